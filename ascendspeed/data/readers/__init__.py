"""Readers of raw files: parquet, JSON, CSV and text."""
