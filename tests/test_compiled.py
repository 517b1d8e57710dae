"""The compiled engine gives what autograd gives: values, gradients, buffers.

Most tests take the backend ``aot_eager``, which traces as inductor does and runs torch's own
kernels; some slow ones take inductor.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chain_cases import close
from compiled_cases import (
    MARKS,
    MODELS,
    agrees,
    graphs,
    mlp,
    normed,
    refuses,
)
from penalty_cases import CASES, Call, close_gradients, gradients, takes
from torch import nn

import fastjac
from fastjac.activations import TABLE
from fastjac.bench.networks import lenet, small_resnet
from fastjac.penalties import IGPen, PenaltySpec, SpectReg

pytestmark = MARKS

READY = [c for c in CASES if takes(c.values[0], "engine") and c.values[0].name != "tangentprop"]
# One of each way in which a penalty asks for its VJPs.
QUICK_CASES = {f"{name}-0" for name in ("spectreg", "datagrad", "igpen", "jacreg", "sobolev")}
PENALTY_CASES = [
    c if c.id in QUICK_CASES else pytest.param(*c.values, id=str(c.id), marks=pytest.mark.slow)
    for c in READY
]


# ---- the same results


@pytest.mark.parametrize(("spec", "options"), PENALTY_CASES)
def test_every_penalty_equals_autograd(spec: PenaltySpec, options: dict[str, Any]) -> None:
    """Random penalties too: with this backend they draw what torch draws eagerly."""
    weights = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    found = []
    for name in ("compiled", "autograd"):
        call = Call(spec, options, engine=name)
        torch.manual_seed(3)
        value = call.values(**({"generator": None} if call.random() else {}))
        found.append([value, *gradients(weights * value, call.inputs)])
    close_gradients(found[0], found[1], rtol=1e-10)
    assert found[0][1].abs().sum() > 0


QUICK = [(name, "aot_eager") for name in ("fused", "a module twice", "moving average")]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(name, backend, marks=[pytest.mark.slow] * ((name, backend) not in QUICK))
        for name in MODELS
        for backend in ("aot_eager", "inductor")
    ],
    indirect=["backend"],
)
def test_models_equal_autograd(name: str, backend: str) -> None:
    torch.manual_seed(0)
    agrees(MODELS[name](), torch.randn(6, 4), k=2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"], indirect=True)
def test_all_fused_activations(backend: str) -> None:
    torch.manual_seed(0)
    layers = [part for fn in TABLE for part in (fastjac.Act(fn), nn.Linear(5, 5))]
    agrees(nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 3)), torch.randn(6, 4))


@pytest.mark.parametrize(
    ("make", "shape", "backend"),
    [
        (lenet, (2, 1, 28, 28), "aot_eager"),
        pytest.param(small_resnet, (2, 3, 32, 32), "aot_eager", marks=pytest.mark.slow),
        pytest.param(lenet, (2, 1, 28, 28), "inductor", marks=pytest.mark.slow),
        pytest.param(small_resnet, (2, 3, 32, 32), "inductor", marks=pytest.mark.slow),
    ],
    indirect=["backend"],
)
def test_networks_of_the_benchmark(make: Any, shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    agrees(make(), torch.randn(shape), (False,))


def test_functions_and_methods_as_models() -> None:
    net, x, w = mlp(), torch.randn(6, 4), torch.randn(6, 3)
    truth = SpectReg(engine="autograd")(net, x, projection=w)[1]
    expected = torch.autograd.grad(truth, net[0].weight)
    model, before = lambda t: net(t), 0
    for _ in range(2):
        before = graphs()
        for f in (model, net.forward):
            value = SpectReg(engine="compiled")(f, x, projection=w)[1]
            close(torch.autograd.grad(value, net[0].weight), expected)
    assert graphs() == before  # the second time
    hidden = normed()
    refuses(lambda t: hidden(t), x, "in-place")  # whose buffers the engine cannot know


def test_losses_targets_and_projections_that_require_grad() -> None:
    x, net, head = torch.randn(6, 4), mlp(), nn.Linear(3, 1)
    found = []
    for name in ("compiled", "autograd"):
        leaf, y = x.clone().requires_grad_(), torch.linspace(0, 1, 6).requires_grad_()
        penalty = IGPen(lambda out, y: (head(out.sin())[:, 0] - y).square(), engine=name)
        value = penalty(net, leaf, y)[1]
        w = torch.linspace(-1, 1, 36).view(2, 6, 3).requires_grad_()
        value = value + SpectReg(engine=name)(net, leaf, projection=w)[1]
        found.append(torch.autograd.grad(value, [net[0].weight, head.weight, y, leaf, w]))
    close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"], indirect=True)
def test_under_autocast(backend: str) -> None:
    """The results of autograd up to a few roundings, under autocast and without it afterwards."""
    torch.manual_seed(0)
    model = mlp().float()
    x, w = (torch.randn(32, n, dtype=torch.float32) for n in (4, 3))
    for on in (True, False):
        found = []
        for name in ("compiled", "autograd"):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                given = w.bfloat16() if on else w
                output, value = SpectReg(engine=name)(model, x, projection=given)
            assert output.dtype == given.dtype
            inputs = list(model.parameters())[:-1]
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, inputs)]))
        error = float((found[0] - found[1]).norm() / found[1].norm())
        assert error < (2**-8 if on else 1e-6)
