"""Wrong options and arguments: the type of the error, and that the message names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, cpu_only
from penalty_cases import SPECS
from torch import Tensor, nn

import fastjac.penalties as p
from fastjac.penalties import PenaltySpec, SpectReg

N, D, M = 3, 4, 5
torch.manual_seed(0)
MODEL = nn.Linear(D, M)
X = torch.randn(N, D, requires_grad=True)
OUT = MODEL(X)
TARGET = torch.tensor([0, 1, 2])
TOKENS = torch.zeros(N, D, dtype=torch.int64)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on another device, with no GPU needed."""
    return torch.zeros(*shape, dtype=dtype, device="meta")


OPTIONS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SpectReg(weight="1"), TypeError, "weight"),
    (lambda: SpectReg(weight=True), TypeError, "weight"),
    (lambda: SpectReg(weight=float("nan")), ValueError, "weight"),
    (lambda: SpectReg(reduction="avg"), ValueError, "reduction is 'avg'.*'mean', 'sum', 'none'"),
    (lambda: SpectReg(every=0), ValueError, "every"),
    (lambda: SpectReg(every=1.5), TypeError, "every"),
    (lambda: SpectReg(n_proj=0), ValueError, "n_proj is 0.*-1 for the exact"),
    (lambda: SpectReg(n_proj=-2), ValueError, "n_proj"),
    (lambda: SpectReg(n_proj=2.0), TypeError, "n_proj"),
    (lambda: SpectReg(n_proj=True), TypeError, "n_proj"),
    (lambda: SpectReg(norm="l3"), ValueError, "norm is 'l3'"),
    (lambda: SpectReg(n_proj=-1, norm="l1"), ValueError, "norm is 'l1' and n_proj is -1"),
    (lambda: p.RandomOneHot(n_proj=-1, norm="l2"), ValueError, "norm is 'l2' and n_proj is -1"),
    (lambda: SpectReg(chunk_size=0), ValueError, "chunk_size"),
    (lambda: p.FrobReg(chunk_size="2"), TypeError, "chunk_size"),
    (lambda: p.TangentProp(chunk_size=-1), ValueError, "chunk_size"),
    (lambda: p.Sobolev(chunk_size=0), ValueError, "chunk_size"),
    (lambda: SpectReg(generator=0), TypeError, "generator"),
    (lambda: p.AccumulatedDREG(generator=0), TypeError, "generator"),
    (lambda: SpectReg(normalize=1), TypeError, "normalize"),
    (lambda: SpectReg(shared="yes"), TypeError, "shared"),
    (lambda: SpectReg(normalize=True, scale=False), ValueError, "scale is False and normalize"),
    (lambda: SpectReg(at=0), TypeError, "at is int"),
    (lambda: SpectReg(engine="fast"), ValueError, "engine is 'fast'.*'auto', 'chain', 'autograd'"),
    (lambda: p.JacobianReg(engine=None), ValueError, "engine is None"),
    (lambda: p.DREG(engine="chain"), TypeError, "engine"),
    (lambda: SpectReg(nproj=2), TypeError, "nproj"),
    (lambda: p.JacobianReg(norm="l1"), TypeError, "norm"),
    (lambda: p.Eikonal(center=2.0), TypeError, "center"),
    (lambda: p.IGPen("mse"), TypeError, "loss_fn"),
    (lambda: p.GradientPenalty(center=-1), ValueError, "center"),
    (lambda: p.GradientPenalty(one_sided=None), TypeError, "one_sided"),
    (lambda: p.FiniteDifferenceDataGrad(eps=0), ValueError, "eps"),
    (lambda: p.DREG(over="layers"), ValueError, "over"),
    (lambda: p.DREG(layers="max"), ValueError, "layers"),
    (lambda: p.DREG(positions="max"), ValueError, "positions"),
    (lambda: p.DREG(include_output=1), TypeError, "include_output"),
    (lambda: p.DREG(use_weight=1), TypeError, "use_weight"),
    (lambda: p.DREG(squared=0), TypeError, "squared"),
    (lambda: p.DREG(layer_weights=["a"]), TypeError, "layer_weights"),
]

