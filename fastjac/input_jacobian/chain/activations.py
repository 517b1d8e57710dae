"""The rules of activations that the kernels of `fastjac.act` compute, from the pre-activation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import KERNEL_ROWS
from fastjac.input_jacobian.chain.rules import Rule, over_lead
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import raw, suffix_of
from fastjac.torch_private import below_autograd

# The saved tensor s, the order of the derivative, the id of φ, its parameters, the op's suffix.
Call = tuple[Tensor, int, int, tuple[float, ...], str]


class Kernel(Rule):
    """``out = φ(z)``; the second-order term and the JVP are one kernel.

    s is z, of which the slope is φ'(s), or the output, of which it is ψ(s) (`Activation.slope`).
    """

    def call(self, node: Any) -> Call:
        raise NotImplementedError

    def jvp(self, node, lead, us):
        s, order, fn, params, suffix = self.call(node)
        u = us[0]
        with below_autograd():  # past the op's own derivative, which is written in Python
            return raw("act" + suffix)(of_rows(s, u), u, order, fn, params)

    def push(self, node, lead, us, delta, wanted):
        s, order, fn, params, suffix = self.call(node)
        u = us[0]
        with below_autograd():
            extra, out = raw("act_backward" + suffix)(of_rows(s, u), delta, u, order, fn, params)
        return out, (over_lead(extra, lead),)


def of_rows(s: Tensor, u: Tensor) -> Tensor:
    """s for each cotangent, ``[K, *s.shape]``."""
    return s if s.shape == u.shape else s.expand(u.shape).contiguous()


@functools.cache
def suffix_for(device: str, dtype: torch.dtype) -> str | None:
    """The suffix of the raw ops for a device and dtype, or None if there is no kernel."""
    chosen = OPS["act"].select("auto", torch.device(device), dtype)
    return None if chosen == "reference" else suffix_of(chosen)


class Activation(Kernel):
    """A node of torch.

    Args:
        read: ``(node)``: the order, the id of φ and its parameters, or None.
        saved: the name of s.
    """

    def __init__(self, read: Callable[[Any], Any], saved: str = "self") -> None:
        self.read, self.saved = read, f"_saved_{saved}"

    def takes(self, node, inside):
        s = getattr(node, self.saved)
        return suffix_for(s.device.type, s.dtype) is not None and self.read(node) is not None

    def targets(self, node, inside):
        return (getattr(node, self.saved),)

    def call(self, node):
        s = getattr(node, self.saved)
        return (s, *self.read(node), suffix_for(s.device.type, s.dtype))


class OwnActivation(Kernel):
    """``fastjac.act`` without a factor."""

    def takes(self, node, inside):
        return (node.of_output or node.constants[0] == 0) and node.saved_tensors[1] is None

    def targets(self, node, inside):
        s, order, fn, *_ = self.call(node)
        return () if KERNEL_ROWS[fn].derivatives[order + 1] == "0" else (s,)

    def call(self, node):
        _, fn, *params, suffix = node.constants
        return node.saved_tensors[0], int(not node.of_output), fn, params, suffix
