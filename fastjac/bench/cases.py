"""Registry of benchmark cases: (penalty, network, batch), or (op, activation, phase).

A case is one entry of :func:`all_cases`; what its contestants compute is found by the name of its
penalty in :data:`fastjac.bench.idioms.IDIOMS`, of its op in :data:`fastjac.bench.phases.OPS`.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastjac.activations import TABLE
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.networks import TransformerClassifier, lenet, mlp, small_resnet
from fastjac.bench.problems import (
    PHASES,
    OpProblem,
    Problem,
    StepProblem,
    op_problem,
    squared_error,
    step_problem,
)

Build = Callable[[torch.device, torch.dtype], Problem]

#: what ``--suite`` takes, and what it holds
SUITES = {
    "quick": "the short look: five steps and the activations, few contestants, under 3 minutes",
    "layer-wise": "steps with a layer-wise penalty (DREG), and its op, act_stats",
    "input-jacobian": "steps with a penalty on the input Jacobian (SpectReg, DataGrad, …)",
    "elementwise": "every activation: forward, backward and double backward",
    "papers": "networks of the papers: LeNet-5, a CIFAR ResNet, SIN (2017); MLPs with DREG (2026)",
    "scaling": "SpectReg on an MLP by width, batch, depth and projections: one axis at a time",
    "all": "every case; what runs if no suite is named",
}

#: activations whose double backward is in the quick suite
QUICK_DOUBLE = ("gelu_tanh", "silu", "gelu", "mish")

#: the point through which the axes of the scaling suite run, and the other values on each
SCALING_BASE = {"width": 256, "batch": 128, "depth": 4, "projections": 1}
SCALING_AXES = {
    "width": (64, 1024, 4096),
    "batch": (8, 32, 512, 2048),
    "depth": (1, 2, 8, 16),
    "projections": (2, 4, 8, 16),
}


@dataclass(frozen=True)
class Case:
    """One line of the benchmark.

    Attributes:
        name: what ``--case`` takes.
        penalty: the penalty of a step, or the op.
        kind: ``"step"`` (forward, loss, backward) or ``"elementwise"`` (one op).
        suites: of :data:`SUITES`; ``"all"`` goes without saying.
        build: makes the problem on a device in a dtype.
        quick: contestants of the quick suite; empty if the case is not in it.
        only: the contestants that take part in any suite; empty for all.
        activation, phase: of an elementwise case; the name that tables and plots show.
        axes: of a scaling case, ``"width=256 batch=128 depth=4 projections=1"``.
    """

    name: str
    penalty: str
    kind: str
    suites: tuple[str, ...]
    build: Build
    quick: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    activation: str = ""
    phase: str = ""
    axes: str = ""


def select_cases(names: Sequence[str] = (), suite: str | None = None) -> list[Case]:
    """Cases of a suite, and of these those whose name matches one of ``names`` (``*`` allowed).

    Raises:
        ValueError: unknown suite, a name that matches no case, or nothing is left.
    """
    chosen = list(all_cases())
    known = [case.name for case in chosen]
    if suite is not None and suite not in SUITES:
        raise ValueError(f"suite {suite!r} does not exist; the suites are {', '.join(SUITES)}")
    if suite not in (None, "all"):
        chosen = [case for case in chosen if suite in case.suites]
    for name in names:
        if not fnmatch.filter(known, name):
            raise ValueError(unknown("case", name, known))
    if names:
        chosen = [c for c in chosen if any(fnmatch.fnmatchcase(c.name, name) for name in names)]
    if not chosen:
        what = f"case {names[0]!r} is not" if names else "no case is"
        raise ValueError(f"{what} in the suite {suite!r}")
    return chosen


def unknown(what: str, name: str, valid: Sequence[str]) -> str:
    """Message for a name that is not registered: the near ones first, then all of them."""
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return f"{what} {name!r} does not exist; {hint}valid names are: {', '.join(valid)}"


def _step(
    name: str,
    penalty: str,
    network: Callable[[], nn.Module],
    shape: tuple[int, ...],
    *suites: str,
    quick: str = "",
    only: str = "",
    **problem: Any,
) -> Case:
    """A training step; ``problem`` is what :func:`step_problem` takes beside device and dtype."""

    def build(device: torch.device, dtype: torch.dtype) -> StepProblem:
        return step_problem(network, shape, penalty, device=device, dtype=dtype, **problem)

    named = ("quick",) if quick else ()
    all_suites = (*named, IDIOMS[penalty].suite, *suites)
    return Case(name, penalty, "step", all_suites, build, (*quick.split(),), (*only.split(),))


def _mlp(inputs: int, hidden: int, width: int, outputs: int = 10, activation: type = nn.GELU):
    return functools.partial(mlp, [inputs, *[width] * hidden, outputs], activation)


def _feed_forward() -> Case:
    """The feed-forward of a Transformer; on the CPU, where it is only a dry run, 1/16 as wide."""

    def build(device: torch.device, dtype: torch.dtype) -> StepProblem:
        d = 4096 if device.type == "cuda" else 256
        shape = (2 * d, d)
        network = _mlp(d, 1, 4 * d, d)
        return step_problem(network, shape, "dreg", device=device, dtype=dtype, outputs=d)

    only = ("plain", "eager", "compiled", "fastjac")
    return Case("dreg-feed-forward", "dreg", "step", ("layer-wise",), build, only=only)


def _scaling(point: dict[str, int]) -> Case:
    network = _mlp(64, point["depth"], point["width"])

    moved = [f"{axis}-{value}" for axis, value in point.items() if value != SCALING_BASE[axis]]
    name, shape = f"scale-{''.join(moved) or 'base'}", (point["batch"], 64)
    only = "plain eager compiled fastjac"
    case = _step(name, "spectreg", network, shape, only=only, n_proj=point["projections"])
    axes = " ".join(f"{axis}={value}" for axis, value in point.items())
    return replace(case, suites=("scaling",), axes=axes)


def _act(fn: str, phase: str) -> Case:
    quick = phase != "double" or fn in QUICK_DOUBLE
    return Case(
        name=f"act-{fn}-{phase}",
        penalty="act",
        kind="elementwise",
        suites=(*(("quick",) if quick else ()), "elementwise"),
        build=lambda device, dtype: op_problem("act", fn, phase, device=device, dtype=dtype),
        quick=("plain", "eager", "fastjac") if quick else (),
        activation=fn,
        phase=phase,
    )


def _act_stats(fn: str, phase: str) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> OpProblem:
        shape = (8192, 8192) if device.type == "cuda" else (4096, 1024)
        return op_problem("act_stats", fn, phase, device=device, dtype=dtype, shape=shape)

    suites, shown = ("elementwise", "layer-wise"), f"{fn}, statistic"
    name = f"act-stats-{fn}-{phase}"
    return Case(name, "act_stats", "elementwise", suites, build, activation=shown, phase=phase)


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every case, steps first."""
    net512 = _mlp(784, 4, 512)
    short = "plain eager fastjac"
    return (
        # the widest one is bound by GEMMs, the narrowest by launches and Python
        _step("spectreg-mlp-b512-w2048", "spectreg", _mlp(1024, 3, 2048), (512, 1024)),
        _step(
            *("spectreg-mlp-b128-w512", "spectreg", net512, (128, 784)), quick=f"{short} compiled"
        ),
        _step(
            *("spectreg-mlp-b100-w64", "spectreg", _mlp(16, 5, 64), (100, 16)),
            quick=f"{short} compiled jacobianreg",
        ),
        _step("datagrad-mlp-b128-w512", "datagrad", net512, (128, 784), quick=short),
        _step("frobreg-mlp-b128-w512", "frobreg", net512, (128, 784), quick=f"{short} jacobianreg"),
        _step("jacreg-mlp-b128-w512", "jacreg", net512, (128, 784)),
        _step(
            *("gradient-penalty-mlp-b128-w512", "gradient-penalty", _mlp(784, 4, 512, 1)),
            (128, 784),
            outputs=1,
        ),
        _step(
            "dreg-mlp-b128-w512", "dreg", net512, (128, 784), "papers", quick=f"{short} compiled"
        ),
        _step("dreg-mlp-b512-w1024", "dreg", _mlp(784, 4, 1024), (512, 784), "papers"),
        _step("dreg-mlp-b4096-w256", "dreg", _mlp(784, 4, 256), (4096, 784), "papers"),
        # four of its seven 3x3 convolutions count: the others end in a sum with the shortcut
        _step("dreg-resnet", "dreg", small_resnet, (32, 3, 32, 32)),
        _step("dreg-transformer", "dreg", TransformerClassifier, (16, 64, 256)),
        # time over plain 1.03 is the aim on a GPU, in bfloat16
        _feed_forward(),
        # for the column `kernels`: beyond plain's, as many with six layers as with two, less one
        # for each layer whose bias gradient the fused backward sums
        *(
            _step(f"dreg-launches-{n}", "dreg", _mlp(64, n, 64), (32, 64), only="plain fastjac")
            for n in (2, 6)
        ),
        _step(
            *("spectreg-relu-mlp-b128-w512", "spectreg", _mlp(784, 4, 512, activation=nn.ReLU)),
            (128, 784),
            kinks=True,
        ),
        _step("spectreg-lenet", "spectreg", lenet, (50, 1, 28, 28), "papers", kinks=True),
        # GELU: in a ReLU network of this size (3M units a batch) some unit is always within
        # rounding of its kink, and two correct convolutions differ by 2e-3 in the gradient
        _step("spectreg-resnet", "spectreg", small_resnet, (32, 3, 32, 32), "papers"),
        # examples/sin.py: network, batch and loss of the experiment; what it fits costs no time
        _step(
            *("spectreg-sin", "spectreg", _mlp(1, 5, 64, 1, nn.ReLU), (100, 1), "papers"),
            outputs=1,
            kinks=True,
            loss=squared_error,
        ),
        _scaling(SCALING_BASE),
        *(
            _scaling({**SCALING_BASE, axis: value})
            for axis, values in SCALING_AXES.items()
            for value in values
        ),
        *(
            _act(fn, phase)
            for phase in PHASES
            for fn in TABLE
            if fn != "identity"  # torch returns the input itself: there is no kernel to time
        ),
        # 90% of the copy bandwidth is the aim on a GPU
        *(_act_stats("gelu", phase) for phase in ("forward", "backward")),
    )
