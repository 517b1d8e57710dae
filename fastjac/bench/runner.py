"""Runs cases: gate, warm-up, rounds, memory; returns records."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from fastjac import dispatch
from fastjac.bench.cases import Case
from fastjac.bench.contestants import Contestant, Prepared
from fastjac.bench.gate import Gate, open_gate
from fastjac.bench.measure import Samples, Step, interleave, peak_bytes
from fastjac.bench.problems import ElementwiseProblem, Problem
from fastjac.bench.records import Record, versions

COPY = "Tensor.clone"
#: rounds below which an interrupted case is dropped
ENOUGH_ROUNDS = 3


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
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int = field(default_factory=available_cores)
    quick: bool = False
    budget_s: float = 2.0
    min_rounds: int = 7
    max_rounds: int = 60
    sample_s: float = 2e-3

    @property
    def dtype_name(self) -> str:
        """``float32`` rather than ``torch.float32``."""
        return str(self.dtype).removeprefix("torch.")


class Watcher(Protocol):
    """Who is told how far a run has come (a progress bar)."""

    def started(self, case: Case, contestants: Sequence[Contestant]) -> None:
        """A case begins."""

    def stage(self, text: str) -> None:
        """What it is doing."""

    def finished(self, case: Case) -> None:
        """A case is done."""


class _Nobody:
    def started(self, case: Case, contestants: Sequence[Contestant]) -> None: ...
    def stage(self, text: str) -> None: ...
    def finished(self, case: Case) -> None: ...


@dataclass
class Outcome:
    """Records of a run, and whether Ctrl-C ended it early."""

    records: list[Record]
    interrupted: bool = False

    @property
    def bad(self) -> list[Record]:
        """Records of contestants that were wrong or failed."""
        return [record for record in self.records if record.status != "ok"]


def contestants_of(
    case: Case, contestants: Sequence[Contestant], options: Options
) -> list[Contestant]:
    """Those of the selected contestants that take part in a case."""
    return [
        contestant
        for contestant in contestants
        if (not options.quick or contestant.name in case.quick)
        and contestant.why_not(case, options.device, options.dtype) is None
    ]


def run(
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    options: Options,
    watcher: Watcher | None = None,
) -> Outcome:
    """Measure the contestants on the cases.

    A contestant whose gradients miss the gate gets a ``"wrong"`` record and is not timed; one that
    raises gets a ``"failed"`` record. Ctrl-C ends the run and keeps what is done: finished cases,
    and the current one from three rounds on.

    Args:
        cases: see :func:`fastjac.bench.cases.select_cases`.
        contestants: see :func:`fastjac.bench.contestants.select_contestants`.
        options: how to measure.
        watcher: progress.
    """
    watcher = watcher or _Nobody()
    outcome = Outcome([])
    with _settings(options):
        try:
            for case in cases:
                entered = contestants_of(case, contestants, options)
                watcher.started(case, entered)
                _run_case(case, entered, options, watcher, outcome.records)
                watcher.finished(case)
        except KeyboardInterrupt:
            outcome.interrupted = True
    return outcome


@contextlib.contextmanager
def _settings(options: Options) -> Iterator[None]:
    """Threads, and float32 that means float32 (cuDNN would round convolutions to TF32)."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def _run_case(
    case: Case,
    contestants: Sequence[Contestant],
    options: Options,
    watcher: Watcher,
    records: list[Record],
) -> None:
    watcher.stage("reference in float64")
    problem = case.build(options.device, options.dtype)
    common = {
        **{"case": case.name, "penalty": case.penalty, "kind": case.kind},
        **{"suite": " ".join(case.suites), "activation": case.activation, "phase": case.phase},
        **{"device": options.device.type, "dtype": options.dtype_name},
        **versions(options.device.type),
    }

    def new_record(contestant: Contestant) -> Record:
        return Record(
            contestant=contestant.name,
            status="ok",
            threads=options.threads,
            **common,  # type: ignore[arg-type]
        )

    try:
        gate = open_gate(problem, options.dtype)
    except Exception as error:
        for contestant in contestants:
            record = new_record(contestant)
            record.status, record.message = "failed", f"float64 reference: {_short(error)}"
            records.append(record)
        return

    mine: dict[str, Record] = {}
    prepared: dict[str, Prepared] = {}
    op = dispatch.OPS["act_stats" if case.penalty == "dreg" else "act"]
    with contextlib.ExitStack() as ends:
        for contestant in contestants:
            stage = "compiling" if contestant.compiles else "checking"
            watcher.stage(f"{contestant.name}: {stage}")
            record = mine[contestant.name] = new_record(contestant)
            if contestant.impl:
                record.impl = op.select(contestant.impl, options.device, options.dtype)
            ready = _admit(contestant, problem, gate, record)
            if ready is not None:
                ends.callback(ready.close)
                prepared[contestant.name] = ready
        if not prepared:
            records.extend(mine.values())
            return
        _measure(prepared, mine, problem, options, watcher, records)


