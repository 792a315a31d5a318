"""What is predicted: targets, losses, metrics and the thresholds of answers."""
