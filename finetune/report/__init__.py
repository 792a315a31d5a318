"""The HTML report of a pretraining or fine-tuning run, a section a file."""
