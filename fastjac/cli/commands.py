"""The commands of ``fastjac``: ``info``, ``check`` and ``bench``.

The exit code is 0, or

- 1 if a check missed, or a benchmark contestant was wrong, failed or became slower;
- 2 for bad arguments, or if there was nothing to check or to compare;
- 130 after Ctrl-C; what was finished is reported and written.
"""

from __future__ import annotations

from typing import Annotated

import typer

import fastjac
from fastjac.cli import check as checks
from fastjac.cli import info as information
from fastjac.cli.bench import bench
from fastjac.cli.console import JsonOption, Names, make_console, usage_error, write_json

app = typer.Typer(
    name="fastjac",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastjac {fastjac.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Fused Jacobian and gradient-norm regularisation for PyTorch."""


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


app.command()(bench)
