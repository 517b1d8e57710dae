"""The chain engine: forward, VJP, JVP and all gradients of a model written out, link by link."""

from fastjac.input_jacobian.chain import operations as operations  # fills the table
from fastjac.input_jacobian.chain.engine import Chain
from fastjac.input_jacobian.chain.links import Unsupported

__all__ = ["Chain", "Unsupported"]
