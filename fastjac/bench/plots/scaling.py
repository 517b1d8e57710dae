"""Picture of the scaling suite: time over the plain step along four axes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastjac.bench.plots.style import COLOURS, GRID, INK, MUTED, OTHER, compose, in_order
from fastjac.bench.records import Record
from fastjac.bench.report import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = dict[str, int]
TICKS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)


def scaling(figure: Figure, records: Sequence[Record]) -> bool:
    """A panel per axis, a line per contestant; the other axes stay at the base point."""
    rows = [r for r in records if r.axes and r.overhead]
    names = [name for name in in_order(rows) if name != "plain"]
    if not names:
        return False
    points = {r.case: _point(r.axes) for r in rows}
    base = {
        axis: statistics.mode(p[axis] for p in points.values()) for axis in _shared_axes(points)
    }
    panels = {axis: _along(axis, points, base) for axis in base}
    panels = {axis: values for axis, values in panels.items() if len(values) > 1}
    if not panels:
        return False
    elsewhere = ", ".join(f"{axis} {value}" for axis, value in base.items())
    compose(
        *(figure, rows, names),
        title="SpectReg on an MLP: how the cost scales",
        note=f"time over the step without penalty, whose ms stand below; elsewhere {elsewhere}",
        width=8.6,
        body=0.2 + 2.7 * -(-len(panels) // 2),
    )
    grid = figure.subplots(-(-len(panels) // 2), min(2, len(panels)), squeeze=False)
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    for ax, (axis, values) in zip(grid.flat, panels.items(), strict=False):
        _panel(ax, rows, values, names)
        ax.set_title(axis)
    return True


def _point(axes: str) -> Point:
    """``"width=256 batch=128"`` as a dict."""
    pairs = (part.split("=") for part in axes.split())
    return {axis: int(value) for axis, value in pairs}


def _shared_axes(points: dict[str, Point]) -> list[str]:
    """The axes that every case has."""
    first, *others = points.values()
    return [axis for axis in first if all(axis in point for point in others)]


def _along(axis: str, points: dict[str, Point], base: Point) -> dict[str, int]:
    """Cases that differ from the base point on this axis alone, and the base, by their value."""
    found = {
        case: point[axis]
        for case, point in points.items()
        if all(point[other] == base[other] for other in base if other != axis)
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _panel(ax: Axes, rows: Sequence[Record], values: dict[str, int], names: Sequence[str]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    places = {case: k for k, case in enumerate(values)}
    highest = lowest = 1.0
    for name in names:
        mine = {r.case: r.overhead or 0.0 for r in rows if r.contestant == name}
        line = [(places[case], mine[case]) for case in values if case in mine]
        if not line:
            continue
        xs, ys = zip(*line, strict=True)
        ours = name == "fastjac"
        ax.plot(
            *(xs, ys),
            *("o-",),
            color=COLOURS.get(name, OTHER),
            linewidth=2.2 if ours else 1.4,
            markersize=5 if ours else 4,
            zorder=3 if ours else 2,
        )
        highest, lowest = max(highest, *ys), min(lowest, *ys)
    ax.axhline(1, color=INK, linewidth=1)
    ax.set_yscale("log")
    ax.set_ylim(0.9 * lowest, 1.15 * highest)
    ax.yaxis.set_major_locator(FixedLocator(TICKS))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
    ax.grid(axis="y", color=GRID)
    plain = {r.case: r.median_ms for r in rows if r.contestant == "plain"}
    labels = [f"{value}\n{number(plain.get(case))} ms" for case, value in values.items()]
    ax.set_xticks(list(places.values()), labels)
    ax.tick_params(axis="x", colors=MUTED)
