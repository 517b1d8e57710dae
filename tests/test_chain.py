"""The chain engine against autograd and the references: all gradients, in any order, precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import close, convnet, run, same, spectreg, three_layers
from conftest import cpu_only
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import Model
from penalty_cases import CASES, Call, close_gradients, gradients, specs_with, takes
from torch import Tensor, nn

import fastjac.input_jacobian.chain.mlp as mlp_module
from fastjac import Act
from fastjac.activations import TABLE
from fastjac.bench.networks import lenet, small_resnet
from fastjac.input_jacobian.chain import network
from fastjac.penalties import DataGrad, FrobReg, PenaltySpec, SpectReg, TangentProp

# Exact in float32: torch's CELU rounds 1 / alpha to it (2.13), whatever the dtype of the tensor.
PARAMS = {
    "min_val": -0.5,
    "max_val": 2.0,
    "negative_slope": 0.25,
    "alpha": 0.5,
    "beta": 2.0,
    "threshold": 1.5,
    "omega": 3.0,
}


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def module_of(name: str, form: str) -> nn.Module:
    """The activation as torch's module or as ours, at its defaults or not."""
    row = TABLE[name]
    params = {k: PARAMS[k] for k in row.params} if form.endswith("other") else {}
    # Torch cannot differentiate its own Hardsigmoid twice, so it is no truth.
    if row.module in (None, "Hardsigmoid") or form.startswith("ours"):
        return Act(name, **params)
    return getattr(nn, row.module)(**row.torch_kwargs, **params)


FORMS = ["torch", "ours", "torch, other", "ours, other"]


@st.composite
def chains(draw: Any) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A network, a batch and the options of a SpectReg."""
    width = draw(st.integers(1, 4))
    n = draw(st.sampled_from([1, 2, 3, 5]))
    shape = draw(st.sampled_from([(width,), (width, 1), (1, width)]))
    layers: list[nn.Module] = [nn.Flatten()] if len(shape) > 1 else []
    extra = draw(st.booleans())  # without them a plain MLP: one C++ call per sweep
    for _ in range(draw(st.integers(1, 4))):
        wide = draw(st.integers(1, 5))
        block: list[nn.Module] = [nn.Linear(width, wide, bias=draw(st.booleans()))]
        more = draw(st.sampled_from(["", "layer norm", "batch norm", "dropout", "residual"]))
        if extra and more == "layer norm":
            block.append(nn.LayerNorm(wide))
        if extra and more == "batch norm":
            block.append(nn.BatchNorm1d(wide).train(n > 2))
        if draw(st.booleans()):
            block.append(
                module_of(draw(st.sampled_from(list(TABLE))), draw(st.sampled_from(FORMS)))
            )
        if extra and more == "dropout":
            block.append(nn.Dropout(0.3))
        if extra and more == "residual":
            block = [Residual(*block[1:], nn.Linear(width, width))]
            wide = width
        layers += block
        width = wide
    layers.append(nn.Linear(width, draw(st.integers(1, 3))))
    chunk = draw(st.sampled_from([None, 1, 2]))
    options = {"n_proj": draw(st.integers(1, 3)), "chunk_size": chunk}
    return nn.Sequential(*layers), torch.randn(n, *shape), options


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_random_chains(data: st.DataObject) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(data.draw(st.integers(0, 1000)))
        model, x, options = data.draw(chains())
        requires_grad = data.draw(st.booleans())
        runs = [
            run(model, x, spectreg(engine, **options), requires_grad=requires_grad)
            for engine in ("chain", "autograd")
        ]
        same(*runs)
    finally:
        torch.set_default_dtype(before)


BY_CPP = [pytest.param(way, marks=cpu_only) for way in ("network", "one call", "one call, large")]


@pytest.fixture(params=["links", *BY_CPP])
def sweeps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ways of the engine. The last one, for a Sequential, frees its layers one by one."""
    if request.param.endswith("large"):
        monkeypatch.setattr(mlp_module, "LARGE", 0)
    if request.param == "links":
        monkeypatch.setattr(network.Network, "of", lambda *args: None)
    return request.param


def by_way(model: nn.Module, x: Tensor, way: str) -> nn.Module:
    """A model that the engine runs in the given way."""
    if way in ("links", "network"):
        model = Model(lambda m, x: m.net(x), net=model)
    described = spectreg("chain").explain(model, x)
    assert ("one C++ call" in described) == (way != "links")
    return model


READY = [c for c in CASES if takes(c.values[0], "engine")]


@pytest.mark.parametrize(("spec", "options"), READY)
def test_every_penalty_equals_its_reference(
    spec: PenaltySpec, options: dict[str, Any], sweeps: str
) -> None:
    call = Call(spec, options, engine="chain")
    truth = call.reference()
    expected = gradients(truth, call.inputs)
    call.model = by_way(call.model, call.x, sweeps)
    value = call.values()
    close(value, truth)
    close_gradients(gradients(value, call.inputs), expected)
    weights = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    close_gradients(
        gradients(weights * value, call.inputs),
        gradients(weights * truth, call.inputs),
    )


