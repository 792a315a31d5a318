"""Fusion heads: encoder outputs of several modalities to logits."""
