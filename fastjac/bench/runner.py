"""Runs cases: gate, warm-up, rounds, memory; returns records."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fastjac.bench.cases import Case
from fastjac.bench.contestants import Contestant, contestants_of
from fastjac.bench.gate import Gate, admit, open_gate, short
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.measure import (
    Options,
    Samples,
    interleave,
    keep_memory,
    launches,
    peak_bytes,
)
from fastjac.bench.problems import OpProblem, Problem
from fastjac.bench.records import Record, versions
from fastjac.bench.steps import Prepared
from fastjac.ops import dispatch

#: Called with a case and what is being done; an empty text says that the case is finished.
Watch = Callable[[Case, str], object]
#: An interrupted case with fewer rounds is dropped.
ENOUGH_ROUNDS = 3
#: The name under which the ceiling is sampled.
CEILING = "ceiling"


@dataclass
class Outcome:
    """The records of a run, and what ended it early.

    Attributes:
        records: One for each contestant and case.
        interrupted: Ctrl-C ended the run.
        stopped: A contestant with wrong gradients ended the run after its case.
    """

    records: list[Record]
    interrupted: bool = False
    stopped: bool = False

    @property
    def bad(self) -> list[Record]:
        """The records of contestants that were wrong or failed."""
        return [record for record in self.records if record.status != "ok"]


def run(
    cases: Sequence[Case],
    contestants: Sequence[Contestant],
    options: Options,
    watch: Watch = lambda case, doing: None,
    save: Callable[[Sequence[Record]], object] = lambda records: None,
) -> Outcome:
    """Measure the contestants on the cases. ``save`` gets the records of a case when it ends.

    A contestant whose gradients miss the gate gets a ``"wrong"`` record and is not timed. The run
    ends after its case, unless ``options.keep_going``. One that raises gets a ``"failed"`` record.
    Ctrl-C ends the run and keeps the finished cases, and the current one if it has three rounds.
    """
    outcome = Outcome([])
    try:
        for case in cases:
            entered = contestants_of(case, contestants, options)
            before = len(outcome.records)
            mine = replace(options, threads=case.threads or options.threads)
            try:
                with settings(mine):
                    _run_case(
                        *(case, entered, mine, functools.partial(watch, case), outcome.records)
                    )
            finally:
                save(outcome.records[before:])
            watch(case, "")
            if not options.keep_going and any(r.status == "wrong" for r in outcome.records):
                outcome.stopped = True
                break
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome


@contextlib.contextmanager
def settings(options: Options) -> Iterator[None]:
    """The number of threads, and no TF32, to which cuDNN would round float32 convolutions."""
    threads = torch.get_num_threads()
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    keep_memory()
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
    """Add the records of a case; none if it is interrupted before it has enough rounds."""
    watch("reference in float64")
    mine = {c.name: new_record(case, c, options) for c in contestants}
    try:
        problem = case.build(options.device, options.dtype)
        gate = open_gate(problem, options.dtype)
    except Exception as error:
        _fail(mine.values(), f"plain PyTorch, which all are compared with, raised {short(error)}")
        records.extend(mine.values())
        return
    samples = Samples()
    with contextlib.ExitStack() as ends:
        prepared: dict[Contestant, Prepared] = {}
        for contestant in contestants:
            watch(f"{contestant.name}: {'compiling' if contestant.compiler else 'checking'}")
            ready = admit(contestant, problem, gate, mine[contestant.name], ends)
            if ready is not None:
                prepared[contestant] = ready
        timed = {contestant.name: mine[contestant.name] for contestant in prepared}
        try:
            if prepared:
                watch("timing " + ", ".join(timed))
                _measure(prepared, timed, problem, options, samples)
                _fill_in(timed, samples, problem, gate)
        except KeyboardInterrupt:
            if samples.n_rounds >= min(ENOUGH_ROUNDS, options.min_rounds):
                _fill_in(timed, samples, problem, gate)
                records.extend(mine.values())
            raise
        except Exception as error:  # for example out of memory; the other cases still count
            _fail(timed.values(), f"while timed: {short(error)}")
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
        dtype=str(options.dtype).removeprefix("torch."),
        threads=options.threads,
        axes=case.axes,
        impl=op.select(contestant.impl, options.device, options.dtype) if contestant.impl else "",
        **versions(options.device.type),
    )


def _measure(
    prepared: Mapping[Contestant, Prepared],
    records: Mapping[str, Record],
    problem: Problem,
    options: Options,
    samples: Samples,
) -> None:
    """Time the admitted contestants beside the ceiling, then count their memory and launches.

    A host case has no ceiling: a large product would leave a cold cache, and its peak of memory
    says nothing. JAX has an allocator of its own.
    """
    host = any(record.kind == "host" for record in records.values())
    steps = {contestant.name: ready.step for contestant, ready in prepared.items()}
    interleave(steps, {} if host else {CEILING: problem.ceiling()}, options, samples)
    for contestant, ready in prepared.items():
        record = records[contestant.name]
        ready.release()
        if not host and contestant.compiler != "jax":
            record.peak_mb = peak_bytes(ready.step, options.device) / 1e6
        if not contestant.compiler:
            record.launches = launches(ready.step)
        ready.release()


def _fill_in(records: Mapping[str, Record], samples: Samples, problem: Problem, gate: Gate) -> None:
    """Fill in the times, and how much of the ceiling each contestant reaches."""
    medians = {name: samples.quantiles_ms(name)[1] for name in samples}
    plain, eager, ceiling = (medians.get(name) for name in ("plain", "eager", CEILING))
    for name, record in records.items():
        record.n_rounds = samples.n_rounds
        record.p20_ms, record.median_ms, record.p80_ms = samples.quantiles_ms(name)
        if plain:
            record.overhead = medians[name] / plain
            record.ratio, record.ratio_se = samples.ratio(name, "plain")
        # The plain step computes no penalty, so it is not a faster eager.
        record.vs_eager = eager / medians[name] if eager and name != "plain" else None
        if ceiling is None:
            continue
        if isinstance(problem, OpProblem):
            copied = 2 * problem.z[0].nbytes
            # plain is the forward kernel in every phase.
            moved = copied if name == "plain" else problem.bytes_moved
            record.copy_gbps = copied / ceiling / 1e6
            record.gbps = moved / medians[name] / 1e6
            record.pct_copy = 100 * record.gbps / record.copy_gbps
        else:
            record.gflop = gate.of(name).gflop
            record.gemm_gflops = 2e-6 * problem.gemm_size**3 / ceiling
            record.pct_gemm = 1e5 * record.gflop / medians[name] / record.gemm_gflops
