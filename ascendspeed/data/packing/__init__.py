"""Packing of documents into rows of one sequence length."""
