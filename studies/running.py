"""Run what is missing of an experiment, on the cores of this machine or on a cluster."""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from studies.experiment import Experiment
from studies.records import Record, Records, commit, here
from studies.settings import Metrics, Setting

# A worker with several threads would share the generators of torch among its runs.
_ONE_RUN = threading.Lock()


def run_missing(
    experiments: Sequence[tuple[Experiment, Records]],
    *,
    jobs: int = -1,
    backend: str = "loky",
    scheduler: str | None = None,
    again: bool = False,
    console: Console | None = None,
) -> int:
    """Run each setting that has no record, append a record for each, and return their number.

    A run that raises, or whose process dies, gets a record with the reason in the column ``error``.
    With ``jobs=1`` the runs are in this process, and what kills it ends the study.

    Arguments:
        experiments: The experiments, with the records that each is appended to. Of a shard ``i`` of
            ``n``, every n-th setting is run.
        jobs: The number of processes; −1 is one for each core. Each uses one thread.
        backend: A backend of joblib, ``"loky"`` or ``"dask"``.
        scheduler: The address of the scheduler of a Dask cluster, for ``"dask"``.
        again: Also run the settings whose record has an error.
    """
    made = {"commit": commit()}
    with _cluster(backend, scheduler) as deaths, _progress(console) as progress:
        bars = []
        for experiment, records in experiments:
            i, n = records.shard
            mine = list(experiment.keys.items())[i - 1 :: n]
            done = records.keys(failed=not again)
            todo = [(key, setting) for key, setting in mine if key not in done]
            bar = progress.add_task(experiment.name, total=len(mine), failed="")
            progress.advance(bar, len(mine) - len(todo))
            bars.append((experiment, records, bar, todo))
        for experiment, records, bar, todo in bars:
            failed = 0
            run = partial(attempt, experiment.run, extra=dict(experiment.extra))
            with records.writing():
                for outcome in _outcomes(run, todo, jobs, experiment.alone, deaths):
                    records.append(_record(experiment, outcome, made))
                    failed += bool(outcome.error)
                    progress.update(bar, advance=1, failed=f"{failed} failed" if failed else "")
        return sum(len(todo) for *_, todo in bars)


class Outcome(NamedTuple):
    """What a run returned, how long it took, and why it failed if it did."""

    key: str
    metrics: Metrics
    seconds: float
    error: str
    where: Record


def attempt(
    run: Callable[..., Metrics], key: str, setting: Setting, extra: dict[str, Any]
) -> Outcome:
    """Seed all generators, run, and return the outcome."""
    with _ONE_RUN:
        torch.set_num_threads(1)
        random.seed(setting.seed)
        np.random.seed(setting.seed)
        torch.manual_seed(setting.seed)
        metrics: Metrics = {}
        error = ""
        start = time.perf_counter()
        try:
            metrics = run(setting, **extra)
        except Exception as exception:
            error = " ".join(f"{type(exception).__name__}: {exception}".split())
        return Outcome(key, metrics, round(time.perf_counter() - start, 3), error, here())


def _record(experiment: Experiment, outcome: Outcome, made: Record) -> Record:
    setting = asdict(experiment.keys[outcome.key])
    result = {"seconds": outcome.seconds, "error": outcome.error, **made, **outcome.where}
    taken = {"key", *setting, *result}.intersection(outcome.metrics)
    if taken:
        raise ValueError(
            f"the metric {min(taken)!r} of {experiment.name} has the name of another column of the "
            "records: rename it"
        )
    return {"key": outcome.key, **setting, **outcome.metrics, **result}


def _outcomes(
    run: Callable[..., Outcome],
    todo: list[tuple[str, Setting]],
    jobs: int,
    one_at_a_time: bool,
    deaths: tuple[type[BaseException], ...],
) -> Iterator[Outcome]:
    """The outcomes of all settings, as they finish.

    If a process dies, the runs that may have been in it are repeated one at a time. The one that
    kills its process again has an outcome that says so.
    """
    left = dict(todo)
    suspects = 0
    while left:
        batch = list(left.items())[: 1 if suspects else None]
        suspects = max(suspects - 1, 0)
        alone = one_at_a_time or len(batch) == 1
        parallel = joblib.Parallel(
            n_jobs=2 if alone and jobs != 1 else jobs,  # with 1 joblib runs it in this process
            pre_dispatch=1 if alone else "2 * n_jobs",
            batch_size=1,
            return_as="generator_unordered",
        )
        try:
            for outcome in parallel(joblib.delayed(run)(*item) for item in batch):
                del left[outcome.key]
                yield outcome
        except deaths:
            if len(batch) > 1:
                # Without batches, joblib hands over at most two runs for each process in advance.
                suspects = 3 * joblib.effective_n_jobs(jobs)
                continue
            key = batch[0][0]
            del left[key]
            reason = "the process died: out of memory, or a fault in compiled code"
            yield Outcome(key, {}, math.nan, reason, here())


@contextlib.contextmanager
def _cluster(backend: str, scheduler: str | None) -> Iterator[tuple[type[BaseException], ...]]:
    """The processes to run in, and the exceptions that joblib raises if one of them dies."""
    if backend == "dask":
        from dask.distributed import Client, KilledWorker

        with Client(scheduler), joblib.parallel_config(backend="dask"):
            yield (KilledWorker,)
    else:
        with joblib.parallel_config(backend=backend):
            yield (TerminatedWorkerError,)


def _progress(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[red]{task.fields[failed]}"),
        console=console,
        speed_estimate_period=300,  # runs differ in length; 30 s, the default, would jump
    )
