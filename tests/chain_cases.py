"""One step of a penalty by each engine, and what must agree between them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from layer_cases import Model
from torch import Tensor, nn

from fastjac.penalties import SpectReg

# The engines sum the same products in another order: some hundred roundings of 1.1e-16, more where
# a normalisation divides by a small spread.
close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


@dataclass
class Run:
    """What one step left behind."""

    model: nn.Module
    output: Tensor
    value: Tensor
    gradients: dict[str, Tensor | None]
    random: Tensor  # the number that torch would draw next


def spectreg(engine: str, **options: Any) -> SpectReg:
    """Four projections, the same ones for every penalty made here."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(3)
    return SpectReg(engine=engine, generator=generator, **{"n_proj": 4, **options})


def run(
    model: nn.Module, x: Tensor, penalty: Any, *targets: Any, requires_grad: bool = True
) -> Run:
    """Forward and backward of loss and penalty on a copy of the model.

    A sum over the samples with different weights: some wrong terms vanish for equal ones.
    """
    model = copy.deepcopy(model)
    x = x.detach().clone().requires_grad_(requires_grad)
    torch.manual_seed(5)
    output, value = penalty(model, x, *targets)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)
    (output.square().sum() + (weights * value).sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        if p.requires_grad and p.grad is None:  # not reached, or reached by zeros
            gradients[name] = torch.zeros_like(p)
    gradients["x"] = x.grad
    return Run(model, output.detach(), value.detach(), gradients, torch.rand(()))


def same(found: Run, expected: Run) -> None:
    """Output, value, all gradients, buffers and the state of the random numbers."""
    close(found.output, expected.output)
    close(found.value, expected.value)
    assert found.gradients.keys() == expected.gradients.keys()
    # What vanishes (a bias before BatchNorm) is left with rounding errors of the others' size.
    largest = max(
        [1.0, *(float(t.abs().max()) for t in expected.gradients.values() if t is not None)]
    )
    for name, truth in expected.gradients.items():
        assert (found.gradients[name] is None) == (truth is None), name
        if truth is not None:
            close(
                found.gradients[name],
                truth,
                atol=1e-11 * largest,
                msg=lambda m, n=name: f"{n}: {m}",
            )
    buffers = dict(expected.model.named_buffers())
    for name, buffer in found.model.named_buffers():
        torch.testing.assert_close(buffer, buffers[name], rtol=1e-12, atol=1e-14)
    assert torch.equal(found.random, expected.random)


def agrees(model: nn.Module, x: Tensor, **options: Any) -> None:
    """The chain engine runs the model and agrees with autograd; so does "auto"."""
    options = {"reduction": "none", **options}
    for requires_grad in (True, False):
        expected = run(model, x, spectreg("autograd", **options), requires_grad=requires_grad)
        for engine in ("chain", "auto"):
            found = run(model, x, spectreg(engine, **options), requires_grad=requires_grad)
            same(found, expected)
    assert spectreg("chain").explain(model, x).startswith("engine: chain")


def falls_back(model: nn.Module, x: Tensor, reason: str) -> None:
    """With "auto" the model runs by autograd; "chain" raises with the reason."""
    explained = spectreg("auto").explain(model, x)
    assert explained.startswith("engine: autograd\n") and re.search(reason, explained)
    expected = run(model, x, spectreg("autograd", reduction="none"))
    same(run(model, x, spectreg("auto", reduction="none")), expected)
    with pytest.raises(RuntimeError, match=f"engine='chain' cannot run this call: .*{reason}"):
        spectreg("chain")(model, x)


def right_or_refused(model: nn.Module, x: Tensor) -> None:
    """With "auto" the gradients are those of autograd; with "chain" too, unless it raises."""
    expected = run(model, x, spectreg("autograd", reduction="none"))
    same(run(model, x, spectreg("auto", reduction="none")), expected)
    try:
        found = run(model, x, spectreg("chain", reduction="none"))
    except RuntimeError as error:
        assert "engine='chain' cannot run" in str(error)
    else:
        same(found, expected)


class Straight(torch.autograd.Function):
    """Rounds; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def three_layers(forward: Callable[[Any, Tensor], Any], **more: nn.Module) -> Model:
    """Linear layers a, b, c of 4, 5, 5 and 3 units and a forward function of ``(self, x)``."""
    layers = {"a": nn.Linear(4, 5), "b": nn.Linear(5, 5), "c": nn.Linear(5, 3)}
    return Model(forward, **{**layers, **more})


def convnet() -> nn.Sequential:
    """A link of each kind, on ``[N, 4]``."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.GELU()),
        *(nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5)),
        *(nn.Tanh(), nn.Linear(5, 3)),
    )


def names_in(function: Any) -> str:
    """The source of a traced function, with the names of what it calls."""
    names = {}
    for name, value in function.__globals__.items():
        names[name] = getattr(value, "__name__", str(value))
    words = function.source.replace("(", " ( ").split()
    return " ".join(names.get(word, word) if word.startswith("f") else word for word in words)
