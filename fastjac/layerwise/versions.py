"""Whether a layer's output was written to in place before it reached the activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.comptime import comptime

from fastjac.layerwise.layers import Call


def check_unchanged(call: Call) -> None:
    # A call that was compiled (version -1) has no in-place writes left.
    if call.version < 0 or torch.compiler.is_compiling():
        return
    z = call.z if call.ref is None else call.ref()
    if z is not None and z._version != call.version:
        raise RuntimeError(
            f"layer {call.name}: its output or that of its activation was modified in place "
            "after it was computed; use the out-of-place operation"
        )


def version_of(z: Tensor, compiling: bool) -> int:
    """How often z was written to; -1 while compiling, where it is kept with the fake tensor."""
    if not compiling:
        return z._version

    @comptime
    def keep(context: Any) -> None:
        fake = context.get_local("z").as_fake()
        fake._fastjac_version = fake._version

    return -1


def refuse_written(z: Tensor, name: str) -> None:
    """While compiling, a tensor that was written to in place is still the same object."""

    @comptime
    def check(context: Any) -> None:
        fake = context.get_local("z").as_fake()
        if fake._version != fake._fastjac_version:
            raise RuntimeError(
                f"layer {context.get_local('name').as_python_constant()}: its output was modified "
                "in place before the activation; under torch.compile use the out-of-place operation"
            )
