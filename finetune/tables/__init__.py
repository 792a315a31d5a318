"""Labelled tables: what may stand in a cell, where rows come from, and the pairs among them."""
