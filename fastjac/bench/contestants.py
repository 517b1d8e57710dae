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
``fastjac-X``    a penalty on the input Jacobian by the engine X (``fastjac`` is ``"auto"``)
``fastjac:X``    an activation or a layer-wise penalty by the implementation X

None of them rounds in TF32, and none draws random numbers while it is timed.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from fastjac.bench import phases, steps
from fastjac.bench.cases import Case, unknown
from fastjac.bench.idioms import INPUT_JACOBIAN
from fastjac.bench.problems import ElementwiseProblem, Problem, StepProblem
from fastjac.bench.steps import Prepared
from fastjac.ops import dispatch

IMPLS = ("reference", "cpu", "triton", "cuda")
#: contestants that run no code of ours
TORCHS = ("plain", "eager", "compiled", "jacobianreg")


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


def by_kind(
    step: Callable[[StepProblem], Prepared], phase: Callable[[ElementwiseProblem], Prepared]
) -> Callable[[Problem], Prepared]:
    """One set-up function out of the one for steps and the one for elementwise problems."""

    def setup(problem: Problem) -> Prepared:
        return step(problem) if isinstance(problem, StepProblem) else phase(problem)

    return setup


def _of_engine(engine: str, compiles: bool = False) -> Contestant:
    step = functools.partial(steps.fastjac_step, engine=engine)
    return Contestant(
        f"fastjac-{engine}",
        by_kind(step, phases.fastjac_phase),
        _cannot_run_compiled if compiles else _has_no_engine,
        compiles,
        # what torch.compile fuses are torch's own activations
        impl="" if compiles else "auto",
    )


def _of_impl(impl: str) -> Contestant:
    return Contestant(
        f"fastjac:{impl}",
        by_kind(
            functools.partial(steps.fastjac_step, impl=impl),
            functools.partial(phases.fastjac_phase, impl=impl),
        ),
        functools.partial(_cannot_run, impl),
        impl=impl,
    )


@functools.cache
def all_contestants() -> tuple[Contestant, ...]:
    """Every contestant; the order is that of tables and plots."""
    return (
        Contestant("plain", by_kind(steps.plain_step, lambda p: phases.forward_phase(p, p.phi))),
        Contestant("eager", by_kind(steps.eager_step, phases.eager_phase)),
        Contestant(
            "compiled",
            by_kind(steps.compiled_step, phases.compiled_phase),
            _cannot_compile,
            compiles=True,
        ),
        Contestant(
            "jacobianreg", by_kind(steps.jacobian_reg_step, phases.eager_phase), _not_jacobian_reg
        ),
        Contestant("fastjac", by_kind(steps.fastjac_step, phases.fastjac_phase), impl="auto"),
        _of_engine("autograd"),
        _of_engine("compiled", compiles=True),
        *map(_of_impl, IMPLS),
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


def _has_no_engine(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    if case.penalty in INPUT_JACOBIAN:
        return None
    return "only penalties on the input Jacobian have engines"


def _cannot_run_compiled(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    return _has_no_engine(case, device, dtype) or _cannot_compile(case, device, dtype)


def _cannot_run(impl: str, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    if case.penalty in INPUT_JACOBIAN:
        return "penalties on the input Jacobian are timed by engine, not by implementation"
    if impl == "triton" and device.type == "cpu":
        return "on the CPU Triton only interprets its kernels"
    return dispatch.why_not(impl, device.type, dtype)
