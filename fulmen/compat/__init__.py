"""Other import paths for the same things."""
