"""PNG plots, drawn from records alone.

Bars start at 0 on linear axes. A contestant has one colour everywhere: torch's are warm or grey,
fastjac's green.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastjac.bench.records import Record
from fastjac.bench.report import number, place, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "plain": "#b8bcc2",
    "eager": "#e8743b",
    "compiled": "#5b8bd0",
    "jacobianreg": "#b58bc4",
    "fastjac": "#13865b",
    "fastjac:cpu": "#6dbb98",
    "fastjac:cuda": "#6dbb98",
    "fastjac:triton": "#a5d46a",
    "fastjac:reference": "#cfdcc9",
}
OTHER = "#8a7f6a"
INK, MUTED, GRID = "#22262b", "#6a7079", "#e4e6e9"
COPY = "#e6e8eb"
#: between groups of bars, in bars
GAP = 0.9
PHASE_TITLES = {"forward": "forward", "backward": "backward", "double": "double backward"}

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


def require_matplotlib() -> None:
    """Raise RuntimeError with the remedy where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError("plots need matplotlib: pip install 'fastjac[plot]'") from error


def draw(records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw every plot the records allow, one set per machine, device, dtype and thread count.

    Of several records of one contestant on one case (a CSV that grew) the last one counts.

    Args:
        records: those that are not ``"ok"`` are left out.
        folder: made if it is not there.

    Returns:
        The files, ``overhead-*``, ``speedup-*``, ``bandwidth-*`` and ``memory-*``.
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
            rows = list(latest.values())
            for kind, painter in PAINTERS.items():
                figure = Figure(layout="constrained")
                if painter(figure, rows):
                    path = folder / f"{kind}-{name}.png"
                    figure.savefig(path)
                    written.append(path)
    return written


def _where(records: Sequence[Record]) -> str:
    first = records[0]
    built = f"torch {first.torch}, fastjac {first.fastjac} {first.commit}".strip()
    return f"{place(first)}, {first.dtype}; {built}"


def _contestants(records: Iterable[Record]) -> list[str]:
    """In the order of the colours."""
    present = {record.contestant for record in records}
    return [name for name in COLOURS if name in present] + sorted(present - COLOURS.keys())


def _head(figure: Figure, title: str, note: str, records: Sequence[Record]) -> None:
    """Title and note at the left, in inches from the top so that the height does not matter."""
    height = figure.get_figheight()
    left = 0.12 / figure.get_figwidth()
    figure.text(left, 1 - 0.26 / height, title, fontsize=13, fontweight="bold", va="center")
    figure.text(left, 1 - 0.52 / height, note, fontsize=9, color=MUTED, va="center")
    figure.text(left, 0.13 / height, _where(records), fontsize=7.5, color=MUTED, va="center")


def _frame(figure: Figure, width: float, height: float, top: float = 0.95) -> None:
    """Size in inches; room for the head above and the origin below."""
    figure.set_size_inches(width, height)
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, 0.26 / height, 1, 1 - (top + 0.26) / height), w_pad=0.1, h_pad=0.06)


def _legend(figure: Figure, names: Sequence[str], **extra: str) -> None:
    """One square per contestant, and per ``label=colour`` in ``extra``."""
    from matplotlib.patches import Patch

    colours = {name: COLOURS.get(name, OTHER) for name in names} | extra
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(
        handles=patches,
        loc="upper left",
        bbox_to_anchor=(0.09 / figure.get_figwidth(), 1 - 0.6 / figure.get_figheight()),
        bbox_transform=figure.transFigure,
        ncols=len(patches),
        columnspacing=1.4,
        handlelength=1.0,
        handleheight=1.0,
        borderaxespad=0.2,
    )


def _bar_label(ax: Axes, x: float, y: float, text: str, ours: bool) -> None:
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


Group = tuple[str, Sequence[tuple[str, float, str]]]


