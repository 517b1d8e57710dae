"""Models for which a chain engine could be wrong without an error: it falls back or is right."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import (
    Straight,
    agrees,
    close,
    falls_back,
    right_or_refused,
    run,
    same,
    spectreg,
    three_layers,
)
from conftest import DEVICE
from torch import Tensor, nn
from torch.overrides import wrap_torch_function
from torch.utils.checkpoint import checkpoint

from fastjac.penalties import FrobReg, TangentProp

pytestmark = pytest.mark.usefixtures("double")


class Reversed(torch.autograd.Function):
    """Returns its input itself; the gradient changes its sign."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


def no_grad_block(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        scale = h.abs().amax(1, keepdim=True)
    return m.c(h / scale)


def write_to_shared_memory(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    flat = h.view(-1)
    h += 1
    return m.c(flat.view(3, 5) * h)


def score(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    energy = h.sin()
    return m.c(torch.autograd.grad(energy, h, torch.ones_like(h), create_graph=True)[0])


def write_to_a_part(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).clone()
    h[:, :2] *= m.b(m.a(x)).sin()[:, :2]
    return m.c(h)


def hooked(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.register_hook(lambda g: 2 * g)
    return m.c(h.sin())


def checkpointed(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(h + checkpoint(lambda t: m.b(t).sin().exp(), h, use_reentrant=False))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "function": (lambda m, x: m.c(m.b(m.a(x)) + Straight.apply(m.a(x))), "calls Straight, a torch"),
    "function that returns its input": (
        lambda m, x: m.c(m.b(m.a(x)) + Reversed.apply(m.a(x))),
        "calls Reversed, a torch.autograd.Function",
    ),
    "hook on a hidden tensor": (hooked, "registers hooks"),
    "checkpoint": (checkpointed, "saved under hooks"),
    "part written to": (write_to_a_part, "not linear writes to a part of a tensor"),
    "input from another input": (
        lambda m, x: m.c([h := m.a(x), torch.logaddexp(h, m.b(h))][1]),
        "computed from another",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_falls_back_with_the_reason(name: str) -> None:
    forward, reason = REFUSED[name]
    falls_back(three_layers(forward), torch.randn(3, 4), reason)


def detached_then_written(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.a(x))
    before = h.detach()
    h += 1  # before too
    return m.c(m.b(h) * before)


def data_then_written(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    before = h.data
    h.relu_()
    return m.c(m.b(h) * before)


def detached_in_place(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.a(x))
    h.detach_()
    return m.c(m.b(h)) + m.c(m.a(x))


def compared_in_place(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.a(x))
    h.gt_(0)
    return m.c(m.b(h)) + m.c(m.a(x))


def new_data(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.data = h.data * 2
    return m.c(h)


def power_in_place(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.a(x))
    h **= 2
    return m.c(m.b(h))


def reinterpreted(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(m.b(h) + h.view(torch.int64).view(torch.float64))


def required_again(m: Any, x: Tensor) -> Tensor:
    x.requires_grad_()
    return m.c(m.b(F.gelu(m.a(x))))


def empty_pieces(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.c(torch.cat([h[:0], torch.cat([h[:, :0], h], 1)]))


def closed_over(m: Any, x: Tensor) -> Tensor:
    @wrap_torch_function(lambda t: (t,))
    def block(t: Tensor) -> Tensor:
        return F.gelu(m.b(t))

    return m.c(block(m.a(x)))


TAKEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "no_grad": no_grad_block,
    "number for the batch": lambda m, x: m.c(m.a(x) / m.a(x).abs().max()),
    "several outputs": lambda m, x: m.c(torch.cat(m.a(x).split([2, 3], 1), 1)),
    "weight from x": lambda m, x: F.linear(m.c.weight, m.b(m.a(x))),
    "memory of another": write_to_shared_memory,
    "gradient inside": score,
    "buffer written to": lambda m, x: m.c(torch.zeros(3, 5).add_(m.a(x))),
    "one PReLU twice": lambda m, x: m.c(F.prelu(F.prelu(m.a(x), m.b.bias[:1]), m.b.bias[:1])),
    "number of the step": lambda m, x: m.c(m.a(x) * (2 if m.a(x).mean().item() > 0 else 1)),
}


@pytest.mark.parametrize("name", list(TAKEN))
def test_runs_by_chain(name: str) -> None:
    agrees(three_layers(TAKEN[name]), torch.randn(3, 4))


UNSEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "vmap": lambda m, x: m.c(m.a(x) + torch.func.vmap(lambda r: r.sin() * 2)(m.a(x))),
    "func.grad": lambda m, x: m.c(m.a(x) + torch.func.grad(lambda t: t.sin().sum())(m.a(x))),
    "func.jvp": lambda m, x: m.c(m.a(x) + torch.func.jvp(torch.sin, (m.a(x),), (m.a(x),))[1]),
    "as_tensor": lambda m, x: m.c(m.b(m.a(x)) + torch.as_tensor(m.a(x), dtype=torch.float32)),
    "same as_tensor": lambda m, x: m.c(m.b(m.a(x)) + torch.as_tensor(m.a(x))),
    "deepcopy of x": lambda m, x: m.c(m.a(copy.deepcopy(x)) + m.a(x)),
    "copy": lambda m, x: m.c(copy.copy(m.a(x)) + m.a(x)),
    "detach": lambda m, x: m.c(m.a(x) * m.b(m.a(x)).detach() + m.a(x.detach())),
    "foreach": lambda m, x: m.c(torch._foreach_mul([m.a(x)], 2.0)[0]),
    "list": lambda m, x: m.c(m.a(x) * (2 if any(x is t for t in [x]) else 1)),
    "retain_grad": lambda m, x: m.c([h := m.a(x), h.retain_grad(), F.gelu(h)][2]),
}
WRITTEN = [
    *(detached_then_written, data_then_written, detached_in_place, compared_in_place, new_data),
    *(power_in_place, reinterpreted, required_again, empty_pieces, closed_over),
]


@pytest.mark.parametrize("name", [*UNSEEN, *(f.__name__ for f in WRITTEN)])
def test_right_by_whichever_engine(name: str) -> None:
    forward = {**UNSEEN, **{f.__name__: f for f in WRITTEN}}[name]
    right_or_refused(three_layers(forward), torch.randn(3, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["script", "trace", "whole"])
def test_torchscript(kind: str) -> None:
    x = torch.randn(3, 4)
    block = nn.Sequential(nn.Linear(5, 5), nn.GELU())
    if kind == "whole":
        model: nn.Module = torch.jit.script(
            nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
        )
    else:
        make = torch.jit.script if kind == "script" else torch.jit.trace
        part = make(block, *([torch.randn(3, 5)] if kind == "trace" else []))
        model = three_layers(lambda m, x: m.c(m.a(x) + m.part(m.a(x))), part=part)
    found = []
    for engine in ("autograd", "auto"):
        output, value = spectreg(engine, n_proj=1)(model, x)
        used = [p for name, p in model.named_parameters() if not name.startswith("b.")]
        total = output.square().sum() + value
        found.append(torch.autograd.grad(total, used, allow_unused=True, materialize_grads=True))
    close(*found)


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_model_that_holds_x(derived: bool, first: bool) -> None:
    """If x requires grad, the gradient with respect to x counts every use of it, as in autograd."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(4, 5)
            self.held = torch.ones(())

        def forward(self, t: Tensor) -> Tensor:
            return self.a(t * self.held) if first else self.a(t.sin()) * self.b(self.held)

    grads = []
    for engine in ("autograd", "auto"):
        torch.manual_seed(0)
        model, x = Holder(), torch.randn(3, 4, requires_grad=True)
        model.held = x.exp() if derived else x
        output, value = FrobReg(engine=engine)(model, x)
        total = output.square().sum() + value
        grads.append(torch.autograd.grad(total, [x, model.a.weight]))
    close(*grads)


def test_hidden_tensor_that_the_model_keeps() -> None:
    """It is an ordinary tensor in the graph of the run: it can be printed, saved and trained on."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.features = m.a(x)
        return m.c(F.gelu(m.features))

    found = []
    for engine in ("auto", "chain", "autograd"):
        torch.manual_seed(0)
        model, x = three_layers(forward), torch.randn(3, 4)
        output, value = spectreg(engine)(model, x)
        assert "grad_fn" in repr(model.features) and type(model.features) is Tensor
        saved = io.BytesIO()
        torch.save(model.features.detach(), saved)
        (output.sum() + value + F.gelu(model.features).square().mean()).backward()
        found.append([model.a.weight.grad, model.c.weight.grad])
    close(found[0], found[2])
    close(found[1], found[2])


def test_hidden_tensor_of_the_run_before() -> None:
    """A state that the model keeps from call to call with its graph."""

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)
            self.before: Any = None

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            out = h if self.before is None else h + self.before
            self.before = F.gelu(h)
            return self.c(out)

    found = []
    for engine in ("chain", "auto", "autograd"):
        torch.manual_seed(0)
        model, x = Memory(), torch.randn(3, 4)
        first, value = spectreg(engine)(model, x)
        second, again = spectreg(engine)(model, x + 1)
        total = first.sum() + value + second.square().sum() + again
        found.append(torch.autograd.grad(total, list(model.parameters())))
    close(found[0], found[2])
    close(found[1], found[2])


class Changing(nn.Module):
    """A model that the chain engine can take in some calls only, with a state of its own."""

    def __init__(self, change: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.c, self.change = nn.Linear(4, 5), nn.Linear(5, 3), change
        self.runs, self.logged = 0, 0.0
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        h = F.gelu(self.norm(self.a(x)))
        return self.c(self.change(self, h))


CHANGES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "logs": lambda m, h: [h, setattr(m, "logged", h.mean().item() if m.runs % 3 == 0 else 0.0)][0],
    "branches": lambda m, h: h.sin() if h.mean() > 0.1 else h * 2,
    "writes": lambda m, h: h if m.runs % 2 else h.clone().index_fill_(1, torch.tensor([0]), 0.0),
    "writes to a part": lambda m, h: h if m.runs % 2 else part_of(h),
    "checkpoints": lambda m, h: h if m.runs < 2 else checkpoint(torch.sin, h, use_reentrant=False),
    "squeezes": lambda m, h: h.squeeze().reshape(-1, 5),
    "own function": lambda m, h: h if m.runs % 2 else Straight.apply(h),
}


def part_of(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = 0
    return h


@pytest.mark.parametrize("name", CHANGES)
def test_model_that_changes_from_call_to_call(name: str) -> None:
    """Each call is decided for itself, and runs the model once."""
    found = []
    for engine in ("auto", "autograd"):
        torch.manual_seed(0)
        model, penalty = Changing(CHANGES[name]), spectreg(engine)
        gradients = []
        for n in (4, 4, 4, 2, 4):
            output, value = penalty(model, torch.randn(n, 4))
            total = output.square().sum() + value
            gradients += torch.autograd.grad(total, list(model.parameters()))
        assert model.runs == model.norm.num_batches_tracked == 5
        found.append([*gradients, model.norm.running_mean])
    close(*found)


@pytest.mark.parametrize("act", [torch.tanh, torch.relu, torch.sigmoid])
def test_hidden_tensor_written_to_behind_an_activation(act: Any) -> None:
    """Torch saves the result of these activations, the engine their input."""

    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.a(x)
        a = act(z)
        z.detach().mul_(-2)
        return m.c(a)

    model, x = three_layers(forward), torch.randn(3, 4)
    expected = run(model, x, spectreg("autograd"))
    try:
        found = run(model, x, spectreg("auto"))
    except RuntimeError as error:
        assert "modified in place" in str(error)
    else:
        same(found, expected)


def test_hypernetwork_of_one_layer() -> None:
    """A weight that depends on x may be the operand of a product."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.gelu(m.a(x))
        return m.c(torch.bmm(h.unsqueeze(2) * h.unsqueeze(1), m.b(h).unsqueeze(2)).squeeze(2))

    right_or_refused(three_layers(forward), torch.randn(3, 4))


def test_power_of_zero() -> None:
    for e in (0, 1, 2, 3.0):
        agrees(three_layers(lambda m, x, e=e: m.c(m.a(x).relu() ** e + m.a(x))), torch.randn(3, 4))
        t = torch.randn(2, 3, 4)
        model = three_layers(lambda m, x, e=e: m.c(m.a(x).relu() ** e + m.a(x)))
        x = torch.randn(3, 4)
        same(*[run(model, x, TangentProp(engine=e), t) for e in ("chain", "autograd")])


def test_complex_parameter() -> None:
    model = three_layers(lambda m, x: m.c((m.a(x) + m.w).abs()))
    model.w = nn.Parameter(torch.randn(5, dtype=torch.complex128))
    falls_back(model, torch.randn(3, 4), "complex numbers")


def test_hook_on_x() -> None:
    """It changes the gradient with respect to x, which is the value of the penalty."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    found = []
    for engine in ("auto", "autograd"):
        for model in (net, three_layers(lambda m, x: net(x))):
            x = torch.randn(3, 4, generator=torch.Generator(DEVICE).manual_seed(0)).requires_grad_()
            x.register_hook(lambda g: 2 * g)
            value = spectreg(engine)(model, x)[1]
            found.append([value.detach(), *torch.autograd.grad(value, list(net.parameters())[:3])])
    for other in found[1:]:
        close(other, found[0])


def test_model_that_modifies_x() -> None:
    x = torch.randn(3, 4, requires_grad=True) * 1
    model = nn.Sequential(nn.ELU(inplace=True), nn.Linear(4, 3))
    for engine in ("auto", "autograd"):
        with pytest.raises(RuntimeError, match="the model modified x in place"):
            spectreg(engine)(model, x)


def test_tangents_that_require_grad() -> None:
    net = three_layers(lambda m, x: m.c(m.a(x).sin()))
    x, found = torch.randn(3, 4), []
    for engine in ("chain", "autograd"):
        t = torch.randn(2, 3, 4, generator=torch.Generator(DEVICE).manual_seed(0)).requires_grad_()
        value = TangentProp(engine=engine)(net, x, t)[1]
        found.append(torch.autograd.grad(value, [t, net.a.weight]))
    close(*found)


def test_operation_that_vmap_cannot_map() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten())
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    agrees(model.to(memory_format=torch.channels_last), x, n_proj=3)


def test_data_replaced_before_the_backward() -> None:
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(3, 4)
    found = []
    for engine in ("chain", "autograd"):
        model = copy.deepcopy(net)
        value = spectreg(engine)(model, x)[1]
        model[0].weight.data = torch.ones(5, 4)
        found.append(torch.autograd.grad(value, [model[0].weight, model[2].weight]))
    close(*found)
