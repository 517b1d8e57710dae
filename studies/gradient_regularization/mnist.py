"""One run of LeNet-5 on few images of MNIST (section 6.1.1)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac
from studies.data import split
from studies.gradient_regularization import training
from studies.networks import LeNet5
from studies.settings import Metrics, Setting

BATCH = 50
LAYOUT = torch.channels_last  # oneDNN's convolutions of few channels are faster so
RATE = 5e-3  # the paper says 0.1, a hundred times the default of Adam
CHECKPOINTS = 10  # of the test accuracy during training, on this many images:
WATCHED = 500


@dataclass(frozen=True)
class Run(Setting):
    """One training.

    Attributes:
        size: The number of training images.
        network: ``"plain"``, ``"batch norm"`` or ``"dropout"`` with rate 0.5.
        decay: The weight decay, as a term of the gradient.
        penalty, weight: The name of the penalty in fastjac or ``"none"``, and its λ.
        confidence: The weight of the confidence penalty beside it.
        at: The block of the network at whose output the gradient is taken, or ``"input"``.
        bound: The option of DataGrad; 0 is none.
        iterations: Minibatches of 50.
    """

    size: int = 2000
    network: str = "dropout"
    decay: float = 5e-4
    penalty: str = "none"
    weight: float = 0.0
    confidence: float = 0.0
    at: str = "input"
    bound: float = 0.0
    iterations: int = 1000


def train(run: Run, directory: Path | None = None) -> Metrics:
    """Train, and return accuracies in per cent; pixels are in [0, 1].

    Raises:
        FloatingPointError: The loss is not finite.
    """
    data = "mnist" if directory is None else "mnist-full"
    rest = {"dev": 1000, "test": 2000} if directory is None else {"dev": 10_000, "test": 10_000}
    samples = split(data, run.seed, train=run.size, standardise=False, directory=directory, **rest)
    model = LeNet5(
        batch_norm=run.network == "batch norm", dropout=0.5 if run.network == "dropout" else 0.0
    )
    fastjac.fuse(model)
    model.to(memory_format=LAYOUT)  # type: ignore[call-overload]
    x = samples.x.contiguous(memory_format=LAYOUT)
    forward = training.forward_of(run.penalty, run.weight, run.at, run.bound)
    optimizer = torch.optim.Adam(model.parameters(), RATE, weight_decay=run.decay, fused=True)
    order = training.batches(len(x), BATCH, run.seed)
    every = max(run.iterations // CHECKPOINTS, 1)
    curve = []
    for step in training.scheduled(optimizer, run.iterations):
        batch = next(order)
        pair = x[batch], samples.y[batch]
        loss = training.step(optimizer, model, forward, *pair, confidence=run.confidence)
        if step % every == every - 1:
            training.finite(loss, step + 1)
            curve.append(_accuracy(model, samples.x_test[:WATCHED], samples.y_test[:WATCHED]))
    squares = sum(parameter.detach().square().sum().item() for parameter in model.parameters())
    return {
        "train": _accuracy(model, samples.x, samples.y),
        "dev": _accuracy(model, samples.x_dev, samples.y_dev),
        "test": _accuracy(model, samples.x_test, samples.y_test),
        "weight_loss": squares,
        "gradient": _gradient(model, samples.x_test, samples.y_test),
        "curve": " ".join(f"{accuracy:.2f}" for accuracy in curve),
    }


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        correct = sum(
            (model(part.contiguous(memory_format=LAYOUT)).argmax(1) == labels).sum().item()
            for part, labels in zip(x.split(1000), y.split(1000), strict=True)
        )
    model.train()
    return 100 * correct / max(len(x), 1)


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean norm of the gradient of each sample's loss with respect to its pixels."""
    model.eval()
    x = x[:1000].contiguous(memory_format=LAYOUT).clone().requires_grad_()
    loss = F.cross_entropy(model(x), y[:1000], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    return gradient.flatten(1).norm(dim=1).mean().item()
