"""Triton kernels of operations that limit a step by memory traffic; a module per operation, imported on use.

They load to fp32, so that the interpreter on a CPU and the compiled kernel on a device compute alike, and
read and write rows of any stride.
"""
