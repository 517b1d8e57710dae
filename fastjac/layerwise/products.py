"""Which weight a layer computed with: the calls of ``F.linear`` and convolutions in its forward.

A subclass of ``nn.Linear`` or ``nn.Conv2d`` may standardise its weight, scale it, or add a low-rank
product to it, so ``module.weight`` says nothing about its Jacobian. A parametrization makes another
tensor each time that it is read. What counts is the argument ``weight`` of the call that returned
the layer's output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastjac.recognise import FUNCTIONS
from fastjac.torch_private import comptime

KINDS: dict[Any, str] = {
    F.linear: "linear",
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), "convolution"),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), "transposed"),
}
GROUPS = 6  # the position of this argument in all convolutions


class Product(NamedTuple):
    """One call of ``F.linear`` or a convolution."""

    kind: str
    z: Tensor  # the result
    version: int  # of z when it was computed; −1 under torch.compile
    weight: Tensor
    groups: int

    def returned(self, z: Tensor, name: str) -> bool:
        """Whether it returned this tensor object, which has not been written to since."""
        if self.z is not z:
            return False
        if self.version >= 0:
            return z._version == self.version
        refuse_written(z, name)
        return True


class Products(TorchFunctionMode):
    """In this block the calls of ``F.linear`` and of convolutions are added to ``found``."""

    def __init__(self, found: list[Product]) -> None:
        super().__init__()
        self.found = found  # a list of the caller's: dynamo does not show attributes of a mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        z = func(*args, **kwargs)
        kind = KINDS.get(func)
        if kind is not None:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            groups = args[GROUPS] if len(args) > GROUPS else kwargs.get("groups", 1)
            version = version_of(z) if torch.compiler.is_compiling() else z._version
            self.found.append(Product(kind, z, version, weight, groups))
        return z


# ---- writes in place, under torch.compile


def version_of(z: Tensor) -> int:
    """Returns −1, and notes the version of the fake tensor that torch.compile traces."""

    @comptime
    def keep(context: Any) -> None:
        fake = context.get_local("z").as_fake()
        fake._fastjac_version = fake._version

    return -1


def refuse_written(z: Tensor, name: str) -> None:
    """Raises if z was written to in place, which leaves it the same object while compiling."""

    @comptime
    def check(context: Any) -> None:
        fake = context.get_local("z").as_fake()
        if fake._version != fake._fastjac_version:
            raise RuntimeError(
                f"layer {context.get_local('name').as_python_constant()}: its output was modified "
                "in place before the activation: under torch.compile use the out-of-place operation"
            )


def refuse_unseen(z: Tensor, name: str) -> None:
    """Raises if an activation takes z that modes do not see while torch.compile traces.

    In torch 2.13 these are F.tanh, F.sigmoid, F.hardswish, F.hardsigmoid and torch.relu_ and the
    like, which dynamo writes into the graph as they are.
    """

    @comptime
    def check(context: Any) -> None:
        for user in context.get_local("z").as_proxy().node.users:
            if user.op == "call_function" and user.target in FUNCTIONS:
                raise RuntimeError(
                    f"layer {context.get_local('name').as_python_constant()}: torch.compile does "
                    f"not show that its output is the input of {user.target.__name__}: call the "
                    "method of the tensor, z.tanh(), or the module, nn.Tanh"
                )
