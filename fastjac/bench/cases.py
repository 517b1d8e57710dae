"""Registry of benchmark cases: (penalty, network, batch), or (op, activation, phase).

A case is one entry of :func:`all_cases`. What its contestants compute is found by the name of its
penalty in :data:`fastjac.bench.idioms.IDIOMS`, or of its op in :data:`fastjac.bench.phases.OPS`.
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
from fastjac.bench import everyday
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.networks import FunctionalMlp, TransformerClassifier, lenet, mlp, small_resnet
from fastjac.bench.problems import PHASES, Problem, op_problem, squared_error, step_problem

#: The arguments of ``--suite``, and what each suite holds.
SUITES = {
    "quick": "a short look: five steps and four activations, few contestants, under 90 seconds",
    "layer-wise": "steps with a layer-wise penalty (DREG), and its op, act_stats",
    "input-jacobian": "steps with a penalty on the input Jacobian (SpectReg, DataGrad, …)",
    "elementwise": "every activation: forward, backward and double backward",
    "papers": "networks of the papers: LeNet-5, a CIFAR ResNet, SIN (2017); MLPs with DREG (2026)",
    "networks": "SpectReg on twelve everyday networks: BERT, Llama, U-Net, SIREN, GRU, …",
    "host": "steps on tensors of a few numbers, one thread: what Python and dispatching cost",
    "scaling": "SpectReg on an MLP by width, batch, depth and projections: one axis at a time",
    "all": "every case; the default",
}

#: The activations whose double backward is in the quick suite.
QUICK_DOUBLE = ("gelu_tanh", "silu", "gelu", "mish")

#: The point that all axes of the scaling suite have in common, and the other values on each axis.
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
        name: The argument of ``--case``.
        penalty: The penalty of a step, or the op.
        kind: ``"step"`` (forward, loss, backward), ``"host"`` (a step on so small tensors that its
            time is the cost of the host) or ``"elementwise"`` (one op).
        suites: Keys of :data:`SUITES`, without ``"all"``.
        build: Makes the problem on a device in a dtype.
        quick: The contestants of the quick suite; empty if the case is not in it.
        only: The contestants that take part in any suite; empty for all.
        activation, phase: Of an elementwise case; the names that tables and plots show.
        axes: Of a scaling case, ``"width=256 batch=128 depth=4 projections=1"``.
        threads: The number of threads that the case always has; None for that of the run.
        jax: Whether the contestant ``jax`` takes part: SpectReg on an MLP with GELU.
    """

    name: str
    penalty: str
    kind: str
    suites: tuple[str, ...]
    build: Callable[[torch.device, torch.dtype], Problem]
    quick: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    activation: str = ""
    phase: str = ""
    axes: str = ""
    threads: int | None = None
    jax: bool = False


def select_cases(names: Sequence[str] = (), suite: str | None = None) -> list[Case]:
    """The cases of a suite whose name matches one of ``names``, or all; ``*`` is allowed.

    Raises:
        ValueError: The suite does not exist, a name matches no case, or no case is left.
    """
    chosen = list(all_cases())
    known = [case.name for case in chosen]
    if suite is not None and suite not in SUITES:
        raise ValueError(unknown("suite", suite, [*SUITES]))
    if suite not in (None, "all"):
        chosen = [case for case in chosen if suite in case.suites]
    for name in names:
        if not fnmatch.filter(known, name):
            raise ValueError(unknown("case", name, known))
    if names:
        chosen = [c for c in chosen if any(fnmatch.fnmatchcase(c.name, name) for name in names)]
    if not chosen:
        raise ValueError(f"No case that --case names is in the suite {suite!r}.")
    return chosen


def unknown(what: str, name: str, valid: Sequence[str]) -> str:
    """The message for a name that is not registered: similar names first, then all."""
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}? " if near else ""
    return f"The {what} {name!r} does not exist. {hint}Valid names are: {', '.join(valid)}."


def _step(
    name: str,
    penalty: str,
    network: Callable[[], nn.Module],
    shape: tuple[int, ...],
    *suites: str,
    quick: str = "",
    only: str = "",
    jax: bool = False,
    **options: Any,
) -> Case:
    """A training step; ``options`` are those of :func:`step_problem`."""

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        return step_problem(network, shape, penalty, device=device, dtype=dtype, **options)

    all_suites = (*(("quick",) if quick else ()), IDIOMS[penalty].suite, *suites)
    lists = (*quick.split(),), (*only.split(),)
    return Case(name, penalty, "step", all_suites, build, *lists, jax=jax)


