"""The reference against closed forms for models with a known Jacobian."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor

from fastjac import reference

# Sums of a dozen float64 products: a few roundings of 1.1e-16 each.
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


# g(x) = W x: the Jacobian is W for every sample.
W = randn(3, 4)
X = randn(2, 4, seed=1).requires_grad_()
OUTPUT = X @ W.T
P = OUTPUT.detach().softmax(1)
TARGET = torch.tensor([2, 0])
Y = torch.eye(3, dtype=torch.float64)[TARGET]
SQUARED = (W * W).sum()


def test_jacobian_of_a_nonlinear_model() -> None:
    def single(x: Tensor) -> Tensor:
        return torch.tanh(W @ x).sin()

    j = reference.jacobian(X, torch.stack([single(x) for x in X]).reshape(2, 3, 1))
    close(j, torch.stack([torch.autograd.functional.jacobian(single, x) for x in X]))


def test_projections_of_a_linear_model() -> None:
    every = torch.ones(2, dtype=torch.float64)
    close(reference.frobreg(X, OUTPUT), SQUARED * every)
    close(reference.frobreg(X, OUTPUT, norm="l1"), W.abs().sum() * every)
    close(reference.frobreg(X, OUTPUT, norm="l2"), W.norm(dim=1).sum() * every)
    close(reference.spectreg(X, OUTPUT, n_proj=-1), SQUARED / 3 * every)
    close(reference.spectreg(X, OUTPUT, n_proj=-1, scale=False), SQUARED * every)
    close(reference.random_onehot(X, OUTPUT, n_proj=-1), SQUARED * every)
    close(reference.jacobian_reg(X, OUTPUT, n_proj=-1), SQUARED / 2 * every)
    close(reference.onehot(X, OUTPUT, TARGET), (W[TARGET] ** 2).sum(1))
    close(reference.datagrad(X, OUTPUT, TARGET), ((P - Y) @ W).square().sum(1))
    rows = [(torch.diag(p) - torch.outer(p, p)) @ W for p in P]
    close(reference.jacreg(X, OUTPUT), torch.stack([(r * r).sum() for r in rows]))


def test_random_projections_of_a_linear_model() -> None:
    def draws() -> torch.Generator:
        return torch.Generator(DEVICE).manual_seed(5)

    r = torch.randn(4, 2, 3, dtype=torch.float64, generator=draws())
    one = torch.randn(4, 1, 3, dtype=torch.float64, generator=draws())
    unit = r / r.norm(dim=2, keepdim=True)
    spectreg = partial(reference.spectreg, X, OUTPUT, n_proj=4)

    def mean(w: Tensor) -> Tensor:
        return (w @ W).square().sum(2).mean(0).expand(2)

    close(spectreg(generator=draws()), mean(r / math.sqrt(3)))
    close(spectreg(generator=draws(), scale=False), mean(r))
    close(spectreg(generator=draws(), normalize=True), mean(unit))
    close(spectreg(generator=draws(), shared=True), mean(one / math.sqrt(3)))
    close(spectreg(generator=draws(), norm="l1", scale=False), (r @ W).abs().sum(2).mean(0))
    close(spectreg(projection=r[0]), mean(r[:1]))
    close(
        reference.jacobian_reg(X, OUTPUT, n_proj=4, generator=draws()),
        3 / 2 * mean(unit),
    )
    index = torch.randint(3, (4, 2), generator=draws())
    close(
        reference.random_onehot(X, OUTPUT, n_proj=4, generator=draws()),
        3 * W.square().sum(1)[index].mean(0),
    )


def test_goals_other_than_zero() -> None:
    scalar, w = OUTPUT[:, 0], W[0]
    for center in (0.0, 1.0, 9.0):
        excess = w.norm() - center
        penalty = partial(reference.gradient_penalty, X, scalar, center=center)
        close(penalty(), (excess**2).expand(2))
        close(penalty(one_sided=True), (excess.clamp(min=0) ** 2).expand(2))
    close(reference.eikonal(X, scalar), ((w.norm() - 1) ** 2).expand(2))
    t = randn(3, 2, 4, seed=2)
    close(reference.tangentprop(X, OUTPUT, t), (t @ W.T).square().sum(2).mean(0))
    close(reference.tangentprop(X, OUTPUT, t[0]), (t[0] @ W.T).square().sum(1))
    goal = randn(2, 3, 4, seed=2)
    close(reference.sobolev(X, OUTPUT, goal), (W - goal).square().sum((1, 2)))
    y = randn(2, seed=4)
    close(
        reference.igpen(X, scalar, y, loss_fn=lambda f, y: (f - y) ** 2),
        (2 * (scalar - y)) ** 2 * (w * w).sum(),
    )
    close(reference.igpen(X, OUTPUT, TARGET), reference.datagrad(X, OUTPUT, TARGET))


def test_finite_difference_and_entropy() -> None:
    v = (P - Y) @ W
    moved = X + 0.1 * v / v.norm(dim=1, keepdim=True)

    def loss(x: Tensor) -> Tensor:
        return F.cross_entropy(x @ W.T, TARGET, reduction="none")

    values = reference.finite_difference_datagrad(lambda x: x @ W.T, X, TARGET, eps=0.1)
    close(values, ((loss(moved) - loss(X)) / 0.1) ** 2)
    uniform = torch.zeros(2, 3, dtype=torch.float64)
    close(reference.confidence_penalty(uniform, uniform), uniform[:, 0] - math.log(3))
    close(reference.confidence_penalty(X, OUTPUT), (P * P.log()).sum(1))


def normal_cdf(z: Tensor) -> Tensor:
    return (1 + torch.erf(z / math.sqrt(2))) / 2


@pytest.mark.parametrize(
    ("activation", "slope"),
    [
        (torch.tanh, lambda z: 1 - z.tanh() ** 2),
        (torch.sigmoid, lambda z: z.sigmoid() * (1 - z.sigmoid())),
        (F.softplus, torch.sigmoid),
        (F.relu, lambda z: (z > 0).double()),
        (F.silu, lambda z: z.sigmoid() * (1 + z * (1 - z.sigmoid()))),
        (
            F.gelu,
            lambda z: normal_cdf(z) + z * torch.exp(-z * z / 2) / math.sqrt(2 * math.pi),
        ),
    ],
    ids=["tanh", "sigmoid", "softplus", "relu", "silu", "gelu"],
)
def test_derivative_of_an_activation(
    activation: reference.Activation, slope: reference.Activation
) -> None:
    z = randn(5, 7)
    close(reference.derivative(activation, z), slope(z))


# Two layers in small numbers. φ(z) = z² has φ' = 2z.
Z1 = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
W1 = torch.tensor([[1.0, 2.0, 2.0], [3.0, 0.0, 4.0]])  # squared row norms 9 and 25
Z2 = torch.tensor([[7.0], [8.0]])
W2 = torch.tensor([[1.0, 2.0]])  # squared row norm 5
STACK = [(Z1, W1, torch.square), (Z2, W2, None)]
# φ'² is (4, 16) and (1, 0): 4·9 + 16·25 and 1·9.
FIRST = torch.tensor([436.0, 9.0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, FIRST),
        ({"over": "units"}, FIRST / 2),
        ({"over": "elements"}, FIRST / 6),
        ({"include_output": True}, FIRST + 5),
        ({"include_output": True, "layers": "mean"}, (FIRST + 5) / 2),
        ({"include_output": True, "over": "elements"}, FIRST / 6 + 5 / 2),
        ({"use_weight": False}, torch.tensor([20.0, 1.0])),
        ({"squared": False}, FIRST.sqrt()),
        ({"squared": False, "over": "units", "include_output": True}, (FIRST / 2).sqrt() + 5**0.5),
        ({"layer_weights": (2.0, 3.0), "include_output": True}, 2 * FIRST + 15),
    ],
    ids=str,
)
def test_dreg_in_small_numbers(options: dict[str, Any], expected: Tensor) -> None:
    torch.testing.assert_close(reference.dreg(STACK, **options), expected)


def test_presets_of_dreg_in_small_numbers() -> None:
    torch.testing.assert_close(reference.contractive(STACK), FIRST)
    torch.testing.assert_close(reference.gu_rigazio(STACK), FIRST.sqrt() + 5**0.5)
    weighted = reference.gu_rigazio(STACK, layer_weights=(2.0, 3.0))
    torch.testing.assert_close(weighted, 2 * FIRST.sqrt() + 3 * 5**0.5)


def test_dreg_counts_each_position_as_a_row() -> None:
    weight = randn(3, 2, 5)  # [C_out, C_in, taps]
    z = randn(4, 3, 6)
    slope = 1 - z.tanh() ** 2
    by_hand = torch.zeros(4, dtype=torch.float64)
    for n in range(4):
        for c in range(3):
            for place in range(6):
                by_hand[n] += slope[n, c, place] ** 2 * (weight[c] ** 2).sum()
    close(reference.dreg([(z, weight, torch.tanh)]), by_hand)
    close(reference.dreg([(z, weight, torch.tanh)], positions="mean"), by_hand / 6)
    close(reference.dreg([(z, weight, torch.tanh)], over="units"), by_hand / 3)
    close(reference.dreg([(z, weight, torch.tanh)], over="elements"), by_hand / 30)
    # The same numbers as a Linear on six tokens: channels last.
    close(reference.dreg([(z.movedim(1, 2), weight.flatten(1), torch.tanh)]), by_hand)


def test_accumulated_dreg_multiplies_the_jacobians() -> None:
    weights = [randn(5, 4), randn(3, 5, seed=1), randn(2, 3, seed=2)]
    x, u = randn(2, 4, seed=3), randn(2, 4, seed=4)

    def activations(x: Tensor) -> list[Tensor]:
        first = torch.tanh(x @ weights[0].T)
        second = torch.sigmoid(first @ weights[1].T)
        return [first, second, second @ weights[2].T]

    first, second, _ = activations(x)
    expected, with_output = [], []
    for n in range(2):
        j1 = torch.diag(1 - first[n] ** 2) @ weights[0]
        j2 = torch.diag(second[n] * (1 - second[n])) @ weights[1]
        pushed = [j1 @ u[n], j2 @ j1 @ u[n], weights[2] @ j2 @ j1 @ u[n]]
        squares = [(t @ t) for t in pushed]
        expected.append(squares[0] + squares[1])
        with_output.append(sum(squares))
    accumulated = partial(reference.accumulated_dreg, activations, x, tangent=u)
    close(accumulated(), torch.stack(expected))
    close(accumulated(include_output=True), torch.stack(with_output))
    drawn = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator(DEVICE).manual_seed(6))
    close(
        reference.accumulated_dreg(
            activations, x, generator=torch.Generator(DEVICE).manual_seed(6)
        ),
        reference.accumulated_dreg(activations, x, tangent=drawn),
    )
