"""The things that the matrix runs: fused models, and penalties in each of their call forms.

A thing computes ``(output, value)`` of a net, and the loss is ``cross entropy + value``. The truth
is the same loss of the plain net in float64, computed by `fastjac.reference`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from layer_cases import recorded
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fastjac
from fastjac import reference
from fastjac.penalties import DREG, AccumulatedDREG, ConfidencePenalty, Contractive

Pair = tuple[Tensor, Tensor]
Run = Callable[[Tensor], Tensor]
Arguments = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]


def mlp() -> nn.Sequential:
    """The third and the fifth module have weights of one shape (`shared`)."""
    return nn.Sequential(
        *(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 5), nn.Tanh()),
        *(nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3)),
    )


def convnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 2), nn.GELU(), nn.Conv2d(3, 4, 2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )


def cotangents(output: Tensor) -> Tensor:
    """``[N, m]``, not random, so that all engines have the same."""
    n, m = output.shape
    index = torch.arange(n * m, dtype=output.dtype, device=output.device)
    return (1 + index).sin().view(n, m)


# ---- the truth: (model, x, y) -> (output, value)


def of_input(f: Callable[..., Tensor]) -> Callable[..., Pair]:
    def truth(model: Run, x: Tensor, y: Tensor) -> Pair:
        output = model(x)
        return output, f(x, output, y).mean()

    return truth


def of_layers(f: Callable[..., Tensor], model: nn.Module, x: Tensor, y: Tensor) -> Pair:
    activations = (nn.GELU, nn.Tanh, nn.SiLU)
    children = pairwise(model.named_children())
    pairs = {name: phi for (name, _), (_, phi) in children if isinstance(phi, activations)}
    with parametrize.cached():  # one power iteration of spectral norm per run, as in the penalty
        output, stack = recorded(model, x, pairs)
        return output, f(stack).mean()


def accumulated(model: nn.Sequential, x: Tensor, y: Tensor) -> Pair:
    def activations(x: Tensor) -> list[Tensor]:
        outs = []
        for module in model:
            x = module(x)
            if not isinstance(module, nn.Linear | nn.Conv2d | nn.Flatten):
                outs.append(x)
        return [*outs, x]

    with parametrize.cached():
        value = reference.accumulated_dreg(activations, x, **tangent(x, x, y)).mean()
        return model(x), value


spectreg_truth = of_input(lambda x, o, y: reference.spectreg(x, o, projection=cotangents(o)))


# ---- ours: (penalty, run, x, y) -> (output, value)


def own_penalty(penalty: Any, run: Run, x: Tensor, y: Tensor) -> Pair:
    """A user's own SpectReg of a fused model."""
    output = run(x)
    (v,) = torch.autograd.grad(output, x, cotangents(output), create_graph=True)
    return output, v.flatten(1).square().sum(1).mean()


def own_penalty_by_func(penalty: Any, run: Run, x: Tensor, y: Tensor) -> Pair:
    output, pull, *_ = torch.func.vjp(run, x)
    (v,) = pull(cotangents(output))
    return output, v.flatten(1).square().sum(1).mean()


def attached(penalty: Any, run: Run, x: Tensor, y: Tensor) -> Pair:
    return run(x), penalty()


def called(arguments: Arguments) -> Callable[..., Pair]:
    def form(penalty: Any, run: Run, x: Tensor, y: Tensor) -> Pair:
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return penalty(run, x, **arguments(x, x.new_empty(len(x), 3, dtype=low), y))

    return form


def on_graph(arguments: Arguments) -> Callable[..., Pair]:
    def form(penalty: Any, run: Run, x: Tensor, y: Tensor) -> Pair:
        output = run(x)
        return output, penalty(x, output, **arguments(x, output, y))

    return form


# Further arguments of a penalty: (x, a tensor like the output, y) -> arguments by keyword.


