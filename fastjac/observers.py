"""How an activation of ours that runs in a model is shown to those who watch the model.

Two things watch a model: a layer-wise penalty, which computes the activation together with its
statistic, and the recording of the chain engine, which notes it as one operation. Neither knows the
other. They meet in `OBSERVERS`, and in `Recorded`, the class of the tensors that are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastjac.ops import act

OBSERVERS: list[Callable[..., Tensor | None]] = []
"""Each is called with ``(z, fn, impl, params, a)`` and returns ``φ(z)`` if it computes this
activation, else the ``a`` that it was given: None, or what an observer before it has computed."""


def activate(z: Tensor, fn: str, impl: str, params: dict[str, Any]) -> Tensor:
    """``φ(z)``: how every activation of ours is called, so that observers see it."""
    a = None
    for observe in tuple(OBSERVERS):  # they come and go meanwhile
        a = observe(z, fn, impl, params, a)
    return act(z, fn=fn, impl=impl, **params) if a is None else a


class Recorded(Tensor):
    """A tensor whose operations are being recorded.

    An observer that computes activations or layers in its own way must leave such a tensor alone,
    or call `refuse`.
    """

    def refuse(self, reason: str) -> None:
        """Raise, so that the recording ends and the model is run in another way."""
        raise NotImplementedError
