"""The gate: a contestant whose gradients are wrong is never timed."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjac.bench.ceilings import FlopCounter
from fastjac.bench.contestants import Contestant, setup_of
from fastjac.bench.problems import Problem, StepProblem
from fastjac.bench.records import Record
from fastjac.bench.steps import Prepared
from fastjac.torch_private import fresh_cache


@dataclass(frozen=True)
class Gate:
    """What a case's gradients must be.

    Attributes:
        truth: the eager idiom's gradients in float64.
        plain_truth: those of the step without penalty (of an op: ``φ(z)``).
        limit, plain_limit: largest relative L2 error: twice eager's own in the run's dtype, and
            not less than rounding of a float32 (float64) result.
        gflop, plain_gflop: 10^9 operations of the matrix products and convolutions of the eager
            and of the plain step.
    """

    truth: Sequence[Tensor]
    plain_truth: Sequence[Tensor]
    limit: float
    plain_limit: float
    gflop: float = 0.0
    plain_gflop: float = 0.0

    def error(self, contestant: str, gradients: Sequence[Tensor]) -> tuple[float, float]:
        """Error of a contestant, and its limit."""
        if contestant == "plain":
            return relative_error(gradients, self.plain_truth), self.plain_limit
        return relative_error(gradients, self.truth), self.limit


def relative_error(values: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """``||values - truth|| / ||truth||`` over all tensors together, in float64; NaN counts as inf.

    Raises:
        ValueError: the number of tensors or a shape differs.
    """
    shapes, wanted = [tuple(v.shape) for v in values], [tuple(t.shape) for t in truth]
    if shapes != wanted:
        raise ValueError(f"gradients of shapes {shapes}, expected {wanted}")
    missed = sum(float((v.double() - t).square().sum()) for v, t in zip(values, truth, strict=True))
    norm = sum(float(t.square().sum()) for t in truth)
    error = (missed / norm) ** 0.5 if norm else missed**0.5
    return error if error == error else float("inf")


def open_gate(problem: Problem, dtype: torch.dtype) -> Gate:
    """Compute the truth; sets the weight of a step's penalty first."""
    wide = problem.double()
    if isinstance(problem, StepProblem):
        assert isinstance(wide, StepProblem)
        problem.weight = wide.weight = _balanced_weight(wide)
    # 8 eps of float32: what a sum of rounded terms differs by when its order changes. A 16-bit
    # contestant has to stay within twice eager's error, with no such floor.
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    found = []
    for setup in (setup_of("plain"), setup_of("eager")):
        truth = setup(wide).gradients()
        mine = setup(problem)
        with FlopCounter() as counter:
            gradients = mine.gradients()
        limit = max(2 * relative_error(gradients, truth), floor)
        found.append((truth, limit, counter.total / 1e9))
    (plain_truth, plain_limit, plain_gflop), (truth, limit, gflop) = found
    return Gate(truth, plain_truth, limit, plain_limit, gflop, plain_gflop)


def _balanced_weight(wide: StepProblem) -> float:
    """Power of two that gives loss and penalty gradients of like norm."""
    loss = setup_of("plain")(wide).gradients()
    both = setup_of("eager")(wide).gradients()  # its weight is 1
    penalty = sum(float((b - a).square().sum()) for a, b in zip(loss, both, strict=True)) ** 0.5
    own = sum(float(a.square().sum()) for a in loss) ** 0.5
    return float(2.0 ** round(math.log2(own / penalty)))


def admit(contestant: Contestant, problem: Problem, gate: Gate, record: Record) -> Prepared | None:
    """Set a contestant up and let it through the gate, or say in its record why not."""
    device = torch.device(record.device)
    cache = _fresh_compile_cache(device) if contestant.compiles else contextlib.nullcontext()
    with contextlib.ExitStack() as refused:
        try:
            with cache:
                began = time.perf_counter()
                prepared = contestant.setup(problem)
                refused.callback(prepared.close)
                gradients = prepared.gradients()
                took = time.perf_counter() - began
            if contestant.compiles:
                record.compile_s = took
            record.engine = prepared.engine
            record.rel_err, record.rel_err_limit = gate.error(contestant.name, gradients)
        except Exception as error:
            record.status, record.message = "failed", short(error)
            return None
        if not record.rel_err <= record.rel_err_limit:
            record.status = "wrong"
            record.message = (
                f"relative error {record.rel_err:.2e} of its gradients, limit "
                f"{record.rel_err_limit:.2e}"
            )
            return None
        refused.pop_all()
        return prepared


def short(error: Exception) -> str:
    """The first line of the error as a traceback would show it."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _fresh_compile_cache(device: torch.device) -> Iterator[None]:
    """Compile time without what an earlier run left on disk, and without torch's own start-up."""
    _start_compiler(device)
    with fresh_cache()():
        yield


@functools.cache
def _start_compiler(device: torch.device) -> None:
    """A first, trivial torch.compile: it imports the compiler and probes the processor."""
    torch.compile(torch.sin, fullgraph=True)(torch.ones(8, device=device))
