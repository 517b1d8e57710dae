"""The commands of ``fastjac``: ``info``, ``check`` and ``bench``.

The exit code is 0, or

- 1 if a check missed, or a benchmark contestant was wrong, failed or became slower;
- 2 for bad arguments, or if there was nothing to check or to compare;
- 130 after Ctrl-C; what was finished is reported and written.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
import typer
from rich.console import Console
from rich.text import Text

from fastjac.bench import compare, plots, records, report
from fastjac.bench.cases import Case, select_cases
from fastjac.bench.contestants import Contestant, contestants_of, left_out, select_contestants
from fastjac.bench.measure import Options, available_cores, busy
from fastjac.bench.records import Record
from fastjac.bench.runner import Outcome, run
from fastjac.cli import check as checks
from fastjac.cli import info as information

app = typer.Typer(
    name="fastjac",
    help="Fused Jacobian and gradient-norm regularisation for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

T = TypeVar("T")
Names = list[str] | None
JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write JSON to this file; - is standard output."),
]


def make_console(json_file: str | None) -> Console:
    """Standard output, or standard error if the JSON goes to standard output.

    Tables are 140 characters wide if the output is not a terminal.
    """
    console = Console(stderr=json_file == "-")
    return console if console.is_terminal else Console(stderr=json_file == "-", width=140)


def write_json(value: object, target: str) -> None:
    """Write a value, or a text that is JSON, to a file, or to standard output if it is ``-``."""
    text = value if isinstance(value, str) else json.dumps(value, indent=1, default=str)
    if target == "-":
        typer.echo(text)
    else:
        writing(Path(target), lambda: Path(target).write_text(text + "\n"))


def writing(path: Path, write: Callable[[], T]) -> T:
    """``write()``; if it fails, the command ends with a usage error that names the path."""
    try:
        return write()
    except OSError as error:
        usage_error(f"cannot write {path}: {error.strerror or error}")


def usage_error(error: object) -> NoReturn:
    """Print the error and exit with 2."""
    message = Text.assemble(("error: ", "red"), str(error))  # brackets in it are not markup
    Console(stderr=True).print(message, soft_wrap=True)
    raise typer.Exit(2)


@app.command()
def info(json_file: JsonOption = None) -> None:
    """Show versions, how the kernels were built, and which implementations can run here."""
    if json_file is None:
        information.render()
    else:
        write_json(information.collect(), json_file)


@app.command()
def check(
    op: Annotated[Names, typer.Option(metavar="NAME", help="Only this op.")] = None,
    impl: Annotated[Names, typer.Option(metavar="NAME", help="Only this implementation.")] = None,
    dtype: Annotated[Names, typer.Option(metavar="NAME", help="Only this dtype.")] = None,
    device: Annotated[Names, typer.Option(metavar="NAME", help="Only this device.")] = None,
    example: Annotated[
        Names, typer.Option(metavar="LABEL", help="Only this example, such as 'gelu [N, C]'.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare every fused op with its float64 reference on this machine; exit 1 on a miss.

    Each option may be repeated.
    """
    try:
        found = checks.run(op=op, impl=impl, dtype=dtype, device=device, example=example)
    except ValueError as error:
        usage_error(error)
    checks.render(found, make_console(json_file))
    if json_file is not None:
        write_json(found, json_file)
    verdicts = [record["ok"] for record in found if record["ok"] is not None]
    if not verdicts:
        usage_error("nothing was checked: no combination that these options leave can run here")
    if not all(verdicts):
        raise typer.Exit(1)


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


@app.command()
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="The quick suite: under three minutes on two cores.")
    ] = False,
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
            min=1, help="CPU threads; the default is all available cores. The suite host has one."
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="The device to run on.")] = Device.cpu,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of networks and data.")] = Dtype.float32,
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
        cases, contestants = _selection(case, suite, contestant, options)
        if csv_file is not None:
            records.check_csv(csv_file)
    except (ValueError, RuntimeError) as error:
        usage_error(error)
    if len(loaded) > 1:
        return _compare(loaded, plot, console)
    if list_only:
        return report.render_list(cases, contestants, options, console)
    outcome = Outcome(loaded[0]) if loaded else _run(cases, contestants, options, csv_file)
    report.render(outcome.records, console)
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


def _options(quick: bool, threads: int | None, device: Device, dtype: Dtype) -> Options:
    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu.")
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

    def save(found: Sequence[Record]) -> None:
        if csv_file is not None and found:
            writing(csv_file, lambda: records.append_csv(found, csv_file))

    console = Console(stderr=True)
    for line in left_out(cases, contestants, options):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    warning = busy(options.threads)
    if warning is not None:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    with report.ProgressBar(cases, contestants, options, console) as bar:
        return run(cases, contestants, options, bar, save)
