"""The compiled engine from call to call: buffers, backward, compilations, random numbers."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import close
from compiled_cases import (
    MARKS,
    MODELS,
    compare,
    graphs,
    mlp,
    normed,
    refuses,
    with_buffer,
)
from penalty_cases import gradients
from torch import Tensor, nn

from fastjac.input_jacobian.compiled import backend, engine
from fastjac.penalties import FrobReg, SpectReg

pytestmark = MARKS


# ---- buffers


def test_buffers_stay_the_same_tensors_and_are_updated_once() -> None:
    model, x = normed(), torch.randn(6, 4)
    model.register_buffer("constant", torch.arange(3.0))
    before = dict(model.named_buffers())
    mean = model[1].running_mean.clone()
    SpectReg(engine="compiled")(model, x)
    after = dict(model.named_buffers())
    assert all(after[name] is b for name, b in before.items())
    assert model[1].num_batches_tracked == 1
    assert not torch.equal(model[1].running_mean, mean)
    model.eval()
    state = copy.deepcopy(model.state_dict())
    SpectReg(engine="compiled")(model, x)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


def test_graphs_that_saved_a_buffer() -> None:
    """Their backward works if the buffer was not written to, and raises if it was."""
    for written in (False, True):

        def forward(m: Any, x: Tensor, written: bool = written) -> Tensor:
            out = m.c(F.gelu(m.a(x)) * m.scale.clone())
            if written:
                m.scale += 1
            return out

        model, x = with_buffer(forward, scale=torch.ones(5)), torch.randn(6, 4)
        output = F.gelu(model.a(x)) * model.scale
        SpectReg(engine="compiled")(model, x)[1].backward()
        if written:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()
        else:
            output.sum().backward()


def test_buffers_that_share_memory() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.one.add_(1)
        return m.c(F.gelu(m.a(x)) * m.two)

    model = with_buffer(forward, one=torch.ones(5))
    model.register_buffer("two", model.one.view(5))
    refuses(model, torch.randn(6, 4), "its buffer 'one', which shares memory with another one")
    assert torch.equal(model.one, torch.ones(5))


# ---- differentiation


def test_backward_as_often_and_in_any_order() -> None:
    model, x, w = mlp(), torch.randn(6, 4, requires_grad=True), torch.randn(6, 3)
    inputs = [x, *list(model.parameters())[:-1]]
    found = []
    for name in ("compiled", "autograd"):
        output, value = SpectReg(engine=name)(model, x, projection=w)
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        loss = torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)
        close(torch.autograd.grad(value, inputs), first)
        found.append((*first, *loss))
    close(*found)


def test_third_derivative_is_refused() -> None:
    model, x = mlp(), torch.randn(6, 4, requires_grad=True)
    output, value = SpectReg(engine="compiled")(model, x)
    for t in (value, output.sum()):
        (g,) = torch.autograd.grad(t, x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            g.square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"], indirect=True)
def test_written_to_between_forward_and_backward(backend: str) -> None:
    model, x = mlp(), torch.randn(6, 4)
    value = SpectReg(engine="compiled")(model, x)[1]
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ---- what is compiled, and when


def test_compiles_once_for_calls_alike() -> None:
    model, x, w = normed(), torch.randn(6, 4), torch.randn(6, 3)

    def compiled(**options: Any) -> int:
        before = graphs()
        SpectReg(engine="compiled", **options)(model, x, projection=w)[1].backward()
        return graphs() - before

    assert compiled() == 1
    with torch.no_grad():
        model[0].weight.mul_(0.5)  # as an optimizer does
    assert [compiled(weight=weight, reduction="sum") for weight in (1.0, 2.0)] == [0, 0]
    model.eval()
    assert [compiled(), compiled()] == [1, 0]
    model.train()
    assert compiled() == 0


def test_sees_hooks_that_come_and_go() -> None:
    """By default torch does not notice them."""
    model, x = mlp(), torch.randn(6, 4)
    compare(model, x)
    first = model[1].register_forward_hook(lambda module, args, out: 2 * out)
    compare(model, x)
    second = model[1].register_forward_hook(lambda module, args, out: out.sin())
    compare(model, x)
    second.remove()
    compare(model, x)
    first.remove()
    compare(model, x)
    handle = model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    compare(model, x)
    handle.remove()
    handle = model[0].register_full_backward_hook(lambda module, into, out: None)
    refuses(model, x, "backwards hooks")
    handle.remove()
    compare(model, x)


@pytest.mark.slow
def test_sees_what_changes_about_a_model() -> None:
    model, x = mlp(), torch.randn(6, 4)
    compare(model, x)
    model[1] = nn.Tanh()
    compare(model, x)
    model[0].weight.requires_grad_(False)
    compare(model, x)
    model[2].weight = nn.Parameter(torch.randn(3, 5))
    compare(model, x)
    model[1].forward = torch.sin
    compare(model, x)
    compare(model, torch.randn(4, 4))
    nn.utils.parametrizations.weight_norm(model[2])
    compare(model, x)
    model.float()
    assert SpectReg(engine="compiled")(model, x.float())[1].dtype == torch.float32


@pytest.mark.slow
def test_batches_of_other_sizes() -> None:
    """With random numbers and dropout, which torch cannot compile for a symbolic size."""
    model, penalty = MODELS["dropout"](), SpectReg(n_proj=2, engine="compiled")
    for n in (6, 5, 4, 6):
        penalty(model, torch.randn(n, 4))[1].backward()


def test_too_many_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.CONFIG, "recompile_limit", 1)
    model = nn.Linear(4, 3)
    SpectReg(engine="compiled")(model, torch.randn(6, 4))
    refuses(model, torch.randn(5, 4), "it has 1 graphs already")


@pytest.mark.parametrize("n", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_small_batches(n: int) -> None:
    model, x, found = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(n, 4), []
    for name in ("compiled", "autograd"):
        value = FrobReg(engine=name)(model, x)[1]
        found.append([value, *gradients(value, list(model.parameters()))])
    close(*found)


def test_model_and_penalty_are_let_go_and_can_be_copied() -> None:
    model, x, penalty = normed(), torch.randn(6, 4), SpectReg(engine="compiled")
    penalty(model, x)[1].backward()
    assert vars(model).keys() == vars(normed()).keys()
    before = graphs()
    for other in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        other(model, x)
    assert graphs() == before
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    copied(x)
    kept, weight = weakref.ref(model), weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert kept() is None and weight() is None


@pytest.mark.parametrize(
    "backend", [pytest.param("inductor", marks=pytest.mark.slow), "aot_eager"], indirect=True
)
def test_random_numbers_are_those_of_the_other_engines(backend: str) -> None:
    model, x, values = MODELS["dropout"](), torch.randn(6, 4), []
    for name in ("compiled", "autograd"):
        penalty = SpectReg(n_proj=2, engine=name)
        torch.manual_seed(1)
        values.append([penalty(model, x)[1].item(), penalty(model, x)[1].item()])
    assert values[0] == pytest.approx(values[1], rel=1e-10) and values[0][0] != values[0][1]


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_wrong_code_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the code of inductor for a LeNet, whose VJP was 0 (torch 2.13)."""

    def wrong(graph: Any, inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            outputs = graph(*args)
            if what == "value":
                return tuple(1.001 * t for t in outputs)
            return tuple(t.detach() + 1.001 * (t - t.detach()) for t in outputs)

        return call

    monkeypatch.setattr(backend, "NAME", wrong)
    model, x = mlp(), torch.randn(6, 4)
    for _ in range(2):
        refuses(model, x, "code that torch compiled for it is wrong, by .* of ")
    monkeypatch.setattr(backend, "NAME", lambda graph, inputs: graph)
    SpectReg(engine="compiled")(mlp(), x)
