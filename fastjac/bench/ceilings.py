"""What the machine can do, measured beside the contestants, and how much of it a case needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from fastjac.bench.problems import OpProblem, Problem
from fastjac.torch_private import TorchDispatchMode

#: the name under which the ceiling is sampled
CEILING = "ceiling"


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions, by torch's own formulas.

    ``torch.utils.flop_counter.FlopCounterMode`` itself follows modules by hooks that
    ``autograd.grad(create_graph=True)`` refuses (torch 2.13).
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def ceiling_step(problem: Problem) -> Callable[[], object]:
    """What is timed beside the contestants.

    For an op, copies of its buffers in turn, into memory allocated like the op's own results; for a
    training step, a large square product in its dtype, into memory that is there.
    """
    if isinstance(problem, OpProblem):
        turn = itertools.cycle(problem.z)
        return lambda: next(turn).clone()
    x = problem.x
    n = gemm_size(x.device)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(x.device, x.dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def gemm_size(device: torch.device) -> int:
    """n of an n×n product: large enough for the full rate, small enough for every round."""
    return 8192 if device.type == "cuda" else 1024
