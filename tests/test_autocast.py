"""The chain engine under autocast, against autograd under autocast and the truth in float64."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import cpu_only
from layer_cases import Model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastjac import SpectReg


def image(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.batch_norm(m.a(x)))
    return m.c((h + F.silu(m.group_norm(m.b(h)))).mean((2, 3)))


def gated(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    left, right = F.gelu(m.norm(h)).chunk(2, -1)
    return m.c(left * torch.softmax(right, -1)) * m.c(h.tanh()[:, :16])


def in_place(m: Any, x: Tensor) -> Tensor:
    """The sum with x, of float32, is in the lower precision."""
    return m.b(m.a(x).tanh()).add_(x).mul_(2).sin()


Made = tuple[Callable[[], nn.Module], tuple[int, ...]]
MODELS: dict[str, Made] = {
    "Sequential": (
        lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.Tanh()),
        (8, 16),
    ),
    "norms": (
        lambda: nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 9)),
        (8, 16),
    ),
    "image": (
        lambda: Model(
            image,
            a=nn.Conv2d(3, 8, 3, padding=1),
            b=nn.Conv2d(8, 8, 3, padding=1),
            c=nn.Linear(8, 5),
            batch_norm=nn.BatchNorm2d(8),
            group_norm=nn.GroupNorm(2, 8),
        ),
        (4, 3, 8, 8),
    ),
    "gated": (
        lambda: Model(gated, a=nn.Linear(16, 32), c=nn.Linear(16, 9), norm=nn.LayerNorm(32)),
        (8, 16),
    ),
    "in place": (
        lambda: Model(in_place, a=nn.Linear(16, 32), b=nn.Linear(32, 16)),
        (8, 16),
    ),
    "attention": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True),
        (4, 12, 32),
    ),
}


def gradients(model: nn.Module, x: Tensor, w: Tensor, engine: str) -> list[Tensor]:
    """Of a loss and the penalty, for the projection w."""
    penalty = SpectReg(engine=engine)
    with torch.no_grad():
        dtype = copy.deepcopy(model)(x).dtype
    output, value = penalty(model, x, projection=w.to(dtype))
    total = output.to(value.dtype).square().mean() + value
    found = torch.autograd.grad(
        total, list(model.parameters()), materialize_grads=True, allow_unused=True
    )
    assert all(g.dtype == p.dtype for g, p in zip(found, model.parameters(), strict=True))
    return list(found)


def distance(found: list[Tensor], truth: list[Tensor]) -> float:
    def norm(ts: Any) -> float:
        return float(sum(t.double().square().sum() for t in ts)) ** 0.5

    return norm(a.double() - b for a, b in zip(found, truth, strict=True)) / norm(truth)


@cpu_only
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_no_less_exact_than_autograd(name: str, low: torch.dtype) -> None:
    """The mean error over six seeds; of a single one it varies by a tenth."""
    make, shape = MODELS[name]
    errors: dict[str, list[float]] = {"autograd": [], "chain": [], "auto": []}
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = make(), torch.randn(shape)
        w = torch.randn(1, len(x), model(x)[0].numel(), dtype=torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            truth = gradients(copy.deepcopy(model).double(), x.double(), w, "autograd")
        for engine, found in errors.items():
            mine = copy.deepcopy(model)
            with torch.autocast("cpu", low):
                for _ in range(3 if engine == "auto" else 1):  # the third time by a program
                    result = gradients(mine, x, w, engine)
            found.append(distance(result, truth))
            if engine == "auto":
                with torch.autocast("cpu", low):
                    assert SpectReg().explain(mine, x).startswith("engine: chain")
    limit = 1.03 * statistics.mean(errors["autograd"])
    assert statistics.mean(errors["chain"]) <= limit
    assert statistics.mean(errors["auto"]) <= limit
