"""What an attached layer-wise penalty must not get wrong: models that write, patch or recompute."""

from __future__ import annotations

import copy
import threading
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import Model, check, close, mlp, one_layer
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac import reference
from fastjac.penalties import DREG

pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("use", ["ignored", "both"])
def test_in_place_activation_still_writes_in_place(use: str, both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        z = m.fc(x)
        a = m.act(z)
        return m.head(z if use == "ignored" else a + z)

    check(one_layer(nn.SiLU(inplace=True), forward), torch.randn(6, 4), {"fc": F.silu})


def test_attributes_that_change_between_steps(both_ways: str) -> None:
    for act, function, name, values in (
        (nn.LeakyReLU(0.01), F.leaky_relu, "negative_slope", (0.1, 0.4)),
        (nn.GELU(), F.gelu, "approximate", ("none", "tanh")),
    ):
        model = one_layer(act)
        steps = [lambda net, v=v, name=name: setattr(net.act, name, v) for v in values]
        phi = lambda z: function(z, **{name: getattr(act, name)})  # noqa: B023, E731
        check(model, torch.randn(6, 4), {"fc": phi}, steps=steps)


def test_hooks_on_the_pre_activation(both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        z = m.fc(x)
        z.register_hook(lambda g: g / 2)
        return m.head(m.act(z))

    check(one_layer(nn.GELU(), forward), torch.randn(6, 4), {"fc": F.gelu})


@pytest.mark.parametrize("how", ["set", "data", "copy"])
def test_weights_that_change_while_the_model_runs(how: str, both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        if how == "data":
            m.fc.weight.data = m.fc.weight.data.clamp(-0.2, 0.2)
        elif how == "copy":
            with torch.no_grad():
                m.fc.weight.copy_(m.fc.weight.clamp(-0.2, 0.2))
        return m.head(m.act(m.fc(x)))

    model = one_layer(nn.GELU(), forward)
    if how == "set":

        def scaled(module: nn.Module, args: Any) -> None:
            module.weight = nn.Parameter(module.weight.detach() * 0.9)

        model.fc.register_forward_pre_hook(scaled)
    check(model, torch.randn(6, 4), {"fc": F.gelu})


def test_input_written_to_after_the_layer_is_refused(both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        x = x.clone()
        z = m.fc(x)
        x.add_(1)
        return m.head(m.act(z))

    penalty = DREG(model := one_layer(nn.GELU(), forward))
    model(torch.randn(6, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty().backward()


def low_rank(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight + self.b @ self.a, self.bias)


def test_forward_patched_by_somebody_else(both_ways: str) -> None:
    model, x = one_layer(nn.GELU()), torch.randn(6, 4)
    model.fc.a = nn.Parameter(torch.randn(2, 4))
    model.fc.b = nn.Parameter(torch.randn(5, 2))
    patch = lambda net: setattr(net.fc, "forward", MethodType(low_rank, net.fc))  # noqa: E731
    patch(model)
    plain = copy.deepcopy(model)
    patch(plain)
    pairs = {"fc": (F.gelu, lambda fc: fc.weight + fc.b @ fc.a)}
    check(model, x, pairs, plain=plain).detach()
    model.act.forward = lambda z: z.tanh()  # the function that it calls counts
    value, w = DREG()(model, x)[1], model.fc.weight + model.fc.b @ model.fc.a
    close(value, reference.dreg([(model.fc(x), w, torch.tanh)]).mean())
    model.act.forward = lambda z: z.abs()  # nobody knows what it is
    with pytest.raises(RuntimeError, match="model has no layer to penalise.*torch.Tensor.abs"):
        DREG()(model, x)


def test_pruned_weight(both_ways: str) -> None:
    """Made anew by a hook in each forward, so no weight to take the norms of before."""
    model = one_layer(nn.GELU())
    prune.l1_unstructured(model.fc, "weight", 0.5)
    # A deep copy needs a weight that is a leaf, which the pruned one is not.
    plain = one_layer(nn.GELU())
    prune.identity(plain.fc, "weight")
    plain.load_state_dict(model.state_dict())
    check(model, torch.randn(6, 4), {"fc": F.gelu}, plain=plain)


def test_layer_that_is_skipped_has_no_gradient(both_ways: str) -> None:
    model, x = one_layer(nn.GELU()), torch.randn(6, 4)
    model.other = nn.Linear(5, 5)
    model.run = lambda m, x: m.head(m.act(m.other(m.act(m.fc(x)))))
    penalty = DREG(model)
    (model(x).sum() + penalty()).backward()
    model.run = lambda m, x: m.head(m.act(m.fc(x)))
    model.zero_grad()
    (model(x).sum() + penalty()).backward()
    assert model.other.weight.grad is None and model.fc.weight.grad is not None


@pytest.mark.parametrize("every_block", [True, False])
def test_checkpoint(every_block: bool, both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        if every_block:
            x = checkpoint(lambda t: m.act(m.one(t)), x, use_reentrant=False)
            return m.head(checkpoint(lambda t: fastjac.silu(m.two(t)), x, use_reentrant=False))
        return checkpoint(
            lambda t: m.head(fastjac.silu(m.two(m.act(m.one(t))))), x, use_reentrant=False
        )

    modules = {"one": nn.Linear(4, 5), "two": nn.Linear(5, 5), "head": nn.Linear(5, 2)}
    model = Model(forward, act=nn.GELU(), **modules)
    plain = Model(
        lambda m, x: m.head(F.silu(m.two(m.act(m.one(x))))), act=nn.GELU(), **copy.deepcopy(modules)
    )
    check(model, torch.randn(6, 4), {"one": F.gelu, "two": F.silu}, plain=plain)


def test_two_checkpointed_forwards_in_one_step(both_ways: str) -> None:
    """The second forward must not take the first for one whose graph is gone."""
    model = Model(lambda m, x: checkpoint(m.net, x, use_reentrant=False), net=mlp())
    pairs, halves = {"net.0": F.gelu, "net.2": F.silu}, lambda m, x: torch.cat([m(x[:2]), m(x[2:])])
    plain = Model(lambda m, x: m.net(x), net=copy.deepcopy(model.net))
    check(model, torch.randn(6, 4), pairs, plain=plain, run=halves)


def test_two_threads_at_once_are_refused() -> None:
    inside, go, outputs = threading.Event(), threading.Event(), []

    def forward(m: Model, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait()
        return m.head(m.act(m.fc(x)))

    model, x = one_layer(nn.GELU(), forward), torch.randn(3, 4)
    penalty = DREG(model)
    thread = threading.Thread(target=lambda: outputs.append(model(x)), daemon=True)
    thread.start()
    inside.wait()
    with pytest.raises(RuntimeError, match="the model runs in two threads at once"):
        model(x)
    go.set()
    thread.join()
    assert len(outputs) == 1
    penalty()


def test_other_threads_use_our_functions_while_a_model_runs() -> None:
    inside, go = threading.Event(), threading.Event()

    def waits(m: Model, x: Tensor) -> Tensor:
        inside.set()
        go.wait()
        return m.head(fastjac.gelu(m.fc(x)))

    slow, x = one_layer(nn.GELU(), waits), torch.randn(3, 4)
    other = one_layer(nn.GELU(), lambda m, x: m.head(fastjac.gelu(m.fc(x))))
    penalty, others = DREG(slow), DREG(other)
    thread = threading.Thread(target=slow, args=(x,), daemon=True)
    thread.start()
    inside.wait()
    try:
        close(fastjac.gelu(x), F.gelu(x))
        other(x)
        others()
    finally:
        go.set()
        thread.join()
    penalty()
    assert penalty.layers_found == others.layers_found == ["fc"]


def test_one_dimensional_input_is_named() -> None:
    penalty = DREG(model := mlp())
    with pytest.raises(RuntimeError, match=r"layer 0: its output has shape \(5,\)"):
        model(torch.randn(4))
    penalty.detach()
