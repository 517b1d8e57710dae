"""Registry of contestants: one set-up function each, which returns the step to time.

``plain``        the training step without penalty (elementwise: torch's forward kernel)
``eager``        today's torch idiom, ``autograd.grad(create_graph=True)`` (torch's own kernels)
``compiled``     ``torch.compile`` of the whole step: ``torch.func.grad`` of loss plus penalty, the
                 penalty over ``torch.func.vjp`` or, for a layer-wise one, written out. One graph
                 (``fullgraph=True``: a fallback to eager would go unnoticed) was as fast as or
                 faster than compiling the objective and calling ``backward`` on it (2 cores:
                 0.86 against 1.20 ms for SpectReg 16-5x64-10, 61.8 against 75.0 for the ResNet).
``jacobianreg``  facebookresearch's JacobianReg algorithm: one pass per projection
``fastjac``      the public penalty on a model prepared by ``fastjac.fuse``; a layer-wise one is
                 attached to the model as it is
``fastjac:X``    the same with ``fuse(model, impl="X")``

None of them rounds in TF32, and none draws random numbers while it is timed.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastjac
from fastjac import dispatch
from fastjac.bench import idioms
from fastjac.bench.cases import Case, unknown
from fastjac.bench.problems import ElementwiseProblem, Problem, StepProblem

IMPLS = ("reference", "cpu", "triton", "cuda")


@dataclass
class Prepared:
    """A contestant set up on a problem.

    Attributes:
        step: what is timed; takes and returns nothing of interest.
        gradients: runs the step once and returns what the gate compares: the gradients of all
            parameters, or the outputs of the elementwise op on its first buffer.
        release: drops what the last step left behind (gradients), so that memory starts level.
        close: ends it; an attached penalty would watch, and keep its model, until the process ends.
    """

    step: Callable[[], object]
    gradients: Callable[[], Sequence[Tensor]]
    release: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contestant:
    """A way of computing a case.

    Attributes:
        name: what ``--contestant`` takes.
        setup: makes it ready; the first call of the step may still compile.
        why_not: ``(case, device, dtype)`` -> None if it takes part, else the reason.
        compiles: its set-up and first call count as compile time.
        impl: what it asks of the fused ops; empty if it uses none of them.
    """

    name: str
    setup: Callable[[Problem], Prepared]
    why_not: Callable[[Case, torch.device, torch.dtype], str | None] = lambda *_: None
    compiles: bool = False
    impl: str = ""


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
    torch._dynamo.reset()
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


def fastjac_penalty(problem: StepProblem) -> tuple[nn.Module, dict[str, Tensor | None]]:
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


def fastjac_step(problem: StepProblem, impl: str = "auto") -> Prepared:
    """``output, value = penalty(model, x)`` on the fused model, loss plus value, backward."""
    if problem.penalty == "dreg":
        return attached_step(problem, impl)
    model = fastjac.fuse(copy.deepcopy(problem.model), impl=impl)
    penalty, named = fastjac_penalty(problem)

    def objective() -> Tensor:
        output, value = penalty(model, problem.x, **named)
        return problem.loss(output, problem.target) + value

    return training_step(model, objective)


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


Phi = Callable[[Tensor], Tensor]


def _in_turn(calls: Sequence[Callable[[], Any]]) -> Prepared:
    turn = itertools.cycle(calls)

    def outputs() -> list[Tensor]:
        result = calls[0]()
        return list(result) if isinstance(result, tuple) else [result]

    return Prepared(lambda: next(turn)(), outputs)


def forward_phase(problem: ElementwiseProblem, phi: Phi) -> Prepared:
    """``phi(z)``, whatever the phase of the problem."""

    def call(z: Tensor) -> Tensor:
        with torch.no_grad():
            return phi(z)

    return _in_turn([functools.partial(call, z) for z in problem.z])


def autograd_phase(
    problem: ElementwiseProblem, phi: Phi, vjp: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Prepared:
    """The phase as autograd runs it, on graphs that were recorded before: no forward is timed.

    Args:
        problem: its phase says what is timed.
        phi: the activation.
        vjp: direct ``(z, g) -> phi'(z) g`` where there is one; else a retained graph.
    """
    if problem.phase == "forward":
        return forward_phase(problem, phi)
    if problem.phase == "backward" and vjp is not None:
        direct = vjp

        def call(z: Tensor, g: Tensor) -> Tensor:
            with torch.no_grad():
                return direct(z, g)

        pairs = zip(problem.z, problem.g, strict=True)
        return _in_turn([functools.partial(call, z, g) for z, g in pairs])
    calls = []
    for k in range(len(problem.z)):
        z = problem.z[k].detach().requires_grad_()
        g = problem.g[k].detach().requires_grad_(problem.phase == "double")
        a = phi(z)
        if problem.phase == "backward":
            outputs, inputs, cotangent = a, [z], g
        else:
            (outputs,) = torch.autograd.grad(a, z, g, create_graph=True)
            inputs, cotangent = [z, g], problem.u[k]
            if not outputs.requires_grad:
                raise RuntimeError(f"{problem.fn}: its VJP has no graph to differentiate again")
        calls.append(
            functools.partial(
                torch.autograd.grad,
                *(outputs, inputs, cotangent),
                retain_graph=True,
                materialize_grads=True,  # phi'' = 0 of a piecewise linear function
            )
        )
    return _in_turn(calls)


def eager_phase(problem: ElementwiseProblem) -> Prepared:
    """torch's kernels."""
    return autograd_phase(problem, problem.phi)


