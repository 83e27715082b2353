"""Dataset handlers: convert rows of a dataset to documents."""
