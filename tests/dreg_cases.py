"""Layer kinds, norms and activations for the sweep of DREG, and what DREG does with each.

`test_dreg_sweep.py` checks each combination; `dreg_table.py` writes the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastjac
from fastjac.layerwise.layers import ACTIVATIONS
from fastjac.layerwise.passes import UNKNOWN_WEIGHT as WEIGHT

NOT_SEEN = "its output, unchanged, was the input of no activation module"
NORM_NOT_SEEN = "the output of the norm was the input of no activation module"
C = 4  # channels of the input, and output channels of every layer


@dataclass(frozen=True)
class Case:
    """``left_out``: the reason for which the layer is left out; None if it counts."""

    name: str
    make: Callable[[], Any]
    left_out: str | None = None
    compiled: str | None = None  # the error under torch.compile, if it raises there


# ---- layers


def standardised(w: Tensor) -> Tensor:
    dims = list(range(1, w.dim()))
    return (w - w.mean(dims, keepdim=True)) / (w.var(dims, keepdim=True) + 1e-3).sqrt()


class StdConv2d(nn.Conv2d):
    """As in timm: the weight is standardised."""

    used = lambda self: standardised(self.weight)  # noqa: E731

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.used(), self.bias, self.stride, self.padding)


class StdConvForward(nn.Conv1d):
    """The same in ``_conv_forward``."""

    used = StdConv2d.used

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
        return super()._conv_forward(x, standardised(weight), bias)


class EqualLinear(nn.Linear):
    """Equalised learning rate."""

    used = lambda self: self.weight * 0.3  # noqa: E731

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.used(), bias=self.bias)


class LoRA(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.a = nn.Parameter(torch.randn(2, self.in_features))
        self.b = nn.Parameter(torch.randn(self.out_features, 2))

    used = lambda self: self.weight + self.b @ self.a  # noqa: E731

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.used(), self.bias)


class LoRASum(LoRA):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.a), self.b)


class EqualTransposed(nn.ConvTranspose2d):
    used = EqualLinear.used

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.used(), self.bias, groups=self.groups)


class MatMul(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class Written(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        z *= 3
        return z


class Inherited(nn.Linear):
    """A subclass that overrides nothing."""


def patched() -> nn.Module:
    layer = nn.Conv2d(C, C, 2)
    layer._conv_forward = MethodType(StdConvForward._conv_forward_patched, layer)
    return layer


def _patched(self: Any, x: Tensor, weight: Tensor, bias: Any) -> Tensor:
    return F.conv2d(x, standardised(weight), bias)


StdConvForward._conv_forward_patched = staticmethod(_patched)  # type: ignore[attr-defined]


LAYERS = [
    Case("Linear", lambda: nn.Linear(C, C)),
    Case("Linear on [N, T, C]", lambda: nn.Linear(C, C)),
    *(
        Case(
            f"{kind.__name__}{'' if not more else ', ' + words}",
            lambda k=kind, m=more: k(C, C, 3 if m.get("padding") == "same" else 2, **m),
        )
        for kind, more, words in (
            (nn.Conv1d, {}, ""),
            (nn.Conv2d, {}, ""),
            (nn.Conv3d, {}, ""),
            (nn.Conv2d, {"groups": 2}, "grouped"),
            (nn.Conv2d, {"groups": C, "bias": False}, "depthwise"),
            (nn.Conv2d, {"padding": "same"}, "padding 'same'"),
            (nn.Conv2d, {"padding": 1, "padding_mode": "circular"}, "circular padding"),
            (nn.ConvTranspose1d, {}, ""),
            (nn.ConvTranspose2d, {"stride": 2}, "stride 2"),
            (nn.ConvTranspose3d, {}, ""),
            (nn.ConvTranspose2d, {"groups": 2}, "grouped"),
        )
    ),
    Case("Linear subclass that overrides nothing", lambda: Inherited(C, C)),
    Case("Linear with `weight_norm`", lambda: parametrizations.weight_norm(nn.Linear(C, C))),
    # 3 of 16 weights: a row of zeros would give the norms a variance of 0, and 1/√ε as a factor.
    Case("Linear, pruned", lambda: prune.l1_unstructured(nn.Linear(C, C), "weight", 0.2)),
    Case("standardised weight in `forward` (timm's StdConv2d)", lambda: StdConv2d(C, C, 2)),
    Case("standardised weight in `_conv_forward`", lambda: StdConvForward(C, C, 2)),
    Case("`_conv_forward` of the instance replaced", patched),
    Case("equalised learning rate", lambda: EqualLinear(C, C)),
    Case(
        "equalised learning rate, transposed, grouped", lambda: EqualTransposed(C, C, 2, groups=2)
    ),
    Case("LoRA, `F.linear(x, W + B A)`", lambda: LoRA(C, C)),
    Case("LoRA, `F.linear(x, W) + …`", lambda: LoRASum(C, C), WEIGHT),
    Case("`x @ W.T` in place of `F.linear`", lambda: MatMul(C, C), WEIGHT),
    Case("activation inside `forward`", lambda: Activated(C, C), WEIGHT),
    Case(
        "writes to its output in place",
        lambda: Written(C, C),
        WEIGHT,
        "its output was modified in place",
    ),
]


def weight_of(layer: Any) -> Tensor:
    if "_conv_forward" in vars(layer):
        return standardised(layer.weight)
    return layer.used() if hasattr(layer, "used") else layer.weight


def is_linear(layer: Any) -> bool:
    return isinstance(layer, nn.Linear)


def input_of(name: str, layer: Any, n: int = 3) -> Tensor:
    if name.endswith("[N, T, C]"):
        return torch.randn(n, 2, C)
    return torch.randn(n, C, *[3] * (0 if is_linear(layer) else weight_of(layer).dim() - 2))


# ---- norms


def batch_norm(layer: Any, z: Tensor) -> nn.Module:
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    return kinds[z.dim()](z.shape[1])


def instance_norm(z: Tensor) -> nn.Module:
    kinds = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    return kinds[z.dim()](z.shape[1])


def affine(norm: Any) -> Any:
    for t in (norm.weight, norm.bias):
        nn.init.normal_(t)
    return norm


NORMS = [
    Case("none", lambda layer, z: None),
    Case("BatchNorm", lambda layer, z: affine(batch_norm(layer, z))),
    Case("BatchNorm, eval", lambda layer, z: used_before(affine(batch_norm(layer, z)), z)),
    Case("BatchNorm without statistics", lambda layer, z: without_statistics(batch_norm(layer, z))),
    Case("LayerNorm", lambda layer, z: affine(nn.LayerNorm(z.shape[-1]))),
    Case(
        "LayerNorm, `affine=False`",
        lambda layer, z: nn.LayerNorm(z.shape[-1], elementwise_affine=False),
    ),
    Case("LayerNorm over two dimensions", lambda layer, z: nn.LayerNorm(z.shape[-2:]), NOT_SEEN),
    Case("RMSNorm", lambda layer, z: nn.RMSNorm(z.shape[-1]), NOT_SEEN),
    Case("GroupNorm", lambda layer, z: nn.GroupNorm(1, z.shape[1]), NOT_SEEN),
    Case("InstanceNorm", lambda layer, z: instance_norm(z), NOT_SEEN),
    Case("LocalResponseNorm", lambda layer, z: nn.LocalResponseNorm(2), NOT_SEEN),
    Case("subclass of BatchNorm", lambda layer, z: subclass(batch_norm(layer, z)), NOT_SEEN),
    Case(
        "BatchNorm with its `forward` replaced",
        lambda layer, z: doubled(batch_norm(layer, z)),
        NOT_SEEN,
    ),
    Case(
        "BatchNorm twice",
        lambda layer, z: nn.Sequential(batch_norm(layer, z), batch_norm(layer, z)),
        NORM_NOT_SEEN,
    ),
    Case("Dropout", lambda layer, z: nn.Dropout(1e-9), NOT_SEEN),
]


def used_before(norm: Any, z: Tensor) -> Any:
    norm(z.detach())
    return norm.eval()


def without_statistics(norm: Any) -> Any:
    return type(norm)(norm.num_features, affine=False, track_running_stats=False)


def subclass(norm: Any) -> Any:
    return type(
        "Twice", (type(norm),), {"forward": lambda self, z: 2 * type(norm).forward(self, z)}
    )(norm.num_features)


def doubled(norm: Any) -> Any:
    norm.forward = lambda z: 2 * z
    return norm


def norm_left_out(case: Case, layer: Any, x: Tensor) -> str | None:
    """A norm whose dimension is not that of the layer's units or channels is not counted."""
    units = "LayerNorm" if is_linear(layer) else "BatchNorm"
    other = case.name.startswith(("LayerNorm", "BatchNorm")) and not case.name.startswith(units)
    return NOT_SEEN if other and x.dim() > 2 else case.left_out


