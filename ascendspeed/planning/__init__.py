"""Memory and time of a run before it is launched: the real engines on fake tensors."""
