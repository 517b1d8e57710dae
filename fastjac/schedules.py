"""Schedules for the weight of a penalty: a factor that is a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastjac import arguments
from fastjac.penalty import Penalty

KINDS = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Warmup:
    """A factor that is 0 up to step ``start`` and 1 from step ``start + steps`` on.

    In between, with ``t = (step − start) / steps``, the factor is ``t`` if ``kind`` is
    ``"linear"`` and ``(1 − cos πt) / 2`` if it is ``"cosine"``. With ``"constant"``, which takes no
    ``steps``, the factor is 0 before step ``start`` and 1 from there on.

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
                f"steps is {self.steps} and kind is {self.kind!r}: steps must be at least 1 for "
                "'linear' and 'cosine', and 0 for 'constant'"
            )

    def __call__(self, step: int) -> float:
        if self.kind == "constant":
            return float(step >= self.start)
        t = min(max((step - self.start) / self.steps, 0.0), 1.0)
        return t if self.kind == "linear" else (1 - math.cos(math.pi * t)) / 2


class WeightSchedule:
    """Sets ``penalty.weight = base * factor(step)``; used like a learning rate scheduler of torch.

    A weight that is a tensor is filled in place, without waiting for its device. In a CUDA graph it
    must be a tensor; if it is a number, the first step that changes it raises.

    ``base`` is the weight of the penalty when the schedule is created. If an earlier schedule has
    set that weight, ``base`` is the base of the earlier schedule. The step starts at 0, and `step`
    increases it; call `step` after ``optimizer.step()``. If the factor is 0, the penalty is still
    computed, and multiplied by 0.

    Arguments:
        penalty: any penalty of fastjac. factor: a function of the step, for example `Warmup`; it
        must return a finite number of at least 0.

    The ``state_dict`` contains the step and the base weight, but not the factor.
    """

    def __init__(self, penalty: Penalty, factor: Callable[[int], float]) -> None:
        if not isinstance(penalty, Penalty):
            what = type(penalty).__name__
            if isinstance(penalty, type):
                what = f"the class {penalty.__name__}"
            raise TypeError(
                f"penalty is {what}: it must be a penalty of fastjac, such as fastjac.SpectReg()"
            )
        if not callable(factor) or isinstance(factor, type):
            what = type(factor).__name__
            if isinstance(factor, type):
                what = f"the class {factor.__name__}"
            raise TypeError(
                f"factor is {what}: it must be a function of the step, such as "
                "fastjac.Warmup('linear', steps=1000)"
            )
        weight, last = penalty.weight, penalty._scheduled
        number = weight.item() if isinstance(weight, Tensor) else weight  # later nothing waits
        if last is not None:
            set_last, base = last
            if isinstance(weight, Tensor):  # as it was rounded
                set_last = torch.tensor(set_last, dtype=weight.dtype, device="cpu").item()
            if set_last == number:
                number = base  # the weight contains a factor, which may be 0
        self.penalty, self.factor, self.base = penalty, factor, number
        self.set_step(0)

    def step(self) -> None:
        """Increase the step by 1 and set the weight."""
        self.set_step(self.last_step + 1)

    def set_step(self, step: int) -> None:
        """Set the step, for training loops that count steps themselves, and set the weight."""
        factor = arguments.factor(f"the value of factor at step {step}", self.factor(step))
        weight, value = self.penalty.weight, self.base * factor
        if isinstance(weight, Tensor):
            with torch.no_grad():
                weight.fill_(value)
        else:
            self.penalty.weight = value
        self.last_step = step
        self.penalty._scheduled = value, self.base

    def state_dict(self) -> dict[str, Any]:
        """The step and the base weight."""
        return {"last_step": self.last_step, "base": self.base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the step and the base weight, and set the weight."""
        self.base = arguments.number("base", state["base"])
        self.set_step(state["last_step"])
