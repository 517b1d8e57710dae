"""Layer kinds, norms and activations for the sweep of DREG, and the formula written out.

``python tests/dreg_cases.py docs/LAYERS.md`` writes the page that shows what DREG counts;
`test_dreg_sweep.py` checks each combination.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastjac
from fastjac import reference
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
    Case("Linear, pruned", lambda: prune.l1_unstructured(nn.Linear(C, C), "weight", 0.5)),
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


def row_norms(layer: Any) -> Tensor:
    """``‖W_c‖²`` of each unit or output channel."""
    w, groups = weight_of(layer), getattr(layer, "groups", 1)
    if "Transpose" not in " ".join(kind.__name__ for kind in type(layer).__mro__):
        return w.flatten(1).square().sum(1)
    return torch.cat([part.square().transpose(0, 1).flatten(1).sum(1) for part in w.chunk(groups)])


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


def gain(norm: Any, z: Tensor) -> Tensor:
    """``k²`` of ``y = k (z − μ) + β``, broadcast with z."""
    if norm is None:
        return torch.ones(())
    if isinstance(norm, nn.LayerNorm):
        gamma = torch.ones(()) if norm.weight is None else norm.weight
        return gamma.square() / (z.var(-1, unbiased=False, keepdim=True) + norm.eps)
    others = [d for d in range(z.dim()) if d != 1]
    batch = norm.training or norm.running_var is None
    var = z.var(others, unbiased=False) if batch else norm.running_var
    gamma = torch.ones(()) if norm.weight is None else norm.weight
    return (gamma.square() / (var + norm.eps)).view(-1, *[1] * (z.dim() - 2))


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


def function_of(act: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(act, nn.Hardsigmoid):  # torch cannot differentiate its own twice
        return lambda t: F.relu6(t + 3) / 6
    return lambda t: act(t.clone())  # the clone is for activations that write in place


# ---- the model, and the formula


class Net(nn.Module):
    def __init__(self, layer: Case, norm: Case, act: Case) -> None:
        super().__init__()
        self.layer = layer.make()
        x = input_of(layer.name, self.layer, 2)
        with torch.no_grad():
            z = self.layer(x)
        self.norm = norm.make(self.layer, z)
        self.act = act.make()
        self.second, self.tanh, self.head = nn.LazyLinear(3), nn.Tanh(), nn.Linear(3, 2)
        self.second(torch.zeros(1, z[0].numel()))

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        z = z if self.norm is None else self.norm(z)
        return self.head(self.tanh(self.second(self.act(z).flatten(1))))


def written_out(net: Net, x: Tensor, left_out: bool, options: dict[str, Any]) -> tuple[Any, Tensor]:
    """The output of the model, and ``R_n``: plain operations, without fastjac."""
    z = net.layer(x)
    if isinstance(net.layer, Written):
        z = z.clone()
    k = None if left_out else gain(net.norm, z)
    y = z if net.norm is None else net.norm(z)
    phi = function_of(net.act)
    a = net.act(y.clone())
    hidden = net.second(a.flatten(1))
    output = net.head(net.tanh(hidden))
    terms = []
    if not left_out:
        dim = -1 if is_linear(net.layer) else 1
        slope = reference.derivative(phi, y).square()
        if options.get("use_weight", True):
            slope = slope * k
        terms.append(
            _term(slope.movedim(dim, 1), row_norms(net.layer), weight_of(net.layer), options)
        )
    w = net.second.weight
    terms.append(_term((1 - hidden.tanh().square()).square(), w.square().sum(1), w, options))
    if options.get("include_output"):
        w = net.head.weight
        terms.append(_term(torch.ones_like(output), w.square().sum(1), w, options))
    value = torch.stack(terms).sum(0)
    return output, value / len(terms) if options.get("layers") == "mean" else value


def _term(slope: Tensor, rows: Tensor, weight: Tensor, options: dict[str, Any]) -> Tensor:
    slope = slope.flatten(2) if slope.dim() > 2 else slope.unsqueeze(2)  # [N, C, P]
    value = slope.sum(2) if not options.get("use_weight", True) else slope.sum(2) * rows
    value = value.sum(1)
    divide = {"sum": 1, "units": len(rows), "elements": weight.numel()}[options.get("over", "sum")]
    value = value / divide
    if options.get("positions") == "mean":
        value = value / slope.shape[2]
    if options.get("squared", True):
        return value
    return torch.where(value > 0, torch.where(value > 0, value, 1).sqrt(), 0)  # gradient 0 at 0


OPTIONS: list[dict[str, Any]] = [
    {},
    {"over": "units"},
    {"over": "elements", "include_output": True},
    {"positions": "mean"},
    {"layers": "mean", "reduction": "sum"},
    {"use_weight": False},
    {"squared": False},
    {"reduction": "none", "include_output": True},
]


# ---- the page

HEAD = """# What DREG counts

Which layers the layer-wise penalties count, in a model that computes layer, norm and activation one
after the other. This page is written by `python tests/dreg_cases.py docs/LAYERS.md` from a table;
`tests/test_dreg_sweep.py` runs the combinations of its rows, attached, called and compiled, with
the norm in training and in eval mode and with each option, and compares output, value and all
gradients with the written-out formula in float64.

✓ means that the layer counts. A number is the reason with which the layer stands in
`layers_left_out`: no value contains a layer whose weight or slope is not known. If no layer is
left, the call raises. Under `torch.compile` some rows raise, with the message given.
"""


def page() -> str:
    notes: list[str] = []
    parts = [HEAD]
    for title, cases in (("layer", LAYERS), ("norm", NORMS), ("activation", ACTS)):
        parts.append(f"| {title} | eager | compiled |\n| --- | --- | --- |")
        for case in cases:
            cells = [
                _cell(reason, notes) for reason in (case.left_out, case.compiled or case.left_out)
            ]
            if case.name.startswith("LayerNorm") and case.left_out is None:
                cells = [f"{c}, after a convolution {_cell(NOT_SEEN, notes)}" for c in cells]
            parts.append(f"| {case.name} | {cells[0]} | {cells[1]} |")
        parts.append("")
    parts += [f"{i}. “{note}”" for i, note in enumerate(notes, 1)]
    return "\n".join(parts) + "\n"


def _cell(reason: str | None, notes: list[str]) -> str:
    if reason is None:
        return "✓"
    if reason not in notes:
        notes.append(reason)
    return f"[{notes.index(reason) + 1}]"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
