"""The commands of ``fastjac``: ``info``, ``check`` and ``bench``.

Exit codes: 0; 1 if a check missed, or if a benchmark contestant was wrong, failed or became slower;
2 for bad arguments, or if there was nothing to check or to compare; 130 after Ctrl-C, when what was
finished is reported and written.
"""

from __future__ import annotations

from typing import Annotated

import typer

from fastjac.cli import check as checks
from fastjac.cli import info as information
from fastjac.cli.bench import bench
from fastjac.cli.terminal import JsonOption, Names, make_console, usage_error, write_json

app = typer.Typer(
    name="fastjac",
    help="Fused Jacobian and gradient-norm regularisation for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    json_file: JsonOption = None,
) -> None:
    """Compare every fused op with its float64 reference on this machine; exit 1 on a miss.

    Each option may be repeated.
    """
    try:
        records = checks.run(op=op, impl=impl, dtype=dtype, device=device)
    except ValueError as error:
        usage_error(error)
    checks.render(records, make_console(json_file))
    if json_file is not None:
        write_json(records, json_file)
    verdicts = [record["ok"] for record in records if record["ok"] is not None]
    if not verdicts:
        usage_error("nothing was checked: no combination that these options leave can run here")
    if not all(verdicts):
        raise typer.Exit(1)


app.command()(bench)
