"""The chain engine: forward, VJP, JVP and gradients of a recorded model, operation by operation."""

from fastjac.input_jacobian.chain import operations as operations  # fills the table
from fastjac.input_jacobian.chain.engine import Chain
from fastjac.input_jacobian.chain.links import Unsupported

__all__ = ["Chain", "Unsupported"]
