"""From raw text to batches: rows -> handlers -> `Document` -> indexed .bin/.idx -> `Batch`. Each module is one arrow."""
