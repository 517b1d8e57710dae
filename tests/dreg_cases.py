"""Layer kinds, norms and activations for the sweep of DREG, and what DREG does with each.

`test_dreg_sweep.py` checks each combination; `dreg_table.py` writes the page.
"""

from __future__ import annotations

import math
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
from fastjac.layerwise.reasons import NOT_FOLLOWED, NOT_FOLLOWED_NORM
from fastjac.layerwise.reasons import UNKNOWN_WEIGHT as WEIGHT

C = 4  # channels of the input, and output channels of every layer


@dataclass(frozen=True)
class Case:
    """``left_out``: the reason for which the layer is left out; None if it counts."""

    name: str
    make: Callable[[], Any]
    left_out: str | None = None
    compiled: str | None = None  # the error under torch.compile, if it raises there
    factor: float = 1.0  # by which z is multiplied on its way to the activation
    phi: Callable[[Tensor], Tensor] | None = None  # if it is not what the module computes


MODIFIED = "its output was modified in place"


def taken(function: str, reason: str = NOT_FOLLOWED) -> str:
    """The reason for a layer whose output this function took."""
    return f"{reason}, but {function}"


def generic(reason: str | None) -> str | None:
    """The reason under torch.compile, where functions that are no activations are not looked at."""
    for known in (NOT_FOLLOWED, NOT_FOLLOWED_NORM):
        if reason is not None and reason.partition(", but ")[0] == known:
            return known
    return reason


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


class Functional(nn.Module):
    """A product with a parameter that is in no module for layers."""

    def __init__(self, run: Callable[..., Tensor], *shape: int, linear: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(C))
        self.run, self.linear = run, linear

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight, self.bias)


class Rows(Functional):
    """The weight is [C_in, C]."""

    used = lambda self: self.weight.t()  # noqa: E731


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
    Case("`F.linear` with a parameter", lambda: Functional(F.linear, C, C)),
    Case("`F.conv2d` with a parameter", lambda: Functional(conv2d, C, C, 2, 2, linear=False)),
    Case("`x @ W + b` with a parameter", lambda: Rows(lambda x, w, b: x @ w + b, C, C)),
    Case("Conv1D of Hugging Face, `torch.addmm` and a view", lambda: Rows(addmm, C, C)),
    Case("LoRA, `F.linear(x, W) + …`", lambda: LoRASum(C, C), WEIGHT),
    Case("`x @ W.T` in place of `F.linear`", lambda: MatMul(C, C), WEIGHT),
    Case("activation inside `forward`", lambda: Activated(C, C), WEIGHT),
    Case(
        "writes to its output in place",
        lambda: Written(C, C),
        WEIGHT,
        MODIFIED,
    ),
]


def conv2d(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, w, b, stride=2, padding=1)


def addmm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, x.view(-1, x.size(-1)), w).view(*x.shape[:-1], -1)


def weight_of(layer: Any) -> Tensor:
    if "_conv_forward" in vars(layer):
        return standardised(layer.weight)
    return layer.used() if hasattr(layer, "used") else layer.weight


def is_linear(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) or getattr(layer, "linear", False)


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
    Case("GroupNorm", lambda layer, z: affine(nn.GroupNorm(2, z.shape[1]))),
    Case("InstanceNorm", lambda layer, z: instance_norm(z)),
    Case("`F.batch_norm`", lambda layer, z: called(affine(batch_norm(layer, z)))),
    Case(
        "BatchNorm, and the double of it in `forward`",
        lambda layer, z: subclass(batch_norm(layer, z)),
        factor=2.0,
    ),
    Case("2 z", lambda layer, z: doubled(batch_norm(layer, z)), factor=2.0),
    Case(
        "LayerNorm over two dimensions",
        lambda layer, z: nn.LayerNorm(z.shape[-2:]),
        taken("F.layer_norm"),
    ),
    Case("RMSNorm", lambda layer, z: nn.RMSNorm(z.shape[-1]), taken("F.rms_norm")),
    Case(
        "LocalResponseNorm",
        lambda layer, z: nn.LocalResponseNorm(2),
        taken("F.local_response_norm"),
    ),
    Case(
        "BatchNorm twice",
        lambda layer, z: nn.Sequential(batch_norm(layer, z), batch_norm(layer, z)),
        taken("F.batch_norm", NOT_FOLLOWED_NORM),
    ),
    Case("Dropout", lambda layer, z: nn.Dropout(1e-9), taken("F.dropout")),
]


def used_before(norm: Any, z: Tensor) -> Any:
    norm(z.detach())
    return norm.eval()


