"""What makes vectors of cells: towers at work, frozen features by content, and fitted columns."""
