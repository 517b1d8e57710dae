"""The contestant ``jax``: where it takes part, and where JAX is installed, its gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import CPU, FAST, named, tiny_case, tiny_problem
from torch import nn

from fastjac.bench import by_jax, contestants
from fastjac.bench.cases import all_cases, select_cases
from fastjac.bench.contestants import why_not
from fastjac.bench.networks import FunctionalMlp
from fastjac.bench.problems import squared_error
from fastjac.bench.runner import run

needs_jax = pytest.mark.skipif(by_jax.why_not() is not None, reason="needs JAX")
JAX = named("jax")[-1]
CASES = [case for case in all_cases() if case.jax]


def test_where_it_takes_part(monkeypatch):
    monkeypatch.setattr(by_jax, "why_not", lambda: None)
    monkeypatch.setattr(contestants, "available_cores", lambda: 2)
    names = ["spectreg-mlp-b128-w512", "spectreg-mlp-b100-w64", "host-sequential"]
    assert [case.name for case in CASES] == names
    for case in CASES:
        problem = case.build(CPU, torch.float32)
        assert len(by_jax.layers_of(problem.model)) >= 4
    step, host = CASES[0], CASES[-1]
    two = replace(FAST, threads=2)
    assert why_not(JAX, step, two) is None and why_not(JAX, host, FAST) is None
    for case, options in (
        *((step, FAST), (select_cases(["dreg-resnet"])[0], two)),
        *((step, replace(two, dtype=torch.float64)), (step, replace(two, dtype=torch.bfloat16))),
        (step, replace(two, device=torch.device("cuda"))),
    ):
        assert "JAX" in (why_not(JAX, case, options) or "")


@pytest.mark.parametrize(
    "model",
    [
        FunctionalMlp([4, 4, 4]),
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.GELU()),
        nn.Sequential(nn.GELU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)),
    ],
    ids=["own module", "tanh", "no head", "no layer", "flatten"],
)
def test_another_network_is_refused(model):
    with pytest.raises(TypeError, match="Linear and GELU"):
        by_jax.layers_of(model)


@needs_jax
@pytest.mark.parametrize("penalty", ["spectreg", "spectreg-k3"])
def test_its_gradients_pass_the_gate(penalty, monkeypatch):
    monkeypatch.setattr(contestants, "available_cores", lambda: 1)
    records = run([replace(tiny_case(penalty), jax=True)], [*named("eager"), JAX], FAST).records
    assert [(r.contestant, r.status, r.message) for r in records][-1] == ("jax", "ok", "")
    found = records[-1]
    assert found.median_ms and found.compile_s and found.launches is found.peak_mb is None


@needs_jax
def test_it_reads_the_problem(monkeypatch):
    problem = tiny_problem("spectreg")
    problem.weight = 0.25
    wanted = named("eager")[-1].setup(problem).gradients()
    for mine, other in zip(JAX.setup(problem).gradients(), wanted, strict=True):
        torch.testing.assert_close(mine, other)
    for wrong in (tiny_problem("frobreg"), replace(problem, loss=squared_error)):
        with pytest.raises(TypeError, match="SpectReg and cross entropy"):
            JAX.setup(wrong)
