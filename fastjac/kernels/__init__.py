"""Triton kernels, a file per op; imported only when a Triton implementation is first used."""
