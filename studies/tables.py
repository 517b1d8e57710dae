"""Markdown tables of the reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from studies.experiment import Frames


def markdown(frame: pd.DataFrame, numbers: str = "g", *, corner: str = "") -> str:
    """A table with the names of the rows in the first column, whose heading is ``corner``.

    Arguments:
        numbers: The format of numbers; text stays as it is, and NaN is a dash.
    """

    def text(value: object) -> str:
        if isinstance(value, float):
            return "–" if value != value else format(value, numbers)
        return str(value)

    shown = frame.map(text)
    shown.index = [str(name) for name in frame.index]
    shown.index.name = corner or frame.index.name or ""
    aligned: Sequence[str] = ["left", *["right"] * shown.shape[1]]
    return str(shown.to_markdown(disable_numparse=True, colalign=aligned))


def runs(frames: Frames, _pictures: Path) -> str:
    """How many runs there were, where, and how long they took."""
    rows = {}
    for name, frame in frames.items():
        if not frame.empty:
            rows[name] = {
                "runs": len(frame),
                "failed": int(frame["error"].notna().sum()),
                "hours of one core": f"{frame['seconds'].sum() / 3600:.2f}",
                "commit": ", ".join(sorted(frame["commit"].astype(str).unique())),
                "processor": "; ".join(sorted(frame["machine"].unique())),
                "torch": ", ".join(sorted(frame["torch"].unique())),
            }
    return markdown(pd.DataFrame(rows).T, corner="experiment") if rows else ""
