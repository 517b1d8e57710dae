"""One run of DataGrad with a bound on another data set than MNIST."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fastjac
from studies.data import split
from studies.gradient_regularization import training
from studies.networks import network
from studies.settings import Metrics, Setting


@dataclass(frozen=True)
class Run(Setting):
    """One training on 200 samples, whose inputs have a standard deviation of 1.

    Attributes:
        data: The data set.
        weight, bound: Options of DataGrad; a bound of 0 is none.
        iterations: Of Adam, with batches of 50.
    """

    data: str = "digits"
    weight: float = 0.0
    bound: float = 0.0
    iterations: int = 1000


def train(run: Run) -> Metrics:
    """Train, and return accuracies in per cent and the training loss.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    samples = split(run.data, run.seed, train=200, test=0.4)
    model = fastjac.fuse(network(samples.x.shape[1:], samples.classes, "gelu"))
    forward = training.forward_of("DataGrad", run.weight, bound=run.bound)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3, fused=True)
    order = training.batches(len(samples.x), 50, run.seed)
    loss = samples.x.new_zeros(())
    for _ in training.scheduled(optimizer, run.iterations):
        batch = next(order)
        loss = training.step(optimizer, model, forward, samples.x[batch], samples.y[batch])
    training.finite(loss, run.iterations)
    with torch.no_grad():
        output = model(samples.x)
        test = (model(samples.x_test).argmax(1) == samples.y_test).double().mean().item()
    return {
        "train": 100 * (output.argmax(1) == samples.y).double().mean().item(),
        "test": 100 * test,
        "loss": F.cross_entropy(output, samples.y).item(),
    }
