"""Every penalty of the registry: values, first and second derivatives, call forms, options."""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from penalty_cases import (
    CASES,
    SPECS,
    Call,
    by_engine,
    close,
    close_gradients,
    gradients,
    seeded,
    specs_with,
    takes,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import fastjac
import fastjac.penalties as package
from fastjac.penalties import DREG, PENALTIES, Penalty, PenaltySpec, SpectReg, spectreg


@pytest.mark.parametrize(("spec", "options", "engine"), by_engine(CASES))
def test_equals_reference(spec: PenaltySpec, options: dict[str, Any], engine: str | None) -> None:
    call = Call(spec, options, engine=engine)
    value, truth = call.values(), call.reference()
    assert value.shape == (3,)
    assert truth.abs().sum() > 0
    close(value, truth)
    close_gradients(gradients(value, call.inputs), gradients(truth, call.inputs))


class Runner(nn.Module):
    """A penalty called inside a module, for functional_call to put the parameters in."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call, self.model = call, call.model

    def forward(self, x: Tensor) -> Tensor:
        penalty = self.call.module(reduction="none")
        return penalty(self.model, x, *self.call.targets)[1]


# Finite differences see the perturbation direction move with the parameters, which the penalty
# holds constant by definition: its gradient is tested below.
DIFFERENTIABLE = [p for p in CASES if p.values[0].name != "finite_difference_datagrad"]


@pytest.mark.parametrize(("spec", "options", "engine"), by_engine(DIFFERENTIABLE))
def test_first_and_second_derivative(
    spec: PenaltySpec, options: dict[str, Any], engine: str | None
) -> None:
    call = Call(spec, options, engine=engine)
    runner = Runner(call)
    names = [name for name, _ in runner.named_parameters()]

    def values(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(runner, state, (x,))

    inputs = tuple(t.detach().clone().requires_grad_() for t in call.inputs)
    torch.manual_seed(0)
    assert gradcheck(values, inputs)
    grad_outputs = (torch.randn(3, dtype=torch.float64, requires_grad=True),)
    assert gradgradcheck(values, inputs, grad_outputs)


def test_finite_difference_gradient_holds_the_direction_constant() -> None:
    call = Call(PENALTIES["finite_difference_datagrad"], {"eps": 0.3})
    (target,) = call.targets
    loss = F.cross_entropy(call.model(call.x), target, reduction="none")
    (v,) = torch.autograd.grad(loss.sum(), call.x)
    moved = call.x.detach() + 0.3 * F.normalize(v)
    leaf = call.x.detach()

    def constant_direction(*parameters: Tensor) -> Tensor:
        names = [name for name, _ in call.model.named_parameters()]
        state = dict(zip(names, parameters, strict=True))
        run = partial(torch.func.functional_call, call.model, state)
        ends = [F.cross_entropy(run(t), target, reduction="none") for t in (moved, leaf)]
        return ((ends[0] - ends[1]) / 0.3) ** 2

    parameters = list(call.model.parameters())
    assert gradcheck(constant_direction, tuple(parameters))
    expected = gradients(constant_direction(*parameters), parameters)
    close_gradients(gradients(call.values(), parameters), expected)


@pytest.mark.parametrize(("spec", "engine"), by_engine(SPECS))
def test_call_forms_agree(spec: PenaltySpec, engine: str | None) -> None:
    call = Call(spec, engine=engine)
    output, value = call.model_form(reduction="mean")
    close(output, call.model(call.x))
    close(call.module()(call.model, call.x, *call.targets)[1], value)
    plain = call.x.detach().clone()
    close(call.module()(call.model, plain, *call.targets)[1], value)
    assert not plain.requires_grad
    if spec.kind != "layer-wise" and spec.name != "finite_difference_datagrad":
        if engine == "chain":
            with pytest.raises(ValueError, match="engine='chain' is for the model form"):
                call.module()(call.x, output, *call.targets)
        output = call.model(call.x)
        penalty = spec.module(**call.options, **call.random())
        graph = penalty(call.x, output, *call.targets)
        close(graph, value)
        options = {**call.options, **call.random()}
        close(spec.functional(call.x, output, *call.targets, **options), value)
        close_gradients(gradients(graph, call.inputs), gradients(value, call.inputs))


@pytest.mark.parametrize(("spec", "engine"), by_engine(SPECS))
def test_reductions_and_weight(spec: PenaltySpec, engine: str | None) -> None:
    call = Call(spec, engine=engine)
    values = call.values()
    close(call.values(reduction="mean"), values.mean())
    close(call.values(reduction="sum"), values.sum())
    close(call.values(reduction="none", weight=2.5), 2.5 * values)
    scaled = gradients(call.values(reduction="sum", weight=2.5), call.inputs)
    close_gradients(scaled, [2.5 * g for g in gradients(values, call.inputs)])
    penalty = call.module(weight=3.0)
    close(penalty(call.model, call.x, *call.targets)[1], 3 * values.mean())
    penalty.weight = 0.5
    penalty.generator = seeded(7)
    close(penalty(call.model, call.x, *call.targets)[1], 0.5 * values.mean())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("spec", "engine"), by_engine(SPECS))
def test_every_third_call(spec: PenaltySpec, engine: str | None, reduction: str) -> None:
    call = Call(spec, engine=engine)
    penalty = call.module(every=3, reduction=reduction)
    value = call.values(reduction=reduction)
    runs = 0

    def model(x: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return call.model(x)

    seen = []
    for _ in range(7):
        if "generator" in call.random():
            penalty.generator = seeded(7)
        arguments = call.model if spec.kind == "layer-wise" else model
        output, now = penalty(arguments, call.x, *call.targets)
        close(output, call.model(call.x))
        seen.append(now)
    for k, now in enumerate(seen):
        if k % 3 == 0:
            close(now, 3 * value)
        else:
            assert now.shape == value.shape
            assert torch.equal(now, torch.zeros_like(value))
            # The value has a graph: every parameter gets a gradient, which is zero.
            for g in torch.autograd.grad(now.sum(), list(call.model.parameters())):
                assert torch.equal(g, torch.zeros_like(g))
    penalty.eval()
    for _ in range(2):
        if "generator" in call.random():
            penalty.generator = seeded(7)
        close(penalty(call.model, call.x, *call.targets)[1], value)


@pytest.mark.slow
@pytest.mark.parametrize("spec", specs_with("x_or_output"))
def test_graph_form_in_a_compiled_step(spec: PenaltySpec, no_stale_graphs: None) -> None:
    """With a fused model the gradients are those of the plain model without torch.compile."""
    found = []
    for compiled in (False, True):
        call = Call(spec)
        model = fastjac.fuse(call.model) if compiled else call.model

        def step(x: Tensor, *targets: Tensor, call: Call = call, model: Any = model) -> Tensor:
            output = model(x)
            return spec.functional(x, output, *targets, **call.options) + output.square().mean()

        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        torch.manual_seed(5)
        found.append(gradients(run(call.x, *call.targets), list(call.model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_skipped_call_is_zero_for_nan_outputs_too() -> None:
    penalty = SpectReg(every=2)
    x = torch.ones(3, 2, requires_grad=True)
    penalty(x, x * 2)
    skipped = penalty(x, x * float("nan"))
    assert skipped.item() == 0
    assert skipped.requires_grad


@pytest.mark.parametrize(("spec", "engine"), by_engine(specs_with("generator")))
def test_generator(spec: PenaltySpec, engine: str | None) -> None:
    call = Call(spec, engine=engine)
    state = torch.get_rng_state()
    first, same, other = (call.values(generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
    unseeded = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        unseeded.append(call.values(generator=None))
    assert torch.equal(unseeded[0], unseeded[1])
    assert not torch.equal(unseeded[0], unseeded[2])
    penalty = call.module(generator=seeded(1), reduction="none")
    drawn = [penalty(call.model, call.x)[1] for _ in range(2)]
    assert torch.equal(drawn[0], first)
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("size", [1, 2, 100])
@pytest.mark.parametrize(("spec", "engine"), by_engine(specs_with("chunk_size")))
def test_chunk_size_changes_nothing(spec: PenaltySpec, engine: str | None, size: int) -> None:
    options = {"n_proj": 5} if takes(spec, "n_proj") else {}
    call = Call(spec, options, engine=engine)
    whole, pieces = call.values(), call.values(chunk_size=size)
    close(pieces, whole)
    close_gradients(gradients(pieces, call.inputs), gradients(whole, call.inputs))


@pytest.mark.parametrize("spec", SPECS)
def test_empty_batch_and_single_sample(spec: PenaltySpec) -> None:
    call = Call(spec)

    def samples(count: int, t: Tensor) -> Tensor:
        # Tangents have the shape [K, N, ...].
        return t[:, :count] if spec.name == "tangentprop" else t[:count]

    for reduction in ("mean", "sum", "none"):
        penalty = call.module(reduction=reduction)
        targets = [samples(0, t) for t in call.targets]
        output, value = penalty(call.model, call.x[:0], *targets)
        assert len(output) == 0
        assert value.shape == ((0,) if reduction == "none" else ())
        assert torch.equal(value, torch.zeros_like(value))
        assert value.requires_grad

    call.x = call.x[:1].detach().requires_grad_()
    call.targets = tuple(samples(1, t) for t in call.targets)
    close(call.values(), call.reference())


@pytest.mark.parametrize("spec", SPECS)
def test_module_is_stateless_and_can_be_copied(spec: PenaltySpec) -> None:
    """A generator is copied with its state. For the count of calls see test_every.py."""
    call = Call(spec)
    assert spec.module(**call.options).state_dict() == {}
    assert pickle.loads(pickle.dumps(spec.functional)) is spec.functional
    copies = (copy.deepcopy, lambda penalty: pickle.loads(pickle.dumps(penalty)))
    penalty = spec.module(**call.options, weight=0.5, reduction="none", every=2)
    assert all(repr(by(penalty)) == repr(penalty) for by in copies)
    penalty = call.module(weight=0.5, reduction="none")
    twins = [by(penalty) for by in copies]
    expected = penalty(call.model, call.x, *call.targets)[1]
    for twin in twins:
        close(twin(call.model, call.x, *call.targets)[1], expected)


def test_repr_shows_what_is_not_default() -> None:
    assert repr(SpectReg()) == "SpectReg()"
    assert repr(SpectReg(3, norm="l1", weight=0.1)) == "SpectReg(n_proj=3, norm='l1', weight=0.1)"
    assert repr(DREG(layer_weights=[1, 2])) == "DREG(layer_weights=(1.0, 2.0))"


def test_registry_lists_every_penalty_and_option() -> None:
    classes = {
        value
        for value in vars(package).values()
        if inspect.isclass(value) and issubclass(value, Penalty)
    }
    assert {spec.module for spec in PENALTIES.values()} == classes - {Penalty, package.InputPenalty}
    common = {"weight", "reduction", "every", "at", "chunk_size", "generator"}
    common |= {"model", "engine", "output"}  # the reference has none of them
    for name, spec in PENALTIES.items():
        assert spec.name == name == spec.functional.__name__ == spec.reference.__name__
        assert getattr(package, name) is spec.functional
        assert {name, spec.module.__name__} <= set(package.__all__)
        options = set(inspect.signature(spec.module).parameters)
        assert options - common == {option for case in spec.cases for option in case}
        called = set(inspect.signature(spec.functional).parameters)
        called -= {"model_or_x", "x_or_output"}
        assert options - {"every", "model"} <= called | {"model"}
        for documented in (spec.module.__doc__, spec.functional.__doc__):
            assert documented is not None
            for word in ("R_n", "Source", "Arguments", "Options"):
                assert word in documented, (name, word)
            for option in called | options:
                assert option in documented, (name, option)
    signature = inspect.signature(spectreg)
    assert list(signature.parameters)[:3] == ["model_or_x", "x_or_output", "projection"]
    assert signature.parameters["n_proj"].kind is inspect.Parameter.KEYWORD_ONLY
