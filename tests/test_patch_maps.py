"""GradientPenalty and its presets with a critic that returns a map of patches, ``[N, 1, ...]``.

The value is that of the sum of the outputs of a sample, as with ``grad_outputs=ones_like(output)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from penalty_cases import close, close_gradients, gradients
from torch import Tensor, nn

import fastjac
from fastjac import GradientPenalty, presets, reference

pytestmark = pytest.mark.usefixtures("double")


def patch_critic() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, 1, 1)
    return nn.Sequential(*layers)


X = torch.linspace(-2, 3, 3 * 2 * 36, dtype=torch.float64).view(3, 2, 6, 6).sin()
CASES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "center 1": (GradientPenalty(), lambda norm: (norm - 1).square()),
    "one-sided": (
        GradientPenalty(0.2, one_sided=True),
        lambda norm: (norm - 0.2).clamp(min=0).square(),
    ),
    "center 0": (GradientPenalty(0.0), torch.square),
    "r1": (presets.r1(10.0), lambda norm: 5 * norm.square()),
}


def of_scripts(critic: nn.Module, x: Tensor, of_norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The lines of published training programs."""
    output = critic(x)
    ones = torch.ones_like(output)
    (v,) = torch.autograd.grad(output, x, grad_outputs=ones, create_graph=True)
    return of_norm(v.view(len(x), -1).norm(2, dim=1)).mean()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["autograd", "chain", "auto"])
def test_is_what_scripts_compute(name: str, engine: str) -> None:
    penalty, of_norm = CASES[name]
    penalty.engine = engine
    critic, x = patch_critic(), X.clone().requires_grad_()
    inputs = [x, *critic.parameters()]
    expected = of_scripts(critic, x, of_norm)
    for _ in range(3):
        output, value = penalty(critic, x)
        assert output.shape == (3, 1, 3, 3)
        close(value, expected)
        close_gradients(gradients(value, inputs), gradients(expected, inputs))


def test_wgan_gp() -> None:
    critic, fake, epsilon = patch_critic(), X.cos(), torch.tensor([0.1, 0.6, 0.8])
    between = torch.lerp(fake, X, epsilon.view(-1, 1, 1, 1)).requires_grad_()
    expected = 10 * of_scripts(critic, between, lambda norm: (norm - 1).square())
    _, value = presets.wgan_gp()(critic, X, fake, epsilon=epsilon)
    close(value, expected)
    inputs = list(critic.parameters())
    close_gradients(gradients(value, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("shape", [(3, 1), (3, 1, 4), (3, 1, 2, 3)])
def test_reference_and_gradcheck(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, requires_grad=True)
    w = torch.randn(4, torch.Size(shape[1:]).numel(), requires_grad=True)

    def value(x: Tensor, w: Tensor) -> Tensor:
        return GradientPenalty(reduction="none")(x, (x @ w).sin().view(shape))

    close(value(x, w), reference.gradient_penalty(x, (x @ w).sin().view(shape)))
    assert torch.autograd.gradcheck(value, (x, w))
    assert torch.autograd.gradgradcheck(value, (x, w))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 1), (3, 2, 2, 1)])
def test_columns_are_refused(shape: tuple[int, ...]) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"\[N\], \[N, 1\] or a map \[N, 1, ...\]; for more columns"
    ):
        GradientPenalty()(x, (2 * x).view(shape))


def test_eikonal_takes_no_maps() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"Eikonal needs one output for a sample, \[N\] or \[N, 1\]"
    ):
        fastjac.eikonal(x, x.view(3, 1, 4))
