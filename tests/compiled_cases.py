"""Models and comparisons for the tests of the compiled engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import layer_cases
import pytest
import torch
import torch.nn.functional as F
from chain_cases import close, convnet, run, same, three_layers
from layer_cases import Model
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastjac
from fastjac.penalties import SpectReg

MARKS = [
    pytest.mark.usefixtures("double", "backend", "empty_graphs"),
    # Torch hides this warning of its own while it traces a tensor that is no leaf, but not from
    # pytest.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def graphs() -> int:
    """The number of graphs that were compiled so far."""
    return int(counters["stats"]["unique_graphs"])


class Projected(nn.Module):
    """A SpectReg with k given projections, so that no engine draws random numbers."""

    def __init__(self, engine: str, k: int) -> None:
        super().__init__()
        self.penalty, self.k = SpectReg(engine=engine, reduction="none"), k

    def forward(self, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.k, len(x), 3 if x.dim() < 4 else 10)
        w = torch.arange(float(torch.Size(shape).numel()), dtype=x.dtype).sin().view(shape)
        return self.penalty(model, x, projection=w)


def agrees(
    model: nn.Module, x: Tensor, requires_grad: tuple[bool, ...] = (True, False), k: int = 1
) -> None:
    """Output, value, gradients, buffers and random numbers are those of the autograd engine."""
    for wanted in requires_grad:
        expected, found = (
            run(model, x, Projected(name, k), requires_grad=wanted)
            for name in ("autograd", "compiled")
        )
        same(found, expected)


def refuses(model: Any, x: Tensor, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        with pytest.raises(RuntimeError, match=f"engine='compiled' cannot run.*{reason}"):
            SpectReg(engine="compiled")(model, x)


def compare(model: nn.Module, x: Tensor) -> None:
    """As `agrees`, without copying the model, so that the compiled function is used again."""
    w, found = torch.linspace(-1, 1, 3 * len(x)).view(len(x), 3), []
    for name in ("compiled", "autograd"):
        output, value = SpectReg(engine=name)(model, x, projection=w)
        inputs = [p for p in model.parameters() if p.requires_grad]
        found.append([value, *torch.autograd.grad(output.square().sum() + value, inputs)])
    close(*found)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3))


def with_buffer(forward: Any, **buffers: Tensor) -> Model:
    model = three_layers(forward)
    for name, b in buffers.items():
        model.register_buffer(name, b)
    return model


def bent_norm(m: Any, x: Tensor) -> Tensor:
    """Running statistics without a module, updated in eval mode too."""
    return m.c(F.batch_norm(m.a(x), m.mean, m.var, training=True))


def moving_average(m: Any, x: Tensor) -> Tensor:
    """A buffer that the output depends on is overwritten in the same run."""
    h = F.gelu(m.a(x))
    out = m.c(h * m.ema.clone())
    m.ema.mul_(0.9).add_(0.1 * h.mean(0).detach())
    return out


def parts_written(m: Any, x: Tensor) -> Tensor:
    m.table[1:3] += 1
    m.count.view(-1)[0] = 7
    return m.c(F.gelu(m.a(x)))


def replaced(m: Any, x: Tensor) -> Tensor:
    """A buffer is replaced by one of another shape and dtype."""
    m.runs = torch.cat([m.runs, m.runs]) + 0.5
    return m.c(F.gelu(m.a(x)))


def shared_norm() -> nn.Sequential:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.GELU(), nn.Linear(4, 4), norm, nn.Linear(4, 3))


def shared_buffer() -> Model:
    """One tensor in two modules: written to in one, read in the other."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.scale.add_(1)
        return m.c(F.gelu(m.a(x)) * m.b.scale)

    model = with_buffer(forward, scale=torch.ones(5))
    model.b.register_buffer("scale", model.scale)
    return model


def hooked() -> nn.Sequential:
    model = mlp()
    model[1].register_forward_hook(lambda module, args, out: 2 * out)
    model[0].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    model[0].weight.register_hook(lambda g: 2 * g)
    return model


def partly_without_grad() -> Model:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = m.b(m.a(x)).tanh()
        return m.c(F.gelu(m.a(x)) * scale * m.b(m.a(x)).detach())

    return three_layers(forward)


def spectral() -> nn.Sequential:
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    return nn.Sequential(first, nn.GELU(), nn.Linear(5, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions and norms": convnet,
    "eval mode": lambda: convnet().eval(),
    "fused": lambda: fastjac.fuse(layer_cases.mlp()),
    "in place": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "spectral norm": spectral,
    "forward hooks": hooked,
    "no_grad and detach": partly_without_grad,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.GELU(), nn.Linear(5, 3)),
    "batch_norm as a function": lambda: with_buffer(
        bent_norm, mean=torch.zeros(5), var=torch.ones(5)
    ).eval(),
    "a module twice": shared_norm,
    "a buffer in two modules": shared_buffer,
    "moving average": lambda: with_buffer(moving_average, ema=torch.ones(5)),
    "parts of buffers": lambda: with_buffer(
        parts_written, table=torch.ones(5), count=torch.ones(2, 2, dtype=torch.int64)
    ),
    "replaced buffer": lambda: with_buffer(replaced, runs=torch.zeros(1, dtype=torch.int64)),
    "constant buffers": lambda: with_buffer(
        lambda m, x: m.c(F.gelu(m.a(x)).masked_fill(m.mask, 0.5) * m.one),
        mask=torch.tensor([False, True, False, False, True]),
        one=torch.ones(1).expand(5),
    ),
    "asks whether x requires grad": lambda: three_layers(
        lambda m, x: m.c(m.a(x).sin()) * (2 if x.requires_grad else 3)
    ),
}
