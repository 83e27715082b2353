"""Inference commands: generation, chat and the generation benchmark, on top of `inference.engine`."""