CALLS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: SpectReg()(None, X), TypeError, "first argument is NoneType"),
    (lambda: SpectReg()(X, None), TypeError, "output is NoneType"),
    (lambda: SpectReg()(X, OUT[0, 0]), ValueError, "output has no dimensions"),
    (lambda: SpectReg()(TOKENS, OUT), TypeError, "x has dtype torch.int64.*embeddings"),
    (lambda: SpectReg()(MODEL, TOKENS), TypeError, "x has dtype torch.int64.*embeddings"),
    (lambda: SpectReg()(MODEL, [1.0]), TypeError, "x is list"),
    (lambda: SpectReg()(X.detach(), OUT), RuntimeError, "x does not require grad"),
    (lambda: SpectReg()(X, OUT.detach()), RuntimeError, "output has no grad_fn"),
    (lambda: SpectReg()(OUT, X), RuntimeError, "x and output are swapped"),
    (lambda: SpectReg()(X, TOKENS), TypeError, "output has dtype torch.int64"),
    (lambda: SpectReg()(X.clone(), OUT), RuntimeError, "output does not depend on x"),
    (lambda: SpectReg()(X, OUT[:2]), ValueError, "output has batch size 2 and x has 3"),
    (lambda: SpectReg()(X, OUT[:, :0]), ValueError, "output has shape"),
    (lambda: SpectReg()(lambda x: (x, x), X), TypeError, "output is tuple"),
    (lambda: SpectReg()(lambda x: x.detach() * 2, X), RuntimeError, "output has no grad_fn"),
    (lambda: SpectReg()(lambda x: MODEL(x.detach()), X), RuntimeError, "does not depend on x"),
    (lambda: SpectReg(at="2")(MODEL, X), ValueError, "at='2' is not a submodule"),
    (lambda: SpectReg(at="")(MODEL, X), ValueError, "at='' is not a submodule"),
    (lambda: SpectReg(at="0")(lambda x: x, X), TypeError, "at='0'.*nn.Module"),
    (lambda: SpectReg(at="0")(torch.compile(Twice()), X), TypeError, "at='0'.*of a compiled model"),
    (lambda: p.DREG()(torch.compile(Twice()), X), TypeError, "torch.compile'd module"),
    (lambda: SpectReg(at="0")(Twice(), X), RuntimeError, "at='0' ran 2 times"),
    (lambda: SpectReg(at="1")(Twice(), X), RuntimeError, "at='1' ran 0 times"),
    (lambda: SpectReg()(X, OUT, projection=OUT[:2]), ValueError, "projection has shape"),
    (lambda: SpectReg()(X, OUT, projection=torch.ones(0, N, M)), ValueError, "projection"),
    (lambda: SpectReg()(X, OUT, projection=[1]), TypeError, "projection is list"),
    (lambda: SpectReg()(X, OUT, projection=OUT.double()), TypeError, "projection has dtype"),
    (lambda: SpectReg()(X, OUT, projection=meta(N, M)), ValueError, "projection is on meta"),
    (lambda: SpectReg(-1)(X, OUT, projection=OUT), ValueError, "projection is given and n_proj"),
    (lambda: p.DataGrad()(X, OUT), TypeError, "target"),
    (lambda: p.DataGrad()(X, OUT, None), TypeError, "target is NoneType"),
    (lambda: p.DataGrad()(X, OUT, TARGET[:2]), ValueError, "target has batch size 2"),
    (lambda: p.DataGrad()(X, OUT, TARGET.int()), TypeError, "target has dtype torch.int32"),
    (lambda: p.DataGrad()(X, OUT, TARGET > 0), TypeError, "target has dtype torch.bool"),
    (lambda: p.DataGrad()(X, OUT, TARGET[:, None]), ValueError, "target has shape"),
    (lambda: p.DataGrad()(X, OUT, torch.ones(N, 2)), ValueError, "target has shape"),
    (lambda: p.OneHot()(X, OUT, meta(N, dtype=torch.int64)), ValueError, "target is on meta"),
    (lambda: p.DataGrad()(X, OUT[:, 0], TARGET * 0), ValueError, "output has 1 column.*DataGrad"),
    (lambda: p.JacReg()(X, OUT[:, :1]), ValueError, "output has 1 column.*JacReg"),
    (lambda: p.ConfidencePenalty()(X, OUT[:, 0]), ValueError, "output has 1 column"),
    (lambda: p.ConfidencePenalty()(X[:2], OUT), ValueError, "output has batch size 3"),
    (lambda: p.ConfidencePenalty()(X, TOKENS), TypeError, "output has dtype"),
    (
        lambda: p.IGPen(lambda o: o.mean())(X, OUT),
        ValueError,
        r"loss_fn returned a tensor of shape \[\].*one loss per sample",
    ),
    (lambda: p.IGPen(lambda o: o)(X, OUT), ValueError, r"returned a tensor of shape \[3, 5\]"),
    (lambda: p.IGPen(lambda o: 1.0)(X, OUT), ValueError, "loss_fn returned float"),
    (lambda: p.IGPen(lambda o: o.detach().sum(1))(X, OUT), RuntimeError, "loss_fn"),
    (
        lambda: p.GradientPenalty()(X, OUT),
        ValueError,
        r"output has shape \(3, 5\): GradientPenalty",
    ),
    (lambda: p.Eikonal()(X, OUT), ValueError, "Eikonal needs one output"),
    (lambda: p.TangentProp()(X, OUT, OUT), ValueError, "tangents has shape"),
    (lambda: p.TangentProp()(X, OUT, X.double()), TypeError, "tangents has dtype"),
    (lambda: p.TangentProp()(X, OUT, meta(N, D)), ValueError, "tangents is on meta"),
    (lambda: p.TangentProp()(X, OUT, X[None][:0]), ValueError, "tangents has shape"),
    (lambda: p.Sobolev()(X, OUT, X), ValueError, "target_grad has shape"),
    (lambda: p.Sobolev()(X, OUT, torch.ones(2, M, D)), ValueError, "target_grad has batch size 2"),
    (lambda: p.Sobolev()(X, OUT, torch.ones(N, M, D).double()), TypeError, "target_grad has dtype"),
    (lambda: p.FiniteDifferenceDataGrad()(X, OUT, TARGET), TypeError, "no graph form"),
    (lambda: p.DREG()(X, OUT), TypeError, "no graph form"),
    (lambda: p.AccumulatedDREG()(X, OUT), TypeError, "no graph form"),
    (lambda: p.DREG()(lambda x: x, X), TypeError, "model is function"),
    (lambda: p.DREG()(MODEL, None), TypeError, "x is NoneType"),
    (lambda: p.AccumulatedDREG()(MODEL, TOKENS), TypeError, "x has dtype torch.int64"),
    (lambda: p.AccumulatedDREG()(MODEL, X, tangent=X[:2]), ValueError, "tangent has shape"),
    (lambda: p.AccumulatedDREG()(MODEL, X, tangent=X.double()), TypeError, "tangent has dtype"),
    (lambda: SpectReg(engine="chain")(X, OUT), ValueError, "engine='chain' is for the model form"),
    (lambda: chained(lambda x: (x, x)), TypeError, "output is tuple"),
    (lambda: chained(lambda x: x.detach() * 2), RuntimeError, "output has no grad_fn: it was deta"),
    (lambda: chained(lambda x: MODEL(x.detach())), RuntimeError, "does not depend on x"),
    (lambda: chained(lambda x: None), TypeError, "output is NoneType"),
    (lambda: chained(lambda x: MODEL(x)[:2]), ValueError, "output has batch size 2 and x has 3"),
    (lambda: chained(lambda x: MODEL(x)[:, :0]), ValueError, "output has shape"),
    (lambda: chained(lambda x: MODEL(x).argmax(1)), TypeError, "output has dtype torch.int64"),
    (lambda: chained(MODEL, [1.0]), TypeError, "x is list"),
    (lambda: chained(MODEL, TOKENS), TypeError, "x has dtype torch.int64"),
    (lambda: chained(MODEL, X[:0]), RuntimeError, "x is empty"),
    (lambda: p.spectreg(X, OUT, every=2), TypeError, "every is an option of the module alone"),
    (lambda: p.spectreg(X, OUT, nproj=2), TypeError, "no option 'nproj'. Did you mean 'n_proj'"),
    (lambda: p.datagrad(X, OUT, TARGET, at="0"), ValueError, "at='0' is for the model form"),
    (lambda: p.dreg(X, OUT), TypeError, "no graph form"),
]


