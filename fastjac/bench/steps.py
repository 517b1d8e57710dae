"""Set-up functions of the contestants for a training step: problem in, step to time out."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastjac
from fastjac.bench import idioms
from fastjac.bench.problems import StepProblem


@dataclass
class Prepared:
    """A contestant set up on a problem.

    Attributes:
        step: what is timed; takes and returns nothing of interest.
        gradients: runs the step once and returns what the gate compares: the gradients of all
            parameters, or the outputs of the elementwise op on its first buffer.
        release: drops what the last step left behind (gradients), so that memory starts level.
        close: ends it; an attached penalty would watch, and keep its model, until the process ends.
        engine: of a fastjac penalty on the input Jacobian: what runs it.
    """

    step: Callable[[], object]
    gradients: Callable[[], Sequence[Tensor]]
    release: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None
    engine: str = ""


def training_step(model: nn.Module, objective: Callable[[], Tensor]) -> Prepared:
    """Gradients to None, objective, backward; no optimiser."""
    parameters = list(model.parameters())

    def release() -> None:
        for parameter in parameters:
            parameter.grad = None

    def step() -> None:
        release()
        objective().backward()

    def gradients() -> list[Tensor]:
        step()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    return Prepared(step, gradients, release)


def plain_step(problem: StepProblem) -> Prepared:
    """Forward, loss, backward."""
    model = copy.deepcopy(problem.model)
    return training_step(model, lambda: problem.loss(model(problem.x), problem.target))


def eager_step(problem: StepProblem) -> Prepared:
    """See :func:`fastjac.bench.idioms.eager_objective`."""
    model = copy.deepcopy(problem.model)
    return training_step(model, idioms.eager_objective(problem, model))


def jacobian_reg_step(problem: StepProblem) -> Prepared:
    """See :func:`fastjac.bench.idioms.jacobian_reg_objective`."""
    model = copy.deepcopy(problem.model)
    return training_step(model, functools.partial(idioms.jacobian_reg_objective, problem, model))


def compiled_step(problem: StepProblem, backend: str = "inductor") -> Prepared:
    """``torch.compile(torch.func.grad(objective))``, its results stored as ``.grad``."""
    model = copy.deepcopy(problem.model)
    objective = idioms.functional_objective(problem, model)
    compiled = torch.compile(torch.func.grad(objective), fullgraph=True, backend=backend)
    parameters = dict(model.named_parameters())
    values = {name: parameter.detach() for name, parameter in parameters.items()}

    def release() -> None:
        for parameter in parameters.values():
            parameter.grad = None

    def step() -> None:
        release()
        grads = compiled(values, problem.x, problem.target, problem.projection)
        for name, parameter in parameters.items():
            parameter.grad = grads[name]

    def gradients() -> list[Tensor]:
        step()
        return [p.grad.clone() for p in parameters.values() if p.grad is not None]

    return Prepared(step, gradients, release)


def fastjac_penalty(problem: StepProblem) -> tuple[Any, dict[str, Tensor | None]]:
    """The public penalty of a problem, and what its call takes beside model and input."""
    weight = problem.weight
    if problem.penalty == "spectreg":
        return fastjac.SpectReg(weight=weight), {"projection": problem.projection}
    if problem.penalty == "datagrad":
        return fastjac.DataGrad(weight=weight), {"target": problem.target}
    made: dict[str, Callable[..., nn.Module]] = {
        "frobreg": fastjac.FrobReg,
        "jacreg": fastjac.JacReg,
        "gradient-penalty": fastjac.GradientPenalty,
    }
    return made[problem.penalty](weight=weight), {}


def fastjac_step(problem: StepProblem, impl: str = "auto", engine: str = "auto") -> Prepared:
    """``output, value = penalty(model, x)``, loss plus value, backward.

    The model is a fused one, but for the compiled engine: torch.compile fuses activations itself.
    """
    if problem.penalty == "dreg":
        return attached_step(problem, impl)
    model = copy.deepcopy(problem.model)
    if engine != "compiled":
        model = fastjac.fuse(model, impl=impl)
    penalty, named = fastjac_penalty(problem)
    penalty.engine = engine

    def objective() -> Tensor:
        output, value = penalty(model, problem.x, **named)
        return problem.loss(output, problem.target) + value

    ran = penalty.explain_engine(model, problem.x).splitlines()[0].removeprefix("engine: ")
    return replace(training_step(model, objective), engine=ran)


def attached_step(problem: StepProblem, impl: str = "auto") -> Prepared:
    """``DREG`` attached to the model, then ``loss(model(x), y) + penalty()``, backward.

    The penalty computes the activations of the layers that it counts, so only a named ``impl``
    needs ``fuse``, which hands it on.
    """
    model = copy.deepcopy(problem.model)
    if impl != "auto":
        model = fastjac.fuse(model, impl=impl)
    penalty = fastjac.DREG(model, weight=problem.weight)

    def objective() -> Tensor:
        return problem.loss(model(problem.x), problem.target) + penalty()

    return replace(training_step(model, objective), close=penalty.detach)
