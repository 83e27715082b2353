"""Dataset handlers: rows of a dataset to documents."""