def compiled_phase(problem: ElementwiseProblem, backend: str = "inductor") -> Prepared:
    """The phase alone under torch.compile, by ``torch.func.vjp`` of ``phi`` once or twice."""
    torch._dynamo.reset()
    phi = problem.phi

    def backward(z: Tensor, g: Tensor) -> Tensor:
        return torch.func.vjp(phi, z)[1](g)[0]

    def double(z: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(backward, z, g)[1](u)

    functions: dict[str, Callable[..., Any]] = {
        "forward": phi,
        "backward": backward,
        "double": double,
    }
    function = torch.compile(functions[problem.phase], fullgraph=True, backend=backend)
    n_inputs = problem.accesses - {"forward": 1, "backward": 1, "double": 2}[problem.phase]
    columns = (problem.z, problem.g, problem.u)[:n_inputs]
    return _in_turn([functools.partial(function, *row) for row in zip(*columns, strict=True)])


def fastjac_phase(problem: ElementwiseProblem, impl: str = "auto") -> Prepared:
    """``fastjac.act``; the double backward through autograd, as a penalty's backward meets it."""
    return autograd_phase(
        problem,
        lambda z: fastjac.act(z, fn=problem.fn, impl=impl),
        lambda z, g: fastjac.act(z, g, 1, problem.fn, impl=impl),
    )


def by_kind(
    step: Callable[[StepProblem], Prepared], phase: Callable[[ElementwiseProblem], Prepared]
) -> Callable[[Problem], Prepared]:
    """One set-up function out of the one for steps and the one for elementwise problems."""

    def setup(problem: Problem) -> Prepared:
        return step(problem) if isinstance(problem, StepProblem) else phase(problem)

    return setup


@functools.cache
def all_contestants() -> tuple[Contestant, ...]:
    """Every contestant; the order is that of tables and plots."""
    return (
        Contestant("plain", by_kind(plain_step, lambda p: forward_phase(p, p.phi))),
        Contestant("eager", by_kind(eager_step, eager_phase)),
        Contestant(
            "compiled", by_kind(compiled_step, compiled_phase), _cannot_compile, compiles=True
        ),
        Contestant("jacobianreg", by_kind(jacobian_reg_step, eager_phase), _not_jacobian_reg),
        Contestant("fastjac", by_kind(fastjac_step, fastjac_phase), impl="auto"),
        *(
            Contestant(
                f"fastjac:{impl}",
                by_kind(
                    functools.partial(fastjac_step, impl=impl),
                    functools.partial(fastjac_phase, impl=impl),
                ),
                functools.partial(_cannot_run, impl),
                impl=impl,
            )
            for impl in IMPLS
        ),
    )


def select_contestants(
    names: Iterable[str] = (), contestants: Sequence[Contestant] | None = None
) -> list[Contestant]:
    """Contestants by name; all without names. ``plain`` is always there: overheads are over it.

    Raises:
        ValueError: a name that is not registered.
    """
    known = list(all_contestants() if contestants is None else contestants)
    names = list(names)
    valid = [contestant.name for contestant in known]
    for name in names:
        if name not in valid:
            raise ValueError(unknown("contestant", name, valid))
    return [c for c in known if not names or c.name in names or c.name == "plain"]


def _cannot_compile(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    compiler = os.environ.get("CXX") or "g++"
    if device.type == "cpu" and not (shutil.which(compiler) or shutil.which("clang++")):
        return f"torch.compile needs a C++ compiler; {compiler!r} was not found"
    return None


def _not_jacobian_reg(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    if case.penalty in ("spectreg", "frobreg", "jacreg"):
        return None
    return f"JacobianReg cannot express {case.penalty}"


def _cannot_run(impl: str, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    if impl == "triton" and device.type == "cpu":
        return "on the CPU Triton only interprets its kernels"
    return dispatch.why_not(impl, device.type, dtype)