def _grouped_bars(ax: Axes, groups: Sequence[Group]) -> None:
    """Horizontal bars ``(contestant, value, label)`` under one tick label per group."""
    position, ticks = 0.0, []
    for _, bars in groups:
        ticks.append(position + (len(bars) - 1) / 2)
        for name, value, label in bars:
            ax.barh(position, value, height=0.86, color=COLOURS.get(name, OTHER))
            _bar_label(ax, value, position, label, name == "fastjac")
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
    steps = [r for r in records if r.kind == "step" and r.overhead is not None]
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
    steps = [r for r in records if r.kind == "step" and r.peak_mb and plain.get(r.case)]
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
    names = _contestants(r for r in steps if r.contestant != "plain")
    plain = {r.case: r for r in steps if r.contestant == "plain"}
    groups = []
    for case in dict.fromkeys(r.case for r in steps):
        mine = {r.contestant: r for r in steps if r.case == case}
        bars = [(n, float(value(mine[n])), label(mine[n])) for n in names if n in mine]
        if bars:
            own = plain.get(case)
            under = "" if own is None else f"\nplain {label(own).split('  ')[1]}"
            groups.append((case + under, bars))
    # bars several times as long as the usual one get a panel with an axis of their own
    usual = statistics.median(map(_longest, groups))
    panels = [
        part
        for part in (
            [group for group in groups if _longest(group) <= 2.5 * usual],
            [group for group in groups if _longest(group) > 2.5 * usual],
        )
        if part
    ]
    heights = [_rows(part) for part in panels]
    _frame(figure, 8.6, 1.3 + 0.45 * len(panels) + 0.185 * sum(heights))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, part in zip(axes, panels, strict=True):
        _grouped_bars(ax, part)
        ax.axvline(1, color=INK, linewidth=1)
        ax.set_xlabel(axis)
    _head(figure, title, note, steps)
    _legend(figure, names)
    return True


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
    names = _contestants(rows)
    phases = [p for p in PHASE_TITLES if any(r.phase == p for r in rows)]
    functions = list(dict.fromkeys(r.activation for r in rows))
    per_group = len(names) + GAP
    _frame(figure, 1.6 + 3.1 * len(phases), 1.9 + 0.165 * per_group * len(functions))
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for ax, phase in zip(axes, phases, strict=True):
        _speedup_panel(ax, [r for r in rows if r.phase == phase], functions, names)
        ax.set_title(PHASE_TITLES[phase])
        ax.set_xlabel("eager time / time")
    _head(
        figure,
        "Activations: speed-up over eager torch",
        "right of the line is faster than torch's own kernels",
        rows,
    )
    _legend(figure, names)
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
        _bar_label(ax, value, y, ratio(value), record.contestant == "fastjac")
    ax.axvline(1, color=COLOURS["eager"], linewidth=1.4)
    ax.set_yticks([k * pitch + (len(names) - 1) / 2 for k in range(len(functions))], functions)
    ax.set_ylim(len(functions) * pitch - 1.3, -0.8)
    ax.set_xlim(0, 1.22 * max(longest, 1.0))


def bandwidth(figure: Figure, records: Sequence[Record]) -> bool:
    """Elementwise: GB/s of eager and fastjac against the copy bandwidth of the same rounds."""
    rows = [
        r
        for r in records
        if r.kind == "elementwise" and r.pct_copy is not None and r.contestant != "plain"
    ]
    if not rows:
        return False
    names = _contestants(rows)
    phases = [p for p in PHASE_TITLES if any(r.phase == p for r in rows)]
    functions = list(dict.fromkeys(r.activation for r in rows))
    _frame(figure, 1.6 + 3.1 * len(phases), 1.9 + 0.27 * len(functions))
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for ax, phase in zip(axes, phases, strict=True):
        _bandwidth_panel(ax, [r for r in rows if r.phase == phase], functions)
        ax.set_title(PHASE_TITLES[phase])
        ax.set_xlabel("GB/s")
    _head(
        figure,
        "Activations: memory bandwidth",
        "bytes the op must move over its time; the bar behind and the percentage of it: "
        "Tensor.clone in the same rounds",
        rows,
    )
    _legend(figure, names, copy=COPY)
    return True


def _bandwidth_panel(ax: Axes, rows: Sequence[Record], functions: Sequence[str]) -> None:
    top = 0.0
    for k, function in enumerate(functions):
        mine = [r for r in rows if r.activation == function]
        if not mine:
            continue
        copied = mine[0].copy_gbps or 0.0
        values = [r.gbps or 0.0 for r in mine]
        top = max(top, copied, *values)
        ax.barh(k, copied, height=0.7, color=COPY)
        ax.plot([min(values), max(values)], [k, k], color=MUTED, linewidth=1.2, zorder=2)
        # ours last, on top of a dot at the same place
        for record in sorted(mine, key=lambda r: r.contestant == "fastjac"):
            ours = record.contestant == "fastjac"
            colour = COLOURS.get(record.contestant, OTHER)
            ax.scatter(record.gbps or 0.0, k, s=46 if ours else 26, color=colour, zorder=3)
            if ours:
                ax.annotate(
                    f"{record.pct_copy:.0f}%",
                    (max(*values, copied), k),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    fontweight="bold",
                )
    ax.set_yticks(range(len(functions)), functions)
    ax.set_ylim(len(functions) - 0.4, -0.6)
    ax.set_xlim(0, 1.16 * max(top, 1e-9))


PAINTERS = {
    "overhead": overhead,
    "speedup": speedup,
    "bandwidth": bandwidth,
    "memory": memory,
}
