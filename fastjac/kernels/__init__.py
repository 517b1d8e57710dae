"""Triton kernels, one file for each op. They are imported when an op first uses them."""
