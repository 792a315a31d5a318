"""Which rows train, choose and test, and what would stop a run before any is encoded."""
