"""One run of a residual network on CIFAR-10 (section 6.1.2), where somebody has the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastjac
from studies.data import split
from studies.gradient_regularization import training
from studies.networks import ResNet
from studies.settings import Metrics, Setting

BATCH = 128


@dataclass(frozen=True)
class Run(Setting):
    """One training, with SGD and Nesterov momentum.

    Attributes:
        size: The number of training images; 50,000 is all.
        augment: Random flips, and shifts by at most 4 pixels.
        penalty, weight: The name of the penalty in fastjac or ``"none"``, and its λ.
        confidence: The weight of the confidence penalty beside it.
        iterations: Minibatches of 128.
        blocks: Residual blocks in each of the three levels.
    """

    size: int = 2000
    augment: bool = False
    penalty: str = "none"
    weight: float = 0.0
    confidence: float = 0.0
    iterations: int = 50_000
    blocks: int = 3


def train(run: Run, directory: Path | None = None) -> Metrics:
    """Train on a GPU if there is one, and return accuracies in per cent.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples = split("cifar10", run.seed, train=run.size, dev=0, directory=directory)
    model = ResNet(blocks=run.blocks).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fastjac.fuse(model)
    forward = training.forward_of(run.penalty, run.weight)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.003
    )
    order = training.batches(len(samples.x), BATCH, run.seed)
    for step in training.scheduled(optimizer, run.iterations):
        batch = next(order)
        x, y = samples.x[batch], samples.y[batch].to(device)
        x = _augmented(x) if run.augment else x
        x = x.to(device, memory_format=torch.channels_last)
        loss = training.step(optimizer, model, forward, x, y, confidence=run.confidence)
        if step % 100 == 99 or step == run.iterations - 1:
            training.finite(loss, step + 1)
    model.eval()
    with torch.no_grad():
        correct = sum(
            (model(x.to(device)).argmax(1).cpu() == y).sum().item()
            for x, y in zip(samples.x_test.split(500), samples.y_test.split(500), strict=True)
        )
    return {"test": 100 * correct / len(samples.x_test)}


def _augmented(x: Tensor) -> Tensor:
    """Flip each image with probability 1/2, and shift it by −4 to 4 pixels in both directions."""
    count, size = len(x), x.shape[-1]
    padded = F.pad(x, (4, 4, 4, 4))
    rows = torch.randint(9, (count, 1)) + torch.arange(size)
    columns = torch.randint(9, (count, 1)) + torch.arange(size)
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    samples = torch.arange(count).view(-1, 1, 1)
    moved = padded.movedim(1, -1)[samples, rows.unsqueeze(2), columns.unsqueeze(1)]
    return moved.movedim(-1, 1)
