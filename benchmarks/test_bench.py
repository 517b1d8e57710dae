"""The cases and contestants of `fastjac bench` under pytest-benchmark, each gated first.

    pip install 'fastjac[bench]'
    python -m pytest benchmarks/test_bench.py                               the quick suite
    python -m pytest benchmarks/test_bench.py --suite layerwise -k resnet
    python -m pytest benchmarks/test_bench.py --benchmark-autosave          then --benchmark-compare

For its storage, its histograms and its statistics of one contestant. What is quoted comes from
`fastjac bench`: there contestants take turns, here one is done before the next begins, so that a
machine that changes speed meanwhile favours one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastjac.bench import Case, Contestant, Options, all_contestants, select_cases
from fastjac.bench.gate import Gate, admit, open_gate
from fastjac.bench.options import contestants_of
from fastjac.bench.problems import Problem
from fastjac.bench.runner import new_record, settings

pytest.importorskip("pytest_benchmark", reason="pip install 'fastjac[bench]'")


def options_of(config: pytest.Config) -> Options:
    """Of the command line."""
    dtype: torch.dtype = getattr(torch, config.getoption("dtype"))
    device = torch.device(config.getoption("device"))
    return Options(device=device, dtype=dtype, quick=config.getoption("suite") == "quick")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per case of the suite and contestant that can run it."""
    options = options_of(metafunc.config)
    pairs = [
        pytest.param(case, contestant, id=f"{case.name}-{contestant.name}")
        for case in select_cases(suite=metafunc.config.getoption("suite"))
        for contestant in contestants_of(case, all_contestants(), options)
    ]
    metafunc.parametrize(("case", "contestant"), pairs)


@pytest.fixture(scope="module")
def options(request: pytest.FixtureRequest) -> Iterator[Options]:
    """With torch set up as `fastjac bench` has it."""
    chosen = options_of(request.config)
    with settings(chosen):
        yield chosen


@functools.lru_cache(maxsize=1)  # contestants of a case follow each other
def gated(case: Case, options: Options) -> tuple[Problem, Gate]:
    """The problem and what its gradients must be."""
    problem = case.build(options.device, options.dtype)
    return problem, open_gate(problem, options.dtype)


@pytest.fixture
def no_graphs_left() -> Iterator[None]:
    """Whatever was compiled goes with the test."""
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_graphs_left")
def test_step(case: Case, contestant: Contestant, options: Options, benchmark: Any) -> None:
    """Time one contestant on one case."""
    problem, gate = gated(case, options)
    record = new_record(case, contestant, options)
    prepared = admit(contestant, problem, gate, record)
    if prepared is None:
        pytest.fail(f"{case.name}, {contestant.name}: {record.status}: {record.message}")
    benchmark.group = case.name
    benchmark.extra_info.update(
        compile_s=record.compile_s, engine=record.engine, impl=record.impl, rel_err=record.rel_err
    )

    def step() -> None:
        prepared.step()
        if options.device.type == "cuda":
            torch.cuda.synchronize(options.device)

    try:
        benchmark(step)
    finally:
        prepared.close()