def _mlp(inputs: int, hidden: int, width: int, outputs: int = 10, activation: type = nn.GELU):
    return functools.partial(mlp, [inputs, *[width] * hidden, outputs], activation)


def _feed_forward() -> Case:
    """The feed-forward block of a Transformer. It is 1/16 as wide in a dry run on the CPU."""

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        d = 4096 if device.type == "cuda" else 256
        network = _mlp(d, 1, 4 * d, d)
        return step_problem(network, (2 * d, d), "dreg", device=device, dtype=dtype, outputs=d)

    only = ("plain", "plain-compiled", "eager", "compiled", "fastjac", "fastjac+compile")
    return Case("dreg-feed-forward", "dreg", "step", ("layer-wise",), build, only=only)


def _scaling(**moved: int) -> Case:
    """SpectReg at the base point of the scaling suite, with one axis moved."""
    point = SCALING_BASE | moved
    name = "".join(f"{axis}-{value}" for axis, value in moved.items()) or "base"
    case = _step(
        *(f"scale-{name}", "spectreg", _mlp(64, point["depth"], point["width"])),
        (point["batch"], 64),
        only="plain eager compiled fastjac",
        n_proj=point["projections"],
    )
    axes = " ".join(f"{axis}={value}" for axis, value in point.items())
    return replace(case, suites=("scaling",), axes=axes)


def _everyday(name: str, network: Callable[[], nn.Module], *shape: int, **options: Any) -> Case:
    """SpectReg with one projection on a network of `everyday`."""
    case = _step(f"net-{name}", "spectreg", network, shape, only="plain eager fastjac", **options)
    return replace(case, suites=("networks",))


def _host(
    name: str, penalty: str, network: Callable[[], nn.Module], *shape: int, jax: bool = False
) -> Case:
    """A step with batch 2 and width 4 on one thread."""
    everyone = (
        "plain plain-compiled eager compiled jax fastjac fastjac+compile graphed-eager "
        "graphed-fastjac"
    )
    case = _step(f"host-{name}", penalty, network, shape, only=everyone, jax=jax)
    return replace(case, kind="host", suites=("host",), threads=1)


def _op(op: str, fn: str, phase: str) -> Case:
    """One phase of ``act`` or ``act_stats``."""
    if op == "act":
        quick = phase == "double" and fn in QUICK_DOUBLE
        suites, shown = ("quick", "elementwise") if quick else ("elementwise",), fn
    else:
        quick, suites, shown = False, ("elementwise", "layer-wise"), f"{fn}, statistic"

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        shape = (8192, 8192) if op == "act_stats" and device.type == "cuda" else (4096, 1024)
        return op_problem(op, fn, phase, device=device, dtype=dtype, shape=shape)

    return Case(
        *(f"{op.replace('_', '-')}-{fn}-{phase}", op, "elementwise", suites, build),
        quick=("plain", "eager", "fastjac") if quick else (),
        activation=shown,
        phase=phase,
    )


