"""The model of the sweep of DREG, and its output and value in plain operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from dreg_cases import Case, Written, input_of, is_linear, weight_of
from torch import Tensor, nn

from fastjac import reference

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


def row_norms(layer: Any) -> Tensor:
    """``‖W_c‖²`` of each unit or output channel."""
    w, groups = weight_of(layer), getattr(layer, "groups", 1)
    if "Transpose" not in " ".join(kind.__name__ for kind in type(layer).__mro__):
        return w.flatten(1).square().sum(1)
    return torch.cat([part.square().transpose(0, 1).flatten(1).sum(1) for part in w.chunk(groups)])


def gain(norm: Any, z: Tensor) -> Tensor:
    """``k²`` of ``y = k (z − μ) + β``, broadcast with z."""
    if norm is None or "forward" in vars(norm):
        return torch.ones(())
    if isinstance(norm, nn.GroupNorm | nn.modules.instancenorm._InstanceNorm):
        groups = getattr(norm, "num_groups", z.shape[1])
        var = z.reshape(len(z), groups, -1).var(-1, unbiased=False)
        inverse = (1 / (var + norm.eps)).repeat_interleave(z.shape[1] // groups, 1)
        gamma = torch.ones(()) if norm.weight is None else norm.weight
        return (gamma.square() * inverse).view(*inverse.shape, *[1] * (z.dim() - 2))
    if isinstance(norm, nn.LayerNorm):
        gamma = torch.ones(()) if norm.weight is None else norm.weight
        return gamma.square() / (z.var(-1, unbiased=False, keepdim=True) + norm.eps)
    others = [d for d in range(z.dim()) if d != 1]
    batch = norm.training or norm.running_var is None
    var = z.var(others, unbiased=False) if batch else norm.running_var
    gamma = torch.ones(()) if norm.weight is None else norm.weight
    return (gamma.square() / (var + norm.eps)).view(-1, *[1] * (z.dim() - 2))


def function_of(act: Any) -> Callable[[Tensor], Tensor]:
    # Torch cannot differentiate its own twice, and has 1/6 in float32 there.
    if isinstance(act, nn.Hardsigmoid):
        return lambda t: F.relu6(t + 3) / 6
    return lambda t: act(t.clone())  # the clone is for activations that write in place


class Net(nn.Module):
    def __init__(self, layer: Case, norm: Case, act: Case) -> None:
        super().__init__()
        self.layer = layer.make()
        x = input_of(layer.name, self.layer, 2)
        with torch.no_grad():
            z = self.layer(x)
        self.norm = norm.make(self.layer, z)
        self.act = act.make()
        self.phi, self.factor = act.phi, norm.factor
        self.inner = act.factor  # inside of the activation
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
    a = phi(y)
    phi = net.phi or phi
    hidden = net.second(a.flatten(1))
    output = net.head(net.tanh(hidden))
    terms = []
    if not left_out:
        dim = -1 if is_linear(net.layer) else 1
        slope = (reference.derivative(phi, y) / net.inner).square()
        if options.get("use_weight", True):
            slope = slope * k * (net.factor * net.inner) ** 2
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
