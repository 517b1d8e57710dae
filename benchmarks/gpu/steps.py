"""Training steps with SpectReg and DREG, at three sizes in two dtypes.

A step is bound by launches at 512 x 512 (batch x width), by matrix products at 2048 x 2048, and by
memory at 65536 x 64. Three sets of contestants are measured, the cheapest first, because each of
the last set compiles for about ten seconds. The plain step is in each set, so the ratios to it can
be compared across sets.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict, replace

import torch

from benchmarks.gpu.work import Item, Row, main
from fastjac.bench.cases import Case
from fastjac.bench.contestants import Contestant, all_contestants, setup_of
from fastjac.bench.measure import Options
from fastjac.bench.networks import mlp
from fastjac.bench.problems import Problem, step_problem
from fastjac.bench.runner import run

#: Batch and width, and what a dry run has in their place.
SIZES = {(512, 512): (8, 8), (2048, 2048): (16, 16), (65536, 64): (64, 4)}
SETS = (
    ("plain", "eager", "fastjac"),
    ("plain", "graphed-eager", "graphed-fastjac"),
    ("plain", "compiled", "fastjac"),
)


def case_of(penalty: str, batch: int, width: int) -> Case:
    """An MLP with three hidden layers, all as wide as its input, and ten classes."""

    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        n, d = (batch, width) if device.type == "cuda" else SIZES[batch, width]
        network = functools.partial(mlp, [d, d, d, d, 10])
        return step_problem(network, (n, d), penalty, device=device, dtype=dtype)

    return Case(f"{penalty}-b{batch}-w{width}", penalty, "step", ("gpu",), build)


def contestants_for(device: str) -> dict[str, Contestant]:
    """By name. On a CPU nothing is captured and nothing is compiled to machine code."""
    known = {contestant.name: contestant for contestant in all_contestants()}
    if device == "cuda":
        return known
    dry = {name: replace(c, name=f"dry-{name}") for name, c in known.items()}
    how = {"backend": "aot_eager"}
    compiled = Contestant("dry-compiled", setup_of("compiled", **how), compiler="aot_eager")
    return known | {n: dry[n] for n in SETS[1][1:]} | {"compiled": compiled}


def measure(case: Case, contestants: list[Contestant], options: Options) -> Iterator[Row]:
    for record in run([case], contestants, options).records:
        yield asdict(record)


def items(device: str) -> Iterator[Item]:
    known = contestants_for(device)
    options = Options(torch.device(device), threads=1, budget_s=0.3, max_rounds=40, keep_going=True)
    sizes, dtypes = list(SIZES), [torch.bfloat16, torch.float32]
    if device == "cpu":
        options = replace(options, budget_s=0.0, min_rounds=3, max_rounds=3, sample_s=1e-5)
        sizes, dtypes = sizes[:1], dtypes[1:]
    for names in SETS:
        for size in sizes:
            for dtype in dtypes:
                for penalty in ("spectreg", "dreg"):
                    case, mine = case_of(penalty, *size), [known[name] for name in names]
                    what = f"{case.name}, {str(dtype).removeprefix('torch.')}, {' '.join(names)}"
                    how = replace(options, dtype=dtype)
                    yield what, functools.partial(measure, case, mine, how)


if __name__ == "__main__":
    main(items)
