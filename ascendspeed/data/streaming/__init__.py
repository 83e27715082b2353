"""Training from raw files without preprocessing."""
