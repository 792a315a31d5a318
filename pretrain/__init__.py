"""Diptych: pretrain."""
