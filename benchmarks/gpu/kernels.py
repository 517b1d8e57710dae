"""The fused ops in GB/s and in per cent of a copy, against eager torch (and compiled, last).

Each tensor has 8192 x 8192 elements, 128 or 256 MB, and at least three are used in turn, so the L2
(60 MB on an H200) holds nothing that the next call needs. The machinery is that of ``fastjac
bench``: nothing is timed whose gradients are wrong, samples of all contestants and of the copy are
taken in turn by CUDA events, and the median counts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict

import torch

from benchmarks.gpu.work import Item, Row, main
from fastjac.bench.cases import Case
from fastjac.bench.contestants import select_contestants
from fastjac.bench.measure import Options
from fastjac.bench.problems import Problem, op_problem
from fastjac.bench.runner import run

#: Op -> its activations and phases.
OPS = {
    "act_stats": (("gelu", "relu", "tanh"), ("forward", "backward")),
    "act": (("gelu", "relu", "tanh"), ("forward", "backward", "double")),
    "row_sqnorm": (("identity",), ("forward", "backward")),
    "softmax_residual": (("identity",), ("forward", "backward")),
}
#: Those that torch.compile runs too, each after half a minute of compilation in total.
COMPILED = (("act_stats", "gelu", "forward"), ("act_stats", "gelu", "backward"))


def case_of(op: str, fn: str, phase: str) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> Problem:
        large = device.type == "cuda"
        shape, buffers = ((8192, 8192), 256 << 20) if large else ((64, 48), 0)
        return op_problem(op, fn, phase, device=device, dtype=dtype, shape=shape, buffers=buffers)

    words = (op.replace("_", "-"), *(() if fn == "identity" else (fn,)), phase)
    shown = {"act": fn, "act_stats": f"{fn}, statistic"}.get(op, op)
    return Case("-".join(words), op, "elementwise", ("gpu",), build, activation=shown, phase=phase)


def measure(case: Case, names: tuple[str, ...], options: Options) -> Iterator[Row]:
    contestants = [c for c in select_contestants(names) if c.name in names]
    for record in run([case], contestants, options).records:
        yield asdict(record)


def items(device: str) -> Iterator[Item]:
    pace = (0.15, 7, 30, 2e-3) if device == "cuda" else (0.0, 3, 3, 1e-5)
    budget_s, *rounds, sample_s = pace
    ours = ("fastjac:cuda", "fastjac:triton") if device == "cuda" else ("fastjac:cpu",)
    plan = [
        (dtype, case_of(op, fn, phase), ("eager", *ours))
        # The buffers of the last problem are kept; they are the same for all ops of a phase.
        for dtype in (torch.bfloat16, torch.float32)
        for phase in ("forward", "backward", "double")
        for op, (activations, phases) in OPS.items()
        for fn in activations
        if phase in phases
    ]
    if device == "cuda":
        plan += [(torch.bfloat16, case_of(*key), ("compiled", *ours)) for key in COMPILED]
    for dtype, case, names in plan:
        options = Options(
            *(torch.device(device), dtype, 1),
            budget_s=budget_s,
            min_rounds=rounds[0],
            max_rounds=rounds[1],
            sample_s=sample_s,
            keep_going=True,
        )
        name = f"{case.name}, {str(dtype).removeprefix('torch.')}, {' '.join(names)}"
        yield name, functools.partial(measure, case, names, options)


if __name__ == "__main__":
    main(items)
