"""The presets have the values and gradients of their originals, for the same inputs and draws."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import peers
import pytest
import torch
from penalty_cases import close, close_gradients, gradients, seeded
from torch import Tensor, nn

import fastjac
from fastjac import presets

pytestmark = pytest.mark.usefixtures("double")


def net(*widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Softplus()]
    return nn.Sequential(*layers[:-1])


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


X, FAKE = randn(3, 4, seed=1), randn(3, 4, seed=2)
TARGET = randn(3, 2, seed=3)
NOISE = randn(2, 3, 4, seed=4)
GAMMA, LAM = 3.7, 1.3


@dataclass
class Preset:
    """The widths of a model, and the original and the preset as functions of ``(model, x)``."""

    widths: tuple[int, ...]
    theirs: Callable[[Any, Tensor], Tensor]
    ours: Callable[[Any, Tensor], Tensor]
    by_model: Callable[[Any, Tensor, str], Tensor] | None = None  # the model form, by engine


PRESETS = {
    "jacobian_reg": Preset(
        (4, 5, 2),
        lambda f, x: peers.JacobianReg(2)(x, f(x)),
        lambda f, x: fastjac.JacobianReg(2)(x, f(x)),
        lambda f, x, engine: fastjac.JacobianReg(2, engine=engine)(f, x)[1],
    ),
    "jacobian_reg exact": Preset(
        (4, 5, 2),
        lambda f, x: peers.JacobianReg(-1)(x, f(x)),
        lambda f, x: fastjac.JacobianReg(-1)(x, f(x)),
        lambda f, x, engine: fastjac.JacobianReg(-1, engine=engine)(f, x)[1],
    ),
    "double_backprop": Preset(
        (4, 5, 2),
        lambda f, x: LAM * peers.double_backprop(x, f(x), TARGET),
        lambda f, x: presets.double_backprop(LAM)(x, f(x), TARGET),
        lambda f, x, engine: presets.double_backprop(LAM, engine=engine)(f, x, TARGET)[1],
    ),
    "r1": Preset(
        (4, 5, 5, 1),
        lambda f, x: peers.r1_loss(f(x), x, GAMMA),
        lambda f, x: presets.r1(GAMMA)(x, f(x)),
        lambda f, x, engine: presets.r1(GAMMA, engine=engine)(f, x)[1],
    ),
    "r2": Preset(
        (4, 5, 5, 1),
        lambda f, x: peers.r1_loss(f(x), x, GAMMA),
        lambda f, x: presets.r2(GAMMA)(x, f(x)),
        lambda f, x, engine: presets.r2(GAMMA, engine=engine)(f, x)[1],
    ),
    "wgan_gp": Preset(
        (4, 5, 5, 1),
        lambda f, x: peers.wgan_gp_loss(f, x, FAKE, LAM),
        lambda f, x: presets.wgan_gp(LAM)(f, x, FAKE)[1],
        lambda f, x, engine: presets.wgan_gp(LAM, engine=engine)(f, x, FAKE)[1],
    ),
    "igr": Preset(
        (4, 5, 5, 1),
        lambda f, x: peers.igr_loss(x, f(x)),
        lambda f, x: presets.igr()(x, f(x)),
        lambda f, x, engine: presets.igr(engine=engine)(f, x)[1],
    ),
    "rnode": Preset(
        (4, 5, 4),
        lambda f, x: torch.stack(peers.rnode_terms(x, f(x), [NOISE[0]])) * TARGET.T,
        lambda f, x: torch.stack(presets.rnode(x, f(x), NOISE[0])) * TARGET.T,
    ),
    "rnode, two vectors": Preset(
        (4, 5, 4),
        lambda f, x: torch.stack(peers.rnode_terms(x, f(x), list(NOISE))) * TARGET.T,
        lambda f, x: torch.stack(presets.rnode(x, f(x), NOISE)) * TARGET.T,
    ),
    "deq": Preset(
        (4, 5, 4),
        lambda f, x: LAM * peers.jac_loss_estimate(f(x), x, vecs=1),
        lambda f, x: presets.deq(1, weight=LAM)(x, f(x)),
        lambda f, x, engine: presets.deq(1, weight=LAM, engine=engine)(f, x)[1],
    ),
}
NAMES = list(PRESETS)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradients_are_the_originals(name: str) -> None:
    preset = PRESETS[name]
    model, x = net(*preset.widths), X.clone().requires_grad_()
    inputs = list(model.parameters()) + ([] if name == "wgan_gp" else [x])

    def seeded_value(side: Callable[..., Tensor], *more: str) -> Tensor:
        torch.manual_seed(5)
        return side(model, x, *more)

    theirs = seeded_value(preset.theirs)
    assert theirs.abs().min() > 1e-6
    sides = [seeded_value(preset.ours)]
    if preset.by_model is not None:
        sides += [seeded_value(preset.by_model, engine) for engine in ("autograd", "chain")]
    for ours in sides:
        close(ours, theirs)
        close_gradients(gradients(ours, inputs), gradients(theirs, inputs))


# The others are penalties of the registry, for which test_penalties.py does this.
@pytest.mark.parametrize("name", ["double_backprop", "wgan_gp", "rnode, two vectors", "deq"])
def test_gradcheck(name: str) -> None:
    preset = PRESETS[name]
    model = net(*preset.widths)
    names = [n for n, _ in model.named_parameters()]

    def value(*parameters: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return torch.func.functional_call(
                model, dict(zip(names, parameters, strict=True)), (x,)
            )

        torch.manual_seed(5)
        return preset.ours(run, X.clone().requires_grad_())

    inputs = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


def test_deq_with_several_given_vectors() -> None:
    f, z = net(4, 5, 4), X.clone().requires_grad_()
    torch.manual_seed(5)
    theirs = peers.jac_loss_estimate(f(z), z, vecs=3)
    torch.manual_seed(5)
    v = torch.stack([torch.randn(3, 4) for _ in range(3)])
    ours = presets.deq(3)(z, f(z), projection=v / math.sqrt(4))
    close(ours, theirs)
    assert presets.deq().n_proj == 2
    drawn = presets.deq(2000, generator=seeded())(z, f(z))
    torch.testing.assert_close(drawn, presets.deq(-1)(z, f(z)), rtol=0.05, atol=0)


def test_image_shaped_samples() -> None:
    """Means and sums are over all dimensions except the first."""
    z, noise = (randn(2, 3, 2, 2, seed=k) for k in (1, 2))
    conv, z = nn.Conv2d(3, 3, 3, padding=1), z.requires_grad_()
    for ours, theirs in zip(
        presets.rnode(z, conv(z).sin(), noise),
        peers.rnode_terms(z, conv(z).sin(), [noise]),
        strict=True,
    ):
        close(ours, theirs)
    torch.manual_seed(5)
    theirs = peers.jac_loss_estimate(conv(z).sin(), z, vecs=1)
    torch.manual_seed(5)
    close(presets.deq(1)(z, conv(z).sin()), theirs)

    def critic(x: Tensor) -> Tensor:
        return conv(x).sin().flatten(1).sum(1)

    close(presets.r1(GAMMA)(z, critic(z)), peers.r1_loss(critic(z), z, GAMMA))
    torch.manual_seed(5)
    theirs = peers.wgan_gp_loss(critic, z.data, noise, LAM)
    torch.manual_seed(5)
    close(presets.wgan_gp(LAM)(critic, z, noise)[1], theirs)


def test_wgan_gp_trains_the_critic_alone() -> None:
    critic, real, fake = net(4, 5, 5, 1), X.clone().requires_grad_(), FAKE.clone().requires_grad_()
    epsilon = torch.tensor([0.0, 1.0, 0.25])
    output, value = presets.wgan_gp()(critic, real, fake, epsilon=epsilon)
    points = torch.stack([FAKE[0], X[1], 0.25 * X[2] + 0.75 * FAKE[2]])
    close(output, critic(points))
    close(value, 10 * fastjac.GradientPenalty()(critic, points)[1])
    assert torch.autograd.grad(value, [real, fake], allow_unused=True) == (None, None)


def test_wgan_gp_skipped_call_runs_the_critic_at_points_in_between() -> None:
    critic, penalty = net(4, 5, 5, 1), presets.wgan_gp(every=2)
    for k in range(2):
        output, value = penalty(critic, X, FAKE, epsilon=torch.full((3,), 0.5))
        close(output, critic((X + FAKE) / 2))
        assert (value != 0) == (k == 0)
    value.backward()


def test_wgan_gp_generator() -> None:
    critic = net(4, 5, 5, 1)
    first, same, other = (
        presets.wgan_gp(generator=seeded(s))(critic, X, FAKE)[1] for s in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_double_backprop_of_one_number_per_sample() -> None:
    model, penalty = net(4, 5, 1), presets.double_backprop()
    truth = penalty(model, X, TARGET[:, :1])[1]
    close(penalty(model, X, TARGET[:, 0])[1], truth)
    close(penalty(lambda x: model(x).squeeze(1), X, TARGET[:, 0])[1], truth)


def test_presets_can_be_copied() -> None:
    critic = net(4, 5, 5, 1)
    assert repr(presets.wgan_gp(every=4)) == "WGANGP(weight=10.0, every=4)"
    assert repr(presets.r1(3.0)) == "GradientPenalty(center=0.0, weight=1.5)"
    for make in (presets.r1, presets.r2, presets.igr):
        penalty = make(reduction="sum", every=2)
        for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
            assert repr(twin) == repr(penalty)
            close(twin(critic, X)[1], copy.deepcopy(penalty)(critic, X)[1])
    penalty = pickle.loads(pickle.dumps(presets.double_backprop(LAM)))
    close(
        penalty(net(4, 5, 2), X, TARGET)[1],
        presets.double_backprop(LAM)(net(4, 5, 2), X, TARGET)[1],
    )


def test_calls_that_are_refused() -> None:
    critic = net(4, 5, 5, 1)
    with pytest.raises(TypeError, match="critic is a Tensor: .* GradientPenalty"):
        presets.wgan_gp()(X, X, FAKE)
    with pytest.raises(ValueError, match=r"fake has shape \(2, 4\) and real has \(3, 4\)"):
        presets.wgan_gp()(critic, X, FAKE[:2])
    with pytest.raises(TypeError, match="fake has dtype torch.float32"):
        presets.wgan_gp()(critic, X, FAKE.float())
    with pytest.raises(ValueError, match=r"epsilon is .*must be a tensor \[3\]"):
        presets.wgan_gp()(critic, X, FAKE, epsilon=torch.rand(3, 1))
    with pytest.raises(TypeError, match="epsilon has dtype torch.float32"):
        presets.wgan_gp()(critic, X, FAKE, epsilon=torch.rand(3, dtype=torch.float32))
    with pytest.raises(TypeError, match="gamma is 'a'"):
        presets.r1("a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target has batch size 2 and output has 3"):
        presets.double_backprop()(net(4, 5, 2), X, TARGET[:2])
    for width, target in ((1, TARGET), (2, TARGET[:, :1]), (2, TARGET[:, 0])):  # would broadcast
        with pytest.raises(ValueError, match=r"target has shape .* must have the shape of output"):
            presets.double_backprop()(net(4, 5, width), X, target)
    z = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="dz must have the shape of z"):
        presets.rnode(z, net(4, 5, 2)(z), NOISE[0])
    with pytest.raises(ValueError, match="and noise that shape or"):
        presets.rnode(z, net(4, 5, 4)(z), NOISE[0, :2])
    with pytest.raises(RuntimeError, match="x does not require grad"):
        presets.rnode(X, net(4, 5, 4)(X), NOISE[0])
