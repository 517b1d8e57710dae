"""The page of the table, and its records as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from benchmarks.published_models.measure import TOLERANCE, Row
from fastjac.bench.records import versions

HEAD = """# Published models

What fastjac does with {n} published models, with random weights. This page is written by
`python -m benchmarks.published_models --to docs/MODELS.md`.

{summary}

How to read it. *fuse*: the activations of a run that `fastjac.fuse` replaces, of all activations in
the autograd graph; ReLU and other functions that torch computes as fast are not replaced. *DREG*:
the layers that DREG finds, of the pairs of layer and activation that the autograd graph has, and
the time of an attached training step divided by that of a plain one. *SpectReg*: the engine that
`engine="auto"` takes from the third call on; whether the gradient of the value is right, with its
error in float64 against central differences of the value along random directions in the parameters
and in x (✓ is at most {tolerance:g}); the time of a step divided by that of a plain one; and how
many times as long the eager idiom takes, `torch.autograd.grad(..., create_graph=True)`. Models are
in training mode, with their dropout. *MATH* marks models with attention that torch differentiates
twice under `SDPBackend.MATH` only, which the eager step then uses. A number in brackets is a
reason, listed below the table.

{machine}
"""

TABLE = """
| model | library | fuse | DREG | cost | SpectReg | right | cost | against eager |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


class Notes:
    """The reasons below the table; a cell refers to one by its number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> str:
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def page(rows: Sequence[Row], threads: int) -> str:
    notes, lines = Notes(), []
    for row in rows:
        lines.append("| " + " | ".join(_cells(row, notes)) + " |")
    about = versions("cpu")
    machine = (
        f"{about['machine']}, {threads} threads, float32; torch {about['torch']}, "
        f"{', '.join(_libraries(rows))}; fastjac at commit {about['commit']}."
    )
    head = HEAD.format(n=len(rows), summary=summary(rows), tolerance=TOLERANCE, machine=machine)
    listed = "\n".join(f"{i}. {text}" for i, text in enumerate(notes.texts, 1))
    return head + TABLE + "\n".join(lines) + ("\n\n" + listed if listed else "") + "\n"


def summary(rows: Sequence[Row]) -> str:
    every = sum(r.pairs is not None and r.dreg_found == r.pairs for r in rows)
    chain = sum(r.engine == "chain" for r in rows)
    right = sum(r.right for r in rows)
    return (
        f"DREG finds every pair of layer and activation in {every} of {len(rows)}. SpectReg runs "
        f"by the chain engine in {chain}, and its gradients are right in {right}."
    )


def _libraries(rows: Sequence[Row]) -> list[str]:
    from importlib.metadata import version

    names = sorted({row.library for row in rows} - {"torch"})
    return [f"{name} {version(name)}" for name in names]


def _cells(row: Row, notes: Notes) -> list[str]:
    def failed(*parts: str) -> str | None:
        for part in ("model", *parts):
            if part in row.failures:
                return notes(row.failures[part])
        return None

    def times(value: float | None, *parts: str) -> str:
        return failed(*parts, "plain", "time") or "–" if value is None else f"{value:.2f}×"

    fuse = failed("pairs", "fuse") or f"{row.fused} of {row.activations}"
    dreg = failed("pairs", "DREG") or f"{row.dreg_found} of {row.pairs}"
    if row.dreg_missing:
        dreg += f" {notes(row.dreg_missing)}"
    engine = failed("engine") or row.engine
    if row.reason:
        engine += f" {notes(row.reason)}"
    if row.error is None:
        right = failed("right") or "–"
    else:
        right = f"{'✓' if row.right else '✗'} {row.error:.0e}"
    against = times(row.speedup, "SpectReg time", "eager")
    if row.eager_attention and row.speedup is not None:
        against += f" {row.eager_attention}"
    return [
        row.model,
        row.library,
        fuse,
        dreg,
        times(row.dreg_cost, "DREG time"),
        engine,
        right,
        times(row.spectreg_cost, "SpectReg time"),
        against,
    ]


def to_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*vars(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {**vars(r), "failures": "; ".join(f"{k}: {v}" for k, v in r.failures.items())} for r in rows
    )
    return text.getvalue()
