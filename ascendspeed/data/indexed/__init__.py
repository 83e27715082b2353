"""Datasets on disk: Megatron .bin/.idx pairs and InternEvo .bin/.meta files."""
