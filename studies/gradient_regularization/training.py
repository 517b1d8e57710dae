"""What the runs of this study share: the penalties, the schedule of the learning rate, the loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac

#: ``(model, x, y) -> (output, weighted penalty)``.
Forward = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_of(penalty: str, weight: float, at: str = "input", bound: float = 0.0) -> Forward:
    """The forward of a penalty by its name in fastjac; with ``"none"`` the penalty is 0."""
    if penalty == "none":
        return lambda model, x, _y: (model(x), x.new_zeros(()))
    options: dict[str, object] = {"at": at} if at != "input" else {}
    if bound:
        options["bound"] = bound
    term = getattr(fastjac, penalty)(weight=weight, **options)
    if isinstance(term, fastjac.DataGrad):
        return lambda model, x, y: term(model, x, y)
    return lambda model, x, _y: term(model, x)


def step(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    forward: Forward,
    x: Tensor,
    y: Tensor,
    *,
    confidence: float = 0.0,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Tensor:
    """One step of the optimizer on the loss, the penalty and the confidence penalty; their sum."""
    output, penalty = forward(model, x, y)
    loss = criterion(output, y) + penalty
    if confidence:
        loss = loss + fastjac.confidence_penalty(x, output, weight=confidence)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches, epoch after epoch; the last samples of an epoch may be left out."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        for batch in torch.randperm(count, generator=generator).split(size):
            if len(batch) == size:
                yield batch


def scheduled(optimizer: torch.optim.Optimizer, iterations: int) -> Iterator[int]:
    """Count the iterations, and divide the learning rate by 10 at 50% and 75% of them."""
    marks = [iterations // 2, iterations * 3 // 4]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks, gamma=0.1)
    for step in range(iterations):
        yield step
        schedule.step()


def finite(loss: Tensor, step: int) -> None:
    """Raise FloatingPointError if the loss is not finite."""
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
