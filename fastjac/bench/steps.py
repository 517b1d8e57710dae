"""Set-up functions of the contestants for a training step: problem in, step to time out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import fastjac
from fastjac.bench.idioms import IDIOMS, InputJacobian, LayerWise
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


def plain(problem: StepProblem) -> Prepared:
    """Forward, loss, backward."""
    model = copy.deepcopy(problem.model)
    return training_step(model, lambda: problem.loss(model(problem.x), problem.target))


def eager(problem: StepProblem) -> Prepared:
    """Today's torch idiom: ``autograd.grad(create_graph=True)``, or hooks on the layers."""
    model = copy.deepcopy(problem.model)
    return _penalised(problem, model, IDIOMS[problem.penalty].eager(problem, model))


def jacobian_reg(problem: StepProblem) -> Prepared:
    """See :meth:`fastjac.bench.idioms.InputJacobian.by_jacobian_reg`."""
    model = copy.deepcopy(problem.model)
    idiom = IDIOMS[problem.penalty]
    assert isinstance(idiom, InputJacobian)
    return _penalised(problem, model, lambda: idiom.by_jacobian_reg(problem, model))


def _penalised(
    problem: StepProblem, model: nn.Module, forward: Callable[[], tuple[Tensor, Tensor]]
) -> Prepared:
    def objective() -> Tensor:
        output, value = forward()
        return problem.loss(output, problem.target) + problem.weight * value

    return training_step(model, objective)


def compiled(problem: StepProblem, backend: str = "inductor") -> Prepared:
    """``torch.compile(torch.func.grad(objective))``, its results stored as ``.grad``.

    BatchNorm's running statistics are taken out of the model: torch.func refuses to update them
    inside a transform. The outputs in training mode do not depend on them.
    """
    model = copy.deepcopy(problem.model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
    forward = IDIOMS[problem.penalty].functional(model)
    loss, weight = problem.loss, problem.weight

    def objective(
        values: dict[str, Tensor], x: Tensor, target: Tensor, projection: Tensor
    ) -> Tensor:
        output, value = forward(values, x, target, projection)
        return loss(output, target) + weight * value

    grad = torch.compile(torch.func.grad(objective), fullgraph=True, backend=backend)
    parameters = dict(model.named_parameters())
    values = {name: parameter.detach() for name, parameter in parameters.items()}

    def release() -> None:
        for parameter in parameters.values():
            parameter.grad = None

    def step() -> None:
        release()
        grads = grad(values, problem.x, problem.target, problem.projection)
        for name, parameter in parameters.items():
            parameter.grad = grads[name]

    def gradients() -> list[Tensor]:
        step()
        return [p.grad.clone() for p in parameters.values() if p.grad is not None]

    return Prepared(step, gradients, release)


def ours(problem: StepProblem, impl: str = "auto", engine: str = "auto") -> Prepared:
    """The public penalty, as its documentation calls it, then loss plus value, backward.

    A penalty on the input Jacobian gets a fused model, but for the compiled engine: torch.compile
    fuses activations itself. A layer-wise penalty computes the activations of the layers that it
    counts, so only a named ``impl`` needs ``fuse``, which hands it on.
    """
    idiom = IDIOMS[problem.penalty]
    made = getattr(fastjac, idiom.ours)
    model = copy.deepcopy(problem.model)
    if isinstance(idiom, LayerWise):
        if impl != "auto":
            model = fastjac.fuse(model, impl=impl)
        penalty = made(model, weight=problem.weight)

        def attached() -> Tensor:
            return problem.loss(model(problem.x), problem.target) + penalty()

        return replace(training_step(model, attached), close=penalty.detach)
    if engine != "compiled":
        model = fastjac.fuse(model, impl=impl)
    penalty = made(weight=problem.weight)
    penalty.engine = engine
    named = {name: getattr(problem, name) for name in idiom.takes}

    def objective() -> Tensor:
        output, value = penalty(model, problem.x, **named)
        return problem.loss(output, problem.target) + value

    ran = penalty.explain_engine(model, problem.x).splitlines()[0].removeprefix("engine: ")
    return replace(training_step(model, objective), engine=ran)
