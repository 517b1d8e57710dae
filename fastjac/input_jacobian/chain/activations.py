"""The rules of activations that the kernels of `fastjac.act` compute, from the pre-activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import IDS, ROWS, get
from fastjac.input_jacobian.chain.rules import Rule, over_lead
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import raw, suffix_of
from fastjac.torch_private import below_autograd

Call = tuple[Tensor, int, list[float], str]  # z, the id of φ, its parameters, the suffix of the op


class Kernel(Rule):
    """``out = φ(z)``; the second-order term ``φ''(z) δ u`` and the JVP are one kernel."""

    def call(self, node: Any) -> Call:
        raise NotImplementedError

    def targets(self, node):
        z, fn, *_ = self.call(node)
        return () if ROWS[fn].is_zero(2) else (z,)

    def jvp(self, node, lead, us):
        z, fn, params, suffix = self.call(node)
        (u, *_) = us
        with below_autograd():  # past the op's own derivative, which is written in Python
            return raw("act" + suffix)(of_rows(z, u), u, 1, fn, params)

    def push(self, node, lead, us, delta, wanted):
        z, fn, params, suffix = self.call(node)
        (u, *_) = us
        with below_autograd():
            extra, out = raw("act_backward" + suffix)(of_rows(z, u), delta, u, 1, fn, params)
        return out, (over_lead(extra, lead),)


def of_rows(z: Tensor, u: Tensor) -> Tensor:
    """z for each cotangent, ``[K, *z.shape]``."""
    return z if z.shape == u.shape else z.expand(u.shape).contiguous()


class Activation(Kernel):
    """A node of torch; ``read(node)`` returns the row of the table and its parameters, or None."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def takes(self, node, inside):
        z = node._saved_self
        kernel = OPS["act"].select("auto", z.device, z.dtype) != "reference"
        return kernel and self.read(node) is not None

    def call(self, node):
        fn, params = self.read(node)
        z = node._saved_self
        suffix = suffix_of(OPS["act"].select("auto", z.device, z.dtype))
        return z, IDS[fn], get(fn).param_values(params), suffix


class OwnActivation(Kernel):
    """``fastjac.act`` without a factor."""

    def takes(self, node, inside):
        return node.constants[0] == 0 and node.saved_tensors[1] is None

    def call(self, node):
        _, fn, *params, suffix = node.constants
        return node.saved_tensors[0], fn, params, suffix
