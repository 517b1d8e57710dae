"""Writes what follows from the registries: ``python -m fastjac.cli.support`` in the project folder.

These are the support table of ``README.md``, and the stubs ``__init__.pyi`` of the packages
``fastjac.penalties`` and ``fastjac.ops``, which tell type checkers and editors the names that a
package finds when it is imported.
"""

from __future__ import annotations

from pathlib import Path

from fastjac.activations import TABLE
from fastjac.ops.act_sizes import never
from fastjac.ops.dispatch import FLOAT_DTYPES, OPS
from fastjac.penalties import PENALTIES, Example, InputPenalty, Penalty, PenaltySpec, Pullback
from fastjac.penalties.registry import call_forms

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"


def _table(*rows: tuple[str, ...]) -> list[str]:
    head, *body = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows
    ]
    return [head, "|" + " --- |" * len(rows[0]), *body, ""]


def markdown() -> str:
    """The tables of penalties, activations and fused ops, as they are registered."""
    penalties = [("penalty", "what it is", "called as", "source")]
    for name, spec in PENALTIES.items():
        doc = (spec.module.__doc__ or "").strip().splitlines()[0]
        title = f"`{spec.module.__name__}`, `{name}`"
        calls = ", ".join(f"`({form})`" for form in call_forms(spec.module))
        penalties.append((title, doc.replace("``", "`"), calls, spec.source))
    activations = [("activation", "torch's", "parameters", "`fuse` replaces")]
    for name, row in TABLE.items():
        params = ", ".join(f"`{k}={v:g}`" for k, v in row.params.items())
        kwargs = ", ".join(f'{k}="{v}"' for k, v in row.torch_kwargs.items())
        function = row.torch.removeprefix("fastjac.activations.")
        function += f"(…, {kwargs})" if kwargs else ""
        module = f"`nn.{row.module}{f'({kwargs})' if kwargs else ''}`" if row.module else "–"
        module += " if `impl` is named" if row.module and never(name) else ""
        activations.append((f"`{name}`", f"`{function}`", params or "–", module))
    ops = [("op", "implementations, best first", "dtypes")]
    dtypes = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
    for name, op in OPS.items():
        ops.append((f"`{name}`", ", ".join(f"`{i}`" for i in op.implementations), dtypes))
    return "\n".join([*_table(*penalties), *_table(*activations), *_table(*ops)]).rstrip()


def update(text: str) -> str:
    """The text of a README with the tables between the markers renewed."""
    begin, end = text.index(BEGIN), text.index(END)
    return f"{text[:begin]}{BEGIN}\n{markdown()}\n{text[end:]}"


def stubs() -> dict[str, str]:
    """The text of the stub of each package, by the folder of the package."""
    ops = [f"from fastjac.ops.{name} import {name} as {name}" for name in OPS]
    classes = [Example, InputPenalty, Penalty, PenaltySpec, Pullback]
    classes += [spec.module for spec in PENALTIES.values()]
    penalties = [f"from {c.__module__} import {c.__name__} as {c.__name__}" for c in classes]
    forms = ["PENALTIES: dict[str, PenaltySpec]", *(f"{n}: Callable[..., Any]" for n in PENALTIES)]
    head = "# Written by python -m fastjac.cli.support."
    typing = ["from collections.abc import Callable", "from typing import Any", ""]
    return {
        "ops": "\n".join([head, *sorted(ops), "", "__all__: list[str]", ""]),
        "penalties": "\n".join(
            [head, *typing, *sorted(penalties), "", "__all__: list[str]", *forms, ""]
        ),
    }


if __name__ == "__main__":
    readme = Path("README.md")
    readme.write_text(update(readme.read_text()))
    for package, text in stubs().items():
        Path("fastjac", package, "__init__.pyi").write_text(text)
