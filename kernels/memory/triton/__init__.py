"""Triton kernels of the neural memory, depth 1 and 2: forward and backward of a group of chunks."""
