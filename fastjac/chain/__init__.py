"""The chain engine: forward, VJP, JVP and all gradients of a model written out, link by link."""

from fastjac.chain import rules as rules  # fills the table
from fastjac.chain.engine import Chain
from fastjac.chain.links import Unsupported

__all__ = ["Chain", "Unsupported"]
