"""Set-up functions of the contestants for a training step: problem in, step to time out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastjac
from fastjac.bench.idioms import IDIOMS, InputJacobian, LayerWise
from fastjac.bench.plain_dreg import PlainDreg
from fastjac.bench.problems import StepProblem, copied
from fastjac.model_output import part_of
from fastjac.torch_private import dynamo_config


@dataclass
class Prepared:
    """A contestant set up on a problem.

    Attributes:
        step: What is timed.
        gradients: Runs the step once and returns what the gate compares: the gradients of all
            parameters, or the outputs of an op on its first buffer.
        release: Frees the gradients of the last step, so that memory is at the same level.
        close: Ends it. A penalty that is attached would observe, and keep, its model.
        engine: Of a fastjac penalty on the input Jacobian, the engine that runs it.
        parameters: Of a training step, what has the gradients.
    """

    step: Callable[[], object]
    gradients: Callable[[], Sequence[Tensor]]
    release: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None
    engine: str = ""
    parameters: Sequence[Tensor] = ()


def training_step(model: nn.Module, backward: Callable[[], object]) -> Prepared:
    """Gradients to None, then ``backward``, which sets them; no optimiser."""
    parameters = list(model.parameters())

    def release() -> None:
        for parameter in parameters:
            parameter.grad = None

    def step() -> None:
        release()
        backward()

    def gradients() -> list[Tensor]:
        step()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    return Prepared(step, gradients, release, parameters=parameters)


def graphed(problem: StepProblem, of: str) -> Prepared:
    """The step of the set-up function ``of`` as a CUDA graph; on a CPU, that step itself.

    Three calls on a side stream come first, as the documentation of CUDA graphs asks: they allocate
    what is kept between steps, and start cuBLAS. A replay writes the gradients to the addresses at
    which the captured step has allocated them, so these tensors are kept.
    """
    prepared: Prepared = globals()[of](problem)
    if not problem.x.is_cuda:
        return prepared
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            prepared.step()
    torch.cuda.current_stream().wait_stream(side)
    prepared.release()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.step()
    kept = [torch.zeros_like(p) if p.grad is None else p.grad for p in prepared.parameters]

    def gradients() -> list[Tensor]:
        graph.replay()
        return [grad.clone() for grad in kept]

    return replace(prepared, step=graph.replay, gradients=gradients, release=lambda: None)


def plain(problem: StepProblem) -> Prepared:
    """Forward, loss, backward."""
    model = copied(problem.model)
    return training_step(model, lambda: problem.task_loss(model(problem.x)).backward())


def _penalised(
    problem: StepProblem,
    model: nn.Module,
    forward: Callable[[], tuple[Tensor, Tensor]],
    weight: float | None = None,
) -> Prepared:
    """The step with the value of ``forward``, times the weight if given, added to the loss."""

    def objective() -> Tensor:
        output, value = forward()
        weighted = value if weight is None else weight * value
        return problem.loss(output, problem.target) + weighted

    # A separate function, so that the output is freed before the backward.
    return training_step(model, lambda: objective().backward())


def eager(problem: StepProblem) -> Prepared:
    """Today's torch idiom: ``autograd.grad(create_graph=True)``, or hooks on the layers."""
    model = copied(problem.model)
    return _penalised(problem, model, IDIOMS[problem.penalty].eager(problem, model), problem.weight)


def jacobian_reg(problem: StepProblem) -> Prepared:
    """See :meth:`fastjac.bench.idioms.InputJacobian.by_jacobian_reg`."""
    model, idiom = copied(problem.model), IDIOMS[problem.penalty]
    assert isinstance(idiom, InputJacobian)
    return _penalised(problem, model, lambda: idiom.by_jacobian_reg(problem, model), problem.weight)


def compiled(problem: StepProblem, backend: str = "inductor") -> Prepared:
    """``torch.compile(torch.func.grad(objective))``, whose results are stored as ``.grad``.

    The running statistics of BatchNorm are removed from the model, because torch.func refuses to
    update them in a transform. In training mode the outputs do not depend on them.

    A user's model is first run without the compiler. What torch.func refuses raises a short error
    then. While compiling (torch 2.13) it would leave hooks on saved tensors disabled, and other
    ways that use a checkpoint would raise too.
    """
    model, idiom = copied(problem.model), IDIOMS[problem.penalty]
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            module.running_mean = module.running_var = module.num_batches_tracked = None
        if problem.own and isinstance(idiom, LayerWise) and getattr(module, "inplace", False):
            # The layer before it is not found while compiling. Inductor fuses it all the same.
            vars(module)["inplace"] = False
    if problem.own and isinstance(idiom, LayerWise):
        return _compiled_step(problem, model, PlainDreg(model), backend)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    given = (
        {name: parameter.detach() for name, parameter in parameters.items()},
        *(problem.x, problem.target, problem.projection),
    )
    if problem.own:
        _gradients(problem, copied(model))(*given)
    run = torch.compile(_gradients(problem, model), fullgraph=True, backend=backend)

    def backward() -> None:
        grads = run(*given)
        for name, parameter in parameters.items():
            parameter.grad = grads[name]

    return training_step(model, backward)