def chained(model: Callable[..., Any], x: Any = X) -> Any:
    return SpectReg(engine="chain")(model, x)


class Twice(nn.Sequential):
    """Runs its first layer twice and its second never."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(D, D), nn.Linear(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return self[0](self[0](x))


@pytest.mark.parametrize(("make", "error", "message"), OPTIONS, ids=[o[2] for o in OPTIONS])
def test_wrong_option(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@cpu_only
@pytest.mark.parametrize("shift", [4, -1])
def test_class_indices_out_of_range(shift: int) -> None:
    with pytest.raises(ValueError, match=r"target has class indices.*\[0, 5\)"):
        p.DataGrad()(X, OUT, TARGET + shift)
    with pytest.raises(ValueError, match="target"):
        p.FiniteDifferenceDataGrad()(MODEL, X, TARGET + shift)


@pytest.mark.parametrize(("call", "error", "message"), CALLS, ids=[c[2] for c in CALLS])
def test_wrong_argument(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("spec", [p for p in SPECS if p.values[0].kind == "input-jacobian"])
def test_gradients_switched_off(spec: PenaltySpec) -> None:
    example = spec.example(torch.float32, torch.Generator(DEVICE))
    penalty = spec.module(**example.options)
    for mode, name in ((torch.no_grad, "torch.no_grad"), (torch.inference_mode, "inference mode")):
        with mode(), pytest.raises(RuntimeError, match=name):
            penalty(example.model, example.x, *example.targets)


def test_failed_call_leaves_the_model_and_the_count_alone() -> None:
    penalty, model = SpectReg(every=2, at="0"), Twice()
    with pytest.raises(RuntimeError, match="ran 2 times"):
        penalty(model, X)
    assert penalty._calls == 0
    assert not model[0]._forward_hooks


def test_generator_on_another_device() -> None:
    output = meta(N, M).requires_grad_() * 2
    with pytest.raises(ValueError, match="generator is on cpu"):
        SpectReg(generator=torch.Generator("cpu")).cotangents(output)
