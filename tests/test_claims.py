"""The claims of the papers as tests.

A random estimate must be within five standard errors, which are taken from the sample. The mean of
thousands of independent values is almost normal, so a true claim fails with a probability below
6e-7, and with the fixed seeds below it does not fail. Each test also checks that the standard error
is below 1 %, so a claim that is wrong by 5 % fails.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor, nn

from fastjac.penalties import (
    accumulated_dreg,
    datagrad,
    dreg,
    finite_difference_datagrad,
    frobreg,
    igpen,
    jacobian_reg,
    random_onehot,
    spectreg,
)

close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)
DRAWS = 40_000
ENGINES = ["autograd", "chain"]


def network(activation: type[nn.Module], *widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for k in range(len(widths) - 1):
        layers += [nn.Linear(widths[k], widths[k + 1]), activation()]
    return nn.Sequential(*layers[:-1]).double()


def batch(n: int, *shape: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(2)
    return torch.randn(n, *shape, dtype=torch.float64, generator=generator)


def copies(x: Tensor) -> Tensor:
    """One sample many times: the per-sample values are then independent draws."""
    return x[:1].repeat(DRAWS, *[1] * (x.dim() - 1)).requires_grad_()


def assert_mean(values: Tensor, expected: Tensor) -> None:
    error = values.std() / len(values) ** 0.5
    assert error < 0.01 * expected.abs()
    assert (values.mean() - expected).abs() < 5 * error


PROJECTIONS = {  # penalty, options, expected value in units of the squared Frobenius norm
    "gaussian": (spectreg, {"scale": False}, 1.0),
    "scaled": (spectreg, {}, 1 / 4),
    "normalised": (spectreg, {"normalize": True}, 1 / 4),
    "one-hot": (random_onehot, {}, 1.0),
    "jacobian-reg": (jacobian_reg, {}, 1 / 2),
    "three": (spectreg, {"n_proj": 3}, 1 / 4),
    "rademacher": (spectreg, {"distribution": "rademacher"}, 1 / 4),
    "spherical": (spectreg, {"distribution": "spherical"}, 1 / 4),
    "orthogonal": (spectreg, {"distribution": "orthogonal", "n_proj": 6}, 1 / 4),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_random_projections_are_unbiased(name: str) -> None:
    """Claim 1: ``E ‖Jᵀr‖² = ‖J‖_F²``; other distributions of r give a multiple of it."""
    penalty, options, per_frobenius = PROJECTIONS[name]
    model, x = network(nn.Tanh, 3, 5, 4), batch(1, 3)
    exact = frobreg(model, x)[1].detach()
    seed = torch.Generator(DEVICE).manual_seed(3)
    values = penalty(model, copies(x), generator=seed, reduction="none", **options)[1]
    assert_mean(values.detach(), per_frobenius * exact)


def test_normalised_projection_bounds_the_spectral_norm_from_below() -> None:
    model, x = network(nn.Tanh, 3, 5, 4), batch(1, 3)
    jacobian = torch.autograd.functional.jacobian(model, x[0])
    values = spectreg(model, copies(x), normalize=True, norm="l2", reduction="none")[1]
    largest = torch.linalg.matrix_norm(jacobian, 2)
    assert values.max() <= largest * (1 + 1e-12)
    # The best of 40 000 directions in four dimensions is close to the singular vector.
    assert values.max() > 0.99 * largest


def test_datagrad_is_the_projection_by_p_minus_y() -> None:
    """Claim 2."""
    model, x = network(nn.Tanh, 4, 6, 3), batch(5, 4)
    target = torch.tensor([0, 1, 2, 1, 0])
    x.requires_grad_()
    output = model(x)
    value = datagrad(x, output, target, reduction="none")
    w = output.softmax(1) - F.one_hot(target, 3)
    close(spectreg(x, output, projection=w, reduction="none"), value)
    loss = F.cross_entropy(output, target, reduction="none")
    (v,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    close(v.square().sum(1), value)
    close(igpen(x, output, target, reduction="none"), value)


@pytest.mark.parametrize("engine", ENGINES)
def test_frobreg_of_one_dense_layer_is_weight_decay(engine: str) -> None:
    linear, x = nn.Linear(4, 3).double(), batch(5, 4)
    value = frobreg(linear, x, engine=engine)[1]
    close(value, linear.weight.square().sum())
    (gradient,) = torch.autograd.grad(value, linear.weight)
    close(gradient, 2 * linear.weight)
    values = spectreg(linear, copies(x), scale=False, reduction="none")[1]
    assert_mean(values.detach(), linear.weight.detach().square().sum())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("penalty", [frobreg, spectreg, random_onehot])
def test_relu_networks_give_the_biases_no_gradient(penalty: Any, engine: str) -> None:
    model, x = network(nn.ReLU, 4, 6, 5, 3), batch(7, 4)
    value = penalty(model, x, engine=engine)[1]
    for name, parameter in model.named_parameters():
        (gradient,) = torch.autograd.grad(
            value, parameter, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        assert torch.equal(gradient, torch.zeros_like(gradient)) == name.endswith("bias")


def test_finite_differences_tend_to_datagrad() -> None:
    model, x = network(nn.Tanh, 4, 6, 3), batch(5, 4)
    target = torch.tensor([0, 1, 2, 1, 0])
    exact = datagrad(model, x, target)[1]

    def error(eps: float) -> Tensor:
        return (finite_difference_datagrad(model, x, target, eps=eps)[1] - exact).abs()

    # The error is of first order in ε: with a step ten times smaller it is ten times smaller.
    for eps in (1e-2, 1e-3, 1e-4):
        assert 9 < error(eps) / error(eps / 10) < 11
    assert error(1e-5) < 1e-4 * exact


def layer_jacobian(layer: nn.Module, activation: nn.Module, a: Tensor) -> Tensor:
    """The Jacobian of one layer for one sample, ``[outputs, inputs]``, by torch.func."""
    j = torch.func.jacrev(lambda t: activation(layer(t.unsqueeze(0)))[0].flatten())(a)
    return j.flatten(1)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.SiLU, nn.ReLU])
def test_dreg_of_dense_layers_is_the_sum_of_their_jacobians(activation: type[nn.Module]) -> None:
    model, x = network(activation, 4, 6, 5, 3), batch(5, 4)
    expected = []
    for sample in x:
        a, squares = sample, []
        for k in (0, 2):
            squares.append(layer_jacobian(model[k], model[k + 1], a).square().sum())
            a = model[k + 1](model[k](a.unsqueeze(0)))[0]
        expected.append(sum(squares))
    close(dreg(model, x, reduction="none")[1], torch.stack(expected))


CONVOLUTIONS = {
    "1d": lambda: nn.Conv1d(2, 3, 3),
    "2d": lambda: nn.Conv2d(2, 3, (2, 3)),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "strided-dilated": lambda: nn.Conv2d(2, 3, 2, stride=2, dilation=2),
    "3d": lambda: nn.Conv3d(1, 2, 2),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 2, stride=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_dreg_of_convolutions_without_padding_is_their_jacobian(kind: str) -> None:
    """Each output position sees all taps; that of the transposed convolution sees one of four."""
    conv = CONVOLUTIONS[kind]()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten()).double()
    x = batch(2, conv.in_channels, *[5] * len(conv.kernel_size))
    expected = torch.stack([layer_jacobian(conv, nn.Tanh(), a).square().sum() for a in x])
    values = dreg(model, x, reduction="none")[1]
    if not conv.transposed:
        close(values, expected)
        return
    # DREG counts all taps, so its value is four times the exact one if the taps are equal.
    assert (values > expected).all()
    with torch.no_grad():
        conv.weight.copy_(conv.weight.mean((2, 3), keepdim=True).expand_as(conv.weight))
    expected = torch.stack([layer_jacobian(conv, nn.Tanh(), a).square().sum() for a in x])
    close(dreg(model, x, reduction="none")[1], 4 * expected)


def test_dreg_counts_taps_on_padding_and_interior_positions_exactly() -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(2, 3, 3, padding=1).double()
    x = batch(1, 2, 7)
    rows = layer_jacobian(conv, nn.Tanh(), x[0]).square().sum(1).reshape(3, 7)
    slope = (1 - conv(x)[0].tanh() ** 2) ** 2
    counted = slope * conv.weight.square().sum((1, 2)).unsqueeze(1)
    close(counted[:, 1:-1], rows[:, 1:-1])
    assert (counted[:, [0, -1]] > rows[:, [0, -1]]).all()
    close(dreg(nn.Sequential(conv, nn.Tanh()), x)[1], counted.sum())


def test_dreg_of_a_grouped_transposed_convolution_without_stride() -> None:
    """Interior positions of a stride-1 transposed convolution see all taps of their group."""
    torch.manual_seed(0)
    conv = nn.ConvTranspose1d(4, 6, 3, groups=2).double()
    x = batch(1, 4, 8)
    rows = layer_jacobian(conv, nn.Tanh(), x[0]).square().sum(1).reshape(6, 10)[:, 2:-2]
    crop = nn.ConvTranspose1d(4, 6, 3, groups=2, padding=2).double()
    crop.load_state_dict(conv.state_dict())
    close(dreg(nn.Sequential(crop, nn.Tanh()), x)[1], rows.sum())


def test_accumulated_dreg_is_unbiased() -> None:
    model, x = network(nn.Tanh, 3, 5, 4, 2), batch(1, 3)
    ends = [model[:2], model[:4]]
    exact = sum(torch.autograd.functional.jacobian(end, x[0]).square().sum() for end in ends)
    seed = torch.Generator(DEVICE).manual_seed(3)
    values = accumulated_dreg(model, copies(x), generator=seed, reduction="none")[1]
    assert_mean(values.detach(), exact)


def test_orthogonal_projections_have_less_variance() -> None:
    """It is zero for K = m. For two of four it is less than that of independent points."""
    model, x = network(nn.Tanh, 3, 5, 4), batch(1, 3)
    exact = spectreg(model, x, n_proj=-1)[1].detach()
    close(spectreg(model, x, n_proj=4, distribution="orthogonal")[1].detach(), exact)

    def variance(distribution: str) -> Tensor:
        seed = torch.Generator(DEVICE).manual_seed(3)
        options = {"n_proj": 2, "distribution": distribution, "generator": seed}
        return spectreg(model, copies(x), reduction="none", **options)[1].detach().var()

    gaussian, spherical, orthogonal = map(variance, ("gaussian", "spherical", "orthogonal"))
    # Two of m orthogonal vectors have (m − 2) / (m − 1) of the variance of two spherical ones.
    assert orthogonal < 0.75 * spherical < 0.75 * gaussian
