"""The ``fastjac`` command: ``info``, ``check``, ``bench``.

Exit codes: 0, 1 (a check missed, a benchmark contestant was wrong or failed, or became slower than
in the records compared with), 2 (bad arguments, nothing to compare), 130 (Ctrl-C; what was finished
is reported and written).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    import torch

    from fastjac.bench import Case, Contestant, Options, Outcome, Record

app = typer.Typer(
    name="fastjac",
    help="Fused Jacobian and gradient-norm regularisation for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write JSON there; - is standard output."),
]


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


def main() -> None:
    """Entry point of the ``fastjac`` command."""
    app()


@app.command()
def info(json_file: JsonOption = None) -> None:
    """Show versions, how the kernels were built, and which implementations can run here."""
    # by name: `fastjac.cli.info` may also be a function of the package
    module = importlib.import_module("fastjac.cli.info")
    if json_file is None:
        module.render(Console())
        return
    _write_json(module.collect(), json_file)


Names = list[str] | None


@app.command()
def check(
    op: Annotated[Names, typer.Option(metavar="NAME", help="Only this op.")] = None,
    impl: Annotated[Names, typer.Option(metavar="NAME", help="Only this implementation.")] = None,
    dtype: Annotated[Names, typer.Option(metavar="NAME", help="Only this dtype.")] = None,
    device: Annotated[Names, typer.Option(metavar="NAME", help="Only this device.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Compare every fused op with its float64 reference on this machine; exit 1 on a miss.

    Each option may be repeated.
    """
    module = importlib.import_module("fastjac.cli.check")
    console = _console(json_file)
    try:
        records = module.run(op=op, impl=impl, dtype=dtype, device=device)
    except ValueError as error:
        _usage_error(error)
    module.render(records, console)
    if json_file is not None:
        _write_json(records, json_file)
    verdicts = [record["ok"] for record in records if record["ok"] is not None]
    if not verdicts:
        _usage_error("nothing was checked: no combination that these options leave can run here")
    if not all(verdicts):
        raise typer.Exit(1)


@app.command()
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
    from_file: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Show, plot and compare the records of this JSON or CSV file, run nothing.",
        ),
    ] = None,
    compare_file: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="OLD",
            exists=True,
            dir_okay=False,
            help="Say what is faster or slower than in this JSON or CSV file, beyond the noise.",
        ),
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Go on after a contestant with wrong gradients.")
    ] = False,
) -> None:
    """Time penalties and ops against plain, eager and compiled torch.

    Every contestant's gradients are first compared with a float64 reference; one that misses is
    shown as WRONG, not timed, ends the run with its case and makes the exit code 1.

    --compare measures what seems changed a second time, and exits with 1 if something of ours is
    slower beyond the noise; with --from, two files are compared.
    """
    from fastjac.bench import plots, records, report

    console = _console(json_file)
    old = _load(compare_file)  # before the run, which may add to the same file
    try:
        if plot is not None:
            plots.require_matplotlib()
        if from_file is None:
            options = replace(_options(quick, threads, device, dtype), keep_going=keep_going)
            cases, contestants = _selection(case, suite, contestant, options)
        if csv_file is not None:
            records.check_csv(csv_file)
    except (ValueError, RuntimeError) as error:
        _usage_error(error)
    if from_file is not None:
        report.render(loaded := _load(from_file), console)
        _draw(loaded, plot, console)
        return _conclude(old, loaded, console)
    if list_only:
        report.render_list(cases, contestants, options, console)
        return
    outcome = _run(cases, contestants, options)
    _measure_again(old, outcome, cases, contestants, options)
    report.render(outcome.records, console)
    if json_file is not None:
        _write_text(records.to_json(outcome.records), json_file)
    if csv_file is not None:
        _writing(csv_file, lambda: records.append_csv(outcome.records, csv_file))
    _draw(outcome.records, plot, console)
    if outcome.interrupted:
        console.print("interrupted: what is shown was finished", style="yellow")
        raise typer.Exit(130)
    if outcome.stopped:
        last = outcome.records[-1].case
        console.print(f"stopped at {last}; --keep-going runs the rest", style="bold red")
    _conclude(old, outcome.records, console)
    if outcome.bad:
        raise typer.Exit(1)


