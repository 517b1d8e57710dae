"""What a step costs the host: launches, and µs per call without waiting for the GPU.

The steps are those of ``fastjac bench --suite host``, so small that the GPU is always ahead. Each
passes the gate first; for a graph this compares what a replay computes. Compiled steps are left to
the stage ``steps``, because each compiles for ten seconds. Calls are issued in bursts of ten, which
stay far below the thousand launches that a stream queues before a launch waits.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.steps import contestants_for
from benchmarks.gpu.work import Item, Row, main
from fastjac.bench.cases import Case, select_cases
from fastjac.bench.contestants import Contestant
from fastjac.bench.gate import open_gate
from fastjac.bench.measure import Options, launches
from fastjac.bench.problems import op_problem
from fastjac.bench.runner import settings

STEPS = ("plain", "eager", "fastjac", "graphed-eager", "graphed-fastjac")
PHASES = (
    *(("act", phase) for phase in ("forward", "backward", "double")),
    *(
        (op, phase)
        for op in ("act_stats", "row_sqnorm", "softmax_residual")
        for phase in ("forward", "backward")
    ),
)
BURST = 10


def per_call(step: Callable[[], object], device: str) -> Row:
    """The medians over bursts: µs to issue a call, and µs until the GPU has done it."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    issued, done = [], []
    for k in range(33 if device == "cuda" else 6):
        wait()
        began = time.perf_counter()
        for _ in range(BURST):
            step()
        issued.append(time.perf_counter() - began)
        wait()
        done.append(time.perf_counter() - began)
        if k == 2:  # the first three warm up
            issued, done = [], []
    return {
        "host_us": 1e6 * statistics.median(issued) / BURST,
        "done_us": 1e6 * statistics.median(done) / BURST,
        "launches": launches(step),
    }


def step_cost(device: str, case: Case, contestant: Contestant) -> Iterator[Row]:
    where = torch.device(device)
    with settings(Options(where, threads=1)):
        problem = case.build(where, torch.float32)
        expected = open_gate(problem, torch.float32).of(contestant.name)
        prepared = contestant.setup(problem)
        error = expected.error(prepared.gradients())
        row = {"step": case.name, "contestant": contestant.name, "rel_err": error}
        right = error <= expected.limit
        wrong = {"ok": False, "reason": f"relative error {error:.1e} > {expected.limit:.1e}"}
        yield row | (per_call(prepared.step, device) if right else wrong)
        prepared.close()


def op_cost(device: str, op: str, phase: str, contestant: Contestant) -> Iterator[Row]:
    fn = "gelu" if op.startswith("act") else "identity"
    where = torch.device(device)
    problem = op_problem(
        *(op, fn, phase), device=where, dtype=torch.float32, shape=(64, 64), buffers=0
    )
    row = {"op": op, "phase": phase, "contestant": contestant.name}
    yield row | per_call(contestant.setup(problem).step, device)


def items(device: str) -> Iterator[Item]:
    known = contestants_for(device)
    for case in select_cases(suite="host"):
        for name in STEPS:
            measure = functools.partial(step_cost, device, case, known[name])
            yield f"{case.name}, {name}", measure
    ours = ("fastjac:cuda", "fastjac:triton") if device == "cuda" else ("fastjac:cpu",)
    for op, phase in PHASES:
        for name in ("eager", *ours):
            yield (
                f"{op} {phase}, {name}",
                functools.partial(op_cost, device, op, phase, known[name]),
            )


if __name__ == "__main__":
    main(items)
