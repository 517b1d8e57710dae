"""A network, its data and penalties, and the same training as a loop by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from penalty_cases import close, seeded
from torch import Tensor, nn

import fastjac
from fastjac import DREG, DataGrad
from fastjac.integrations import PenaltyTerm

X = torch.randn(16, 4, dtype=torch.float64, generator=seeded())
Y = torch.randint(3, (16,), generator=seeded())


def batches(size: int = 2, samples: int = 16) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X[:samples].split(size), Y[:samples].split(size), strict=True))


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))


def terms(model: Any, targets: Callable[[Any], Tensor], every: int = 1) -> list[Any]:
    """One of each kind."""
    return [
        DREG(model.net, weight=0.2, every=every),
        PenaltyTerm(DataGrad(weight=0.5, every=every), module="net", targets=targets),
    ]


def train_by_hand(
    net: nn.Sequential, given: Sequence[tuple[Tensor, Tensor]], accumulate: int = 1
) -> None:
    """SGD by the references' formulas, with nothing attached."""
    for k in range(0, len(given), accumulate):
        total = torch.zeros(())
        for x, y in given[k : k + accumulate]:
            x = x.clone().requires_grad_()
            output = net(x)
            layer = net[0](x), net[0].weight, net[1]
            value = 0.2 * fastjac.reference.dreg([layer]).mean()
            value = value + 0.5 * fastjac.reference.datagrad(x, output, y).mean()
            total = total + (F.cross_entropy(output, y) + value) / accumulate
        gradients = torch.autograd.grad(total, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradients, strict=True):
                p -= 0.1 * g


def same_weights(model: nn.Module, other: nn.Module) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(p, q, rtol=1e-10, atol=1e-12)


def no_hooks(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
