"""What the commands share: where they print and write, and how they refuse an argument."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.text import Text

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
