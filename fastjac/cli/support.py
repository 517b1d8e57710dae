"""What is written from the registries: ``python -m fastjac.cli.support`` in the project's folder.

The support table of ``README.md``, and ``fastjac/penalties/__init__.pyi``, from which type checkers
and editors know the names that the package finds when it is imported.
"""

from __future__ import annotations

import re
from pathlib import Path

import fastjac.penalties
from fastjac.activations import TABLE
from fastjac.ops.dispatch import FLOAT_DTYPES, OPS
from fastjac.penalties import (
    PENALTIES,
    Example,
    InputPenalty,
    Penalty,
    PenaltySpec,
    Pullback,
)
from fastjac.penalty import ModelPenalty

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _table(*rows: tuple[str, ...]) -> list[str]:
    head, *body = rows
    return [_row(*head), "|" + " --- |" * len(head), *(_row(*cells) for cells in body)]


def _calls(cls: type[Penalty]) -> str:
    """The call forms of a penalty, with what it takes after the first two arguments."""
    _, _, *more = cls.call_parameters()
    positional = [p for p in more if p.kind is not p.KEYWORD_ONLY]
    rest = "".join(", …" if p.kind is p.VAR_POSITIONAL else f", {p.name}" for p in positional)
    forms = ["model, x"] if issubclass(cls, ModelPenalty) else ["x, output", "model, x"]
    return ", ".join(f"`({form}{rest})`" for form in forms)


def markdown() -> str:
    """The tables of penalties, activations and fused ops, as they are registered."""
    penalties = [("penalty", "what it is", "called as", "source")]
    for name, spec in PENALTIES.items():
        doc = (spec.module.__doc__ or "").strip().splitlines()[0]
        title = f"`{spec.module.__name__}`, `{name}`"
        penalties.append((title, doc.replace("``", "`"), _calls(spec.module), spec.source))
    activations = [("activation", "torch's", "parameters", "`fuse` replaces")]
    for name, row in TABLE.items():
        params = ", ".join(f"`{k}={v:g}`" for k, v in row.params.items())
        kwargs = ", ".join(f'{k}="{v}"' for k, v in row.torch_kwargs.items())
        function = row.torch.removeprefix("fastjac.activations.")
        function += f"(…, {kwargs})" if kwargs else ""
        module = f"`nn.{row.module}{f'({kwargs})' if kwargs else ''}`" if row.module else "–"
        activations.append((f"`{name}`", f"`{function}`", params or "–", module))
    ops = [("op", "implementations, best first", "dtypes")]
    dtypes = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
    for name, op in OPS.items():
        ops.append((f"`{name}`", ", ".join(f"`{i}`" for i in op.implementations), dtypes))
    return "\n".join([*_table(*penalties), "", *_table(*activations), "", *_table(*ops)])


def update(text: str) -> str:
    """A README's text with what stands between the markers renewed."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the file has no {BEGIN} … {END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{markdown()}\n{END}", text)


def stub() -> str:
    """The text of ``fastjac/penalties/__init__.pyi``."""
    imports, functions = [], []
    for cls in (Example, InputPenalty, Penalty, PenaltySpec, Pullback):
        imports.append(f"from {cls.__module__} import {cls.__name__} as {cls.__name__}")
    for name, spec in PENALTIES.items():
        cls = spec.module
        imports.append(f"from {cls.__module__} import {cls.__name__} as {cls.__name__}")
        functions.append(f"{name}: Callable[..., Any]")
    return "\n".join(
        [
            "# Written by python -m fastjac.cli.support.",
            "from collections.abc import Callable",
            "from typing import Any",
            "",
            *sorted(imports),
            "",
            "__all__: list[str]",
            "PENALTIES: dict[str, PenaltySpec]",
            *functions,
            "",
        ]
    )


if __name__ == "__main__":
    readme = Path("README.md")
    readme.write_text(update(readme.read_text()))
    Path(fastjac.penalties.__file__).with_suffix(".pyi").write_text(stub())
