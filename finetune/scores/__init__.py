"""What answers are worth: intervals, gains, and the results of a run in one document."""
