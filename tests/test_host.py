"""What the fastjac step of each case of the suite ``host`` costs the host, as counts.

Counts do not depend on the machine, so a single launch or Python call more fails. A change that
needs fewer lowers the limit here.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple

import pytest
import torch
from bench_cases import CPU

from fastjac.bench import steps
from fastjac.bench.cases import Case, select_cases
from fastjac.bench.measure import launches
from fastjac.bench.steps import Prepared
from fastjac.layerwise import statistics
from fastjac.ops import dispatch


class Counts(NamedTuple):
    """Dispatched operations that are not views, and calls of Python functions, in one step."""

    launches: int
    calls: int


#: Counted with torch 2.13 and Python 3.11. A comprehension is a call there, and none from 3.12 on.
LIMITS = {
    "host-sequential": Counts(14, 130),
    "host-own-module": Counts(20, 148),
    "host-residual": Counts(30, 194),
    "host-transformer": Counts(173, 228),
    "host-dreg-3-layers": Counts(21, 141),
    "host-dreg-6-layers": Counts(30, 159),
}
CASES = {case.name: case for case in select_cases(suite="host")}

needs_library = pytest.mark.skipif(
    dispatch.why_not("cpu", "cpu", torch.float32) is not None, reason="needs the CPU library"
)


@contextmanager
def step_of(case: Case, form: str = "ours") -> Iterator[Prepared]:
    """The step of a contestant, which has run a few times."""
    problem = case.build(CPU, torch.float32)
    problem.weight = 0.5  # a value that is multiplied by 1 costs a launch less
    prepared = getattr(steps, form)(problem)
    try:
        for _ in range(3):
            prepared.step()
        yield prepared
    finally:
        prepared.close()


def calls(step: Callable[[], object]) -> int:
    """The calls of Python functions in one call of a step."""
    total = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal total
        total += event == "call"

    before, collects = sys.getprofile(), gc.isenabled()
    gc.collect()
    gc.disable()  # the finalizers that it runs would count
    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return total


def check(name: str, what: str, count: int, limit: int) -> None:
    assert count <= limit, f"{name}: {count} {what} in a step of fastjac, the limit is {limit}"


def test_every_case_has_limits() -> None:
    assert [*LIMITS] == [*CASES]


@needs_library
@pytest.mark.parametrize("name", CASES)
def test_launches(name: str) -> None:
    with step_of(CASES[name]) as prepared:
        check(name, "launches", launches(prepared.step), LIMITS[name].launches)


@needs_library
@pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions have other functions")
@pytest.mark.parametrize("name", CASES)
def test_calls(name: str) -> None:
    with step_of(CASES[name]) as prepared:
        counted = calls(prepared.step)
        assert counted == calls(prepared.step), "the count differs from step to step"
        check(name, "calls of Python functions", counted, LIMITS[name].calls)


def test_a_further_layer_of_dreg_launches_nothing_more_on_a_gpu(monkeypatch) -> None:
    # The row norms of all layers are one launch there, and the fused backward sums the gradient of
    # a bias, so a layer of DREG has one launch less than one of the plain step.
    monkeypatch.setattr(statistics, "TAPPED", {"cpu"})
    beyond = []
    for name in ("host-dreg-3-layers", "host-dreg-6-layers"):
        with step_of(CASES[name]) as ours, step_of(CASES[name], "plain") as plain:
            beyond.append(launches(ours.step) - launches(plain.step))
    assert beyond[1] <= beyond[0], f"launches beyond plain's with 3 and 6 layers: {beyond}"
