"""Tiny cases and planted contestants for the tests of the benchmark and its command."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from fastjac.bench import idioms, steps
from fastjac.bench.cases import Case
from fastjac.bench.contestants import Contestant, select_contestants
from fastjac.bench.idioms import IDIOMS, EagerDreg
from fastjac.bench.measure import Options
from fastjac.bench.networks import TransformerClassifier, mlp, small_resnet
from fastjac.bench.problems import PHASES, StepProblem, op_problem, squared_error, step_problem
from fastjac.bench.records import Record
from fastjac.bench.steps import Prepared

CPU = torch.device("cpu")
FAST = Options(threads=1, budget_s=0.0, min_rounds=3, max_rounds=3, sample_s=1e-5)
#: the layer-wise penalty on small copies of its other networks, with the shape of the input
NETWORKS = {
    "dreg-resnet": (functools.partial(small_resnet, (2, 3, 4)), (5, 3, 8, 8)),
    "dreg-transformer": (functools.partial(TransformerClassifier, 8, 2, 12, 2), (5, 4, 8)),
}
#: SpectReg with several projections, and as in the SIN experiment
VARIANTS: dict[str, dict[str, Any]] = {
    "spectreg-k3": {"n_proj": 3},
    "spectreg-sin": {"outputs": 1, "loss": squared_error},
}
STEPS = (*IDIOMS, *NETWORKS, *VARIANTS)


def tiny_problem(penalty: str, dtype: torch.dtype = torch.float32) -> StepProblem:
    if penalty in NETWORKS:
        return step_problem(*NETWORKS[penalty], "dreg", device=CPU, dtype=dtype)
    options = {"outputs": 1 if penalty == "gradient-penalty" else 3, **VARIANTS.get(penalty, {})}
    network = functools.partial(mlp, [6, 8, 7, options["outputs"]])
    return step_problem(network, (5, 6), _of(penalty), device=CPU, dtype=dtype, **options)


def _of(name: str) -> str:
    """The penalty of one of `STEPS`."""
    return "dreg" if name in NETWORKS else "spectreg" if name in VARIANTS else name


def tiny_case(penalty: str = "spectreg", name: str | None = None) -> Case:
    return Case(
        name or f"{penalty}-tiny",
        _of(penalty),
        "step",
        ("tiny",),
        lambda device, dtype: tiny_problem(penalty, dtype),
    )


def tiny_op(fn: str = "gelu", phase: str = "double", op: str = "act") -> Case:
    return Case(
        *(f"act-{fn}-{phase}", op, "elementwise", ("tiny",)),
        lambda device, dtype: op_problem(
            op, fn, phase, device=device, dtype=dtype, shape=(16, 9), buffers=0
        ),
        activation=fn,
        phase=phase,
    )


def named(*names: str) -> list[Contestant]:
    return select_contestants(names)


def planted(name: str, gradients) -> Contestant:
    """A contestant whose step may not be run outside the gate."""

    def setup(problem):
        def step():
            raise AssertionError("a wrong contestant was timed")

        return Prepared(step, lambda: gradients(problem))

    return Contestant(name, setup)


def without_second_order(problem):
    """The penalty's VJP without create_graph: the bug that drops the second-order term."""
    model = copy.deepcopy(problem.model)
    x = problem.x.detach().requires_grad_()
    output = model(x)
    (v,) = torch.autograd.grad(output, x, problem.projection[0], retain_graph=True)
    value = v.square().sum(1).mean()
    (problem.loss(output, problem.target) + problem.weight * value).backward()
    return [p.grad for p in model.parameters()]


def slightly_off(problem):
    gradients = list(steps.eager(problem).gradients())
    return [gradients[0] * (1 + 2e-5), *gradients[1:]]


def not_a_number(problem):
    return [g * float("nan") for g in steps.eager(problem).gradients()]


def layerwise_gradients(problem: StepProblem, kind: type[EagerDreg] = EagerDreg):
    """Of loss plus penalty, by the eager idiom or a faulty copy of it."""
    model = copy.deepcopy(problem.model)
    output, value = kind(model)(problem.x)
    (problem.loss(output, problem.target) + problem.weight * value).backward()
    return [p.grad for p in model.parameters()]


class WithoutTheNorm(EagerDreg):
    def __init__(self, model):
        super().__init__(model)
        self.layers = [(layer, None, activation) for layer, _, activation in self.layers]


class StatisticsConstant(EagerDreg):
    def _note_before_norm(self, module, inputs):
        super()._note_before_norm(module, (inputs[0].detach(),))


class OneLayerShort(EagerDreg):
    def __init__(self, model):
        super().__init__(model)
        self.layers.pop()


class SlopeConstant(EagerDreg):
    """The gradient of the weights alone: the second-order term is dropped."""

    def __call__(self, x):
        term = idioms.penalty_term
        with mock.patch.object(
            idioms, "penalty_term", lambda slope, *rest: term(slope.detach(), *rest)
        ):
            return super().__call__(x)


def interrupting(at_call: int) -> Contestant:
    def setup(problem):
        calls = 0

        def step():
            nonlocal calls
            calls += 1
            if calls == at_call:
                raise KeyboardInterrupt

        return Prepared(step, steps.eager(problem).gradients)

    return Contestant("interrupting", setup)


def record(case: str = "c", contestant: str = "eager", **values: Any) -> Record:
    base = Record(
        *(case, "spectreg", "step", "quick", "", "", contestant, "ok", "cpu", "float32", 2)
    )
    return replace(base, **({"n_rounds": 5, "torch": "2.13", "machine": "M, 1"} | values))


def trio(case: str, ratio: float, **values: Any) -> list[Record]:
    """plain, eager and fastjac, which is ``ratio`` times as fast as eager."""
    shared = {"p20_ms": 1.0, "p80_ms": 9.0, "rel_err": 1e-7, **values}
    return [
        record(case, "plain", median_ms=4.0, overhead=1.0, peak_mb=3.0, **shared),
        record(case, "eager", median_ms=8.0, overhead=2.0, vs_eager=1.0, peak_mb=6.0, **shared),
        record(
            *(case, "fastjac"),
            median_ms=8 / ratio,
            overhead=2 / ratio,
            vs_eager=ratio,
            peak_mb=4.0,
            **shared,
        ),
    ]


def elementwise_records() -> list[Record]:
    shared = {"kind": "elementwise", "activation": "gelu", "gbps": 5.0, "copy_gbps": 10.0}
    return [
        replace(r, pct_copy=50.0, phase=phase, **shared)
        for phase in PHASES
        for r in trio(f"act-gelu-{phase}", 4.5)
    ]