@functools.cache
def all_cases() -> tuple[Case, ...]:
    """Every case, steps first."""
    net512, b128 = _mlp(784, 4, 512), (128, 784)
    short = "plain eager fastjac"
    return (
        # The widest is bound by matrix products, the narrowest by launches and Python.
        _step("spectreg-mlp-b512-w2048", "spectreg", _mlp(1024, 3, 2048), (512, 1024)),
        _step(
            *("spectreg-mlp-b128-w512", "spectreg", net512, b128),
            quick=f"{short} compiled fastjac+compile",
            jax=True,
        ),
        _step(
            *("spectreg-mlp-b100-w64", "spectreg", _mlp(16, 5, 64), (100, 16)),
            quick=f"{short} compiled jacobianreg fastjac+compile",
            jax=True,
        ),
        _step("datagrad-mlp-b128-w512", "datagrad", net512, b128, quick=short),
        _step("frobreg-mlp-b128-w512", "frobreg", net512, b128, quick=f"{short} jacobianreg"),
        _step("jacreg-mlp-b128-w512", "jacreg", net512, b128),
        _step(
            *("gradient-penalty-mlp-b128-w512", "gradient-penalty", _mlp(784, 4, 512, 1), b128),
            outputs=1,
        ),
        _step(
            *("dreg-mlp-b128-w512", "dreg", net512, b128, "papers"),
            quick=f"{short} compiled fastjac+compile",
        ),
        _step("dreg-mlp-b512-w1024", "dreg", _mlp(784, 4, 1024), (512, 784), "papers"),
        _step("dreg-mlp-b4096-w256", "dreg", _mlp(784, 4, 256), (4096, 784), "papers"),
        # Four of its seven 3x3 convolutions count; the others end in a sum with the shortcut.
        _step("dreg-resnet", "dreg", small_resnet, (32, 3, 32, 32)),
        _step("dreg-transformer", "dreg", TransformerClassifier, (16, 64, 256)),
        # The aim on a GPU in bfloat16 is 1.03 times plain.
        _feed_forward(),
        _step(
            *("spectreg-relu-mlp-b128-w512", "spectreg", _mlp(784, 4, 512, activation=nn.ReLU)),
            *(b128,),
            kinks=True,
        ),
        _step("spectreg-lenet", "spectreg", lenet, (50, 1, 28, 28), "papers", kinks=True),
        # It has GELU: in a ReLU network of this size (3M units in a batch) some unit is always
        # within rounding of its kink, and two correct convolutions differ by 2e-3 in the gradient.
        _step("spectreg-resnet", "spectreg", small_resnet, (32, 3, 32, 32), "papers"),
        # The network, batch and loss of studies/gradient_regularization/sin.py.
        _step(
            *("spectreg-sin", "spectreg", _mlp(1, 5, 64, 1, nn.ReLU), (100, 1), "papers"),
            outputs=1,
            kinks=True,
            loss=squared_error,
        ),
        # "auto" may take 1.1 times as long as eager.
        _everyday("bert", everyday.Bert, 4, 32, 128),
        _everyday("llama", everyday.Llama, 4, 32, 128),
        _everyday("swin", everyday.Swin, 4, 3, 32, 32),
        _everyday("mixer", everyday.Mixer, 8, 3, 32, 32),
        _everyday("siren", everyday.Siren, 512, 2, outputs=1, loss=squared_error),
        _everyday("gated", everyday.Gated, 64, 64, kinks=True),
        _everyday("pinn", everyday.Pinn, 512, 2, outputs=1, loss=squared_error),
        _everyday("deepsdf", everyday.DeepSdf, 512, 3, outputs=1, loss=squared_error),
        _everyday("gru", everyday.GruClassifier, 32, 16, 32),
        _everyday("unet", everyday.UNet, 8, 3, 16, 16),
        _everyday("dcgan", everyday.Discriminator, 8, 3, 32, 32, outputs=1, kinks=True),
        _everyday("residual", everyday.Residual, 64, 64),
        # The same layers twice, as a Sequential and in a module with functional calls.
        _host("sequential", "spectreg", _mlp(4, 3, 4), 2, 4, jax=True),
        _host("own-module", "spectreg", functools.partial(FunctionalMlp, [4, 4, 4, 4, 10]), 2, 4),
        _host("residual", "spectreg", functools.partial(everyday.Residual, 4, 4, layers=3), 2, 4),
        _host("transformer", "spectreg", functools.partial(everyday.Bert, 4, 2, layers=1), 2, 4, 4),
        # On a GPU the launches beyond plain's are as many with six layers as with three, less one
        # for each layer whose bias gradient the fused backward sums (tests/test_host.py).
        *(_host(f"dreg-{n}-layers", "dreg", _mlp(4, n, 4), 2, 4) for n in (3, 6)),
        _scaling(),
        *(_scaling(**{axis: value}) for axis in SCALING_AXES for value in SCALING_AXES[axis]),
        # torch returns the input of identity itself, so there is no kernel to time.
        *(_op("act", fn, phase) for phase in PHASES for fn in TABLE if fn != "identity"),
        # The aim on a GPU is 90% of the copy bandwidth.
        *(_op("act_stats", "gelu", phase) for phase in ("forward", "backward")),
    )
