"""PNG pictures of records: :data:`PICTURES` declares six, and :func:`draw` draws them.

A picture has panels, and a panel has rows, one for each case or activation. ``painters`` paints the
panels.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastjac.bench.cases import SCALING_BASE
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.painters import (
    CEILING,
    GAP,
    MUTED,
    STYLE,
    Mark,
    Rows,
    bars,
    colour_of,
    dots,
    in_order,
    lines,
    point,
)
from fastjac.bench.problems import PHASES
from fastjac.bench.records import Record, by_run
from fastjac.bench.report import number, place, ratio, versions_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panels = dict[str, list[Mark]]


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Attributes:
        kind: The kind of its records: ``"step"``, ``"elementwise"`` or ``"scaling"``.
        title, note, axis: Its texts; ``axis`` is the label of the x-axis.
        paint: Paints one panel: ``(ax, heading, marks, rows)``.
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
    paint: Callable[[Axes, str, Sequence[Mark], Rows], None]
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
                text = ratio(value) + ("" if self.shown is None else f"  {self.shown(record)}")
                ceiling = getattr(record, self.ceiling[1], 0.0)
                if ceiling:
                    text = f"{100 * value / ceiling:.0f}%"
                marks.append(Mark(row, record.contestant, value, text, ceiling, record, own))
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
    panels: Panels = {}
    for mark in sorted(marks, key=lambda mark: [*PHASES].index(mark.record.phase)):
        heading = "double backward" if mark.record.phase == "double" else mark.record.phase
        panels.setdefault(heading, []).append(mark)
    return panels


def axes_of_scaling(marks: Sequence[Mark]) -> Panels:
    """One panel for each axis: the cases that differ from the base point along it alone."""
    panels: Panels = {}
    for axis, base in SCALING_BASE.items():
        mine = [m for m in marks if {**point(m), axis: base} == SCALING_BASE]
        if len({m.row for m in mine}) > 1:
            panels[axis] = mine
    return panels


PICTURES = {
    "overhead": Picture(
        "step",
        "Training step with a Jacobian penalty",
        "time over the same step without penalty (1×); shorter is better",
        "time / plain step",
        bars,
        families,
        lambda record, plain: record.overhead,
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
        lambda record, plain: record.overhead,
        unit=2.1,
    ),
    "roofline": Picture(
        "step",
        "Training steps: rate of the matrix products",
        "operations that the case needs over the whole step's time; the bar behind, and the "
        "percentage:\nof the rate of a large matrix product in the same rounds",
        "GFLOP/s",
        dots,
        lambda marks: {"": list(marks)},
        lambda record, plain: (record.pct_gemm or 0) * (record.gemm_gflops or 0) / 100 or None,
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
        lambda record, plain: (
            record.peak_mb / plain.peak_mb if record.peak_mb and plain and plain.peak_mb else None
        ),
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


def draw(records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw every picture that the records allow, for each machine, device, dtype and thread count.

    If a contestant has several records of a case, the last one counts. Records whose status is not
    ``"ok"`` are left out. The folder is created if it does not exist.

    Returns:
        The paths of the files, ``overhead-cpu-float32-2t.png`` and so on.
    """
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    runs = by_run(r for r in records if r.status == "ok" and r.median_ms is not None)
    machines = list(dict.fromkeys(machine for machine, *_ in runs))
    written: list[Path] = []
    with matplotlib.rc_context(STYLE):
        for (machine, device, dtype, threads), mine in runs.items():
            latest = {(record.case, record.contestant): record for record in mine}
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
    panels = picture.panels(marks) if in_order(marks) not in ([], ["plain"]) else {}
    if not panels:
        return False
    beside = picture.panels is phases
    rows: dict[str, Rows] = {}
    for heading, part in panels.items():
        shown = marks if beside else part
        names = dict.fromkeys(mark.row for mark in shown)
        rows[heading] = {row: in_order(m for m in shown if m.row == row) for row in names}
    columns = len(panels) if beside else min(2, len(panels)) if picture.paint is lines else 1
    sizes = [1.0 for _ in panels]
    if picture.paint is bars:
        sizes = [sum(len(names) + GAP for names in mine.values()) for mine in rows.values()]
    elif picture.paint is dots:
        sizes = [float(len(mine)) for mine in rows.values()]
    sizes = sizes[::columns]  # of the rows of panels, in units
    width = 1.6 + 3.1 * columns if beside else 8.6
    body = 0.1 + sum(0.65 + picture.unit * size for size in sizes)
    keys = {name: colour_of(name) for name in in_order(marks)}
    if picture.ceiling[0]:
        keys[picture.ceiling[0]] = CEILING
    _frame(figure, picture, marks[0].record, keys, width, body)
    grid = figure.subplots(len(sizes), columns, squeeze=False, sharey=beside, height_ratios=sizes)
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    for ax, (heading, part) in zip(grid.flat, panels.items(), strict=False):
        picture.paint(ax, heading, part, rows[heading])
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
