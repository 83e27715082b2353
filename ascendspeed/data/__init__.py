"""Training data: raw files -> readers -> handlers -> `Document` -> .bin/.idx -> packing -> `Batch`."""
