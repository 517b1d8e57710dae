"""Pictures of a factorial study, written as PNG files that are the same for the same data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import scikit_posthocs
import seaborn as sns
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import FixedLocator

from studies import statistics

# Okabe and Ito, "Color Universal Design", 2008; yellow is last, as it is faint on white.
COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442",
)  # fmt: skip
# Eleven and eight have no common factor, so 88 methods differ in one of the two.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")

STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLORS),
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "lines.linewidth": 1.6,
    "lines.markersize": 7,
}

Look = dict[str, Any]


@contextmanager
def style() -> Iterator[None]:
    """Sets the fonts, the colours and the layout of the pictures of the studies within a block."""
    with mpl.rc_context(STYLE):
        yield


def look(method_names: Sequence[str]) -> dict[str, Look]:
    """A colour and a marker for each method, in the order of the names.

    Pass all methods of a study, and the result to each picture, so that a method looks the same in
    pictures that show only some of them.
    """
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(method_names)
    }


def save(figure: Figure, path: str | Path) -> Path:
    """Writes a figure as PNG at 150 dpi, without a date or a version in it, and closes it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def critical_difference(
    table: pd.DataFrame,
    path: str | Path,
    title: str,
    better: str = "higher",
    *,
    looks: Mapping[str, Look] | None = None,
) -> Path:
    """Draws the mean ranks of the methods; a bar joins those that Nemenyi's test cannot tell apart.

    Args:
        table: the table of :func:`studies.statistics.cells`.
        path: the file to write.
        title: the title; the number of cells and Friedman's p are added below it.
        better: ``"higher"`` or ``"lower"``, the values that rank first.
        looks: the result of :func:`look`, if not for the methods of the table.
    """
    if better not in ("higher", "lower"):
        raise ValueError(f"better must be 'higher' or 'lower', got {better!r}")
    if len(table) < 2:
        raise ValueError(f"ranks need at least two cells, got {len(table)}")
    names = [str(name) for name in table.columns]
    # scikit-posthocs draws in the order of a set, which for strings is another one in each run.
    signed = (table if better == "higher" else -table).set_axis(range(len(names)), axis=1)
    mean = statistics.ranks(signed)
    looks = looks or look(names)
    matrix = statistics.nemenyi(signed)
    with style():
        figure = Figure(figsize=(8, 1.9 + 0.26 * len(names)))
        axes = figure.subplots()
        drawn = scikit_posthocs.critical_difference_diagram(
            mean,
            matrix,
            ax=axes,
            alpha=statistics.LEVEL,
            label_fmt_left="{label}",
            label_fmt_right="{label}",
            color_palette={i: looks[name]["color"] for i, name in enumerate(names)},
            elbow_props={"linewidth": 1.2},
            marker_props={"s": 50, "edgecolors": "black", "linewidths": 0.6},
        )
        for label, point in zip(drawn["labels"], drawn["markers"], strict=True):
            i = int(label.get_text())
            parts = [f" {mean[i]:.2f} ", names[i]]
            label.set_text(" ".join(parts if label.get_ha() == "left" else reversed(parts)))
            label.set_color("black")
            marker = MarkerStyle(looks[names[i]]["marker"])
            point.set_paths([marker.get_path().transformed(marker.get_transform())])
        axes.spines["top"].set_visible(True)
        axes.set_xlim(0.9, len(names) + 0.1)
        axes.xaxis.set_major_locator(FixedLocator(range(1, len(names) + 1)))
        note = f"mean rank over {len(table)} cells, 1 is best"
        if not np.isnan(matrix.attrs["friedman"]):
            note += f"; Friedman p = {matrix.attrs['friedman']:.2g}"
        axes.set_title(f"{title}\n{note}", pad=12)
        return save(figure, path)


def lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    path: str | Path,
    *,
    title: str = "",
    x_label: str | None = None,
    y_label: str | None = None,
    log_x: bool = False,
    looks: Mapping[str, Look] | None = None,
) -> Path:
    """Draws the mean of ``y`` at each ``x``, with a line for each value of ``hue``.

    The bars are 95% bootstrap intervals over all the rows at a point, so ``frame`` should hold only
    those of which the mean is meant, such as the seeds of one setting. Each line is moved sideways
    a little, so that its bars do not lie on those of another.

    Args:
        frame: the records.
        x: the column of the horizontal axis, of numbers.
        y: the column of the vertical axis.
        hue: the column of the methods.
        path: the file to write.
        title: the title.
        x_label: the label of the horizontal axis, if not ``x``.
        y_label: the label of the vertical axis, if not ``y``.
        log_x: whether the horizontal axis is logarithmic.
        looks: the result of :func:`look`, if not for the methods of the frame.
    """
    method = frame[hue].astype(str)
    looks = looks or look(list(method.unique()))
    order = [name for name in looks if (method == name).any()]
    values = np.unique(frame[x].astype(float))
    if log_x and values[0] <= 0:
        raise ValueError(f"log_x needs positive values of {x!r}, got {values[0]:g}")
    place = np.log10(frame[x].astype(float)) if log_x else frame[x].astype(float)
    gaps = np.diff(np.log10(values) if log_x else values)
    step = 0.3 * gaps.min(initial=np.inf) / len(order) if len(gaps) else 0.0
    place = place + step * (method.map(order.index) - (len(order) - 1) / 2)
    moved = frame.assign(**{x: 10**place if log_x else place, hue: method})
    with style():
        figure = Figure(figsize=(8, 4.6))
        axes = figure.subplots()
        if log_x:
            axes.set_xscale("log")
        sns.lineplot(
            moved,
            x=x,
            y=y,
            hue=hue,
            style=hue,
            hue_order=order,
            style_order=order,
            palette={name: looks[name]["color"] for name in order},
            markers={name: looks[name]["marker"] for name in order},
            markeredgecolor="black",
            markeredgewidth=0.6,
            dashes=False,
            errorbar=("ci", 95),
            seed=statistics.SEED,
            err_style="bars",
            err_kws={"elinewidth": 1.2},
            ax=axes,
        )
        # More would run into each other at this width.
        if len(values) <= 10:
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
        axes.set(title=title, xlabel=x_label or x, ylabel=y_label or y)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        return save(figure, path)


def effects(
    rows: pd.DataFrame, path: str | Path, title: str, *, x_label: str = "Mean difference"
) -> Path:
    """Draws each effect of :func:`studies.statistics.compared` with its interval, and a zero line.

    A filled marker is a comparison that is significant after correction.
    """
    with style():
        figure = Figure(figsize=(8, 1.7 + 0.34 * len(rows)))
        axes = figure.subplots()
        axes.axvline(0, color="0.5", linewidth=1)
        for place, (_, row) in enumerate(rows.iterrows()):
            fill = COLORS[0] if row.p_holm < statistics.LEVEL else "white"
            axes.plot([row.low, row.high], [place, place], "|-", color=COLORS[0])
            axes.plot(row.effect, place, "o", color=COLORS[0], markerfacecolor=fill)
        axes.set_yticks(range(len(rows)), [str(name) for name in rows.index])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(f"{x_label} with 95% interval (filled: corrected p < 0.05)")
        axes.set_title(title)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        return save(figure, path)
