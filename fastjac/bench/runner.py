"""Runs cases: gate, warm-up, rounds, memory; returns records."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fastjac.bench.cases import Case
from fastjac.bench.ceilings import CEILING, ceiling_step, gemm_size
from fastjac.bench.contestants import Contestant
from fastjac.bench.gate import Gate, admit, open_gate, short
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.measure import Samples, Step, interleave, kernels, peak_bytes
from fastjac.bench.options import Options, contestants_of
from fastjac.bench.problems import OpProblem, Problem
from fastjac.bench.records import Record, versions
from fastjac.bench.steps import Prepared
from fastjac.ops import dispatch

#: told how far a run has come: the case and what is being done, "" when the case is finished
Watch = Callable[[Case, str], object]
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

    @property
    def bad(self) -> list[Record]:
        """Records of contestants that were wrong or failed."""
        return [record for record in self.records if record.status != "ok"]


def run(
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    options: Options,
    watch: Watch = lambda case, doing: None,
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
        watch: progress.
    """
    outcome = Outcome([])
    with settings(options):
        try:
            for case in cases:
                entered = contestants_of(case, contestants, options)
                _run_case(case, entered, options, functools.partial(watch, case), outcome.records)
                watch(case, "")
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
    watch: Callable[[str], object],
    records: list[Record],
) -> None:
    """Add the records of a case: none if it is interrupted before it has enough rounds."""
    watch("reference in float64")
    mine = {c.name: new_record(case, c, options) for c in contestants}
    try:
        problem = case.build(options.device, options.dtype)
        gate = open_gate(problem, options.dtype)
    except Exception as error:
        _fail(mine.values(), f"float64 reference: {short(error)}")
        records.extend(mine.values())
        return
    prepared: dict[str, Prepared] = {}
    samples = Samples()
    with contextlib.ExitStack() as ends:
        for contestant in contestants:
            watch(f"{contestant.name}: {'compiling' if contestant.compiles else 'checking'}")
            if contestant.compiles:
                ends.callback(torch.compiler.reset)  # graphs of this case, and its model with them
            ready = admit(contestant, problem, gate, mine[contestant.name])
            if ready is not None:
                ends.callback(ready.close)
                prepared[contestant.name] = ready
        timed = {name: mine[name] for name in prepared}
        try:
            if prepared:
                watch("timing " + ", ".join(prepared))
                _measure(prepared, timed, problem, options, samples)
        except KeyboardInterrupt:
            if samples.n_rounds >= min(ENOUGH_ROUNDS, options.min_rounds):
                _fill_in(timed, samples, problem, gate)
                records.extend(mine.values())
            raise
        except Exception as error:  # out of memory, say: the other cases still count
            _fail(timed.values(), f"while timed: {short(error)}")
        else:
            _fill_in(timed, samples, problem, gate)
        records.extend(mine.values())


def _fail(records: Iterable[Record], message: str) -> None:
    for record in records:
        record.status, record.message = "failed", message


def new_record(case: Case, contestant: Contestant, options: Options) -> Record:
    """A record without measurements."""
    op = dispatch.OPS[case.penalty if case.kind == "elementwise" else IDIOMS[case.penalty].op]
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
    prepared: Mapping[str, Prepared],
    records: Mapping[str, Record],
    problem: Problem,
    options: Options,
    samples: Samples,
) -> None:
    """Time the contestants that passed, beside the ceiling, and count their memory and kernels."""
    steps: dict[str, Step] = {name: ready.step for name, ready in prepared.items()}
    interleave(steps, options, samples, {CEILING: ceiling_step(problem)})
    for name, ready in prepared.items():
        ready.release()
        records[name].peak_mb = peak_bytes(ready.step, options.device) / 1e6
        records[name].kernels = kernels(ready.step, options.device)
        ready.release()


def _fill_in(records: Mapping[str, Record], samples: Samples, problem: Problem, gate: Gate) -> None:
    """What the samples say: times, and how much of the ceiling each contestant reaches."""
    if not records:
        return
    medians = {name: samples.quantiles_ms(name)[1] for name in (*records, CEILING)}
    plain, eager = medians.get("plain"), medians.get("eager")
    for name, record in records.items():
        record.n_rounds = samples.n_rounds
        record.p20_ms, record.median_ms, record.p80_ms = samples.quantiles_ms(name)
        if plain:
            record.overhead = medians[name] / plain
            record.ratio, record.ratio_se = samples.ratio(name, "plain")
        # the plain step computes no penalty: it is not a faster eager
        record.vs_eager = eager / medians[name] if eager and name != "plain" else None
        if isinstance(problem, OpProblem):
            copied = 2 * problem.z[0].numel() * problem.z[0].element_size()
            # a plain contestant is the forward kernel, whatever the phase
            moved = copied if name == "plain" else problem.bytes_moved
            record.copy_gbps = copied / medians[CEILING] / 1e6
            record.gbps = moved / medians[name] / 1e6
            record.pct_copy = 100 * record.gbps / record.copy_gbps
        else:
            n = gemm_size(problem.x.device)
            record.gflop = gate.plain_gflop if name == "plain" else gate.gflop
            record.gemm_gflops = 2e-6 * n**3 / medians[CEILING]
            record.pct_gemm = 1e5 * record.gflop / medians[name] / record.gemm_gflops
