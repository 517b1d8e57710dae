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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastjac.bench import phases, steps
from fastjac.bench.cases import Case, unknown
from fastjac.bench.idioms import IDIOMS, InputJacobian
from fastjac.bench.problems import Problem, StepProblem
from fastjac.bench.steps import Prepared
from fastjac.ops import dispatch

WhyNot = Callable[[Case, torch.device, torch.dtype], str | None]


@dataclass(frozen=True)
class Contestant:
    """A way of computing a case.

    Attributes:
        name: what ``--contestant`` takes.
        setup: makes it ready; the first call of the step may still compile.
        why_not: ``(case, device, dtype)`` -> None if it takes part, else the reason.
        compiles: its set-up and first call count as compile time.
        impl: what it asks of the fused ops; empty if it uses none of them.
        colour: of its bars and lines.
    """

    name: str
    setup: Callable[[Problem], Prepared]
    why_not: WhyNot = lambda *_: None
    compiles: bool = False
    impl: str = ""
    colour: str = "#8a7f6a"


def runs_ours(contestant: str) -> bool:
    """Whether the contestant of this name runs code of fastjac."""
    return contestant.startswith("fastjac")


def setup_of(form: str, **how: Any) -> Callable[[Problem], Prepared]:
    """The set-up function of this name for a training step or for a phase of an op."""

    def setup(problem: Problem) -> Prepared:
        module = steps if isinstance(problem, StepProblem) else phases
        return getattr(module, form)(problem, **how)

    return setup


def _ours(name: str, colour: str, why_not: WhyNot = lambda *_: None, **how: str) -> Contestant:
    setup, impl = setup_of("ours", **how), how.get("impl", "auto")
    return Contestant(name, setup, why_not, impl=impl, colour=colour)


def _of_impl(impl: str, colour: str) -> Contestant:
    return _ours(f"fastjac:{impl}", colour, functools.partial(_cannot_run, impl), impl=impl)


@functools.cache
def all_contestants() -> tuple[Contestant, ...]:
    """Every contestant; the order is that of tables and plots."""
    return (
        Contestant("plain", setup_of("plain"), colour="#b8bcc2"),
        Contestant("eager", setup_of("eager"), colour="#e8743b"),
        Contestant(
            *("compiled", setup_of("compiled"), _cannot_compile), compiles=True, colour="#5b8bd0"
        ),
        Contestant("jacobianreg", setup_of("jacobian_reg"), _not_jacobian_reg, colour="#b58bc4"),
        _ours("fastjac", "#13865b"),
        _ours("fastjac-autograd", "#8f9f3a", _has_no_engine, engine="autograd"),
        # it asks nothing of the fused ops: what torch.compile fuses are torch's own activations
        Contestant(
            *("fastjac-compiled", setup_of("ours", engine="compiled"), _cannot_run_compiled),
            compiles=True,
            colour="#2f9fb0",
        ),
        _of_impl("reference", "#cfdcc9"),
        _of_impl("cpu", "#6dbb98"),
        _of_impl("triton", "#a5d46a"),
        _of_impl("cuda", "#6dbb98"),
    )


def select_contestants(names: Sequence[str] = ()) -> list[Contestant]:
    """Contestants by name; all without names. ``plain`` is always there: overheads are over it.

    Raises:
        ValueError: a name that is not registered.
    """
    known = all_contestants()
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
    idiom = IDIOMS.get(case.penalty)
    if isinstance(idiom, InputJacobian) and idiom.jacobian_reg is not None:
        return None
    return f"JacobianReg cannot express {case.penalty}"


def _has_no_engine(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    if isinstance(IDIOMS.get(case.penalty), InputJacobian):
        return None
    return "only penalties on the input Jacobian have engines"


def _cannot_run_compiled(case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    return _has_no_engine(case, device, dtype) or _cannot_compile(case, device, dtype)


def _cannot_run(impl: str, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
    if isinstance(IDIOMS.get(case.penalty), InputJacobian):
        return "penalties on the input Jacobian are timed by engine, not by implementation"
    if impl == "triton" and device.type == "cpu":
        return "on the CPU Triton only interprets its kernels"
    return dispatch.why_not(impl, device.type, dtype)
