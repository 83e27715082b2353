"""Page of a training run: curves, events, checkpoints and settings, read from its log."""
