"""Training: a head on frozen features, or with the encoders, by every method."""
