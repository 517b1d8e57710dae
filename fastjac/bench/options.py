"""How a run measures, and who takes part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastjac.bench.cases import Case
from fastjac.bench.contestants import Contestant


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy(threads: int) -> str | None:
    """A warning if other processes take the cores that the run wants; None if they are free."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = available_cores()
    if load + threads <= cores + 0.7:
        return None
    return (
        f"other work is running here (load {load:.1f}, {cores} cores, {threads} threads wanted): "
        "expect wide p20 - p80 ranges, and do not quote these times"
    )


@dataclass(frozen=True)
class Options:
    """How a run measures.

    Attributes:
        device, dtype: of networks and data.
        threads: ``torch.set_num_threads``.
        quick: each case runs the contestants of its quick list only.
        budget_s: sampling time per contestant and case.
        min_rounds, max_rounds: limits of what the budget buys.
        sample_s: shortest sample; a shorter step is repeated within it.
        keep_going: a contestant with wrong gradients does not end the run.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int = field(default_factory=available_cores)
    quick: bool = False
    budget_s: float = 2.0
    min_rounds: int = 7
    max_rounds: int = 60
    sample_s: float = 2e-3
    keep_going: bool = False

    @property
    def dtype_name(self) -> str:
        """``float32`` rather than ``torch.float32``."""
        return str(self.dtype).removeprefix("torch.")


def contestants_of(
    case: Case, contestants: Sequence[Contestant], options: Options
) -> list[Contestant]:
    """Those of the selected contestants that take part in a case."""
    return [
        contestant
        for contestant in contestants
        if (not options.quick or contestant.name in case.quick)
        and (not case.only or contestant.name in case.only)
        and contestant.why_not(case, options.device, options.dtype) is None
    ]
