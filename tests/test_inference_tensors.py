"""Tensors made under ``torch.inference_mode()``: every error says which they are and what to do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastjac
from fastjac import DREG, AccumulatedDREG, DataGrad, FiniteDifferenceDataGrad, SpectReg

X, Y = torch.randn(3, 4), torch.tensor([0, 1, 2])
COPY = (
    r"^parameters or buffers of the model \(0.weight, .* were made under .*copy.deepcopy\(model\)"
)


def loaded(*norm: nn.Module) -> nn.Sequential:
    """A model whose parameters were made under inference mode."""
    with torch.inference_mode():
        return nn.Sequential(nn.Linear(4, 5), *copy.deepcopy(norm), nn.Tanh(), nn.Linear(5, 3))


CALLS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    **{e: (SpectReg(engine=e), ()) for e in ("auto", "chain", "autograd")},
    "target": (DataGrad(), (Y,)),
    "finite differences": (FiniteDifferenceDataGrad(), (Y,)),
    "layer-wise": (DREG(), ()),
    "pushed": (AccumulatedDREG(), ()),
}


@pytest.mark.filterwarnings("ignore:.*engine='autograd' runs instead")
@pytest.mark.parametrize("norm", [(), (nn.BatchNorm1d(5),)], ids=["plain", "BatchNorm"])
@pytest.mark.parametrize("penalty, targets", CALLS.values(), ids=CALLS)
def test_parameters_of_a_penalty(
    penalty: Any, targets: tuple[Tensor, ...], norm: tuple[nn.Module, ...]
) -> None:
    model = loaded(*norm)
    with pytest.raises(RuntimeError, match=COPY):
        penalty(model, X, *targets)
    output, value = penalty(copy.deepcopy(model), X, *targets)  # the advice helps
    (output.sum() + value).backward()


@pytest.mark.parametrize("norm", [(), (nn.BatchNorm1d(5),)], ids=["plain", "BatchNorm"])
def test_parameters_of_an_attached_penalty(norm: tuple[nn.Module, ...]) -> None:
    model = loaded(*norm)
    penalty = DREG(model)
    with pytest.raises(RuntimeError, match=COPY):
        model(X)
    penalty.detach()
    model = copy.deepcopy(model)
    penalty = DREG(model)
    (model(X).sum() + penalty()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_other_errors_are_not_replaced() -> None:
    class Broken(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("of the model")

    with pytest.raises(RuntimeError, match="^of the model"):
        SpectReg(engine="autograd")(Broken(*loaded()), X)


@pytest.mark.parametrize("engine", ["auto", "chain", "autograd"])
def test_inputs_of_a_penalty(engine: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.inference_mode():
        x, w = torch.randn(3, 4), torch.randn(1, 3, 3)
    with pytest.raises(RuntimeError, match=r"^x was made under .*: .*pass a clone\(\) of it"):
        SpectReg(engine=engine)(model, x)
    if engine == "autograd":
        with pytest.raises(RuntimeError, match="^projection was made under"):
            SpectReg(engine=engine)(model, X, projection=w)
    with pytest.raises(RuntimeError, match="^x was made under"):
        DREG()(model, x)
    attached = DREG(model)
    with pytest.raises(RuntimeError, match="^an input of the model was made under"):
        model(x)
    attached.detach()


def test_a_tensor_that_nothing_names() -> None:
    with torch.inference_mode():
        factor = torch.randn(4)
    with pytest.raises(RuntimeError, match="^a tensor of the model was made under"):
        SpectReg(engine="autograd")(lambda x: x * factor, X)


OPS: dict[str, Callable[[Tensor], Any]] = {
    "z": lambda t: fastjac.act(t, X.clone().requires_grad_(), 1),
    "g": lambda t: fastjac.act(X.clone().requires_grad_(), t, 1),
    "weights": lambda t: fastjac.act_stats(X.clone().requires_grad_(), weights=t[:, 0]),
    r"weights\[1\]": lambda t: fastjac.row_sqnorm([X.clone().requires_grad_(), t]),
    "logits": lambda t: fastjac.softmax_residual(t, Y),
}


@pytest.mark.parametrize("name, call", OPS.items(), ids=OPS)
def test_ops(name: str, call: Callable[[Tensor], Any]) -> None:
    with torch.inference_mode():
        t = torch.randn(3, 4)
        parameter = nn.Parameter(t)
    with pytest.raises(RuntimeError, match=f"^{name} was made under .*: .*pass a clone"):
        call(parameter if name == "logits" else t)
