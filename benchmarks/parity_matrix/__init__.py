"""The parity matrix: layouts as data, runs of them, comparison with plain torch, and the report."""
