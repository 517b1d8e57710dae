"""PNG pictures of records: :data:`PICTURES` declares six, and :func:`draw` draws them.

A picture has panels, and a panel has rows: a case or an activation each. Bars start at 0 on linear
axes. A contestant has the same colour in every picture.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastjac.bench.cases import SCALING_BASE
from fastjac.bench.contestants import OTHER_COLOUR, all_contestants
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.problems import PHASES
from fastjac.bench.records import Record
from fastjac.bench.report import number, place, ratio, versions_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    """One contestant in one row of a picture; ``plain`` is the plain record of the same case."""

    row: str
    contestant: str
    value: float
    record: Record
    plain: Record | None


Panels = dict[str, list[Mark]]
#: Row -> its contestants, in the order of the tables.
Rows = dict[str, list[str]]


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Attributes:
        kind: The kind of its records: ``"step"``, ``"elementwise"`` or ``"scaling"``.
        title, note, axis: Its texts; ``axis`` is the label of the x-axis.
        paint: Paints one panel.
        panels: Splits the marks into panels.
        value: ``(record, plain record of the case)`` -> the number shown; None leaves it out.
        shown: The measured quantity behind a ratio, as text.
        ceiling: What the value is compared with: the entry in the legend, and the column.
        without: The contestants that are left out.
        unit: The height in inches of a bar, of a row of dots, or of a panel of lines.
    """

    kind: str
    title: str
    note: str
    axis: str
    paint: Callable[[Axes, str, Sequence[Mark], Rows, Picture], None]
    panels: Callable[[Sequence[Mark]], Panels]
    value: Callable[[Record, Record | None], float | None]
    shown: Callable[[Record], str] | None = None
    ceiling: tuple[str, str] = ("", "")
    without: tuple[str, ...] = ("plain",)
    unit: float = 0.185

    def marks(self, records: Sequence[Record]) -> list[Mark]:
        """The marks of those records that the picture shows."""
        mine = [r for r in records if ("scaling" if r.axes else r.kind) == self.kind]
        plain = {r.case: r for r in mine if r.contestant == "plain"}
        marks = []
        for record in mine:
            own = plain.get(record.case)
            value = self.value(record, own)
            if value is not None and record.contestant not in self.without:
                row = record.activation or record.case
                if own is not None and self.shown is not None:
                    row += f"\nplain {self.shown(own)}"
                marks.append(Mark(row, record.contestant, value, record, own))
        return marks


def families(marks: Sequence[Mark]) -> Panels:
    """The layer-wise penalties, the others, and the rows of each that need a longer axis.

    A layer-wise penalty costs a few per cent of a step, an exact Jacobian ten steps.
    """
    headings = {
        "layer-wise": "layer-wise penalties",
        "input-jacobian": "penalties on the input Jacobian",
    }
    panels: Panels = {}
    for suite, heading in headings.items():
        mine = [m for m in marks if IDIOMS[m.record.penalty].suite == suite]
        longest: dict[str, float] = {}
        for mark in mine:
            longest[mark.row] = max(mark.value, longest.get(mark.row, 0.0))
        limit = 2.5 * statistics.median(longest.values()) if mine else 0.0
        panels[heading] = [m for m in mine if longest[m.row] <= limit]
        panels[f"{heading}, on a longer axis"] = [m for m in mine if longest[m.row] > limit]
    return {heading: part for heading, part in panels.items() if part}


def phases(marks: Sequence[Mark]) -> Panels:
    """One panel for each phase, side by side, with the same rows."""
    panels = {
        "double backward" if phase == "double" else phase: [
            m for m in marks if m.record.phase == phase
        ]
        for phase in PHASES
    }
    return {heading: part for heading, part in panels.items() if part}


def whole(marks: Sequence[Mark]) -> Panels:
    """A single panel."""
    return {"": list(marks)}


def axes_of_scaling(marks: Sequence[Mark]) -> Panels:
    """One panel for each axis: the cases that differ from the base point along it alone."""
    panels: Panels = {}
    for axis, base in SCALING_BASE.items():
        mine = [m for m in marks if {**_point(m), axis: base} == SCALING_BASE]
        if len({m.row for m in mine}) > 1:
            panels[axis] = mine
    return panels


def _point(mark: Mark) -> dict[str, int]:
    """``"width=256 batch=128"`` as a dict; an axis that is not named is at the base point."""
    pairs = (part.split("=") for part in mark.record.axes.split())
    return SCALING_BASE | {axis: int(value) for axis, value in pairs}