def called(norm: Any) -> Any:
    """The same norm as a call of the function (timm's BatchNormAct2d)."""

    def forward(self: Any, z: Tensor) -> Tensor:
        statistics = self.running_mean, self.running_var
        return F.batch_norm(z, *statistics, self.weight, self.bias, self.training, 0.1, self.eps)

    kind = type("Called", (type(norm),), {"forward": forward})
    norm.__class__ = kind
    return norm


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
    first = ("BatchNorm", "`F.batch_norm`", "GroupNorm", "InstanceNorm")
    other = case.name.startswith(first if is_linear(layer) else "LayerNorm")
    if (case.left_out is not None and not case.name.startswith("BatchNorm twice")) or not other:
        return case.left_out
    return taken(function_of_norm(case.name)) if x.dim() > 2 else case.left_out


def function_of_norm(name: str) -> str:
    kinds = {"Batch": "batch", "`F": "batch", "Group": "group", "Inst": "instance"}
    return f"F.{next((f for n, f in kinds.items() if name.startswith(n)), 'layer')}_norm"


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
        self.other = nn.Identity()  # a module without submodules would be recognised

    def forward(self, z: Tensor) -> Tensor:
        return self.run(z)


HIDDEN = "torch.compile does not show that its output is the input of"

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu(z)": lambda z: F.relu(z),
    "F.relu(z, inplace=True)": lambda z: F.relu(z, inplace=True),
    "z.relu()": lambda z: z.relu(),
    "z.relu_()": lambda z: z.relu_(),
    "torch.tanh(z)": lambda z: torch.tanh(z),
    "z.sigmoid()": lambda z: z.sigmoid(),
    "F.gelu(z)": lambda z: F.gelu(z),
    'F.gelu(z, approximate="tanh")': lambda z: F.gelu(z, approximate="tanh"),
    "F.leaky_relu(z, 0.2)": lambda z: F.leaky_relu(z, 0.2),
    "F.softplus(input=z, beta=2)": lambda z: F.softplus(input=z, beta=2),
    "F.hardtanh(z, -0.5, 0.5)": lambda z: F.hardtanh(z, -0.5, 0.5),
    "F.elu(z, 0.5, True)": lambda z: F.elu(z, 0.5, True),
    "F.logsigmoid(z)": lambda z: F.logsigmoid(z),
    "F.threshold(z, 0.1, 0.2)": lambda z: F.threshold(z, 0.1, 0.2),
    "F.silu(z.unsqueeze(-1)).squeeze(-1)": lambda z: F.silu(z.unsqueeze(-1)).squeeze(-1),
}


class NewGELU(nn.Module):
    """As in transformers."""

    def forward(self, z: Tensor) -> Tensor:
        return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * torch.pow(z, 3))))


class QuickGELU(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z * torch.sigmoid(1.702 * z)


class SwishInPlace(nn.Module):
    """As in timm."""

    def forward(self, z: Tensor) -> Tensor:
        return z.mul_(z.sigmoid())


class SquaredReLU(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return torch.square(F.relu(z))


WRITTEN: dict[str, type[nn.Module]] = {
    "0.5 * z * (1 + torch.tanh(…))": NewGELU,
    "z * torch.sigmoid(1.702 * z)": QuickGELU,
    "z.mul_(z.sigmoid())": SwishInPlace,
    "torch.square(F.relu(z))": SquaredReLU,
}


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
    Case("`2 * F.relu(z)` in a subclass", Doubled, phi=F.relu),
    *(Case(f"`{name}`", lambda f=f: Function(f)) for name, f in FUNCTIONS.items()),
    *(
        Case(f"`{name}`", lambda f=f: Function(f), compiled=HIDDEN)
        for name, f in {
            "F.tanh(z)": lambda z: F.tanh(z),
            "F.hardswish(z)": lambda z: F.hardswish(z),
        }.items()
    ),
    Case("`torch.relu_(z)`", lambda: Function(lambda z: torch.relu_(z)), compiled=MODIFIED),
    Case("`torch.sin(3 * z)`", lambda: Function(lambda z: torch.sin(3 * z)), factor=3.0),
    Case("`F.silu(1 + z / 2)`", lambda: Function(lambda z: F.silu(1 + z / 2)), factor=0.5),
    *(Case(f"a module with `{name}`", kind) for name, kind in WRITTEN.items()),
    Case("`F.relu(z) ** 2`", lambda: Function(lambda z: F.relu(z) ** 2), phi=F.relu),
    Case(
        "`z.clamp(0, 1)`",
        lambda: Function(lambda z: z.clamp(0, 1)),
        taken("torch.Tensor.clamp"),
    ),
    Case("RReLU", lambda: nn.RReLU(0.1, 0.1), taken("F.rrelu")),
    Case("Softmax", lambda: nn.Softmax(-1), taken("F.softmax")),
]
