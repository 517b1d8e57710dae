"""The command ``fastjac bench``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from fastjac.bench import compare, plots, records, report, verdict
from fastjac.bench.cases import Case, select_cases
from fastjac.bench.contestants import Contestant, contestants_of, left_out, select_contestants
from fastjac.bench.measure import Options, available_cores, busy
from fastjac.bench.records import Record
from fastjac.bench.runner import Outcome, run
from fastjac.cli.console import JsonOption, Names, make_console, usage_error, write_json, writing
from fastjac.cli.own_model import Batch, bench_model

YOURS = "Your own model"


class Device(str, Enum):
    """The device of a run."""

    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, Enum):
    """The dtype of networks and data."""

    float32 = "float32"
    float64 = "float64"
    bfloat16 = "bfloat16"
    float16 = "float16"


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="The quick suite: under 90 seconds on two cores.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Your model instead of the suites. The function returns an nn.Module, or "
            "(model, x), or (model, x, target).",
            rich_help_panel=YOURS,
        ),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            "--input", metavar="SHAPE", help="A random batch: 128,784.", rich_help_panel=YOURS
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:K",
            help="Random targets: classes:10 (cross entropy) or values:3 (squared error). Without "
            "them the loss is the mean square of the output.",
            rich_help_panel=YOURS,
        ),
    ] = None,
    penalty: Annotated[
        Names,
        typer.Option(
            metavar="NAME",
            help="A penalty to time; may be repeated. The default is spectreg and dreg.",
            rich_help_panel=YOURS,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="The output in what the model returns: logits, or an index.",
            rich_help_panel=YOURS,
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="SUBMODULE",
            help="Differentiate with respect to the output of this submodule, such as an "
            "embedding, not the input.",
            rich_help_panel=YOURS,
        ),
    ] = None,
    case: Annotated[
        Names, typer.Option(metavar="NAME", help="Only this case; * matches; may be repeated.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only this suite; --list describes them.")
    ] = None,
    contestant: Annotated[
        Names,
        typer.Option(metavar="NAME", help="Only this contestant (and plain); may be repeated."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads; the default is all available cores, and 1 for the suite host."
        ),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="The device to run on; the default is cpu, or that of your model."),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="The dtype of networks and data; the default is float32, or that of your model."
        ),
    ] = None,
    json_file: JsonOption = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Add the records to this CSV file.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw PNG plots into this folder.")
    ] = None,
    list_only: Annotated[
        bool, typer.Option("--list", help="List cases and contestants, and run nothing.")
    ] = False,
    from_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Show and plot the records of this JSON or CSV file, and run nothing. If it is "
            "given twice, report what is faster or slower in the second file than in the first.",
        ),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Continue after a contestant with wrong gradients.")
    ] = False,
) -> None:
    """Time penalties and ops against plain, eager and compiled torch.

    With --model, the penalties are timed on your own model and batch:
    fastjac bench --model mymodule:make_model --input 128,784 --target classes:10

    The gradients of every contestant are first compared with a float64 reference. A contestant with
    wrong gradients is shown as WRONG and not timed. The run ends after its case, with exit code 1.

    --from OLD --from NEW exits with 1 if something of fastjac became slower beyond the noise.
    """
    console = make_console(json_file)
    try:
        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise RuntimeError('Plots need matplotlib: pip install "fastjac[bench]"')
        loaded = [records.load(file) for file in from_files or ()]
        if [] in loaded:
            raise ValueError("--from: the file holds no records.")
        options = replace(_options(quick, threads, device, dtype), keep_going=keep_going)
        if csv_file is not None:
            records.check_csv(csv_file)
        yours = (input_shape, target, penalty, output, at)
        if model is None and any(option is not None for option in yours):
            raise ValueError("--input, --target, --penalty, --output and --at belong to --model")
        if model is not None and (case or suite or list_only or loaded or plot):
            others = "--case, --suite, --list, --from and --plot"
            raise ValueError(f"--model times your model alone: leave out {others}")
        cases, contestants = _selection(case, suite, contestant, options)
    except (ValueError, RuntimeError) as error:
        usage_error(error)
    if model is not None:
        _warn_if_busy(options, Console(stderr=True))
        batch = Batch(input_shape, target, output, at, device is None, dtype is None)
        found = bench_model(model, batch, penalty, options, contestants, _appending(csv_file))
        found.render(console)
        if json_file is not None:
            write_json(records.to_json(found.records), json_file)
        if found.interrupted or found.bad:
            raise typer.Exit(130 if found.interrupted else 1)
        return None
    if len(loaded) > 1:
        return _compare(loaded, plot, console)
    if list_only:
        return report.render_list(cases, contestants, options, console)
    outcome = Outcome(loaded[0]) if loaded else _run(cases, contestants, options, csv_file)
    report.render(outcome.records, console)
    for mine in records.by_run(outcome.records).values():
        text = verdict.of_machine(mine)
        if text:
            text += " For your own model: fastjac bench --model MODULE:FUNCTION --input SHAPE"
            console.print(f"\n{text}", highlight=False, markup=False)
    if json_file is not None and not loaded:
        write_json(records.to_json(outcome.records), json_file)
    if plot is not None:
        for path in writing(plot, lambda: plots.draw(outcome.records, plot)):
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
    if loaded:
        return None
    if outcome.interrupted:
        console.print("The run was interrupted. The finished cases are shown.", style="yellow")
        raise typer.Exit(130)
    if outcome.stopped:
        last = outcome.records[-1].case
        console.print(f"stopped at {last}; --keep-going runs the rest", style="bold red")
    if outcome.bad:
        raise typer.Exit(1)


def _options(
    quick: bool, threads: int | None, device: Device | None, dtype: Dtype | None
) -> Options:
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu.")
    pace: dict[str, Any] = {"budget_s": 0.2, "max_rounds": 40, "min_rounds": 5} if quick else {}
    return Options(
        device=torch.device((device or Device.cpu).value),
        dtype=getattr(torch, (dtype or Dtype.float32).value),
        threads=threads or available_cores(),
        quick=quick,
        **pace,
    )


def _selection(
    names: Names, suite: str | None, contestant: Names, options: Options
) -> tuple[list[Case], list[Contestant]]:
    """The cases and contestants of a command line; ``--quick`` alone means the quick suite."""
    cases = select_cases(names or (), "quick" if options.quick and suite is None else suite)
    contestants = select_contestants(contestant or ())
    # A case for which only the implied plain step is left is not run.
    asked = set(contestant or (c.name for c in contestants))
    entered = [
        case
        for case in cases
        if asked & {c.name for c in contestants_of(case, contestants, options)}
    ]
    if not entered:
        what = f"--contestant {' '.join(contestant)}" if contestant else "--quick"
        lacks = "; ".join(left_out(cases, contestants, options))
        raise ValueError(
            f"{what}: no contestant is left for any of the chosen cases.{lacks and f' {lacks}.'}"
        )
    return entered, contestants


def _compare(loaded: list[list[Record]], plot: Path | None, console: Console) -> None:
    """Print the changes from the first file to the second."""
    if len(loaded) > 2 or plot is not None:
        usage_error("--from: give one file to show or plot, or two to compare")
    changes, alone = compare.compare(*loaded)
    compare.render(changes, alone, console)
    if not changes:
        usage_error("--from: no case of fastjac can be compared between the two files")
    if any(change.verdict == "slower" for change in changes):
        raise typer.Exit(1)


def _run(
    cases: list[Case], contestants: list[Contestant], options: Options, csv_file: Path | None
) -> Outcome:
    """Measure; the records of each case are added to the CSV file at once."""
    save = _appending(csv_file)
    console = Console(stderr=True)
    for line in left_out(cases, contestants, options):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    _warn_if_busy(options, console)
    with report.ProgressBar(cases, contestants, options, console) as bar:
        return run(cases, contestants, options, bar, save)


def _appending(csv_file: Path | None) -> Callable[[Sequence[Record]], None]:
    def save(found: Sequence[Record]) -> None:
        if csv_file is not None and found:
            writing(csv_file, lambda: records.append_csv(found, csv_file))

    return save


def _warn_if_busy(options: Options, console: Console) -> None:
    warning = busy(options.threads)
    if warning is not None:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
