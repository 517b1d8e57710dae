"""The rules of activations that the kernels of `fastjac.act` compute, from the pre-activation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import ROWS
from fastjac.input_jacobian.chain.rules import Rule, over_lead
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import raw, suffix_of
from fastjac.torch_private import below_autograd

Call = tuple[Tensor, int, tuple[float, ...], str]  # z, the id of φ, its parameters, the op's suffix


class Kernel(Rule):
    """``out = φ(z)``; the second-order term ``φ''(z) δ u`` and the JVP are one kernel."""

    def call(self, node: Any) -> Call:
        raise NotImplementedError

    def jvp(self, node, lead, us):
        z, fn, params, suffix = self.call(node)
        u = us[0]
        with below_autograd():  # past the op's own derivative, which is written in Python
            return raw("act" + suffix)(of_rows(z, u), u, 1, fn, params)

    def push(self, node, lead, us, delta, wanted):
        z, fn, params, suffix = self.call(node)
        u = us[0]
        with below_autograd():
            extra, out = raw("act_backward" + suffix)(of_rows(z, u), delta, u, 1, fn, params)
        return out, (over_lead(extra, lead),)


def of_rows(z: Tensor, u: Tensor) -> Tensor:
    """z for each cotangent, ``[K, *z.shape]``."""
    return z if z.shape == u.shape else z.expand(u.shape).contiguous()


@functools.cache
def suffix_for(device: str, dtype: torch.dtype) -> str | None:
    """The suffix of the raw ops for a device and dtype, or None if there is no kernel."""
    chosen = OPS["act"].select("auto", torch.device(device), dtype)
    return None if chosen == "reference" else suffix_of(chosen)


class Activation(Kernel):
    """A node of torch; ``read(node)`` returns the id of φ and its parameters, or None."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def takes(self, node, inside):
        z = node._saved_self
        return suffix_for(z.device.type, z.dtype) is not None and self.read(node) is not None

    def targets(self, node):
        return (node._saved_self,)

    def call(self, node):
        z = node._saved_self
        return (z, *self.read(node), suffix_for(z.device.type, z.dtype))


class OwnActivation(Kernel):
    """``fastjac.act`` without a factor."""

    def takes(self, node, inside):
        return node.constants[0] == 0 and node.saved_tensors[1] is None

    def targets(self, node):
        return () if ROWS[node.constants[1]].derivatives[2] == "0" else (node.saved_tensors[0],)

    def call(self, node):
        _, fn, *params, suffix = node.constants
        return node.saved_tensors[0], fn, params, suffix
