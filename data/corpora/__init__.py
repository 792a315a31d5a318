"""Diptych: corpora."""
