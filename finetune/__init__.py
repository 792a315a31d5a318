"""Diptych: finetune."""
