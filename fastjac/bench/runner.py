"""Runs cases: gate, warm-up, rounds, memory; returns records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fastjac.bench.cases import Case
from fastjac.bench.ceilings import COPY, GEMM, copy_step, gemm_size, gemm_step
from fastjac.bench.contestants import Contestant
from fastjac.bench.gate import Gate, admit, open_gate, short
from fastjac.bench.measure import Samples, Step, interleave, peak_bytes
from fastjac.bench.options import Nobody, Options, Watcher, contestants_of
from fastjac.bench.problems import ElementwiseProblem, Problem
from fastjac.bench.records import Record, versions
from fastjac.bench.steps import Prepared
from fastjac.ops import dispatch

#: rounds below which an interrupted case is dropped
ENOUGH_ROUNDS = 3


@dataclass
class Outcome:
    """Records of a run, and what ended it early.

    Attributes:
        records: one per contestant and case.
        interrupted: by Ctrl-C.
        stopped: after the case in which a contestant had wrong gradients.
    """

    records: list[Record]
    interrupted: bool = False
    stopped: bool = False

    def add(self, other: Outcome) -> None:
        """What a further run gave."""
        self.records += other.records
        self.interrupted |= other.interrupted
        self.stopped |= other.stopped

    @property
    def bad(self) -> list[Record]:
        """Records of contestants that were wrong or failed."""
        return [record for record in self.records if record.status != "ok"]


def run(
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    options: Options,
    watcher: Watcher | None = None,
) -> Outcome:
    """Measure the contestants on the cases.

    A contestant whose gradients miss the gate gets a ``"wrong"`` record, is not timed, and ends the
    run with its case, unless ``options.keep_going``; one that raises gets a ``"failed"`` record.
    Ctrl-C ends the run and keeps what is done: finished cases, and the current one from three
    rounds on.

    Args:
        cases: see :func:`fastjac.bench.cases.select_cases`.
        contestants: see :func:`fastjac.bench.contestants.select_contestants`.
        options: how to measure.
        watcher: progress.
    """
    watcher = watcher or Nobody()
    outcome = Outcome([])
    with settings(options):
        try:
            for case in cases:
                entered = contestants_of(case, contestants, options)
                watcher.started(case, entered)
                _run_case(case, entered, options, watcher, outcome.records)
                watcher.finished(case)
                if not options.keep_going and any(r.status == "wrong" for r in outcome.records):
                    outcome.stopped = True
                    break
        except KeyboardInterrupt:
            outcome.interrupted = True
    return outcome


@contextlib.contextmanager
def settings(options: Options) -> Iterator[None]:
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
    mine = {c.name: new_record(case, c, options) for c in contestants}
    try:
        problem = case.build(options.device, options.dtype)
        gate = open_gate(problem, options.dtype)
    except Exception as error:
        for record in mine.values():
            record.status, record.message = "failed", f"float64 reference: {short(error)}"
        records.extend(mine.values())
        return
    prepared: dict[str, Prepared] = {}
    with contextlib.ExitStack() as ends:
        for contestant in contestants:
            stage = "compiling" if contestant.compiles else "checking"
            watcher.stage(f"{contestant.name}: {stage}")
            if contestant.compiles:
                ends.callback(torch._dynamo.reset)  # graphs of this case, and its model with them
            ready = admit(contestant, problem, gate, mine[contestant.name])
            if ready is not None:
                ends.callback(ready.close)
                prepared[contestant.name] = ready
        if not prepared:
            records.extend(mine.values())
            return
        _measure(prepared, mine, problem, gate, options, watcher, records)


def new_record(case: Case, contestant: Contestant, options: Options) -> Record:
    """A record without measurements."""
    op = dispatch.OPS["act_stats" if case.penalty == "dreg" else "act"]
    return Record(
        case=case.name,
        penalty=case.penalty,
        kind=case.kind,
        suite=" ".join(case.suites),
        activation=case.activation,
        phase=case.phase,
        contestant=contestant.name,
        status="ok",
        device=options.device.type,
        dtype=options.dtype_name,
        threads=options.threads,
        axes=case.axes,
        impl=op.select(contestant.impl, options.device, options.dtype) if contestant.impl else "",
        **versions(options.device.type),
    )


def _measure(
    prepared: dict[str, Prepared],
    mine: dict[str, Record],
    problem: Problem,
    gate: Gate,
    options: Options,
    watcher: Watcher,
    records: list[Record],
) -> None:
    """Time the contestants that passed and take their peak memory; add all records of the case."""
    steps: dict[str, Step] = {name: ready.step for name, ready in prepared.items()}
    ceilings: dict[str, Step] = (
        {COPY: copy_step(problem)}
        if isinstance(problem, ElementwiseProblem)
        else {GEMM: gemm_step(problem)}
    )
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
            ceilings=ceilings,
        )
        watcher.stage("peak memory")
        for name, ready in prepared.items():
            ready.release()
            mine[name].peak_mb = peak_bytes(ready.step, options.device) / 1e6
            ready.release()
    except Exception as error:  # out of memory, say: the other cases still count
        for name in prepared:
            mine[name].status, mine[name].message = "failed", f"while timed: {short(error)}"
        records.extend(mine.values())
        samples.seconds.clear()
    finally:
        if samples.n_rounds >= ENOUGH_ROUNDS or samples.n_rounds >= options.min_rounds:
            timed = {name: mine[name] for name in prepared}
            _fill_in(timed, samples)
            if isinstance(problem, ElementwiseProblem):
                _fill_in_bandwidth(timed, samples, problem)
            else:
                _fill_in_products(timed, samples, problem.x.device, gate)
            records.extend(mine.values())


def _fill_in(records: dict[str, Record], samples: Samples) -> None:
    for name, record in records.items():
        record.n_rounds = samples.n_rounds
        record.p20_ms, record.median_ms, record.p80_ms = samples.quantiles_ms(name)
    medians = {name: samples.quantiles_ms(name)[1] for name in records}
    plain, eager = medians.get("plain"), medians.get("eager")
    for name, record in records.items():
        if plain:
            record.overhead = medians[name] / plain
            record.ratio, record.ratio_se = samples.ratio(name, "plain")
        # the plain step computes no penalty: it is not a faster eager
        record.vs_eager = eager / medians[name] if eager and name != "plain" else None


def _fill_in_bandwidth(
    records: dict[str, Record], samples: Samples, problem: ElementwiseProblem
) -> None:
    tensor = problem.z[0]
    copied = 2 * tensor.numel() * tensor.element_size()
    copy_gbps = copied / samples.quantiles_ms(COPY)[1] / 1e6
    for name, record in records.items():
        # a plain contestant is the forward kernel, whatever the phase
        moved = copied if name == "plain" else problem.bytes_moved
        record.copy_gbps = copy_gbps
        record.gbps = moved / samples.quantiles_ms(name)[1] / 1e6
        record.pct_copy = 100 * record.gbps / copy_gbps


def _fill_in_products(
    records: dict[str, Record], samples: Samples, device: torch.device, gate: Gate
) -> None:
    gemm_gflops = 2e-6 * gemm_size(device) ** 3 / samples.quantiles_ms(GEMM)[1]
    for name, record in records.items():
        record.gflop = gate.plain_gflop if name == "plain" else gate.gflop
        record.gemm_gflops = gemm_gflops
        record.pct_gemm = 1e5 * record.gflop / samples.quantiles_ms(name)[1] / gemm_gflops
