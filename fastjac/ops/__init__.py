"""The fused ops. One file an op: schema, fake kernels, autograd, and who can run it."""

from fastjac.ops.act import act

__all__ = ["act"]
