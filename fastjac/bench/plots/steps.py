"""Pictures of the training steps: time and memory over the plain step."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastjac.bench.idioms import IDIOMS
from fastjac.bench.plots.style import COLOURS, GAP, INK, OTHER, bar_label, compose, in_order
from fastjac.bench.records import Record
from fastjac.bench.report import number, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Group = tuple[str, Sequence[tuple[str, float, str]]]


def _grouped_bars(ax: Axes, groups: Sequence[Group]) -> None:
    """Horizontal bars ``(contestant, value, label)`` under one tick label per group."""
    position, ticks = 0.0, []
    for _, bars in groups:
        ticks.append(position + (len(bars) - 1) / 2)
        for name, value, label in bars:
            ax.barh(position, value, height=0.86, color=COLOURS.get(name, OTHER))
            bar_label(ax, value, position, label, name == "fastjac")
            position += 1
        position += GAP
    ax.set_yticks(ticks, [name for name, _ in groups])
    ax.set_ylim(position - GAP - 0.4, -0.6)
    ax.set_xlim(0, 1.2 * max(_longest(group) for group in groups))


def _longest(group: Group) -> float:
    return max(value for _, value, _ in group[1])


def _rows(groups: Sequence[Group]) -> float:
    return sum(len(bars) + GAP for _, bars in groups)


def overhead(figure: Figure, records: Sequence[Record]) -> bool:
    """Time of a training step over the plain one, per case and contestant."""
    steps = [r for r in records if r.kind == "step" and r.overhead is not None and not r.axes]
    if not [r for r in steps if r.contestant != "plain"]:
        return False
    return _step_bars(
        figure,
        steps,
        title="Training step with a Jacobian penalty",
        note="time over the same step without penalty (1×); shorter is better",
        axis="time / plain step",
        value=lambda r: r.overhead,
        label=lambda r: f"{ratio(r.overhead)}  {number(r.median_ms)} ms",
    )


def memory(figure: Figure, records: Sequence[Record]) -> bool:
    """Peak memory of a training step over that of the plain one."""
    plain = {r.case: r.peak_mb for r in records if r.contestant == "plain" and r.kind == "step"}
    steps = [
        r for r in records if r.kind == "step" and r.peak_mb and plain.get(r.case) and not r.axes
    ]
    if not [r for r in steps if r.contestant != "plain"]:
        return False

    def over_plain(record: Record) -> float:
        return (record.peak_mb or 0.0) / (plain[record.case] or 1.0)

    return _step_bars(
        figure,
        steps,
        title="Peak memory of a training step",
        note="allocated above parameters and inputs, over the same step without penalty (1×)",
        axis="peak memory / plain step",
        value=over_plain,
        label=lambda r: f"{ratio(over_plain(r))}  {number(r.peak_mb)} MB",
    )


def _step_bars(
    figure: Figure,
    steps: Sequence[Record],
    *,
    title: str,
    note: str,
    axis: str,
    value: Any,
    label: Any,
) -> bool:
    names = in_order(r for r in steps if r.contestant != "plain")
    plain = {r.case: r for r in steps if r.contestant == "plain"}
    groups = []
    for case in dict.fromkeys(r.case for r in steps):
        mine = {r.contestant: r for r in steps if r.case == case}
        bars = [(n, float(value(mine[n])), label(mine[n])) for n in names if n in mine]
        if bars:
            own = plain.get(case)
            under = "" if own is None else f"\nplain {label(own).split('  ')[1]}"
            groups.append((case + under, bars))
    panels = _panels(groups, {r.case: IDIOMS[r.penalty].suite == "layer-wise" for r in steps})
    heights = [_rows(part) for part in panels.values()]
    compose(
        *(figure, steps, names),
        title=title,
        note=note,
        width=8.6,
        body=0.1 + 0.65 * len(panels) + 0.185 * sum(heights),
    )
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (heading, part) in zip(axes, panels.items(), strict=True):
        _grouped_bars(ax, part)
        ax.set_title(heading)
        ax.axvline(1, color=INK, linewidth=1)
        ax.set_xlabel(axis)
    return True


def _panels(groups: Sequence[Group], layerwise: dict[str, bool]) -> dict[str, list[Group]]:
    """The two families of penalties apart, and bars several times as long as the usual one.

    Each panel has an axis of its own: a layer-wise penalty costs a few per cent, an exact Jacobian
    ten steps.
    """
    families = {
        "layer-wise penalties": [g for g in groups if layerwise[_case(g)]],
        "penalties on the input Jacobian": [g for g in groups if not layerwise[_case(g)]],
    }
    panels: dict[str, list[Group]] = {}
    for heading, mine in families.items():
        usual = statistics.median(map(_longest, mine)) if mine else 0.0
        panels[heading] = [g for g in mine if _longest(g) <= 2.5 * usual]
        panels[f"{heading}, on a longer axis"] = [g for g in mine if _longest(g) > 2.5 * usual]
    return {heading: part for heading, part in panels.items() if part}


def _case(group: Group) -> str:
    return group[0].partition("\n")[0]
