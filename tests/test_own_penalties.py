"""A penalty of one's own, defined outside of the package, with every engine; its slips too.

The texts of the errors are in `public_errors.txt`; here every engine gives the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from penalty_cases import close, close_gradients, gradients
from torch import Tensor, nn

import fastjac
from fastjac import InputPenalty, Pullback
from fastjac.input_jacobian.projections import RandomPenalty


class FirstClass(InputPenalty):
    """``R_n = factor ‖∂g_n0/∂x_n‖²``: one method, ``per_sample``."""

    def __init__(self, factor: float = 2.0, **options: Any) -> None:
        super().__init__(**options)
        self.factor = factor

    def per_sample(self, pull: Pullback) -> Tensor:
        w = torch.zeros_like(pull.output)
        w[:, 0] = 1
        return self.factor * pull.vjp(w.unsqueeze(0))[0].square().sum(1)


class Weighted(InputPenalty):
    """``R_n = ‖J_nᵀ t_n‖² + ‖J_n x_n‖²`` for a target t: all products, and an argument."""

    def per_sample(self, pull: Pullback, target: Tensor) -> Tensor:
        w, u = target.unsqueeze(0), pull.x.unsqueeze(0)
        return pull.squared_norms(w) + pull.jvp(u)[0].square().sum(1)


class Signs(RandomPenalty):
    """Random signs, by `draw` alone."""

    def draw(self, k: int, logits: Tensor, dtype: torch.dtype) -> Tensor:
        shape = k, *logits.shape
        return torch.randint(2, shape, generator=self.generator).to(dtype).mul_(2).sub_(1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def in_graph(penalty: InputPenalty, net: Net, x: Tensor, *targets: Any) -> Tensor:
    return penalty(x, net(x), *targets)


def by(engine: str, plain: bool = False) -> Callable[..., Tensor]:
    def call(penalty: InputPenalty, net: Net, x: Tensor, *targets: Any) -> Tensor:
        penalty.engine = engine
        return penalty(net.layers if plain else net, x, *targets)[1]

    return call


WAYS = {
    "graph form": in_graph,
    "autograd": by("autograd"),
    "auto": by("auto"),
    "chain": by("chain"),
    "C++": by("chain", plain=True),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def problem() -> tuple[Net, Tensor, Tensor]:
    net, x = Net().double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    return net, x, torch.randn(4, 2, dtype=torch.float64)


def jacobian(net: Net, x: Tensor) -> Tensor:
    """``J_n``, ``[N, m, d]``, with a graph."""
    rows = [torch.autograd.grad(g.sum(), x, create_graph=True)[0] for g in net(x).unbind(1)]
    return torch.stack(rows, 1)


@ways
def test_own_penalties_are_right(way: Callable[..., Tensor]) -> None:
    net, x, target = problem()
    inputs = [x, *net.parameters()]
    j = jacobian(net, x)
    signs = torch.randint(2, (1, 4, 2), generator=torch.Generator().manual_seed(3)) * 2.0 - 1
    for penalty, targets, truth in (
        (FirstClass(3.0, weight=0.5), (), 1.5 * j[:, 0].square().sum(1).mean()),
        (
            Weighted(),
            (target,),
            torch.einsum("nmd,nm->nd", j, target).square().sum(1).mean()
            + torch.einsum("nmd,nd->nm", j, x).square().sum(1).mean(),
        ),
        (
            Signs(generator=torch.Generator().manual_seed(3)),
            (),
            torch.einsum("nmd,nm->nd", j, signs[0].double()).square().sum(1).mean(),
        ),
    ):
        value = way(penalty, net, x, *targets)
        close(value, truth)
        close_gradients(gradients(value, inputs), gradients(truth, inputs))


def test_a_constant_is_no_slip() -> None:
    """A penalty that begins later, for example, asks for no products."""

    class Later(InputPenalty):
        def per_sample(self, pull: Pullback) -> Tensor:
            return torch.zeros(len(pull.output))

    net, x, _ = problem()
    for way in WAYS.values():
        assert way(Later(), net, x) == 0


def test_a_frozen_linear_model_has_a_constant_jacobian() -> None:
    """So the value of a penalty has no gradient, and that is no slip either."""
    net, x, _ = nn.Linear(3, 2).double().requires_grad_(False), *problem()[1:]
    value = FirstClass(engine="autograd")(net, x)[1]
    close(value, 2 * net.weight[0].square().sum())


Slip = Callable[[Pullback], Any]


def ones(pull: Pullback) -> Tensor:
    return torch.ones_like(pull.output)[None]


SLIPS: list[tuple[Slip, str]] = [
    (lambda pull: pull.vjp(ones(pull))[0], r"per_sample returned a tensor of shape \[4, 3\]"),
    (lambda pull: pull.squared_norms(ones(pull)).sum(), r"returned a tensor of shape \[\]"),
    (lambda pull: 0.0, r"returned float 0.0: it must return a tensor of shape \[4\]"),
    (lambda pull: pull.squared_norms(ones(pull)).detach(), "does not require grad"),
    (lambda pull: torch.no_grad()(pull.squared_norms)(ones(pull)), "called under torch.no_grad"),
    (
        lambda pull: pull.squared_norms(ones(pull)[0]),
        r"here \[K, 4, 2\]; for K = 1 pass",
    ),
    (lambda pull: pull.vjp(ones(pull)[:, :2]), r"pull.vjp\(w\) .* was given .* shape \[1, 2, 2\]"),
    (lambda pull: pull.vjp(ones(pull)[:0]), r"shape \[0, 4, 2\]: .* K of at least 1"),
    (lambda pull: pull.jvp(ones(pull)), r"here \[K, 4, 3\]"),
    (lambda pull: pull.squared_norms(ones(pull).float()), "has dtype torch.float32 and output"),
    (
        lambda pull: pull.jvp(pull.x[None].float()),
        "float32 and x has torch.float64",
    ),
    (lambda pull: pull.vjp(ones(pull).to("meta")), "has device meta and output has cpu"),
    (lambda pull: pull.vjp(ones(pull), 0), "chunk_size is 0"),
    (
        lambda pull: pull.then(torch.sum).vjp(ones(pull)),
        r"to pull.then returned a tensor",
    ),
]


def slipping(slip: Slip) -> type[InputPenalty]:
    class Own(InputPenalty):
        def per_sample(self, pull: Pullback) -> Tensor:
            return slip(pull)

    return Own


@ways
@pytest.mark.parametrize(("slip", "message"), SLIPS, ids=[message for _, message in SLIPS])
def test_slips_are_named_by_every_engine(
    slip: Slip, message: str, way: Callable[..., Tensor]
) -> None:
    net, x, _ = problem()
    for _ in range(3):  # the chain engine runs other code in its later calls
        with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
            way(slipping(slip)(), net, x)


class ByHand(InputPenalty):
    def per_sample(self, pull: Any) -> Tensor:
        (g,) = torch.autograd.grad(pull.output.sum(), pull.x, create_graph=True)
        return g.square().sum(1)


@pytest.mark.parametrize("plain", [True, False])
def test_what_is_differentiated_by_hand_is_right(plain: bool) -> None:
    """By autograd in each call, also in those that the chain engine would run."""
    net, x, _ = problem()
    net = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2)).to(x) if plain else net
    penalty = ByHand()
    leaf = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(leaf).sum(), leaf, create_graph=True)
    truth = torch.autograd.grad(g.square().sum(1).mean(), [*net.parameters()], allow_unused=True)
    for _ in range(4):
        _, value = penalty(net, x)
        found = torch.autograd.grad(value, [*net.parameters()], allow_unused=True)
        torch.testing.assert_close(found, truth)
    assert "per_sample differentiates pull.output itself" in penalty.explain(net, x)
    torch.testing.assert_close(penalty(leaf, net(leaf)), g.square().sum(1).mean())
    with pytest.raises(RuntimeError, match=r"ByHand.per_sample differentiates .* use the products"):
        ByHand(engine="chain")(net, x)


@pytest.mark.parametrize("way", ["model form", "graph form"])
@pytest.mark.parametrize("slip", ["no create_graph", "detached", "of the output"])
def test_what_is_differentiated_by_hand_and_detached_raises(slip: str, way: str) -> None:
    class Detached(InputPenalty):
        def per_sample(self, pull: Any) -> Tensor:
            if slip == "of the output":
                return pull.output.detach().square().sum(1)
            (g,) = torch.autograd.grad(
                pull.output.sum(), pull.x, retain_graph=True, create_graph=slip == "detached"
            )
            return g.square().sum(1).detach()

    net, x, _ = problem()
    penalty, leaf = Detached(), x.detach().requires_grad_()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="does not require grad.*needs create_graph=True"):
            penalty(net, x) if way == "model form" else penalty(leaf, net(leaf))


def test_writes_and_misspelt_attributes_are_named() -> None:
    class Writes(InputPenalty):
        def per_sample(self, pull: Any) -> Tensor:
            return pull.output.mul_(2).sum(1)

    class Misspelt(InputPenalty):
        def per_sample(self, pull: Any) -> Tensor:
            return pull.ouput.sum(1)

    net, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="Writes.per_sample writes to pull.output or pull.x in"):
        Writes(engine="chain")(net, x)
    with pytest.raises(AttributeError, match="Misspelt.per_sample .* no attribute 'ouput': it has"):
        Misspelt()(net, x)


@pytest.mark.slow
def test_compiled(no_stale_graphs: None) -> None:
    net, x, target = problem()
    penalty = Weighted()
    step = torch.compile(lambda x, t: penalty(net, x, t)[1], backend="aot_eager", fullgraph=True)
    close(step(x, target), penalty(net, x, target)[1])
    for slip, message in SLIPS[:2]:
        own = slipping(slip)()
        step = torch.compile(lambda x, p=own: p(net, x)[1], backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match=message):
            step(x)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["the model", "a part", "a function", "its method", "ours"])
def test_a_compiled_model_is_refused_at_the_call(where: str, no_stale_graphs: None) -> None:
    net, x, _ = problem()
    model: Any = torch.compile(net, backend="aot_eager")
    if where == "a part":
        model = nn.Sequential(nn.Linear(3, 3).double(), model)
    elif where == "a function":
        model = torch.compile(lambda x: net(x), backend="aot_eager")
    elif where == "ours":  # whose backend overwrites what the second derivative needs
        model = fastjac.compile(net)
    elif where == "its method":
        model = net
        model.compile(backend="aot_eager")
    message = "compiled code twice: pass the model before compiling, and compile the step that"
    for engine in ("auto", "chain", "autograd"):
        for penalty in (
            fastjac.SpectReg(engine=engine),
            fastjac.SpectReg(2, engine=engine),
            fastjac.FrobReg(engine=engine),
            fastjac.Sobolev(engine=engine),
            fastjac.TangentProp(engine=engine),
        ):
            extra: tuple[Tensor, ...] = ()
            if isinstance(penalty, fastjac.Sobolev):
                extra = (torch.zeros(4, 2, 3, dtype=torch.float64),)
            elif isinstance(penalty, fastjac.TangentProp):
                extra = (torch.ones_like(x).detach(),)
            for _ in range(2):
                with pytest.raises(RuntimeError, match=message):
                    penalty(model, x, *extra)
            if engine == "auto":
                with pytest.raises(RuntimeError, match=message):
                    penalty(x, model(x), *extra)
    if where == "ours":  # code of inductor keeps nothing for the second of two backwards
        return
    # Its gradient once is no derivative of compiled code twice.
    _, value = fastjac.finite_difference_datagrad(model, x, torch.zeros(4).long())
    value.backward()


def test_a_compiled_branch_that_does_not_depend_on_x(no_stale_graphs: None) -> None:
    """No second derivative of it is needed."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.other = Net(), torch.compile(Net(), backend="aot_eager")

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.other(torch.ones(4, 3))

    two, x = Two(), torch.randn(4, 3)
    for engine in ("auto", "chain", "autograd"):
        fastjac.SpectReg(engine=engine)(two, x)[1].backward()
