"""``fastjac bench``: the options of the benchmark, and where its records go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from fastjac.bench import (
    Case,
    Contestant,
    Options,
    Outcome,
    Record,
    compare,
    plots,
    records,
    report,
    run,
    select_cases,
    select_contestants,
)
from fastjac.bench.options import available_cores, busy, contestants_of
from fastjac.cli.terminal import JsonOption, Names, make_console, usage_error, write_text, writing


class Device(str, Enum):
    """Where the benchmark runs."""

    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """What the benchmark computes in."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="The quick suite: under three minutes on two cores.")
    ] = False,
    case: Annotated[
        Names,
        typer.Option(metavar="NAME", help="Only this case; * matches; may be repeated."),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this suite; --list describes them.")
    ] = None,
    contestant: Annotated[
        Names,
        typer.Option(metavar="NAME", help="Only this contestant (and plain); may be repeated."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default all available cores.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to run.")] = Device.cpu,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of networks and data.")] = Dtype.float32,
    json_file: JsonOption = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Add the records to this CSV file."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw PNG plots into this folder.")
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="List cases and contestants, run nothing.")
    ] = False,
    from_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Show and plot the records of this JSON or CSV file, run nothing. Given twice, "
            "say what is faster or slower in the second file than in the first.",
        ),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on after a contestant with wrong gradients.")
    ] = False,
) -> None:
    """Time penalties and ops against plain, eager and compiled torch.

    Every contestant's gradients are first compared with a float64 reference; one that misses is
    shown as WRONG, not timed, ends the run with its case and makes the exit code 1.

    --from OLD --from NEW exits with 1 if something of ours became slower beyond the noise.
    """
    console = make_console(json_file)
    try:
        if plot is not None:
            plots.require_matplotlib()
        loaded = _load(from_files or ())
        options = replace(_options(quick, threads, device, dtype), keep_going=keep_going)
        cases, contestants = _selection(case, suite, contestant, options)
        if csv_file is not None:
            records.check_csv(csv_file)
    except (ValueError, RuntimeError) as error:
        usage_error(error)
    if loaded:
        return _show(loaded, plot, console)
    if list_only:
        report.render_list(cases, contestants, options, console)
        return
    outcome = _run(cases, contestants, options)
    report.render(outcome.records, console)
    if json_file is not None:
        write_text(records.to_json(outcome.records), json_file)
    if csv_file is not None:
        writing(csv_file, lambda: records.append_csv(outcome.records, csv_file))
    _draw(outcome.records, plot, console)
    if outcome.interrupted:
        console.print("interrupted: what is shown was finished", style="yellow")
        raise typer.Exit(130)
    if outcome.stopped:
        last = outcome.records[-1].case
        console.print(f"stopped at {last}; --keep-going runs the rest", style="bold red")
    if outcome.bad:
        raise typer.Exit(1)


def _options(quick: bool, threads: int | None, device: Device, dtype: Dtype) -> Options:
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    pace: dict[str, Any] = {"budget_s": 0.2, "max_rounds": 40, "min_rounds": 5} if quick else {}
    return Options(
        device=torch.device(device.value),
        dtype=getattr(torch, dtype.value),
        threads=threads or available_cores(),
        quick=quick,
        **pace,
    )


def _selection(
    names: Names, suite: str | None, contestant: Names, options: Options
) -> tuple[list[Case], list[Contestant]]:
    """Cases and contestants of a command line; ``--quick`` alone means the quick suite."""
    if options.quick and suite is None:
        suite = "quick"
    cases = select_cases(names or (), suite)
    contestants = select_contestants(contestant or ())
    # a case in which only the implied plain step is left has nothing to say
    asked = set(contestant or (c.name for c in contestants))
    entered = [
        case
        for case in cases
        if asked & {c.name for c in contestants_of(case, contestants, options)}
    ]
    if not entered:
        what = f"--contestant {' '.join(contestant)}" if contestant else "--quick"
        raise ValueError(f"{what}: no contestant is left for any of the chosen cases")
    return entered, contestants


def _load(files: Sequence[Path]) -> list[list[Record]]:
    """The records of each file that ``--from`` names."""
    loaded = [records.load(file) for file in files]
    for file, found in zip(files, loaded, strict=True):
        if not found:
            raise ValueError(f"{file} holds no records")
    return loaded


def _show(loaded: list[list[Record]], plot: Path | None, console: Console) -> None:
    """The records of one file, or the changes from the first file to the second."""
    if len(loaded) == 1:
        report.render(loaded[0], console)
        return _draw(loaded[0], plot, console)
    if len(loaded) > 2 or plot is not None:
        usage_error("--from: give one file to show or plot, or two to compare")
    comparison = compare.compare(*loaded)
    compare.render(comparison, console)
    if not comparison.changes:
        usage_error("--from: no case of ours can be compared between the two files")
    if any(change.verdict == "slower" for change in comparison.changes):
        raise typer.Exit(1)


def _run(cases: list[Case], contestants: list[Contestant], options: Options) -> Outcome:
    console = Console(stderr=True)
    warning = busy(options.threads)
    if warning is not None:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    with report.ProgressBar(cases, contestants, options, console) as bar:
        return run(cases, contestants, options, bar)


def _draw(drawn: Sequence[Record], folder: Path | None, console: Console) -> None:
    if folder is None:
        return
    for path in writing(folder, lambda: plots.draw(drawn, folder)):
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
