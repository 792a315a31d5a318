"""A run on disk: models, half-done trainings, the journal, and looks at the test split."""
