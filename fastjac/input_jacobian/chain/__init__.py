"""The chain engine: a double backward from the autograd graph, operation by operation."""

from fastjac.input_jacobian.chain import nodes as nodes  # fills the table
from fastjac.input_jacobian.chain.engine import Chain, GraphRun
from fastjac.input_jacobian.chain.mlp import Mlp
from fastjac.input_jacobian.chain.rules import Unsupported

__all__ = ["Chain", "GraphRun", "Mlp", "Unsupported"]
