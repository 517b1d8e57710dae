"""An attached layer-wise penalty against the reference: values, gradients, options, layouts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, cpu_only
from layer_cases import Counting, Model, check, close, encoder_layer, mlp, recorded
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastjac
from fastjac import reference
from fastjac.nn import ConvAct1d, ConvAct2d, ConvAct3d, LinearAct
from fastjac.ops import dispatch, native
from fastjac.ops.dispatch import OPS
from fastjac.ops.native import triton_interpreted
from fastjac.penalties import DREG

pytestmark = pytest.mark.usefixtures("double")


def nested() -> tuple[nn.Module, dict[str, Any]]:
    inner = Model(lambda m, x: m.act(m.fc(x)) + x, fc=nn.Linear(5, 5), act=nn.Mish())
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), inner, nn.Linear(5, 2))
    return model, {"0": torch.tanh, "2.fc": F.mish}


def functional() -> tuple[nn.Module, dict[str, Any]]:
    def forward(m: Model, x: Tensor) -> Tensor:
        a = fastjac.gelu(m.one(x), approximate="tanh")
        return m.head(fastjac.softplus(m.two(a), beta=2.0))

    model = Model(forward, one=nn.Linear(4, 5), two=nn.Linear(5, 5), head=nn.Linear(5, 2))
    return model, {
        "one": partial(F.gelu, approximate="tanh"),
        "two": partial(F.softplus, beta=2.0),
    }


def fused() -> tuple[nn.Module, dict[str, Any]]:
    return fastjac.fuse(mlp()), {"0": F.gelu, "2": F.silu}


def convolutions() -> tuple[nn.Module, dict[str, Any]]:
    grouped = nn.Conv1d(2, 4, 3, padding=1, groups=2)
    circular = nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular")
    modules = (grouped, nn.GELU(), nn.Conv1d(4, 3, 3, stride=2), nn.SiLU(), circular, nn.Tanh())
    return nn.Sequential(*modules), {"0": F.gelu, "2": F.silu, "4": torch.tanh}


CASES = {
    "sequential": (lambda: (mlp(), {"0": F.gelu, "2": F.silu}), (7, 4)),
    "tokens": (lambda: (mlp(), {"0": F.gelu, "2": F.silu}), (3, 5, 4)),
    "nested": (nested, (7, 4)),
    "functional": (functional, (7, 4)),
    "fused": (fused, (7, 4)),
    "held-function": (lambda: (encoder_layer(), {"linear1": F.gelu}), (3, 5, 4)),
    "convolutions": (convolutions, (3, 2, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, both_ways: str) -> None:
    make, shape = CASES[case]
    model, pairs = make()
    assert check(model, torch.randn(shape), pairs).layers_found == list(pairs)


@pytest.fixture(params=["cpu", "reference"])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The implementation that `auto` takes for the row norms; "reference": no library is built."""
    if request.param == "reference":
        taken = dispatch.backend

        def backend(name: str) -> native.Backend:
            return taken(name) if name == "triton" else native.Backend(name, False, "not built")

        monkeypatch.setattr(dispatch, "backend", backend)
    for cached in (dispatch.why_not, dispatch._select_cached):
        cached.cache_clear()
    yield request.param
    monkeypatch.undo()
    for cached in (dispatch.why_not, dispatch._select_cached):
        cached.cache_clear()


