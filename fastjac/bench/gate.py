"""The gate: a contestant whose gradients are wrong is never timed."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fastjac.bench.contestants import Contestant, setup_of
from fastjac.bench.problems import Problem, StepProblem
from fastjac.bench.records import Record
from fastjac.bench.steps import Prepared
from fastjac.torch_private import TorchDispatchMode, fresh_cache


@dataclass(frozen=True)
class Expected:
    """What gradients must be.

    Attributes:
        truth: The gradients of plain torch in float64.
        limit: The largest relative L2 error: twice the error of plain torch in the dtype of the
            run, and at least the rounding of a float32 (float64) result.
        gflop: 10^9 operations of the matrix products and convolutions of plain torch.
    """

    truth: Sequence[Tensor]
    limit: float
    gflop: float

    def error(self, gradients: Sequence[Tensor]) -> float:
        """The relative error of a contestant's gradients."""
        return relative_error(gradients, self.truth)


@dataclass(frozen=True)
class Gate:
    """What is expected of ``plain`` (a step without penalty, or ``φ(z)``) and of the others."""

    plain: Expected
    full: Expected

    def of(self, contestant: str) -> Expected:
        return self.plain if contestant in ("plain", "plain-compiled") else self.full


def relative_error(values: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """``||values - truth|| / ||truth||`` over all tensors together in float64; NaN becomes inf.

    Raises:
        ValueError: The number of tensors or a shape differs.
    """
    shapes, wanted = [tuple(v.shape) for v in values], [tuple(t.shape) for t in truth]
    if shapes != wanted:
        raise ValueError(f"The gradients have the shapes {shapes}; expected {wanted}.")
    missed = sum(float((v.double() - t).square().sum()) for v, t in zip(values, truth, strict=True))
    norm = sum(float(t.square().sum()) for t in truth)
    error = (missed / norm) ** 0.5 if norm else missed**0.5
    return error if error == error else float("inf")


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions by torch's own formulas.

    ``torch.utils.flop_counter.FlopCounterMode`` cannot be used: it follows modules by hooks that
    ``autograd.grad(create_graph=True)`` refuses (torch 2.13).
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def open_gate(problem: Problem, dtype: torch.dtype) -> Gate:
    """Compute the truth. The weight of a step's penalty is set first, see `StepProblem.weight`."""
    wide = problem.double()
    if isinstance(problem, StepProblem):
        assert isinstance(wide, StepProblem)
        problem.weight = wide.weight = _balanced_weight(wide)
    # 8 eps of float32: the difference between two sums of the same rounded terms in another order.
    # A 16-bit contestant must stay within twice eager's error.
    floor = 1e-12 if dtype == torch.float64 else 1e-6

    def expected(form: str) -> Expected:
        truth = setup_of(form)(wide).gradients()
        prepared = setup_of(form)(problem)
        with FlopCounter() as counter:
            gradients = prepared.gradients()
        limit = max(2 * relative_error(gradients, truth), floor)
        return Expected(truth, limit, counter.total / 1e9)

    return Gate(expected("plain"), expected("eager"))


def _balanced_weight(wide: StepProblem) -> float:
    """The power of two that gives loss and penalty gradients of similar norm."""
    loss = setup_of("plain")(wide).gradients()
    both = setup_of("eager")(wide).gradients()  # its weight is 1
    penalty = sum(float((b - a).square().sum()) for a, b in zip(loss, both, strict=True)) ** 0.5
    own = sum(float(a.square().sum()) for a in loss) ** 0.5
    return float(2.0 ** round(math.log2(own / penalty)))


def admit(
    contestant: Contestant, problem: Problem, gate: Gate, record: Record, ends: contextlib.ExitStack
) -> Prepared | None:
    """Set a contestant up and compare its gradients; its record says why it is not admitted.

    What the contestant holds is released when ``ends`` is closed.
    """
    cache = contextlib.nullcontext()
    try:
        if contestant.compiler == "torch":
            _start_compiler(record.device)
            cache = fresh_cache()()  # no code that an earlier run left on disk
            ends.callback(torch.compiler.reset)  # frees the graphs of this case, and its model
        with cache:
            began = time.perf_counter()
            prepared = contestant.setup(problem)
            ends.callback(prepared.close)
            gradients = prepared.gradients()
            took = time.perf_counter() - began
        expected = gate.of(contestant.name)
        record.compile_s = took if contestant.compiler else None
        record.engine = prepared.engine
        record.rel_err, record.rel_err_limit = expected.error(gradients), expected.limit
    except Exception as error:
        record.status, record.message = "failed", short(error)
        return None
    if record.rel_err <= record.rel_err_limit:
        return prepared
    record.status = "wrong"
    record.message = (
        f"the relative error of its gradients is {record.rel_err:.2e}, "
        f"the limit is {record.rel_err_limit:.2e}"
    )
    return None


def short(error: Exception) -> str:
    """The first line of an error as a traceback shows it."""
    return traceback.format_exception_only(error)[-1].strip().split("\n")[0][:300]


@functools.cache
def _start_compiler(device: str) -> None:
    """Compile a function once, so that no contestant's time counts the start of the compiler."""
    torch.compile(torch.sin, fullgraph=True)(torch.ones(8, device=device))
