"""Conversion between checkpoint formats, and verification of the result."""