@cpu_only
@pytest.mark.skipif(not triton_interpreted(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("case", ["sequential", "convolutions"])
def test_statistic_by_triton(case: str, both_ways: str, rows: str) -> None:
    """Triton has no row norms: PyTorch computes them on a GPU for which only Triton can compile."""
    (make, shape), device = CASES[case], torch.device("cpu")
    model, pairs = make()
    assert OPS["row_sqnorm"].select("auto", device, torch.float64) == rows
    model = fastjac.fuse(model, impl="triton")
    with Counting() as counted:
        check(model, torch.randn(shape), pairs)
    assert counted.names["act_stats_triton"] == 2 * len(pairs)
    assert counted.names["act_stats_backward_triton"] == 2 * len(pairs)
    for name in ("row_sqnorm", "row_sqnorm_backward"):
        assert (counted.names[name] > 0) == (rows == "cpu")
    check(model, torch.randn(shape), pairs, squared=False)


@pytest.mark.parametrize(
    "options",
    [
        {"over": "units"},
        {"over": "elements", "positions": "mean"},
        {"layers": "mean"},
        {"use_weight": False},
        {"squared": False},
        {"layer_weights": (0.0, 2.0)},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], both_ways: str) -> None:
    check(mlp(), torch.randn(3, 5, 4), {"0": F.gelu, "2": F.silu}, **options)


def test_layer_act_modules_are_torchs_with_their_activation() -> None:
    x = torch.randn(7, 4)
    first, second = LinearAct(4, 5, "elu", alpha=0.7), LinearAct(5, 5, "sine", bias=False)
    model = nn.Sequential(first, second, nn.Linear(5, 2))
    plain = nn.Sequential(nn.Linear(4, 5), nn.ELU(0.7), nn.Linear(5, 5, bias=False))
    plain[0].load_state_dict(first.state_dict())
    plain[2].load_state_dict(second.state_dict())
    close(model[:2](x), torch.sin(plain(x)))
    truth = reference.dreg(
        [(plain[0](x), plain[0].weight, plain[1]), (plain(x), plain[2].weight, torch.sin)]
    ).mean()
    penalty = DREG(model)
    model(x)
    value = penalty()
    close(value, truth)
    close(
        torch.autograd.grad(value, [first.weight, first.bias, second.weight]),
        torch.autograd.grad(truth, [plain[0].weight, plain[0].bias, plain[2].weight]),
    )
    for kind, conv, n in ((ConvAct1d, nn.Conv1d, 1), (ConvAct2d, nn.Conv2d, 2)):
        ours, theirs = kind(2, 3, 3, "tanh", padding=1), conv(2, 3, 3, padding=1)
        theirs.load_state_dict(ours.state_dict())
        image = torch.randn(2, 2, *[5] * n)
        close(ours(image), theirs(image).tanh())
    assert isinstance(ConvAct3d(1, 1, 1), nn.Conv3d)


def test_shared_module_and_tied_weight_count_each_time(both_ways: str) -> None:
    tied = nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = tied.weight
    model = Model(
        lambda m, x: m.act(m.b(m.act(m.a(m.act(m.a(x)))))), a=tied, b=other, act=nn.GELU()
    )
    x = torch.randn(5, 4)
    penalty = DREG(model)
    model(x)
    penalty()
    model(x)
    value = penalty()
    assert penalty.layers_found == ["a", "a", "b"]
    z1 = F.linear(x, tied.weight, tied.bias)
    z2 = F.linear(F.gelu(z1), tied.weight, tied.bias)
    z3 = F.linear(F.gelu(z2), tied.weight, other.bias)
    truth = reference.dreg([(z, tied.weight, F.gelu) for z in (z1, z2, z3)]).mean()
    close(value, truth)
    inputs = [tied.weight, tied.bias, other.bias]
    close(torch.autograd.grad(value, inputs), torch.autograd.grad(truth, inputs))


def test_penalty_alone_reaches_every_weight_and_bias(both_ways: str) -> None:
    model, x = mlp(), torch.randn(6, 4)
    penalty = DREG(model)
    for _ in range(2):
        model.zero_grad()
        model(x)
        penalty().backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    _, stack = recorded(plain, x, {"0": F.gelu, "2": F.silu})
    reference.dreg(stack).mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(p.grad, q.grad)


def test_parametrised_weight(both_ways: str) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.GELU())
    check(model, torch.randn(6, 4), {"0": F.gelu})


def test_frozen_parameters(both_ways: str) -> None:
    for frozen in ("weight", "bias"):
        model, x = mlp(), torch.randn(6, 4)
        getattr(model[0], frozen).requires_grad_(False)
        penalty = DREG(model)
        for _ in range(2):
            model(x)
            penalty().backward()
        assert getattr(model[0], frozen).grad is None
        assert model[2].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, both_ways: str) -> None:
    """Against float64: no worse than what eager torch does under the same autocast."""
    model, x = mlp().float(), torch.randn(64, 4, dtype=torch.float32)
    wide = copy.deepcopy(model).double()

    def gradients(net: nn.Module, x: Tensor, *, ours: bool, cast: bool) -> list[Tensor]:
        with torch.autocast(DEVICE, dtype, enabled=cast):
            if ours:
                penalty = DREG(net)
                net(x)
                penalty()
                output = net(x)
                value = penalty()
            else:
                output, stack = recorded(net, x, {"0": F.gelu, "2": F.silu})
                value = reference.dreg(stack).mean()
            loss = output.float().square().mean() if cast else output.square().mean()
        return list(torch.autograd.grad(loss + value, list(net.parameters())))

    truth = gradients(wide, x.double(), ours=False, cast=False)
    eager = gradients(copy.deepcopy(model), x, ours=False, cast=True)
    mine = gradients(copy.deepcopy(model), x, ours=True, cast=True)
    for m, e, t, p in zip(mine, eager, truth, model.parameters(), strict=True):
        assert m.dtype == p.dtype
        error, eagers = ((v.double() - t).norm() / t.norm() for v in (m, e))
        assert error <= max(1.5 * eagers.item(), 4 * torch.finfo(dtype).eps), (error, eagers)


def test_second_derivative_through_an_attached_penalty(both_ways: str) -> None:
    """The gradient of the gradient: a recorded backward is made of differentiable operations."""
    model, x = mlp(), torch.randn(4, 4).requires_grad_()
    plain = copy.deepcopy(model)
    results = []
    for net in (model, plain):
        if net is model:
            penalty = DREG(net)
            net(x)
            penalty()
            loss = net(x).square().mean() + penalty()
        else:
            output, stack = recorded(net, x, {"0": F.gelu, "2": F.silu})
            loss = output.square().mean() + reference.dreg(stack).mean()
        inputs = [x, *net.parameters()]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        results.append((*first, *torch.autograd.grad(norm, inputs)))
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_batched_cotangents_through_an_attached_model(both_ways: str) -> None:
    model, x = mlp(), torch.randn(2, 4)
    plain = copy.deepcopy(model)
    penalty = DREG(model)
    model(x)
    penalty()
    rows = [
        torch.autograd.grad(
            net(x).flatten(), list(net.parameters()), torch.eye(6), is_grads_batched=True
        )
        for net in (model, plain)
    ]
    close(*rows)


def test_batched_cotangents_of_the_value(both_ways: str) -> None:
    model, x = mlp(), torch.randn(6, 4)
    penalty = DREG(model)
    model(x)
    penalty()
    model(x)
    value, weights = penalty(), [model[0].weight, model[2].weight]
    once = torch.autograd.grad(value, weights, retain_graph=True)
    batch = torch.autograd.grad(value, weights, torch.tensor([1.0, 2.0]), is_grads_batched=True)
    close(batch, tuple(torch.stack([g, 2 * g]) for g in once))
