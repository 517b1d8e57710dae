"""The chain engine: a double backward from the autograd graph, operation by operation."""

from fastjac.input_jacobian.chain import nodes as nodes  # fills the table
from fastjac.input_jacobian.chain.engine import Chain
from fastjac.input_jacobian.chain.graph_run import GraphRun
from fastjac.input_jacobian.chain.mlp import Mlp
from fastjac.input_jacobian.chain.network import run_of
from fastjac.input_jacobian.chain.program import programs_of
from fastjac.input_jacobian.chain.record import CHECKPOINT
from fastjac.input_jacobian.chain.rules import Unsupported
from fastjac.input_jacobian.chain.signature import Signature, Unreadable, keeps_hidden

__all__ = [
    "CHECKPOINT",
    "Chain",
    "GraphRun",
    "Mlp",
    "Signature",
    "Unreadable",
    "Unsupported",
    "keeps_hidden",
    "programs_of",
    "run_of",
]
