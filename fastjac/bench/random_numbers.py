"""Whether a model draws random numbers, as dropout does, and the model without them."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastjac.bench.gate import relative_error
from fastjac.bench.problems import StepProblem, copied


def without_dropout(model: nn.Module) -> nn.Module:
    """A copy whose submodules are in eval mode, but for the norms."""
    model = copied(model)
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower() and not [*module.children()]
        if module is not model and not norm:
            module.training = False
    return model


class InEval(nn.Module):
    """Runs a model whose own ``training`` is False.

    This module is in training mode, without which the passes of an attached penalty do not count.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        model.training = False

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def draws(problem: StepProblem, advancing: bool = False) -> bool:
    """Whether runs of the model with other random numbers have other gradients, by 0.1% or more.

    Args:
        advancing: A model that asks a generator of random numbers for some counts too: four runs
            may by chance skip the same layers, or none.
    """
    asked: list[bool] = []

    def run() -> list[Tensor]:
        model = copied(problem.model)
        before = [generator.read() for generator in generators()]
        problem.task_loss(model(problem.x)).backward()
        asked.append([generator.read() for generator in generators()] != before)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    with unchanged_generators():
        first, *rest = [run() for _ in range(4)]
    if advancing and any(asked):
        return True
    return any(relative_error(other, first) > 1e-3 for other in rest)


class Generator(NamedTuple):
    """Something that models draw from. Its state is a value that can be compared."""

    read: Callable[[], Any]
    write: Callable[[Any], None]


def generators() -> list[Generator]:
    """Those of torch, of Python's ``random``, and of NumPy if something has imported it."""
    found = [
        Generator(
            lambda: torch.get_rng_state().tolist(),
            lambda state: torch.set_rng_state(torch.tensor(state, dtype=torch.uint8)),
        ),
        Generator(random.getstate, random.setstate),
    ]
    if torch.cuda.is_available():
        found.append(
            Generator(
                lambda: [state.tolist() for state in torch.cuda.get_rng_state_all()],
                lambda states: torch.cuda.set_rng_state_all(
                    [torch.tensor(state, dtype=torch.uint8) for state in states]
                ),
            )
        )
    numpy = sys.modules.get("numpy")
    if numpy is not None:

        def read() -> tuple[Any, ...]:
            kind, keys, *others = numpy.random.get_state()
            return (kind, keys.tolist(), *others)

        found.append(Generator(read, numpy.random.set_state))
    return found


@contextlib.contextmanager
def unchanged_generators() -> Iterator[None]:
    """After this block the generators are as before."""
    states = [(generator, generator.read()) for generator in generators()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.write(state)
