"""Observers of the activations that run in a model.

A layer-wise penalty computes an activation together with its statistic. It does not know who calls
the activation, so the two meet here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import TABLE
from fastjac.ops.act import act
from fastjac.ops.act_sizes import pays

OBSERVERS: list[Callable[..., Tensor | None]] = []
"""Each observer is called with ``(z, fn, impl, params, a)``. It returns ``φ(z)`` if it computes
this activation, otherwise ``a``, which is None or the result of an earlier observer."""


# The function of torch of each row, and its options. Code of torch.compile cannot import modules.
TORCH = {
    name: (row.torch_function_object(), {**row.torch_kwargs, **row.params})
    for name, row in TABLE.items()
}


@functools.cache
def _torch_function(fn: str) -> Callable[..., Any]:
    return TABLE[fn].torch_function()


def activate(z: Tensor, fn: str, impl: str, params: dict[str, Any]) -> Tensor:
    """``φ(z)``, computed by an observer or by `fastjac.act`. All activations of fastjac call it.

    With ``impl="auto"``, torch computes it where that is faster (`fastjac.ops.act_sizes`).
    """
    a = None
    for observe in tuple(OBSERVERS):  # the list may change during the loop
        a = observe(z, fn, impl, params, a)
    if a is not None:
        return a
    if impl == "auto" and isinstance(z, Tensor) and not pays(z, fn):
        if torch.compiler.is_compiling():
            function, options = TORCH[fn]
            return function(z, **{**options, **params})
        return _torch_function(fn)(z) if not params else TABLE[fn].torch_function(**params)(z)
    return act(z, fn=fn, impl=impl, **params)
