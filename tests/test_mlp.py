"""The C++ sweeps of an MLP: which models take them, the same bits twice, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac
from fastjac.chain.mlp import LARGE, Mlp
from fastjac.dispatch import why_not

if why_not("cpu", "cpu", torch.float32):
    pytest.skip(why_not("cpu", "cpu", torch.float32), allow_module_level=True)


def net(width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width, bias=False)),
        *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 10)),
    )


def gradients(model: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> list[Tensor]:
    output, value = fastjac.SpectReg(engine="chain")(model, x, projection=w)
    loss = F.cross_entropy(output, y) + value
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("n", [3, LARGE // 64 + 5], ids=["small", "layer by layer"])
@pytest.mark.parametrize("k", [1, 3])
def test_same_bits_twice(n: int, k: int) -> None:
    model, x, y = net(), torch.randn(n, 16), torch.randint(10, (n,))
    w = torch.randn(k, n, 10)
    first, second = (gradients(model, x, y, w) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def with_hook() -> nn.Module:
    model = net()
    model[1].register_forward_hook(lambda module, args, out: out)
    return model


class Subclass(nn.Linear):
    pass


MODELS: dict[str, tuple[Any, bool]] = {
    "plain": (net, True),
    "nested": (lambda: nn.Sequential(nn.Flatten(), nn.Sequential(net())), True),
    "fused": (lambda: fastjac.fuse(net()), True),
    "hook": (with_hook, False),
    "subclass": (lambda: nn.Sequential(Subclass(16, 4), nn.GELU(), nn.Linear(4, 2)), False),
    "dropout": (lambda: nn.Sequential(nn.Linear(16, 4), nn.Dropout(), nn.Linear(4, 2)), False),
    "ends in an activation": (lambda: net().append(nn.Tanh()), False),
    "transposed weight": (lambda: transposed(net()), False),
    "other dtype": (lambda: net().double(), False),
}


def transposed(model: nn.Sequential) -> nn.Sequential:
    model[2].weight.data = model[2].weight.data.t().contiguous().t()  # type: ignore[operator]
    return model


@pytest.mark.parametrize("name", MODELS)
def test_models_that_take_it(name: str) -> None:
    make, taken = MODELS[name]
    assert (Mlp.of(make(), torch.randn(5, 16)) is not None) is taken


def test_penalty_holds_no_more_than_it_says() -> None:
    """Two stacks of 2 N rows a layer until the backward, and none of it after."""
    model, x, w = net(), torch.randn(8, 16), torch.randn(8, 10)
    output, value = fastjac.SpectReg(engine="chain")(model, x, projection=w)
    chain = value.grad_fn.next_functions[0][0]
    while not hasattr(chain, "chain"):
        chain = chain.next_functions[0][0]
    run = chain.chain.run
    assert [tuple(t.shape) for t in run.stacks] == [(16, 64)] * 3
    assert [tuple(t.shape) for t in run.deltas] == [(16, 64)] * 3 + [(16, 10)]
    (output.sum() + value).backward()
    assert chain.chain is None
    assert run.stacks == run.deltas == [] and run.pushed is None
