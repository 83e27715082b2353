"""What `python -m benchmarks.parity_matrix` is made of: rows as data, running them, judging and writing what came out."""