def bars(ax: Axes, heading: str, marks: Sequence[Mark], rows: Rows, picture: Picture) -> None:
    """A group of bars for each row, with a line at 1."""
    found = {(mark.row, mark.contestant): mark for mark in marks}
    position, ticks = 0.0, []
    for row, contestants in rows.items():
        ticks.append(position + (len(contestants) - 1) / 2)
        for contestant in contestants:
            mark = found.get((row, contestant))
            if mark is not None:
                ax.barh(position, mark.value, height=0.86, color=_colour(contestant))
                shown = "" if picture.shown is None else f"  {picture.shown(mark.record)}"
                _write(ax, mark.value, position, ratio(mark.value) + shown, contestant == OURS)
            position += 1
        position += GAP
    ax.axvline(1, color=INK, linewidth=1)
    ax.set_yticks(ticks, list(rows))
    ax.set_ylim(position - GAP - 0.4, -0.6)
    ax.set_xlim(0, 1.22 * max(1.0, *(mark.value for mark in marks)))


def dots(ax: Axes, heading: str, marks: Sequence[Mark], rows: Rows, picture: Picture) -> None:
    """For each row a bar up to the ceiling and a dot for each contestant, ours in per cent."""
    longest = 0.0
    for y, row in enumerate(rows):
        mine = [mark for mark in marks if mark.row == row]
        if not mine:
            continue
        ceiling = getattr(mine[0].record, picture.ceiling[1])
        values = [mark.value for mark in mine]
        longest = max(longest, ceiling, *values)
        ax.barh(y, ceiling, height=0.7, color=CEILING)
        ax.plot([min(values), max(values)], [y, y], color=MUTED, linewidth=1.2, zorder=2)
        for mark in sorted(mine, key=lambda mark: mark.contestant == OURS):  # ours on top
            ours = mark.contestant == OURS
            ax.scatter(
                mark.value, y, s=46 if ours else 26, color=_colour(mark.contestant), zorder=3
            )
            if ours:
                _write(ax, max(*values, ceiling), y, f"{100 * mark.value / ceiling:.0f}%", ours)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1.16 * longest)


def lines(ax: Axes, heading: str, marks: Sequence[Mark], rows: Rows, picture: Picture) -> None:
    """A line for each contestant along the axis that the heading names."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    cases = sorted({(_point(mark)[heading], mark.row) for mark in marks})
    place_of = {row: k for k, (_, row) in enumerate(cases)}
    for contestant in _in_order(marks):
        mine = sorted((place_of[m.row], m.value) for m in marks if m.contestant == contestant)
        width, size = (2.2, 5) if contestant == OURS else (1.4, 4)
        colour, above = _colour(contestant), 3 if contestant == OURS else 2
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


def _colour(contestant: str) -> str:
    return COLOURS.get(contestant, OTHER_COLOUR)


def _in_order(marks: Iterable[Mark]) -> list[str]:
    """The contestants in the order of the tables."""
    present = {mark.contestant for mark in marks}
    return [name for name in COLOURS if name in present] + sorted(present - COLOURS.keys())


def _overhead(record: Record, plain: Record | None) -> float | None:
    return record.overhead


def _memory(record: Record, plain: Record | None) -> float | None:
    return record.peak_mb / plain.peak_mb if record.peak_mb and plain and plain.peak_mb else None


def _rate(record: Record, plain: Record | None) -> float | None:
    return (record.pct_gemm or 0.0) * (record.gemm_gflops or 0.0) / 100 or None


PICTURES = {
    "overhead": Picture(
        "step",
        "Training step with a Jacobian penalty",
        "time over the same step without penalty (1×); shorter is better",
        "time / plain step",
        bars,
        families,
        _overhead,
        shown=lambda record: f"{number(record.median_ms)} ms",
    ),
    "scaling": Picture(
        "scaling",
        "SpectReg on an MLP: how the cost scales",
        "time over the step without penalty, whose ms stand below; elsewhere "
        + ", ".join(f"{axis} {value}" for axis, value in SCALING_BASE.items()),
        "",
        lines,
        axes_of_scaling,
        _overhead,
        unit=2.1,
    ),
    "roofline": Picture(
        "step",
        "Training steps: rate of the matrix products",
        "operations that the case needs over the whole step's time; the bar behind, and the "
        "percentage:\nof the rate of a large matrix product in the same rounds",
        "GFLOP/s",
        dots,
        whole,
        _rate,
        ceiling=("GEMM ceiling", "gemm_gflops"),
        without=(),
        unit=0.27,
    ),
    "memory": Picture(
        "step",
        "Peak memory of a training step",
        "allocated above parameters and inputs, over the same step without penalty (1×)",
        "peak memory / plain step",
        bars,
        families,
        _memory,
        shown=lambda record: f"{number(record.peak_mb)} MB",
    ),
    "speedup": Picture(
        "elementwise",
        "Activations: speed-up over eager torch",
        "right of the line is faster than torch's own kernels",
        "eager time / time",
        bars,
        phases,
        lambda record, plain: record.vs_eager,
        without=("plain", "eager"),
    ),
    "bandwidth": Picture(
        "elementwise",
        "Activations: memory bandwidth",
        "bytes the op must move over its time; the bar behind, and the percentage:\n"
        "of the bandwidth of Tensor.clone in the same rounds",
        "GB/s",
        dots,
        phases,
        lambda record, plain: record.gbps,
        ceiling=("copy", "copy_gbps"),
        unit=0.27,
    ),
}


def require_matplotlib() -> None:
    """Raise RuntimeError with the remedy if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError('Plots need matplotlib: pip install "fastjac[bench]"') from error


