"""Paints one panel of a picture: bars, dots below a ceiling, or lines along an axis.

Bars start at 0 on linear axes. A contestant has the same colour in every picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastjac.bench.cases import SCALING_BASE
from fastjac.bench.contestants import OTHER_COLOUR, all_contestants
from fastjac.bench.records import Record
from fastjac.bench.report import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {contestant.name: contestant.colour for contestant in all_contestants()}
INK, MUTED, GRID, CEILING = "#22262b", "#6a7079", "#e4e6e9", "#e6e8eb"
OURS = "fastjac"
#: The space between two groups of bars, in bars.
GAP = 0.9
#: The labels of the logarithmic axis of the scaling picture.
TICKS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
STYLE: Any = {
    **{"font.size": 9, "text.color": INK, "figure.dpi": 160, "legend.frameon": False},
    **{"axes.edgecolor": GRID, "axes.labelcolor": MUTED, "axes.axisbelow": True},
    **{"axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False},
    **{"axes.grid": True, "axes.grid.axis": "x", "grid.color": GRID},
    **{"xtick.color": MUTED, "ytick.color": INK, "xtick.bottom": False, "ytick.left": False},
}


class Mark(NamedTuple):
    """One contestant in one row of a picture.

    ``text`` stands beside it, ``ceiling`` is what its value is compared with, and ``plain`` is the
    plain record of the same case.
    """

    row: str
    contestant: str
    value: float
    text: str
    ceiling: float
    record: Record
    plain: Record | None


#: Row -> its contestants, in the order of the tables.
Rows = dict[str, list[str]]


def point(mark: Mark) -> dict[str, int]:
    """``"width=256 batch=128"`` as a dict; an axis that is not named is at the base point."""
    pairs = (part.split("=") for part in mark.record.axes.split())
    return SCALING_BASE | {axis: int(value) for axis, value in pairs}


def bars(ax: Axes, heading: str, marks: Sequence[Mark], rows: Rows) -> None:
    """A group of bars for each row, with a line at 1."""
    found = {(mark.row, mark.contestant): mark for mark in marks}
    position, ticks = 0.0, []
    for row, contestants in rows.items():
        ticks.append(position + (len(contestants) - 1) / 2)
        for contestant in contestants:
            mark = found.get((row, contestant))
            if mark is not None:
                ax.barh(position, mark.value, height=0.86, color=colour_of(contestant))
                _write(ax, mark.value, position, mark.text, contestant == OURS)
            position += 1
        position += GAP
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks(ticks, list(rows))
    ax.set_ylim(position - GAP - 0.4, -0.6)
    ax.set_xlim(0, 1.22 * max(1.0, *(mark.value for mark in marks)))


def dots(ax: Axes, heading: str, marks: Sequence[Mark], rows: Rows) -> None:
    """For each row a bar up to the ceiling and a dot for each contestant, ours in per cent."""
    longest = 0.0
    for y, row in enumerate(rows):
        mine = [mark for mark in marks if mark.row == row]
        if not mine:
            continue
        ceiling = mine[0].ceiling
        values = [mark.value for mark in mine]
        longest = max(longest, ceiling, *values)
        ax.barh(y, ceiling, height=0.7, color=CEILING)
        ax.plot([min(values), max(values)], [y, y], color=MUTED, linewidth=1.2, zorder=2)
        for mark in sorted(mine, key=lambda mark: mark.contestant == OURS):  # ours on top
            ours = mark.contestant == OURS
            ax.scatter(
                mark.value, y, s=46 if ours else 26, color=colour_of(mark.contestant), zorder=3
            )
            if ours:
                _write(ax, max(*values, ceiling), y, mark.text, ours)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1.16 * longest)


def lines(ax: Axes, heading: str, marks: Sequence[Mark], rows: Rows) -> None:
    """A line for each contestant along the axis that the heading names."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    cases = sorted({(point(mark)[heading], mark.row) for mark in marks})
    place_of = {row: k for k, (_, row) in enumerate(cases)}
    for contestant in in_order(marks):
        mine = sorted((place_of[m.row], m.value) for m in marks if m.contestant == contestant)
        width, size = (2.2, 5) if contestant == OURS else (1.4, 4)
        colour, above = colour_of(contestant), 3 if contestant == OURS else 2
        ax.plot(
            *zip(*mine, strict=True),
            "o-",
            color=colour,
            linewidth=width,
            markersize=size,
            zorder=above,
        )
    heights = [1.0, *(mark.value for mark in marks)]
    ax.axhline(1, color=INK, linewidth=1)
    ax.set_yscale("log")
    ax.set_ylim(0.9 * min(heights), 1.15 * max(heights))
    ax.yaxis.set_major_locator(FixedLocator(TICKS))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}×"))
    ax.grid(axis="y", color=GRID)
    plain = {mark.row: number(mark.plain.median_ms) if mark.plain else "" for mark in marks}
    ax.set_xticks(range(len(cases)), [f"{value}\n{plain[row]} ms" for value, row in cases])


def _write(ax: Axes, x: float, y: float, text: str, ours: bool) -> None:
    """Write at the end of a bar; the white ground keeps the grid out of the text."""
    weight, colour = ("bold", INK) if ours else ("normal", MUTED)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
    where: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "zorder": 4}
    ax.annotate(text, (x, y), fontsize=8, fontweight=weight, color=colour, bbox=ground, **where)


def colour_of(contestant: str) -> str:
    return COLOURS.get(contestant, OTHER_COLOUR)


def in_order(marks: Iterable[Mark]) -> list[str]:
    """The contestants in the order of the tables."""
    present = {mark.contestant for mark in marks}
    return [name for name in COLOURS if name in present] + sorted(present - COLOURS.keys())
