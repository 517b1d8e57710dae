"""What the chain engine leaves behind: after a fallback, between calls, in threads, in memory."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import Straight, close, run, same, spectreg, three_layers
from conftest import DEVICE
from layer_cases import Model
from torch import Tensor, nn

import fastjac
from fastjac.input_jacobian import guards
from fastjac.input_jacobian.chain import network, record
from fastjac.input_jacobian.chain.rules import RULES
from fastjac.input_jacobian.pullback import Pullback
from fastjac.penalties import DREG, FrobReg, IGPen, SpectReg

pytestmark = pytest.mark.usefixtures("double")


class Counting(nn.Module):
    """Counts its runs in buffers and falls back at the end of the run."""

    def __init__(self, replaced: bool) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.dropout, self.replaced = nn.Dropout(0.5), replaced
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.replaced:
            self.runs = self.runs + 1
        else:
            self.runs += 1
        return self.c(Straight.apply(self.dropout(self.norm(self.a(x)))))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("replaced", [False, True], ids=["written to", "replaced"])
def test_model_runs_once(replaced: bool, training: bool) -> None:
    """Also where the chain engine finds at the end that it cannot take the run."""
    model, x = Counting(replaced).train(training), torch.randn(6, 4)
    found = run(model, x, spectreg("auto"))
    assert found.model.runs == 1
    assert found.model.norm.num_batches_tracked == int(training)
    same(found, run(model, x, spectreg("autograd")))  # buffers and random numbers among it


def test_lazy_modules() -> None:
    for engine in ("auto", "chain"):
        model = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.GELU(), nn.LazyLinear(3))
        output, value = spectreg(engine)(model, torch.randn(6, 4))
        assert model[1].num_batches_tracked == 1
        (output.sum() + value).backward()


def test_argument_that_requires_grad() -> None:
    """Arguments of a penalty that require grad get it."""
    model, x, target = nn.Sequential(nn.Linear(4, 3)), torch.randn(3, 4), torch.randn(3, 3)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1)

    for penalty, name in ((SpectReg(), "projection"), (IGPen(loss), "target")):
        penalty(model, x, **{name: target})
        learnt = target.clone().requires_grad_()
        value = penalty(model, x, **{name: learnt})[1]
        expected = type(penalty)(*([loss] if name == "target" else []), engine="autograd")
        (g,) = torch.autograd.grad(value, learnt)
        close(g, torch.autograd.grad(expected(model, x, **{name: learnt})[1], learnt)[0])
        fresh = type(penalty)(*([loss] if name == "target" else []), engine="chain")
        fresh(model, x, **{name: target})


def test_penalty_that_depends_on_more_than_the_output() -> None:
    """If a loss has parameters of its own, autograd computes their gradients."""
    x, head = torch.randn(3, 4), nn.Linear(3, 1)

    def loss(output: Tensor) -> Tensor:
        return head(output.sin()).squeeze(1)

    found = []
    for engine in ("autograd", "auto", "chain"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
        value = IGPen(loss, engine=engine)(model, x)[1]
        found.append(torch.autograd.grad(value, [head.weight, *list(model.parameters())[:3]]))
    close(found[1], found[0])
    close(found[2], found[0])


def test_model_that_returns_several_tensors() -> None:
    model, x = three_layers(lambda m, x: (m.c(m.a(x)), m.a(x))), torch.randn(3, 4)
    for engine in ("chain", "auto"):
        with pytest.raises(
            TypeError, match="output is tuple: what the model returns must be a torch"
        ):
            spectreg(engine)(model, x)


def test_quiet_by_autograd() -> None:
    """Autograd runs without a warning if the engine is known not to apply."""
    net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
    x, auto = torch.randn(3, 4), spectreg("auto")
    w = torch.randn(2, 3, 3)
    expected = spectreg("autograd")(net, x, projection=w)[1]
    close(auto(lambda t: net(t), x, projection=w)[1], expected)
    close(spectreg("chain")(lambda t: net(t), x, projection=w)[1], expected)
    with torch.autograd.graph.save_on_cpu():
        close(auto(net, x, projection=w)[1], expected)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert auto(net.float(), x.float())[0].dtype == torch.bfloat16
    net.double()
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(lambda t: auto(net, t)[1])(x)


def test_autocast_inside_the_model() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            h = m.a(x)
        return m.c(F.gelu(h.float()))

    model, x, found = three_layers(forward).float(), torch.randn(3, 4).float(), []
    for engine in ("autograd", "auto"):
        value = spectreg(engine)(model, x)[1]
        found.append(torch.autograd.grad(value, [model.a.weight, model.c.weight]))
    torch.testing.assert_close(*found, rtol=2**-6, atol=2**-6)


@pytest.mark.slow
@pytest.mark.parametrize("part", [False, True], ids=["whole", "part"])
def test_compiled_models_run_by_autograd(part: bool, no_stale_graphs: None) -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
    compiled = torch.compile(net, backend="eager")
    model = Model(lambda m, x: m.n(x), n=compiled) if part else compiled
    x, w = torch.randn(3, 4), torch.randn(3, 3)
    found = []
    for engine, m in (("auto", model), ("autograd", net)):
        value = SpectReg(engine=engine)(m, x, projection=w)[1]
        found.append(torch.autograd.grad(value, [net[0].weight, net[2].weight]))
    close(*found)


@pytest.mark.parametrize("ours", [False, True])
def test_together_with_an_attached_layerwise_penalty(ours: bool) -> None:
    found = []
    for engine in ("autograd", "auto"):
        torch.manual_seed(1)
        act = fastjac.Act("gelu") if ours else nn.GELU()
        model, x = nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 3)), torch.randn(6, 4)
        layerwise = DREG(model)
        output, value = spectreg(engine)(model, x)
        total = output.square().sum() + value + layerwise()
        found.append([total.detach(), *torch.autograd.grad(total, list(model.parameters()))])
    close(*found)


def test_threads() -> None:
    model = three_layers(lambda m, x: m.c(F.gelu(m.b(fastjac.gelu(m.a(x))))))
    x = torch.randn(3, 4)
    truth = FrobReg(engine="autograd")(model, x)[1].item()
    values: list[float] = []

    def work() -> None:
        penalty = FrobReg(engine="chain")
        for _ in range(40):
            value = penalty(model, x)[1]
            value.backward()
            values.append(value.item())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(values) == 160 and values == pytest.approx([truth] * 160, rel=1e-12)


def test_nothing_stays_in_memory() -> None:
    """No reference cycle holds the activations until the garbage collector comes."""
    model, x = three_layers(lambda m, x: m.c(F.gelu(m.a(x)))), torch.randn(3, 4)

    def recorded() -> int:
        return sum(type(t).__name__ in ("GraphRun", "Record", "Step") for t in gc.get_objects())

    gc.collect()
    before = recorded()
    gc.disable()
    try:
        for backward in (True, False):
            output, value = spectreg("chain")(model, x)
            if backward:
                (output.sum() + value).backward()
            del output, value
        after = recorded()
    finally:
        gc.enable()
    assert after == before


class OwnPerSample(fastjac.SpectReg):
    """A penalty that uses x itself."""

    def per_sample(self, pull: Pullback, *targets: Any, **named: Any) -> Tensor:
        return super().per_sample(pull, *targets, **named) + pull.x.square().sum(1)


class TwoPasses(fastjac.SpectReg):
    def per_sample(self, pull: Pullback, *targets: Any, **named: Any) -> Tensor:
        first = super().per_sample(pull, *targets, **named)
        return first + 2 * super().per_sample(pull, *targets, **named)


class UpAndDown(fastjac.SpectReg):
    """A JVP of what a VJP gave, of the output and of x: ``‖J J^T (w + g) + J x‖²``."""

    def per_sample(self, pull: Pullback, *targets: Any, **named: Any) -> Tensor:
        w, _ = self.cotangents(pull.output, *targets, **named)
        v = pull.vjp(w + pull.output)
        return pull.jvp(torch.cat([v, pull.x.unsqueeze(0)])).sum(0).square().sum(1)


@pytest.mark.parametrize("make", [OwnPerSample, TwoPasses, UpAndDown])
def test_penalties_of_users(make: Any) -> None:
    """A subclass with its own ``per_sample``, on a model that runs in one C++ call per sweep."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, w = torch.randn(5, 4).double().requires_grad_(), torch.randn(5, 3).double()
    found = []
    for engine in ("chain", "autograd"):
        output, value = make(engine=engine)(model, x, projection=w)
        found.append(torch.autograd.grad(output.sum() + value, [x, *model.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
def test_loss_that_depends_on_x_beside_the_output(inside: bool, sequential: bool) -> None:
    """A reconstruction loss: the gradient with respect to x is the total one, as in torch."""
    net = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
    model = net if sequential else Model(lambda m, x: m.net(x), net=net)
    head, found = nn.Linear(4, 4), []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(1)

    for engine in ("autograd", "auto", "chain"):
        x = torch.randn(3, 4, generator=torch.Generator(DEVICE).manual_seed(0)).requires_grad_()
        leaf = x
        x = x.sin() if inside else x
        output, value = IGPen(loss, engine=engine)(model, x, head(x))
        inputs = [leaf, head.weight, *net.parameters()]
        found.append([value.detach(), *torch.autograd.grad(output.sum() + value, inputs)])
    close(found[1], found[0])
    close(found[2], found[0])


def test_hook_on_a_parameter_of_the_loss() -> None:
    scale = torch.ones(3, requires_grad=True)
    scale.register_hook(lambda g: 3 * g)
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
    penalty = IGPen(lambda output: (output * scale).square().sum(1), engine="chain")
    with pytest.raises(RuntimeError, match="has hooks: use engine='autograd'"):
        penalty(model, torch.randn(3, 4))


def test_types_of_nodes_are_not_kept() -> None:
    """A model that makes a class of an ``autograd.Function`` in each call."""
    model = three_layers(lambda m, x: m.c(type("Local", (Straight,), {}).apply(m.a(x))))
    spectreg("auto")(model, torch.randn(3, 4))
    before = len(guards._kinds), len(record._kinds)
    spectreg("auto")(model, torch.randn(3, 4))
    assert (len(guards._kinds), len(record._kinds)) == before


@pytest.mark.parametrize("keep", [False, True])
def test_backward_after_one_that_failed(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first has used a part of what was kept: the second is right, or raises."""
    monkeypatch.setattr(network.Network, "of", lambda *args: None)
    layers = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    model = Model(lambda m, x: m.layers(x), layers=layers)
    x, w = torch.randn(4, 4), torch.randn(4, 2)
    _, value = SpectReg(engine="chain")(model, x, projection=w)
    rule, calls = RULES["AddmmBackward0"], []

    def push(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("of the test")
        return type(rule).push(rule, *args)

    monkeypatch.setattr(rule, "push", push)
    with pytest.raises(RuntimeError, match="of the test"):
        value.backward(retain_graph=keep)
    if not keep:
        with pytest.raises(RuntimeError, match="a second time"):
            value.backward()
        return
    value.backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    SpectReg(engine="autograd")(model, x, projection=w)[1].backward()
    for p, grad in zip(model.parameters(), found, strict=True):
        assert (p.grad is None) == (grad is None)
        if p.grad is not None:
            close(grad, p.grad)
