"""One run of the sweep: train a network with a regularizer, and measure it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import fastjac
from studies.data import Split, split
from studies.dreg import plain
from studies.networks import network
from studies.settings import Metrics, Setting

NOISE = (0.1, 0.3, 0.5, 1.0)  # standard deviations, where that of the inputs is 1
LAMBDA = 10**-2.5  # the paper's, for DREG
BATCH = 64

#: The regularizers, each with its customary strength. There is one for all data sets, as in the
#: paper, which states that of DREG alone.
STRENGTHS = {
    "none": 0.0,
    "weight decay": 5e-4,  # as a term of the gradient
    "dropout": 0.2,
    "IGPen": 0.1,
    "spectral norm": 0.0,  # it has no strength
    "DREG": LAMBDA,
}

#: What DREG computes in the options experiment.
VARIANTS: dict[str, dict[str, object]] = {
    "default": {},
    "mean over positions": {"positions": "mean"},
    "not squared": {"squared": False},
    "without W": {"use_weight": False},
    "with output layer": {"include_output": True},
    "mean over units": {"over": "units"},
    "annealed": {},
}


@dataclass(frozen=True)
class Run(Setting):
    """One training.

    Attributes:
        data, activation, regularizer: The three factors of the sweep.
        fraction: The part of the training samples that is used.
        scale: A factor for the strength of the regularizer.
        variant: A key of `VARIANTS`, for DREG.
        way: ``"fastjac"``, or ``"torch"`` for the same in plain eager torch.
        steps: Of Adam, with batches of 64.
    """

    data: str = "digits"
    activation: str = "gelu"
    regularizer: str = "none"
    fraction: float = 1.0
    scale: float = 1.0
    variant: str = "default"
    way: str = "fastjac"
    steps: int = 1000


def train(run: Run, directory: Path | None = None) -> Metrics:
    """Train, and return accuracies in per cent.

    The initial weights, the batches and the samples depend on the seed and not on the regularizer,
    so that two regularizers are compared on the same run.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    torch.manual_seed(run.seed)  # also for a second training in one run
    samples = split(run.data, run.seed, train=run.fraction, test=0.25, directory=directory)
    strength = STRENGTHS[run.regularizer] * run.scale
    dropout = strength if run.regularizer == "dropout" else 0.0
    model = network(samples.x.shape[1:], samples.classes, run.activation, dropout)
    forward = _regularized(run, model, strength)
    decay = strength if run.regularizer == "weight decay" else 0.0
    optimizer = torch.optim.Adam(model.parameters(), 2e-3, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    anneal = partial(_anneal, steps=run.steps) if run.variant == "annealed" else None
    batches = torch.Generator().manual_seed(run.seed)
    x, y = samples.x, samples.y
    if x.dim() == 4:  # oneDNN's convolutions of few channels are faster so
        x = x.contiguous(memory_format=torch.channels_last)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    start = time.perf_counter()
    order = torch.empty(0, dtype=torch.long)
    for step in range(run.steps):
        if len(order) < min(BATCH, len(x)):
            order = torch.randperm(len(x), generator=batches)
        batch, order = order[:BATCH], order[BATCH:]
        output, penalty = forward(x[batch], y[batch])
        loss = F.cross_entropy(output, y[batch])
        if penalty is not None:
            loss = loss + (penalty if anneal is None else anneal(step) * penalty)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99 and not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}")
    seconds = time.perf_counter() - start
    return {"training": round(seconds, 3), **_measure(model.eval(), samples, run.seed)}


def _regularized(
    run: Run, model: nn.Module, strength: float
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    """``(x, y) -> (output, weighted penalty or None)``, in the way of the run."""
    ours = run.way == "fastjac"
    if run.regularizer == "spectral norm":
        for layer in list(model.modules()):
            if hasattr(layer, "weight"):
                spectral_norm(layer)
    if ours:
        fastjac.fuse(model)
    if run.regularizer == "DREG":
        if not ours:
            return lambda x, _y: plain.dreg(model, x, strength)
        term = fastjac.DREG(model, weight=strength, **VARIANTS[run.variant])
        return lambda x, _y: (model(x), term())
    if run.regularizer == "IGPen":
        if not ours:
            return lambda x, y: plain.igpen(model, x, y, strength)
        # IGPen of the cross-entropy, whose input gradient has a closed form.
        gradient = fastjac.DataGrad(weight=strength)
        return lambda x, y: gradient(model, x, y)
    return lambda x, _y: (model(x), None)


def _anneal(step: int, steps: int) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def _measure(model: nn.Module, samples: Split, seed: int) -> Metrics:
    """Accuracies, and the norms of the gradient of each test sample's loss by its input."""

    def accuracy(x: Tensor, y: Tensor) -> float:
        return round(100 * (model(x).argmax(1) == y).double().mean().item(), 3)

    with torch.no_grad():
        metrics: Metrics = {
            "train": accuracy(samples.x, samples.y),
            "test": accuracy(samples.x_test, samples.y_test),
        }
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(samples.x_test.shape, generator=generator)
        for level in NOISE:
            metrics[f"noise_{level}"] = accuracy(samples.x_test + level * noise, samples.y_test)
    x = samples.x_test.clone().requires_grad_()
    loss = F.cross_entropy(model(x), samples.y_test, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    norms = gradient.flatten(1).norm(dim=1).double()
    mean = norms.mean().item()
    metrics["loss"] = loss.item() / len(x)
    metrics["gradient"] = mean
    metrics["tail"] = norms.quantile(0.99).item() / mean if mean else math.nan
    return metrics
