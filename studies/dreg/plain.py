"""The penalties as one writes them in plain eager torch, to compare the time of the sweep with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.networks import ACTIVATIONS


def dreg(model: nn.Module, x: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The output of an ``nn.Sequential``, and ``weight · Σ_l (1/N) Σ_n ‖diag φ'(z_ln) W_l‖_F²``."""
    a = x
    penalty = rows = x.new_zeros(())
    kinds = tuple(ACTIVATIONS.values())
    for layer in model.children():
        z = a
        a = layer(z)
        if isinstance(layer, kinds):
            (slope,) = torch.autograd.grad(a, z, torch.ones_like(a), create_graph=True)
            s = slope.square().flatten(2).sum(2) if z.dim() > 2 else slope.square()  # [N, C]
            penalty = penalty + (s.mean(0) * rows).sum()
        elif hasattr(layer, "weight"):
            rows = layer.weight.flatten(1).square().sum(1)  # type: ignore[operator]
    return a, weight * penalty


def igpen(model: nn.Module, x: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """The output, and ``weight · (1/N) Σ_n ‖∂ℓ_n/∂x_n‖²`` for the cross-entropy ``ℓ_n``."""
    x = x.requires_grad_()
    output = model(x)
    loss = F.cross_entropy(output, y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return output, weight * gradient.flatten(1).square().sum(1).mean()