@pytest.mark.parametrize("spec", specs_with("engine"))
def test_what_the_engine_cannot_run_is_said(spec: PenaltySpec) -> None:
    call = Call(spec, engine="chain")
    call.x = call.x[:0].detach()
    with pytest.raises(RuntimeError, match="engine='chain' cannot run this call: x is empty"):
        call.values()


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3))


OPTIONS = [{"n_proj": 1}, {"n_proj": 3}, {"n_proj": 3, "chunk_size": 2}, {"norm": "l2"}]


WAYS = [(mlp, "links"), (convnet, "links")]
WAYS += [pytest.param(mlp, *way.values, marks=cpu_only) for way in BY_CPP]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("make", "sweeps"), WAYS, indirect=["sweeps"])
def test_backward_as_often_and_in_any_order(
    make: Any, options: dict[str, Any], sweeps: str
) -> None:
    """Loss and penalty together or apart, once or again: sums of the same two gradients."""
    torch.manual_seed(0)
    model, x = make(), torch.randn(7, 4, requires_grad=True)
    model = by_way(model, x, sweeps)
    inputs = [x, *model.parameters()]

    def graph(engine: str) -> tuple[Tensor, Tensor]:
        output, value = spectreg(engine, **options)(model, x)
        return output.square().sum(), value

    def grad(t: Tensor, keep: bool = False) -> list[Tensor]:
        found = torch.autograd.grad(t, inputs, retain_graph=keep, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, inputs, strict=True)]

    def total(*found: list[Tensor]) -> list[Tensor]:
        return [torch.stack(g).sum(0) for g in zip(*found, strict=True)]

    loss, value = graph("autograd")
    of_loss, of_value = grad(loss, True), grad(value)
    loss, value = graph("chain")
    close(grad(loss + value), total(of_loss, of_value))
    loss, value = graph("chain")
    close(grad(loss), of_loss)
    loss, value = graph("chain")
    close(grad(value), of_value)
    loss, value = graph("chain")
    close(grad(loss, True), of_loss)
    close(grad(value), of_value)
    loss, value = graph("chain")
    close(grad(value, True), of_value)
    close(grad(loss, True), of_loss)
    close(grad(value, True), of_value)
    close(grad(loss + value), total(of_loss, of_value))
    loss, value = graph("chain")
    (loss + value).backward(retain_graph=True)
    once = [p.grad.clone() for p in inputs]
    (loss + value).backward()
    for p, g in zip(inputs, once, strict=True):
        assert torch.equal(p.grad, 2 * g)
    with pytest.raises(RuntimeError, match="a second time.*retain_graph=True"):
        grad(loss + value)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_third_derivative(options: dict[str, Any], sweeps: str) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    model = by_way(mlp(), x, sweeps)
    leaves = [x, *model.parameters()]
    found = []
    for engine in ("autograd", "chain"):
        torch.manual_seed(1)
        output, value = spectreg(engine, **options)(model, x)
        drawn = torch.rand(1)
        for t in (value, output.square().sum(), value + output.sum()):
            grads = torch.autograd.grad(t, leaves, create_graph=True, materialize_grads=True)
            total = sum(g.square().sum() for g in grads)
            again = torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True)
            found.append([t, *grads, *again, drawn, torch.rand(1)])
    for ours, theirs in zip(found[3:], found[:3], strict=True):
        close_gradients(ours, theirs)


@pytest.mark.usefixtures("double")
def test_third_derivative_is_refused_if_the_model_has_kept_a_tensor() -> None:
    kept = []
    model = three_layers(lambda m, x: m.c(F.gelu([h := m.a(x), kept.append(h)][0])))
    x = torch.randn(3, 4, requires_grad=True)
    output, value = spectreg("chain")(model, x)
    assert torch.autograd.grad(output.sum(), x, create_graph=True)[0].requires_grad
    with pytest.raises(RuntimeError, match='differentiable once.*use engine="autograd"'):
        torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("what", ["0.weight", "0.bias", "4.weight", "x"])
def test_written_to_between_forward_and_backward(what: str, sweeps: str) -> None:
    x = torch.randn(3, 4)
    model = mlp()
    value = spectreg("chain")(by_way(model, x, sweeps), x)[1]
    with torch.no_grad():
        (x if what == "x" else model.get_parameter(what)).add_(1)
    if not sweeps.startswith("one call") and what.endswith("bias"):  # no backward needs its numbers
        value.backward()
        return
    with pytest.raises(RuntimeError, match="modified (in place before the b|by an inplace oper)"):
        value.backward()


