"""Device, process groups, and fused kernels."""
