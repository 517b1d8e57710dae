"""Colours, frame, head and legend that all pictures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastjac.bench.contestants import all_contestants
from fastjac.bench.records import Record
from fastjac.bench.report import place

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: by contestant, in the order of tables and plots
COLOURS = {contestant.name: contestant.colour for contestant in all_contestants()}
OTHER = "#8a7f6a"
INK, MUTED, GRID = "#22262b", "#6a7079", "#e4e6e9"
#: the ground behind what is measured against a ceiling
CEILING = "#e6e8eb"
PHASE_TITLES = {"forward": "forward", "backward": "backward", "double": "double backward"}
#: heights in inches: a line of the note, a row of the legend, what stands below the axes
LINE, KEYS, ORIGIN = 0.16, 0.22, 0.26
#: between groups of bars, in bars
GAP = 0.9

STYLE: Any = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.bottom": False,
    "ytick.left": False,
    "legend.frameon": False,
    "figure.dpi": 160,
}


def where(records: Sequence[Record]) -> str:
    first = records[0]
    built = f"torch {first.torch}, fastjac {first.fastjac} {first.commit}".strip()
    return f"{place(first)}, {first.dtype}; {built}"


def in_order(records: Iterable[Record]) -> list[str]:
    """In the order of the colours."""
    present = {record.contestant for record in records}
    return [name for name in COLOURS if name in present] + sorted(present - COLOURS.keys())


def compose(
    figure: Figure,
    records: Sequence[Record],
    names: Sequence[str],
    *,
    title: str,
    note: str,
    width: float,
    body: float,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Size the figure and write what stands around the axes.

    Args:
        figure: gets title, note and legend above and the origin of the records below, all placed
            in inches, so that the height does not matter.
        records: those shown.
        names: contestants of the legend.
        title, note: the note may have several lines.
        width, body: inches; the body is what the axes get.
        extra: further entries of the legend: label to colour.
    """
    keys = _rows_of_keys(
        {name: COLOURS.get(name, OTHER) for name in names} | dict(extra or {}), width
    )
    below_note = 0.44 + LINE * (note.count("\n") + 1)
    top = below_note + KEYS * len(keys) + 0.13
    height = top + body + ORIGIN
    figure.set_size_inches(width, height)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, ORIGIN / height, 1, body / height), w_pad=0.1, h_pad=0.06)
    left = 0.12 / width
    figure.text(left, 1 - 0.26 / height, title, fontsize=13, fontweight="bold", va="center")
    figure.text(left, 1 - 0.43 / height, note, fontsize=9, color=MUTED, va="top")
    figure.text(left, 0.13 / height, where(records), fontsize=7.5, color=MUTED, va="center")
    for k, row in enumerate(keys):
        _legend(figure, row, 0.09 / width, 1 - (below_note + KEYS * k) / height)


def _rows_of_keys(colours: dict[str, str], width: float) -> list[dict[str, str]]:
    """The legend in as many rows as the width asks for."""
    rows: list[dict[str, str]] = [{}]
    used = 0.0
    for label, colour in colours.items():
        wanted = 0.42 + 0.075 * len(label)
        if used + wanted > width:
            rows.append({})
            used = 0.0
        rows[-1][label] = colour
        used += wanted
    return rows


def _legend(figure: Figure, colours: dict[str, str], x: float, y: float) -> None:
    """One square per entry, in a row whose upper left corner is at ``(x, y)``."""
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in colours.items()],
        loc="upper left",
        bbox_to_anchor=(x, y),
        bbox_transform=figure.transFigure,
        ncols=len(colours),
        columnspacing=1.4,
        handlelength=1.0,
        handleheight=1.0,
        borderaxespad=0.2,
    )


def bar_label(ax: Axes, x: float, y: float, text: str, ours: bool) -> None:
    """Value at the end of a bar; the white ground keeps grid and reference lines out of it."""
    ax.annotate(
        text,
        (x, y),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        fontweight="bold" if ours else "normal",
        color=INK if ours else MUTED,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        zorder=4,
    )