def _measure(
    prepared: dict[str, Prepared],
    mine: dict[str, Record],
    problem: Problem,
    options: Options,
    watcher: Watcher,
    records: list[Record],
) -> None:
    """Time the contestants that passed and take their peak memory; add all records of the case."""
    steps: dict[str, Step] = {name: ready.step for name, ready in prepared.items()}
    if isinstance(problem, ElementwiseProblem):
        steps[COPY] = _copy_step(problem)
    samples = Samples()
    watcher.stage("timing " + ", ".join(prepared))
    try:
        interleave(
            *(steps, options.device),
            budget_s=options.budget_s,
            min_rounds=options.min_rounds,
            max_rounds=options.max_rounds,
            sample_s=options.sample_s,
            samples=samples,
        )
        watcher.stage("peak memory")
        for name, ready in prepared.items():
            ready.release()
            mine[name].peak_mb = peak_bytes(ready.step, options.device) / 1e6
            ready.release()
    except Exception as error:  # out of memory, say: the other cases still count
        for name in prepared:
            mine[name].status, mine[name].message = "failed", f"while timed: {_short(error)}"
        records.extend(mine.values())
        samples.seconds.clear()
    finally:
        if samples.n_rounds >= ENOUGH_ROUNDS or samples.n_rounds >= options.min_rounds:
            _fill_in(mine, prepared, samples, problem)
            records.extend(mine.values())


def _admit(contestant: Contestant, problem: Problem, gate: Gate, record: Record) -> Prepared | None:
    """Set a contestant up and let it through the gate, or say in its record why not."""
    device = torch.device(record.device)
    cache = _fresh_compile_cache(device) if contestant.compiles else contextlib.nullcontext()
    with contextlib.ExitStack() as refused:
        try:
            with cache:
                began = time.perf_counter()
                prepared = contestant.setup(problem)
                refused.callback(prepared.close)
                gradients = prepared.gradients()
                took = time.perf_counter() - began
            if contestant.compiles:
                record.compile_s = took
            record.rel_err, record.rel_err_limit = gate.error(contestant.name, gradients)
        except Exception as error:
            record.status, record.message = "failed", _short(error)
            return None
        if not record.rel_err <= record.rel_err_limit:
            record.status = "wrong"
            record.message = (
                f"relative error {record.rel_err:.2e} of its gradients, limit "
                f"{record.rel_err_limit:.2e}"
            )
            return None
        refused.pop_all()
        return prepared


def _short(error: Exception) -> str:
    """Last line of what a traceback would show, on one line."""
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def _fresh_compile_cache(device: torch.device) -> Iterator[None]:
    """Compile time without what an earlier run left on disk, and without torch's own start-up."""
    from torch._inductor.utils import fresh_cache

    _start_compiler(device)
    with fresh_cache():
        yield


@functools.cache
def _start_compiler(device: torch.device) -> None:
    """A first, trivial torch.compile: it imports the compiler and probes the processor."""
    torch.compile(torch.sin, fullgraph=True)(torch.ones(8, device=device))


def _copy_step(problem: ElementwiseProblem) -> Callable[[], object]:
    """Copies of the op's buffers in turn, into memory allocated like the op's own results."""
    turn = itertools.cycle(problem.z)
    return lambda: next(turn).clone()


def _fill_in(
    records: dict[str, Record],
    prepared: dict[str, Prepared],
    samples: Samples,
    problem: Problem,
) -> None:
    for name in prepared:
        record = records[name]
        record.n_rounds = samples.n_rounds
        record.p20_ms, record.median_ms, record.p80_ms = samples.quantiles_ms(name)
    medians = {name: records[name].median_ms for name in prepared}
    plain, eager = medians.get("plain"), medians.get("eager")
    for name, median in medians.items():
        record = records[name]
        assert median is not None
        record.overhead = median / plain if plain else None
        # the plain step computes no penalty: it is not a faster eager
        record.vs_eager = eager / median if eager and name != "plain" else None
        if isinstance(problem, ElementwiseProblem):
            tensor = problem.z[0]
            copied = 2 * tensor.numel() * tensor.element_size()
            record.copy_gbps = copied / samples.quantiles_ms(COPY)[1] / 1e6
            # a plain contestant is the forward kernel, whatever the phase
            moved = copied if name == "plain" else problem.bytes_moved
            record.gbps = moved / median / 1e6
            record.pct_copy = 100 * record.gbps / record.copy_gbps