def _options(quick: bool, threads: int | None, device: Device, dtype: Dtype) -> Options:
    import torch

    from fastjac.bench.options import Options, available_cores

    if device is Device.cuda and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    pace: dict[str, Any] = {"budget_s": 0.2, "max_rounds": 40, "min_rounds": 5} if quick else {}
    chosen: torch.dtype = getattr(torch, dtype.value)
    return Options(
        device=torch.device(device.value),
        dtype=chosen,
        threads=threads or available_cores(),
        quick=quick,
        **pace,
    )


def _selection(
    names: list[str] | None, suite: str | None, contestant: list[str] | None, options: Options
) -> tuple[list[Case], list[Contestant]]:
    """Cases and contestants of a command line; ``--quick`` alone means the quick suite."""
    from fastjac.bench import select_cases, select_contestants
    from fastjac.bench.options import contestants_of

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


def _load(path: Path | None) -> list[Record]:
    from fastjac.bench import records

    try:
        loaded = [] if path is None else records.load(path)
    except ValueError as error:
        _usage_error(error)
    if path is not None and not loaded:
        _usage_error(f"{path} holds no records")
    return loaded


def _conclude(old: list[Record], new: list[Record], console: Console) -> None:
    """Print the comparison, if there is one; exit where it finds something slower, or nothing."""
    if not old or not new:
        return
    from fastjac.bench import report_compare
    from fastjac.bench.compare import compare

    comparison = compare(old, new)
    report_compare.render(comparison, console)
    if not comparison.changes:
        _usage_error("--compare: nothing was compared: no case of ours is on both sides")
    if comparison.slower:
        raise typer.Exit(1)


def _measure_again(
    old: list[Record],
    outcome: Outcome,
    cases: list[Case],
    contestants: list[Contestant],
    options: Options,
) -> None:
    """Run the cases that seem changed once more, into the same outcome.

    A change is real if it comes back; if not, the spread of the two runs is part of the noise.
    """
    if not old or outcome.interrupted or outcome.stopped:
        return
    from fastjac.bench.compare import compare

    changed = {case for change in compare(old, outcome.records).beyond for case in change.cases}
    if changed:
        again = _run([case for case in cases if case.name in changed], contestants, options)
        outcome.add(again)


def _run(cases: list[Case], contestants: list[Contestant], options: Options) -> Outcome:
    from fastjac.bench import report, run
    from fastjac.bench.options import busy

    console = Console(stderr=True)
    warning = busy(options.threads)
    if warning is not None:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)
    with report.ProgressBar(cases, contestants, options, console) as bar:
        return run(cases, contestants, options, bar)


def _draw(records: list[Record], folder: Path | None, console: Console) -> None:
    if folder is None:
        return
    from fastjac.bench import plots

    for path in _writing(folder, lambda: plots.draw(records, folder)):
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


def _console(json_file: str | None) -> Console:
    """Standard output, unless the JSON goes there; wide tables where no terminal limits them."""
    console = Console(stderr=json_file == "-")
    return console if console.is_terminal else Console(stderr=json_file == "-", width=140)


def _write_json(value: object, target: str) -> None:
    _write_text(json.dumps(value, indent=1, default=str), target)


def _write_text(text: str, target: str) -> None:
    if target == "-":
        typer.echo(text)
    else:
        _writing(Path(target), lambda: Path(target).write_text(text + "\n"))


def _writing(path: Path, write: Callable[[], Any]) -> Any:
    try:
        return write()
    except OSError as error:
        _usage_error(f"cannot write {path}: {error.strerror or error}")


def _usage_error(error: object) -> NoReturn:
    message = Text.assemble(("error: ", "red"), str(error))  # brackets in it are not markup
    Console(stderr=True).print(message, soft_wrap=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    main()
