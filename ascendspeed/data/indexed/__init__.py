"""Indexed datasets on disk: Megatron's .bin/.idx, InternEvo's .bin/.meta."""