@pytest.mark.usefixtures("double")
def test_two_penalties_of_one_model_and_input(sweeps: str) -> None:
    x, target = torch.randn(3, 4, requires_grad=True), torch.tensor([0, 1, 2])
    model = by_way(mlp(), x, sweeps)
    found = []
    for engine in ("chain", "autograd"):
        first, a = FrobReg(engine=engine)(model, x)
        second, b = DataGrad(engine=engine)(model, x, target)
        total = F.cross_entropy(first, target) * a + (a * b).sqrt() + second.square().sum()
        found.append(torch.autograd.grad(total, [x, *model.parameters()]))
    close(*found)


@pytest.mark.usefixtures("double")
def test_gradients_of_strided_and_expanded_cotangents(sweeps: str) -> None:
    """The gradient that the engine receives is not contiguous, or is expanded."""
    x = torch.randn(4, 3, requires_grad=True).t()
    model = by_way(mlp(), x, sweeps)
    for loss in (lambda o: o.sum(), lambda o: (o.t() @ torch.ones(3, 2)).square().sum()):
        found = []
        for engine in ("chain", "autograd"):
            output, value = spectreg(engine, reduction="none")(model, x)
            found.append(torch.autograd.grad(loss(output) + value.sum(), list(model.parameters())))
        close(*found)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("make", "shape"), [(lenet, (2, 1, 28, 28)), (small_resnet, (2, 3, 32, 32))]
)
def test_networks_of_the_benchmark(make: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    same(*[run(model, x, spectreg(engine)) for engine in ("chain", "autograd")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [mlp, convnet])
def test_rounding_errors_are_those_of_autograd(make: Any, dtype: torch.dtype) -> None:
    """All gradients together, against the truth of the same rounded numbers in float64."""
    torch.manual_seed(0)
    model, x = make().to(dtype), torch.randn(64, 4).to(dtype)
    w = torch.randn(2, 64, 3).to(dtype)

    def step(engine: str, dtype: torch.dtype) -> Tensor:
        net, leaf = copy.deepcopy(model).to(dtype), x.to(dtype).requires_grad_()
        output, value = SpectReg(engine=engine)(net, leaf, projection=w.to(dtype))
        total = output.double().square().sum() + 20 * value.double()
        found = torch.autograd.grad(total, [leaf, *net.parameters()])
        return torch.cat([g.double().flatten() for g in found])

    truth = step("autograd", torch.float64)
    errors = [float((step(e, dtype) - truth).norm()) for e in ("chain", "autograd")]
    assert 0 < errors[0] <= 2 * errors[1]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("make", [mlp, convnet])
def test_training_takes_the_same_path(make: Any) -> None:
    curves = []
    for engine in ("chain", "autograd"):
        torch.manual_seed(1)
        model, x, y = make(), torch.randn(32, 4), torch.randn(32, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        penalty = spectreg(engine, weight=0.5)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            output, value = penalty(model, x)
            loss = F.mse_loss(output, y) + value
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < 0.95 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-9)


@pytest.mark.usefixtures("double")
def test_explain_lists_the_links_and_leaves_no_trace() -> None:
    model, x = convnet(), torch.randn(5, 4)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    text = spectreg("auto").explain(model, x)
    assert text.splitlines()[0] == "engine: chain"
    for word in ("Addmm", "Gelu", "Convolution", "NativeBatchNorm", "MaxPool2DWithIndices"):
        assert word in text
    assert torch.equal(torch.get_rng_state(), state)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])
    model = three_layers(lambda m, x: m.c(F.gelu(m.a(x)).cumprod(1)))
    assert "by autograd: Cumprod" in spectreg("chain").explain(model, x)
    assert "not chain: engine='autograd' is set" in spectreg("autograd").explain(model, x)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_jvp_and_its_gradient_against_finite_differences(chunk_size: int | None) -> None:
    """Not against torch, which takes mean and variance of a norm for constants here."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4), nn.BatchNorm1d(4)),
        *(nn.Tanh(), nn.Linear(4, 2)),
    )
    x, t = torch.randn(4, 3, requires_grad=True), torch.randn(2, 4, 3)
    penalty = TangentProp(reduction="none", engine="chain", chunk_size=chunk_size)

    def value(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(model.named_parameters()), parameters, strict=True))
        return penalty(lambda x: torch.func.functional_call(model, named, (x,)), x, t)[1]

    def slopes(eps: float) -> Tensor:
        with torch.no_grad():
            return torch.stack([model(x + eps * u) - model(x - eps * u) for u in t]) / (2 * eps)

    parameters = [p.detach().requires_grad_() for p in model.parameters()]
    close(value(x, *parameters), slopes(1e-5).square().sum(2).mean(0), rtol=1e-7)
    assert torch.autograd.gradcheck(value, (x, *parameters), fast_mode=True)
