"""Devices, process groups and fused kernels."""
