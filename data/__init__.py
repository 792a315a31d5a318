"""Diptych: data."""
