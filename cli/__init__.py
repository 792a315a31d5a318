"""Diptych: cli."""
