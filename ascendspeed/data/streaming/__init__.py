"""Training on raw files: rows are tokenized while the run consumes them, without preprocessing."""