def nothing(x: Tensor, output: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {}


def projection(x: Tensor, output: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"projection": cotangents(output)}


def target(x: Tensor, output: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"target": y}


def tangent(x: Tensor, output: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"tangent": torch.ones_like(x).cumsum(0).cos()}


# ---- the things


@dataclass(frozen=True)
class Thing:
    """``make(model)`` returns the penalty or None, and ``form`` calls it."""

    name: str
    group: str
    make: Callable[[nn.Module], Any]
    form: Callable[[Any, Run, Tensor, Tensor], Pair]
    truth: Callable[[Any, Tensor, Tensor], Pair]


class Function(nn.Module):
    """A function of fastjac, called in a forward."""

    def forward(self, z: Tensor) -> Tensor:
        return fastjac.tanh(z)


def fused_modules(model: nn.Module) -> None:
    """Fuses the activations in three ways: a layer that has one, a function, and a module."""
    inner = getattr(model, "inner", model)
    old = inner[0]
    if isinstance(old, nn.Conv2d):
        inner[0] = fastjac.nn.ConvAct(2, 3, 2, "gelu", dtype=torch.float64)
    else:
        inner[0] = fastjac.nn.LinearAct(4, 5, "gelu", dtype=torch.float64)
    inner[0].weight, inner[0].bias = old.weight, old.bias
    inner[1], inner[3] = nn.Identity(), Function()
    on_cpu = next(model.parameters()).device.type == "cpu"
    fastjac.fuse(model, impl="cpu" if on_cpu else "auto")  # at any size


LAYER_WISE: list[tuple[Any, Any]] = [(DREG, reference.dreg), (Contractive, reference.contractive)]
INPUT: list[tuple[Any, Any, Arguments]] = [
    (fastjac.SpectReg, spectreg_truth, projection),
    (fastjac.DataGrad, of_input(reference.datagrad), target),
    (fastjac.FrobReg, of_input(lambda x, o, y: reference.frobreg(x, o)), nothing),
]
confidence_truth = of_input(lambda x, o, y: reference.confidence_penalty(x, o))


def things() -> Iterator[Thing]:
    yield Thing("fused + autograd.grad", "fused", fused_modules, own_penalty, spectreg_truth)
    yield Thing("fused + func.vjp", "fused", fused_modules, own_penalty_by_func, spectreg_truth)
    for kind, f in LAYER_WISE:
        name, truth = kind.__name__, partial(of_layers, f)
        yield Thing(f"{name} attached", "layer-wise", kind, attached, truth)
        yield Thing(f"{name} called", "layer-wise", make(kind), called(nothing), truth)
    kind = AccumulatedDREG
    yield Thing("AccumulatedDREG called", "layer-wise", make(kind), called(tangent), accumulated)
    for name, form in (("graph", on_graph), ("called", called)):
        own = make(ConfidencePenalty), form(nothing), confidence_truth
        yield Thing(f"Confidence {name}", "output", *own)
    for kind, truth, arguments in INPUT:
        name, group = kind.__name__, "input Jacobian"
        yield Thing(f"{name} graph", group, make(kind), on_graph(arguments), truth)
        for engine in ("auto", "chain", "autograd"):
            own = make(kind, engine=engine), called(arguments), truth
            yield Thing(f"{name} {engine}", group, *own)


def make(kind: type, **options: Any) -> Callable[[nn.Module], Any]:
    """A penalty that is not attached."""
    return lambda model: kind(**options)


THINGS = list(things())


@dataclass
class Ours:
    """The loss of a thing on a model."""

    thing: Thing
    model: nn.Module
    penalty: Any

    def __call__(self, x: Tensor, y: Tensor, run: Run | None = None) -> Tensor:
        output, value = self.thing.form(self.penalty, run or self.model, x, y)
        return F.cross_entropy(output, y) + value


def backward(loss: Callable[..., Tensor], model: nn.Module, x: Tensor, y: Tensor) -> None:
    loss(x, y).backward()


class Cell:
    """One thing on one net, and the plain net with the same parameters."""

    def __init__(
        self,
        thing: Thing,
        net: Callable[[], nn.Module] = mlp,
        change: Callable[[Any], Any] = lambda model: None,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        torch.manual_seed(0)
        self.plain = net().double()
        for p in self.plain.parameters():
            p.data.mul_(2)  # the penalties are then about as large as the cross entropy
        change(self.plain)
        model = wrap(copy.deepcopy(self.plain))
        self.thing, self.ours = thing, Ours(thing, model, thing.make(model))
        shape = (6, 4) if net is mlp else (6, 2, 4, 4)
        self.x = torch.randn(shape, dtype=torch.float64)
        self.y = torch.arange(6) % 3

    @property
    def model(self) -> Any:
        return self.ours.model

    def truth(self, x: Tensor, y: Tensor) -> Tensor:
        output, value = self.thing.truth(self.plain, x, y)
        return F.cross_entropy(output, y) + value

    def expected(self, train: Callable[..., None] = backward) -> list[Tensor]:
        return gradients_of(self.truth, self.plain, self.x, self.y, train)

    def found(self, train: Callable[..., None] = backward, loss: Any = None) -> list[Tensor]:
        return gradients_of(loss or self.ours, self.model, self.x, self.y, train)

    def agrees(self, train: Callable[..., None] = backward, loss: Any = None) -> None:
        """Asserts that the gradients with respect to x and the parameters are the true ones."""
        same(self.found(train, loss), self.expected(train))


def gradients_of(
    loss: Any, model: Any, x: Tensor, y: Tensor, train: Any = backward
) -> list[Tensor]:
    """With respect to x and all parameters; zeros where there is none."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    train(loss, model, x, y)
    return [torch.zeros_like(t) if t.grad is None else t.grad for t in (x, *model.parameters())]


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    # Some dozen float64 roundings of numbers of order 1.
    torch.testing.assert_close(list(found), list(expected), rtol=1e-10, atol=1e-12)
