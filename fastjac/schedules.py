"""Warm-up of a penalty's weight: a factor that is a plain function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastjac import arguments
from fastjac.penalty import Penalty

KINDS = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Warmup:
    """``factor(step)``: 0 up to step ``start``, 1 from step ``start + steps`` on.

    In between, with ``t = (step − start) / steps``: ``"linear"`` is ``t``, ``"cosine"`` is
    ``(1 − cos πt) / 2``. ``"constant"`` takes no ``steps``: 0 before ``start``, 1 from it on.

    >>> warmup = Warmup("linear", steps=100, start=50)
    >>> [warmup(step) for step in (0, 50, 75, 150, 1000)]
    [0.0, 0.0, 0.25, 1.0, 1.0]
    """

    kind: str = "linear"
    steps: int = 0
    start: int = 0

    def __post_init__(self) -> None:
        arguments.choice("kind", self.kind, KINDS)
        for name in ("steps", "start"):
            arguments.count(name, getattr(self, name), least=0)
        if (self.kind == "constant") != (self.steps == 0):
            raise ValueError(
                f"steps is {self.steps} and kind {self.kind!r}: 'linear' and 'cosine' need "
                "steps >= 1, and 'constant' has none"
            )

    def __call__(self, step: int) -> float:
        if self.kind == "constant":
            return float(step >= self.start)
        t = min(max((step - self.start) / self.steps, 0.0), 1.0)
        return t if self.kind == "linear" else (1 - math.cos(math.pi * t)) / 2


class WeightSchedule:
    """Sets ``penalty.weight = base * factor(step)``, in the manner of torch's LR schedulers.

    ``base`` is the weight that the penalty has when the schedule is made; where an earlier schedule
    has set that weight, it is the base of that one. The step is 0 then, and one more after each
    `step`; call it after ``optimizer.step()``. At factor 0 the penalty is computed still, and
    multiplied by 0.

    Arguments:
        penalty: any penalty of fastjac. factor: a function of the step, `Warmup` or your own; it
        must return a finite number.

    The ``state_dict`` holds the step and the base weight, not the factor.
    """

    def __init__(self, penalty: Penalty, factor: Callable[[int], float]) -> None:
        if not isinstance(penalty, Penalty):
            raise TypeError(f"penalty is {type(penalty).__name__}: it must be one of fastjac's")
        if not callable(factor):
            raise TypeError(
                f"factor is {type(factor).__name__}: it must be a function of the step, such as "
                "fastjac.Warmup('linear', steps=1000)"
            )
        self.penalty, self.factor, self.base = penalty, factor, penalty.weight
        if penalty._scheduled is not None and penalty._scheduled[0] == penalty.weight:
            self.base = penalty._scheduled[1]  # the weight has a factor in it, which may be 0
        self.set_step(0)

    def step(self) -> None:
        """Go to the next step."""
        self.set_step(self.last_step + 1)

    def set_step(self, step: int) -> None:
        """Go to a step, where somebody else counts them."""
        factor = arguments.number("the value of factor", self.factor(step))
        self.last_step = step
        self.penalty.weight = self.base * factor
        self.penalty._scheduled = self.penalty.weight, self.base

    def state_dict(self) -> dict[str, Any]:
        """The step and the base weight."""
        return {"last_step": self.last_step, "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, at its step."""
        self.base = arguments.number("base", state["base"])
        self.set_step(state["last_step"])
