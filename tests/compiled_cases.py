"""Models, comparisons and compilers for the tests under ``torch.compile``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import layer_cases
import pytest
import torch
import torch.nn.functional as F
from chain_cases import convnet, run, same, three_layers
from functorch.compile import make_boxed_func
from layer_cases import Model
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager

import fastjac
from fastjac.penalties import SpectReg

MARKS = [pytest.mark.usefixtures("double", "no_stale_graphs")]


class Counting:
    """The backend ``aot_eager``, and how often it compiled."""

    def __init__(self) -> None:
        self.compilations = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.compilations += 1
        return aot_eager(graph, inputs)


class Graphs:
    """A backend that runs the graphs of the forward and of the backward as they are traced."""

    def __init__(self) -> None:
        self.forward: list[torch.fx.GraphModule] = []
        self.backward: list[torch.fx.GraphModule] = []
        self.outputs: Any = ()  # of the last call
        self.run = aot_autograd(
            fw_compiler=self._keep(self.forward),
            inference_compiler=self._keep(self.forward),
            bw_compiler=self._keep(self.backward),
        )

    def _keep(self, graphs: list[torch.fx.GraphModule]) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            graphs.append(graph)
            return make_boxed_func(graph.forward)

        return compiler

    def __call__(self, graph: Any, inputs: Any) -> Any:
        run = self.run(graph, inputs)

        def call(*args: Any) -> Any:
            self.outputs = run(*args)
            return self.outputs

        return call


def calls(graph: torch.fx.GraphModule) -> Counter[str]:
    """The operations of a graph by name; a product with a bias counts as ``mm``."""
    names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return Counter(name.removesuffix(".default").replace("aten.addmm", "aten.mm") for name in names)


class Projected(nn.Module):
    """A SpectReg with k given projections, compiled or not."""

    def __init__(self, k: int, backend: Any = None, **options: Any) -> None:
        super().__init__()
        self.penalty, self.k = SpectReg(reduction="none", **options), k
        self.backend = backend

    def forward(self, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.k, len(x), 3 if x.dim() < 4 else 10)
        w = torch.arange(float(torch.Size(shape).numel()), dtype=x.dtype).sin().view(shape)

        def call(x: Tensor, w: Tensor) -> Any:
            return self.penalty(model, x, projection=w)

        return compiled(call, self.backend)(x, w) if self.backend else call(x, w)


def compiled(f: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Any:
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def agrees(
    model: nn.Module, x: Tensor, k: int = 1, backend: Any = "aot_eager", **options: Any
) -> None:
    """Output, value, gradients, buffers and random numbers are those of eager mode."""
    for wanted in (True, False):
        torch._dynamo.reset()
        expected = run(model, x, Projected(k, engine="autograd"), requires_grad=wanted)
        same(run(model, x, Projected(k, backend, **options), requires_grad=wanted), expected)


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

# The gradient depends on a buffer that the run writes to, and the backward that torch compiles
# reads it afterwards, with no penalty in the step too (torch 2.13).
WRONG_IN_TORCH = {
    ("moving average", "aot_eager"),
    ("moving average", "inductor"),
    ("a buffer in two modules", "aot_eager"),
    ("a buffer in two modules", "inductor"),
    ("spectral norm", "inductor"),
}
