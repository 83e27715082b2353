"""Packing: documents that share rows of one sequence length."""