def draw(records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw every picture that the records allow, for each machine, device, dtype and thread count.

    If a contestant has several records of a case, the last one counts. Records whose status is not
    ``"ok"`` are left out. The folder is created if it does not exist.

    Returns:
        The paths of the files, ``overhead-cpu-float32-2t.png`` and so on.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str, str, int], dict[tuple[str, str], Record]] = {}
    for record in records:
        if record.status == "ok" and record.median_ms is not None:
            key = (record.machine, record.device, record.dtype, record.threads)
            groups.setdefault(key, {})[record.case, record.contestant] = record
    machines = list(dict.fromkeys(machine for machine, *_ in groups))
    written: list[Path] = []
    with matplotlib.rc_context(STYLE):
        for (machine, device, dtype, threads), latest in groups.items():
            name = f"{device}-{dtype}" + (f"-{threads}t" if device == "cpu" else "")
            if len(machines) > 1:
                slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")[:32]
                name += f"-{slug or machines.index(machine)}"
            for kind, picture in PICTURES.items():
                figure = Figure(layout="constrained")
                if paint(figure, picture, list(latest.values())):
                    written.append(folder / f"{kind}-{name}.png")
                    figure.savefig(written[-1])
    return written


def paint(figure: Figure, picture: Picture, records: Sequence[Record]) -> bool:
    """Draw a picture of the records; False if they have nothing for it."""
    marks = picture.marks(records)
    panels = picture.panels(marks) if _in_order(marks) not in ([], ["plain"]) else {}
    if not panels:
        return False
    beside = picture.panels is phases
    rows: dict[str, Rows] = {}
    for heading, part in panels.items():
        shown = marks if beside else part
        names = dict.fromkeys(mark.row for mark in shown)
        rows[heading] = {row: _in_order(m for m in shown if m.row == row) for row in names}
    columns = len(panels) if beside else min(2, len(panels)) if picture.paint is lines else 1
    sizes = [1.0 for _ in panels]
    if picture.paint is bars:
        sizes = [sum(len(names) + GAP for names in mine.values()) for mine in rows.values()]
    elif picture.paint is dots:
        sizes = [float(len(mine)) for mine in rows.values()]
    sizes = sizes[::columns]  # of the rows of panels, in units
    width = 1.6 + 3.1 * columns if beside else 8.6
    body = 0.1 + sum(0.65 + picture.unit * size for size in sizes)
    keys = {name: _colour(name) for name in _in_order(marks)}
    if picture.ceiling[0]:
        keys[picture.ceiling[0]] = CEILING
    _frame(figure, picture, marks[0].record, keys, width, body)
    grid = figure.subplots(len(sizes), columns, squeeze=False, sharey=beside, height_ratios=sizes)
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    for ax, (heading, part) in zip(grid.flat, panels.items(), strict=False):
        picture.paint(ax, heading, part, rows[heading], picture)
        ax.set_title(heading)
        ax.set_xlabel(picture.axis)
    return True


def _frame(
    figure: Figure,
    picture: Picture,
    first: Record,
    keys: Mapping[str, str],
    width: float,
    body: float,
) -> None:
    """Size the figure, and write title, note and legend above the axes, the machine below them.

    All is placed in inches, so that the height of the figure does not matter; ``body`` is the
    height of the axes.
    """
    from matplotlib.patches import Patch

    columns = int(width / 1.6)
    below_note = 0.44 + 0.16 * (picture.note.count("\n") + 1)
    below = 0.26
    height = below_note + 0.22 * -(-len(keys) // columns) + 0.13 + body + below
    figure.set_size_inches(width, height)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, below / height, 1, body / height), w_pad=0.1, h_pad=0.06)
    left = 0.12 / width
    figure.text(left, 1 - 0.26 / height, picture.title, fontsize=13, fontweight="bold", va="center")
    figure.text(left, 1 - 0.43 / height, picture.note, fontsize=9, color=MUTED, va="top")
    where = f"{place(first)}, {first.dtype}; {versions_of(first)}"
    figure.text(left, 0.13 / height, where, fontsize=7.5, color=MUTED, va="center")
    patches = [Patch(color=colour, label=label) for label, colour in keys.items()]
    figure.legend(
        # matplotlib fills the columns of a legend one after the other.
        handles=[patch for k in range(columns) for patch in patches[k::columns]],
        ncols=min(columns, len(patches)),
        loc="upper left",
        bbox_to_anchor=(0.09 / width, 1 - below_note / height),
        bbox_transform=figure.transFigure,
        **{"columnspacing": 1.4, "handlelength": 1.0, "handleheight": 1.0, "borderaxespad": 0.2},
    )
