"""The ops of an MLP in graphs of ``torch.compile``: their results, and when they stand there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chain_cases import close
from compiled_cases import MARKS, Graphs, calls, compiled
from torch import Tensor, nn

import fastjac
from fastjac.activations import MAX_PARAMS, TABLE
from fastjac.input_jacobian.traced_mlp import layers_of, plan_of
from fastjac.nn import activation_of, row_of
from fastjac.ops.in_graph import MLP_WEIGHT
from fastjac.ops.mlp import ONCE
from fastjac.ops.registration import raw
from fastjac.penalties import DREG, DataGrad, FrobReg, IGPen, JacReg, SpectReg, TangentProp

pytestmark = MARKS


def net(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), *middle, nn.Linear(6, 3)),
    )


SHAPES: dict[str, Callable[[], nn.Sequential]] = {
    "curved": lambda: net(nn.GELU()),
    "not curved": lambda: net(nn.ReLU()),
    "two Linear modules in a row": lambda: net(),
    "parameters": lambda: net(nn.LeakyReLU(0.3)),
    "nested": lambda: net(nn.Sequential(nn.SiLU(), nn.Sequential(nn.Linear(6, 6), nn.Mish()))),
    "flattens": lambda: nn.Sequential(nn.Flatten(), *net(nn.GELU())),
}


def inputs_of(model: nn.Sequential, n: int = 5) -> Tensor:
    return torch.randn(n, 2, 2) if type(model[0]) is nn.Flatten else torch.randn(n, 4)


def shared() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.GELU(), layer, nn.GELU(), nn.Linear(4, 3))


# ---- the raw ops


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("k", [1, 3])
def test_fake_kernels_know_the_sizes(name: str, k: int) -> None:
    model, n = SHAPES[name](), 5
    x = inputs_of(model, n)
    layers = layers_of(model, x)
    assert layers is not None
    x = x.flatten(1)
    weights = [weight.detach() for weight, _, _ in layers]
    biases = [bias.detach() for _, bias, _ in layers if bias is not None]
    plan, checks = plan_of(layers), ("test_schema", "test_faketensor")

    def run(op: str, *args: Any) -> Any:
        torch.library.opcheck(raw(op), args, test_utils=checks)
        return raw(op)(*args)

    output, saved = run("mlp_forward", x, weights, biases, plan)
    close(output, model(x.view(inputs_of(model, n).shape)).detach())
    w = torch.randn(k * n, 3)
    v, norms, deltas = run("mlp_pull", w, weights, saved, k, plan)
    close(norms, v.square().sum(1))
    u, factor = torch.randn(k * n, 4), torch.rand(k * n)
    out, pushed = run("mlp_push", u, factor, weights, saved, deltas, k, plan)
    assert out.shape == w.shape
    wanted = [1.0] * len(weights) + [0.0] * len(biases) + [1.0]
    for given in (pushed, None):
        args = (output, u, factor, x, weights, saved, deltas, given, wanted, plan)
        *grads, grad_x = run("mlp_backward", *args)
        assert [g.shape for g in grads[: len(weights)]] == [t.shape for t in weights]
        assert grad_x.shape == x.shape and not any(g.numel() for g in grads[len(weights) :])
    run("mlp_backward", output, None, None, x, weights, saved, None, None, wanted, plan)


def test_plans_that_do_not_fit() -> None:
    x, weight = torch.randn(5, 4), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="plan must have rows of"):
        raw("mlp_forward")(x, [weight], [], [0.0] * (5 + MAX_PARAMS + 1))
    with pytest.raises(RuntimeError, match="is not differentiable: use a penalty"):
        raw("mlp_forward")(x.requires_grad_(), [weight], [], [0.0])


# ---- the same results as autograd


def gradients(penalty: Any, model: Any, x: Tensor, args: Any, run: Any) -> list[Tensor]:
    """Of the output and the value together, with respect to x and the parameters."""
    x = x.clone().requires_grad_()

    def loss(x: Tensor, *args: Tensor) -> Tensor:
        output, value = penalty(model, x, *args)
        return output.square().sum() + value

    total = run(loss)(x, *args)
    return [total.detach(), *torch.autograd.grad(total, [x, *model.parameters()])]


def agrees(model: Any, x: Tensor, kind: Any, *args: Tensor, **options: Any) -> None:
    graphs = Graphs()
    options = {"weight": 0.7, **options}
    found = gradients(kind(**options), model, x, args, lambda f: compiled(f, graphs))
    truth = gradients(kind(engine="autograd", **options), model, x, args, lambda f: f)
    close(found, truth, rtol=1e-10, atol=1e-12)
    assert calls(graphs.forward[-1])["fastjac.mlp_forward"] == 1
    assert calls(graphs.backward[-1])["fastjac.mlp_backward"] >= 1


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", [FrobReg, DataGrad])
def test_networks(name: str, kind: Any) -> None:
    """The cotangents of DataGrad depend on the output, so what they add goes down through it."""
    torch.manual_seed(0)
    model = SHAPES[name]()
    x = inputs_of(model)
    agrees(model, x, kind, *([torch.arange(5) % 3] if kind is DataGrad else []))


@pytest.mark.parametrize("kind", [FrobReg, JacReg])
def test_parts_of_the_cotangents(kind: Any) -> None:
    torch.manual_seed(0)
    agrees(SHAPES["curved"](), torch.randn(5, 4), kind, chunk_size=2)


def test_norms_that_are_not_squared() -> None:
    torch.manual_seed(0)
    agrees(SHAPES["curved"](), torch.randn(5, 4), DataGrad, torch.arange(5) % 3, norm="l1")


def test_a_module_twice_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    agrees(shared(), torch.randn(5, 4), FrobReg)
    for frozen in ("0.weight", "2.weight", "3.bias"):
        model = SHAPES["two Linear modules in a row"]()
        model.get_parameter(frozen).requires_grad_(False)
        found = []
        for run in (compiled, lambda f: f):
            value = run(lambda x, model=model: FrobReg()(model, x)[1])(torch.ones(5, 4))
            trained = [p for p in model.parameters() if p.requires_grad]
            found.append(torch.autograd.grad(value, trained, materialize_grads=True,
                                             allow_unused=True))  # fmt: skip
        close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("fn", [fn for fn in TABLE if fn != "identity"])
def test_activations(fn: str) -> None:
    torch.manual_seed(0)
    agrees(net(fastjac.Act(fn)), torch.randn(5, 4), DataGrad, torch.arange(5) % 3)


def test_rows_of_modules() -> None:
    """As `activation_of`, which dynamo does not trace."""
    modules = [nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU(0.2), nn.ELU(0.5), nn.Tanh(), nn.Softplus()]
    for module in (*modules, nn.Softplus(2.0), nn.PReLU(), nn.Linear(2, 2)):
        act, row = activation_of(module), row_of(module)
        if act is None:
            assert row is None
        else:
            assert row == (act.fn, TABLE[act.fn].param_values(act.params))
    assert row_of(fastjac.Act("celu", alpha=2.0)) == ("celu", (2.0,))
    assert row_of(fastjac.Act("celu", impl="reference")) is None


# ---- the backward


def test_gradients_of_one_part_leave_nothing_behind() -> None:
    """A backward that does not reach the output must not count in the next one."""
    torch.manual_seed(0)
    model, x = SHAPES["curved"](), torch.randn(5, 4)
    penalty, w = SpectReg(), torch.randn(5, 3, requires_grad=True)

    def values(x: Tensor, w: Tensor) -> Any:
        return penalty(model, x, projection=w)

    found = []
    for run in (compiled(values, "eager"), values):
        output, value = run(x, w)
        (of_w,) = torch.autograd.grad(value, w, retain_graph=True)
        of_loss = torch.autograd.grad(output.sum(), model[0].weight, retain_graph=True)
        twice = torch.autograd.grad(value, model[0].weight, retain_graph=True)
        found.append([of_w, *of_loss, *twice, *torch.autograd.grad(value, model[0].weight)])
    close(*found)


def test_third_derivatives_are_refused() -> None:
    model, x = SHAPES["curved"](), torch.randn(5, 4, requires_grad=True)
    value = compiled(lambda x: FrobReg()(model, x)[1], "eager")(x)
    with pytest.raises(RuntimeError, match=ONCE[:40]):
        torch.autograd.grad(value, x, create_graph=True)


def test_other_products_run_the_model_again() -> None:
    """A loss may depend on x beside the output."""
    torch.manual_seed(0)
    model, x = SHAPES["curved"](), torch.randn(5, 4)

    def loss(output: Tensor, x: Tensor) -> Tensor:
        return (output.sum(1) * x.sin().sum(1)).square()

    found = []
    for run in (compiled, lambda f: f):
        leaf = x.clone().requires_grad_()
        value = run(lambda x: IGPen(loss)(model, x, x)[1])(leaf)
        inputs = [leaf, *list(model.parameters())[:-1]]
        found.append(torch.autograd.grad(value, inputs))
    close(*found)


# ---- when the ops are taken


def hooked() -> nn.Sequential:
    model = SHAPES["curved"]()
    model[1].register_forward_hook(lambda module, args, out: 2 * out)
    return model


def patched() -> nn.Sequential:
    model = SHAPES["curved"]()
    model[1].forward = torch.sin
    return model


def weight_norm() -> nn.Sequential:
    model = SHAPES["curved"]()
    nn.utils.parametrizations.weight_norm(model[2])
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "forward hook": hooked,
    "forward of the user": patched,
    "parametrization": weight_norm,
    "ends in an activation": lambda: nn.Sequential(*SHAPES["curved"](), nn.Tanh()),
    "one layer": lambda: nn.Sequential(nn.Linear(4, 3)),
    "norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)),
    "activation without a row": lambda: net(nn.PReLU()),
    "large": lambda: nn.Sequential(nn.Linear(4, MLP_WEIGHT // 4 + 1), nn.Tanh(), nn.Linear(
        MLP_WEIGHT // 4 + 1, 3)),
}  # fmt: skip


def ops_in(step: Callable[[Tensor], Any], x: Tensor) -> int:
    torch._dynamo.reset()
    graphs = Graphs()
    compiled(step, graphs)(x)
    return calls(graphs.forward[-1])["fastjac.mlp_forward"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str) -> None:
    torch.manual_seed(0)
    model, x = OTHERS[name](), torch.randn(5, 4)
    assert ops_in(lambda x: FrobReg()(model, x)[1], x) == 0
    found = compiled(lambda x: FrobReg()(model, x)[1])(x)
    close(found, FrobReg(engine="autograd")(model, x)[1])


def test_other_calls() -> None:
    model, x = SHAPES["curved"](), torch.randn(5, 4)
    assert ops_in(lambda x: FrobReg()(model, x)[1], x) == 1
    assert ops_in(lambda x: FrobReg(engine="autograd")(model, x)[1], x) == 0
    assert ops_in(lambda x: FrobReg(at="1")(model, x)[1], x) == 0
    assert ops_in(lambda x: TangentProp()(model, x, torch.ones_like(x))[1], x) == 0
    low = copy.deepcopy(model).bfloat16()
    assert ops_in(lambda x: FrobReg()(low, x.bfloat16())[1], x) == 0

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return FrobReg()(model, x)[1]

    assert ops_in(under_autocast, x) == 0
    penalty = DREG(model)
    assert ops_in(lambda x: FrobReg()(model, x)[1] + penalty(), x) == 0
    penalty.detach()
    assert ops_in(lambda x: FrobReg()(model, x)[1], x) == 1
