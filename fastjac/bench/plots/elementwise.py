"""Picture of the activations: speed-up over torch's own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastjac.bench.plots.style import (
    COLOURS,
    GAP,
    OTHER,
    PHASE_TITLES,
    bar_label,
    compose,
    in_order,
)
from fastjac.bench.records import Record
from fastjac.bench.report import ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def speedup(figure: Figure, records: Sequence[Record]) -> bool:
    """Elementwise: eager's time over the contestant's, a panel per phase."""
    rows = [
        r
        for r in records
        if r.kind == "elementwise"
        and r.vs_eager is not None
        and r.contestant not in ("plain", "eager")
    ]
    if not rows:
        return False
    names = in_order(rows)
    phases = [p for p in PHASE_TITLES if any(r.phase == p for r in rows)]
    functions = list(dict.fromkeys(r.activation for r in rows))
    per_group = len(names) + GAP
    compose(
        *(figure, rows, names),
        title="Activations: speed-up over eager torch",
        note="right of the line is faster than torch's own kernels",
        width=1.6 + 3.1 * len(phases),
        body=0.7 + 0.165 * per_group * len(functions),
    )
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for ax, phase in zip(axes, phases, strict=True):
        _speedup_panel(ax, [r for r in rows if r.phase == phase], functions, names)
        ax.set_title(PHASE_TITLES[phase])
        ax.set_xlabel("eager time / time")
    return True


def _speedup_panel(
    ax: Axes, rows: Sequence[Record], functions: Sequence[str], names: Sequence[str]
) -> None:
    longest = max(r.vs_eager or 0.0 for r in rows)
    pitch = len(names) + GAP
    for record in rows:
        value = record.vs_eager or 0.0
        y = functions.index(record.activation) * pitch + names.index(record.contestant)
        ax.barh(y, value, height=0.86, color=COLOURS.get(record.contestant, OTHER))
        bar_label(ax, value, y, ratio(value), record.contestant == "fastjac")
    ax.axvline(1, color=COLOURS["eager"], linewidth=1.4)
    ax.set_yticks([k * pitch + (len(names) - 1) / 2 for k in range(len(functions))], functions)
    ax.set_ylim(len(functions) * pitch - 1.3, -0.8)
    ax.set_xlim(0, 1.22 * max(longest, 1.0))
