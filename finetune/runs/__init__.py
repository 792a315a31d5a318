"""What a run leaves on disk: its heads, the lines of its trainings, and how often its test was looked at."""