def _gradients(problem: StepProblem, model: nn.Module) -> Callable[..., dict[str, Tensor]]:
    """``(parameters, x, target, projection) -> gradients`` of the objective, by torch.func."""
    forward = IDIOMS[problem.penalty].functional(problem, model)
    loss, weight = problem.loss, problem.weight

    def objective(
        values: dict[str, Tensor], x: Tensor, target: Tensor, projection: Tensor
    ) -> Tensor:
        output, value = forward(values, x, target, projection)
        return loss(output, target) + weight * value

    return torch.func.grad(objective)


def plain_compiled(problem: StepProblem) -> Prepared:
    """``torch.compile`` of the plain step with its backward, as one graph."""
    model = copied(problem.model)

    def step(x: Tensor, target: Tensor) -> None:
        problem.loss(part_of(model(x), problem.output), target).backward()

    return _whole_step(problem, model, torch.compile(step, fullgraph=True))


def _whole_step(
    problem: StepProblem, model: nn.Module, run: Callable[[Tensor, Tensor], None]
) -> Prepared:
    """A compiled function of ``(x, target)`` that has the backward in it."""

    def backward() -> None:
        with dynamo_config().patch(trace_autograd_ops=True, allow_rnn=True):
            run(problem.x, problem.target)

    return training_step(model, backward)


def _compiled_step(
    problem: StepProblem, model: nn.Module, attached: PlainDreg, backend: str
) -> Prepared:
    """``torch.compile`` of a step with a layer-wise penalty in plain torch, as one graph."""

    def step(x: Tensor, target: Tensor) -> None:
        output = part_of(model(x), problem.output)
        (problem.loss(output, target) + problem.weight * attached()).backward()

    run = torch.compile(step, fullgraph=True, backend=backend)
    return replace(_whole_step(problem, model, run), close=attached.detach)


def _penalty(problem: StepProblem, attached_to: Sequence[nn.Module] = ()) -> Any:
    """The public penalty of a problem."""
    options: dict[str, Any] = {"weight": problem.weight, "output": problem.output}
    if not attached_to:
        options["at"] = problem.at
    return getattr(fastjac, IDIOMS[problem.penalty].ours)(*attached_to, **options)


def ours_compiled(problem: StepProblem, backend: str = "inductor") -> Prepared:
    """``fastjac.compile`` of the step with the public penalty and its backward."""
    idiom = IDIOMS[problem.penalty]
    model = copied(problem.model)
    penalty = _penalty(problem, [model] if isinstance(idiom, LayerWise) else [])
    named = {name: getattr(problem, name) for name in getattr(idiom, "takes", ())}

    def step(x: Tensor, target: Tensor, named: dict[str, Tensor]) -> None:
        if isinstance(idiom, LayerWise):
            output = model(x)
            value = penalty()
        else:
            output, value = penalty(model, x, **named)
        (problem.loss(part_of(output, problem.output), target) + value).backward()

    run = fastjac.compile(step, backend=backend)
    prepared = training_step(model, lambda: run(problem.x, problem.target, named))
    close = penalty.detach if isinstance(idiom, LayerWise) else prepared.close
    return replace(prepared, close=close)


def fused(model: nn.Module, impl: str = "auto") -> nn.Module:
    """`fastjac.fuse`, which warns if the activations of the model are functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastjac.fuse(model, impl=impl)


def ours(problem: StepProblem, impl: str = "auto", engine: str = "auto") -> Prepared:
    """The public penalty, called as its documentation says.

    A penalty on the input Jacobian gets a fused model. A layer-wise penalty computes the
    activations of its layers itself, so it needs ``fuse`` only to pass on a named ``impl``.
    """
    idiom = IDIOMS[problem.penalty]
    model = copied(problem.model)
    if isinstance(idiom, LayerWise):
        if impl != "auto":
            model = fused(model, impl)
        attached = _penalty(problem, [model])

        def layerwise() -> tuple[Tensor, Tensor]:
            whole = model(problem.x)
            # Without a call of its own in the benchmark's models: tests/test_host.py counts them.
            output = whole if problem.output is None else part_of(whole, problem.output)
            return output, attached()

        return replace(_penalised(problem, model, layerwise), close=attached.detach)
    model = fused(model, impl)
    penalty = _penalty(problem)
    penalty.engine = engine
    named = {name: getattr(problem, name) for name in idiom.takes}
    ran = penalty.explain(model, problem.x).splitlines()[0].removeprefix("engine: ")

    def forward() -> tuple[Tensor, Tensor]:
        whole, value = penalty(model, problem.x, **named)
        return (whole if problem.output is None else part_of(whole, problem.output)), value

    return replace(_penalised(problem, model, forward), engine=ran)
