"""The share of a training step's time that a penalty takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fastjac.ops.autograd import graph_nodes


def now(device: torch.device | None) -> float:
    """The time in seconds, after the device has finished its work."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


class StepTimer:
    """Times the last ``window`` of every ``period`` steps, or none if ``period`` is 0.

    The time of a penalty is that of its call and of those backward nodes that only the penalty has.
    The nodes that it shares with the loss, those of the network, are not included; nor is the
    statistic that a layer-wise penalty computes in one pass with the activation.
    """

    def __init__(self, period: int, window: int) -> None:
        self.period, self.window = period, window
        self.steps = 0
        self.measuring = False
        self.total = 0.0  # the time of the steps of this window
        self.spent: dict[str, float] = {}
        self._start: float | None = None
        self._device: torch.device | None = None

    def begin(self, device: torch.device | None) -> None:
        """Called when a step starts."""
        self._device = device
        self.steps += 1
        if self.period == 0:
            return
        place = (self.steps - 1) % self.period - (self.period - self.window)
        self.measuring = place >= 0
        if place == 0:
            self.total, self.spent = 0.0, {}
        self._start = now(device) if self.measuring else None

    def end(self) -> dict[str, float]:
        """Called when a step ends. At the end of a window it returns each penalty's share."""
        if not self.measuring or self._start is None:
            return {}
        self.total += now(self._device) - self._start
        self._start = None
        if self.steps % self.period:
            return {}
        return {name: spent / self.total for name, spent in self.spent.items()}

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Times the call of a penalty in this block."""
        if not self.measuring:
            yield
            return
        start = now(self._device)
        yield
        self._add(name, now(self._device) - start)

    def backward(self, name: str, value: Tensor, loss: Tensor) -> None:
        """Times the backward nodes of ``value`` that ``loss`` does not have, when they run."""
        if not self.measuring or value.grad_fn is None:
            return
        shared = list(graph_nodes(loss))
        started = [0.0]

        def before(*_: Any) -> None:
            started[0] = now(self._device)

        def after(*_: Any) -> None:
            self._add(name, now(self._device) - started[0])

        for node in graph_nodes(value, *shared):
            node.register_prehook(before)
            node.register_hook(after)

    def _add(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + seconds
