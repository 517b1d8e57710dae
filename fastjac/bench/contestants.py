"""Registry of contestants: one set-up function each, which returns the step to time.

``plain``        the training step without penalty (elementwise: torch's forward kernel)
``plain-compiled``  ``torch.compile`` of that step with its backward, one graph
``eager``        today's torch idiom, ``autograd.grad(create_graph=True)`` (torch's own kernels)
``compiled``     ``torch.compile`` of the whole step: ``torch.func.grad`` of loss plus penalty. One
                 graph (``fullgraph=True``, because a fallback to eager would go unnoticed) was as
                 fast as or faster than compiling the objective and calling ``backward`` on it (2
                 cores: 0.86 against 1.20 ms for SpectReg 16-5x64-10, 61.8 against 75.0 ms for the
                 ResNet).
``jax``          ``jax.jit(jax.grad(objective))``, where JAX is installed
``jacobianreg``  facebookresearch's JacobianReg algorithm: one pass per projection
``fastjac``      the public penalty on a model prepared by ``fastjac.fuse``; a layer-wise penalty is
                 attached to the model as it is
``fastjac+compile``  ``fastjac.compile`` of the step with the public penalty and the backward
``fastjac-X``    a penalty on the input Jacobian by the engine X (``fastjac`` is ``"auto"``)
``fastjac:X``    an op or a layer-wise penalty by the implementation X
``graphed-X``    the step of X captured in a CUDA graph; what is timed is one replay

None of them rounds to TF32, and none draws random numbers while it is timed.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastjac.bench import by_jax, phases, steps
from fastjac.bench.cases import Case, unknown
from fastjac.bench.idioms import IDIOMS, InputJacobian
from fastjac.bench.measure import Options, available_cores
from fastjac.bench.problems import Problem, StepProblem
from fastjac.bench.steps import Prepared
from fastjac.ops import dispatch
from fastjac.torch_private import dynamo_config

#: The colour of a contestant that is not registered.
OTHER_COLOUR = "#8a7f6a"


@dataclass(frozen=True)
class Contestant:
    """A way of computing a case.

    Attributes:
        name: The argument of ``--contestant``.
        setup: Makes it ready; the first call of the step may still compile.
        colour: The colour of its bars and lines.
        compiler: What compiles it, ``"torch"`` (Inductor) or ``"jax"``, else empty. Its set-up and
            first call count as compile time.
        impl: The implementation of the fused ops that it asks for; empty if it uses none.
    """

    name: str
    setup: Callable[[Problem], Prepared]
    colour: str = OTHER_COLOUR
    compiler: str = ""
    impl: str = ""


def setup_of(form: str, **how: Any) -> Callable[[Problem], Prepared]:
    """The set-up function of this name, for a training step or for a phase of an op."""

    def setup(problem: Problem) -> Prepared:
        module = steps if isinstance(problem, StepProblem) else phases
        return getattr(module, form)(problem, **how)

    return setup


def _ours(name: str, colour: str, impl: str = "auto", **how: str) -> Contestant:
    return Contestant(name, setup_of("ours", impl=impl, **how), colour, impl=impl)


@functools.cache
def all_contestants() -> tuple[Contestant, ...]:
    """Every contestant, in the order of tables and plots."""
    return (
        Contestant("plain", setup_of("plain"), "#b8bcc2"),
        Contestant("plain-compiled", setup_of("plain_compiled"), "#8d949e", compiler="torch"),
        Contestant("eager", setup_of("eager"), "#e8743b"),
        Contestant("compiled", setup_of("compiled"), "#5b8bd0", compiler="torch"),
        Contestant("jax", by_jax.setup, "#c9a227", compiler="jax"),
        Contestant("jacobianreg", setup_of("jacobian_reg"), "#b58bc4"),
        _ours("fastjac", "#13865b"),
        _ours("fastjac-autograd", "#8f9f3a", engine="autograd"),
        Contestant("fastjac+compile", setup_of("ours_compiled"), "#2f9fb0", compiler="torch"),
        _ours("fastjac:reference", "#cfdcc9", "reference"),
        _ours("fastjac:cpu", "#6dbb98", "cpu"),
        _ours("fastjac:triton", "#a5d46a", "triton"),
        _ours("fastjac:cuda", "#6dbb98", "cuda"),
        Contestant("graphed-eager", setup_of("graphed", of="eager"), "#f3b08f"),
        Contestant("graphed-fastjac", setup_of("graphed", of="ours"), "#0b5a3c", impl="auto"),
    )


def select_contestants(names: Sequence[str] = ()) -> list[Contestant]:
    """The contestants of these names, or all. ``plain`` is always there, because overheads need it.

    Raises:
        ValueError: A name is not registered.
    """
    known = all_contestants()
    valid = [contestant.name for contestant in known]
    for name in names:
        if name not in valid:
            raise ValueError(unknown("contestant", name, valid))
    return [c for c in known if not names or c.name in names or c.name == "plain"]


def why_not(contestant: Contestant, case: Case, options: Options) -> str | None:
    """Why a contestant cannot compute a case here; None if it can."""
    idiom, device = IDIOMS.get(case.penalty), options.device.type
    if contestant.name == "jacobianreg" and getattr(idiom, "jacobian_reg", None) is None:
        return f"JacobianReg cannot express {case.penalty}"
    if contestant.name in ("plain-compiled", "fastjac+compile") and idiom is None:
        return "a training step is compiled; compiled has the ops"
    if contestant.name in ("plain-compiled", "fastjac+compile") and not hasattr(
        dynamo_config(), "trace_autograd_ops"
    ):
        return f"torch.compile of torch {torch.__version__} does not trace loss.backward()"
    if contestant.name.startswith("fastjac-") and not isinstance(idiom, InputJacobian):
        return "only penalties on the input Jacobian have engines"
    if contestant.name.startswith("graphed-") and (device == "cpu" or idiom is None):
        return "a CUDA graph holds a training step on a GPU"
    if contestant.compiler == "jax":
        if not case.jax:
            return "JAX is compared in few cases, which have SpectReg on an MLP"
        if device != "cpu" or options.dtype != torch.float32:
            return "JAX is compared on the CPU, in float32"
        if case.kind != "host" and options.threads != available_cores():
            return f"JAX uses all {available_cores()} cores; taskset gives it fewer"
    if contestant.name.startswith("fastjac:"):
        if isinstance(idiom, InputJacobian):
            return "penalties on the input Jacobian are timed by engine, not by implementation"
        if contestant.impl == "triton" and device == "cpu":
            return "on the CPU Triton only interprets its kernels"
        return dispatch.why_not(contestant.impl, device, options.dtype)
    return missing(contestant, options)


def missing(contestant: Contestant, options: Options) -> str | None:
    """What a contestant needs that this machine does not have; None if it has all."""
    if contestant.compiler == "jax":
        return by_jax.why_not()
    if contestant.compiler == "torch" and options.device.type == "cpu":
        compiler = os.environ.get("CXX") or "g++"
        if not (shutil.which(compiler) or shutil.which("clang++")):
            return f"torch.compile needs a C++ compiler; {compiler!r} was not found"
    return None


def asked(contestant: Contestant, case: Case, options: Options) -> bool:
    """Whether the lists of a case name a contestant."""
    quick = not options.quick or contestant.name in case.quick
    return quick and (not case.only or contestant.name in case.only)


def contestants_of(
    case: Case, contestants: Sequence[Contestant], options: Options
) -> list[Contestant]:
    """Those of the contestants that take part in a case."""
    return [
        contestant
        for contestant in contestants
        if asked(contestant, case, options) and why_not(contestant, case, options) is None
    ]


def left_out(
    cases: Sequence[Case], contestants: Sequence[Contestant], options: Options
) -> list[str]:
    """A line for each contestant that would run in one of the cases if the machine had more."""
    lines = []
    for contestant in contestants:
        lack = missing(contestant, options)
        if lack and any(
            asked(contestant, case, options) and why_not(contestant, case, options) == lack
            for case in cases
        ):
            lines.append(f"{contestant.name} is left out: {lack}")
    return lines