# ---- activations


class Doubled(nn.ReLU):
    """A subclass of an activation with a forward of its own."""

    def forward(self, z: Tensor) -> Tensor:
        return 2 * super().forward(z)


class Own(Doubled):
    def fastjac_activation(self, z: Tensor) -> Tensor:
        return 2 * F.relu(z)


class Function(nn.Module):
    """Calls a function, as a model's forward does."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = lambda z: run(z)  # not an attribute that is an activation function

    def forward(self, z: Tensor) -> Tensor:
        return self.run(z)


def module(kind: Any) -> nn.Module:
    return kind(0.1, 0.2) if kind is nn.Threshold else kind()


def written(kind: Any) -> nn.Module:
    return kind(0.1, 0.2, inplace=True) if kind is nn.Threshold else kind(inplace=True)


def can_write(kind: Any) -> bool:
    return hasattr(module(kind), "inplace")


ACTS = [
    *(Case(kind.__name__, lambda k=kind: module(k)) for kind in ACTIVATIONS),
    *(
        Case(f"{kind.__name__}(inplace=True)", lambda k=kind: written(k))
        for kind in ACTIVATIONS
        if can_write(kind)
    ),
    *(
        Case(f"`fastjac.{name}`", lambda n=name: Function(getattr(fastjac, n)))
        for name in ("gelu", "relu", "silu", "tanh")
    ),
    Case("a module with `fastjac_activation`", Own),
    Case("subclass of an activation", Doubled, NOT_SEEN),
    Case("`F.relu`", lambda: Function(F.relu), NOT_SEEN),
    Case("`torch.relu_`", lambda: Function(torch.relu_), NOT_SEEN),
    Case("RReLU", lambda: nn.RReLU(0.1, 0.1), NOT_SEEN),
    Case("Softmax", lambda: nn.Softmax(-1), NOT_SEEN),
]
