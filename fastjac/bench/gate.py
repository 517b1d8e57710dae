"""The gate: a contestant whose gradients are wrong is never timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjac.bench import contestants as entrants
from fastjac.bench.problems import ElementwiseProblem, Problem, StepProblem


@dataclass(frozen=True)
class Gate:
    """What a case's gradients must be.

    Attributes:
        truth: the eager idiom's gradients in float64.
        plain_truth: those of the step without penalty (elementwise: ``phi(z)``).
        limit, plain_limit: largest relative L2 error: twice eager's own in the run's dtype, and
            not less than rounding of a float32 (float64) result.
    """

    truth: Sequence[Tensor]
    plain_truth: Sequence[Tensor]
    limit: float
    plain_limit: float

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
        plain = entrants.plain_step(problem), entrants.plain_step(wide)
        eager = entrants.eager_step(problem), entrants.eager_step(wide)
    else:
        assert isinstance(wide, ElementwiseProblem)
        plain = (
            entrants.forward_phase(problem, problem.phi),
            entrants.forward_phase(wide, wide.phi),
        )
        eager = entrants.eager_phase(problem), entrants.eager_phase(wide)
    # 8 eps of float32: what a sum of rounded terms differs by when its order changes. A 16-bit
    # contestant has to stay within twice eager's error, with no such floor.
    floor = 1e-12 if dtype == torch.float64 else 1e-6
    limits = []
    for mine, true in (plain, eager):
        truth = true.gradients()
        limits.append((truth, max(2 * relative_error(mine.gradients(), truth), floor)))
    (plain_truth, plain_limit), (truth, limit) = limits
    return Gate(truth, plain_truth, limit, plain_limit)


def _balanced_weight(wide: StepProblem) -> float:
    """Power of two that gives loss and penalty gradients of like norm."""
    loss = entrants.plain_step(wide).gradients()
    both = entrants.eager_step(wide).gradients()  # its weight is 1
    penalty = sum(float((b - a).square().sum()) for a, b in zip(loss, both, strict=True)) ** 0.5
    own = sum(float(a.square().sum()) for a in loss) ** 0.5
    return float(2.0 ** round(torch.tensor(own / penalty).log2().item()))
