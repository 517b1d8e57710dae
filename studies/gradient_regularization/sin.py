"""One run of an MLP on noisy samples of sin(5x) (section 6.1.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac
from studies.gradient_regularization import training
from studies.networks import sin_network
from studies.settings import Metrics, Setting

GRID = torch.linspace(-1, 1, 900).unsqueeze(1)
NEIGHBOUR = 0.001  # of SIN2


@dataclass(frozen=True)
class Run(Setting):
    """One training.

    Attributes:
        data: ``"SIN"``, or ``"SIN2"`` with a second sample 0.001 to the right of each, of the
            same value. A network that fits SIN2 has flat steps at the samples.
        penalty, weight: The name of the penalty in fastjac or ``"none"``, and its λ.
        iterations: Of Adam on all samples at once.
    """

    data: str = "SIN"
    penalty: str = "none"
    weight: float = 0.0
    iterations: int = 5000


def samples(seed: int) -> tuple[Tensor, Tensor]:
    """100 samples ``x`` of [−1, 1] and ``sin(5x)`` with noise of standard deviation 0.1."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(100, 1, generator=generator) - 1
    return x, torch.sin(5 * x) + 0.1 * torch.randn(100, 1, generator=generator)


def train(run: Run) -> Metrics:
    """Train, and compare with sin(5x) on a grid of 900 points.

    The metrics are the mean squared errors on the grid and on the samples, the root mean square of
    the slope at the samples and on the grid, and for seed 0 every fifth value on the grid.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    x, y = samples(run.seed)
    if run.data == "SIN2":
        x, y = torch.cat([x, x + NEIGHBOUR]), torch.cat([y, y])
    model = fastjac.fuse(sin_network())
    forward = training.forward_of(run.penalty, run.weight)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    loss = y.new_zeros(())
    for _ in training.scheduled(optimizer, run.iterations):
        loss = training.step(optimizer, model, forward, x, y, criterion=F.mse_loss)
    training.finite(loss, run.iterations)
    values, slopes = _values_and_slopes(model, GRID)
    fitted, slopes_at_samples = _values_and_slopes(model, x)
    return {
        "mse": F.mse_loss(values, torch.sin(5 * GRID)).item(),
        "train": F.mse_loss(fitted, y).item(),
        "slope": slopes.square().mean().sqrt().item(),
        "slope_at_samples": slopes_at_samples.square().mean().sqrt().item(),
        "curve": " ".join(f"{v:.4f}" for v in values[::5, 0].tolist()) if run.seed == 0 else "",
    }


def _values_and_slopes(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    values = model(x)
    (slopes,) = torch.autograd.grad(values.sum(), x)
    return values.detach(), slopes
