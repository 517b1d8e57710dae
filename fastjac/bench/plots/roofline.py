"""Pictures of what was achieved against what the machine can do, measured in the same rounds.

Steps are held against the rate of a large matrix product, activations against a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fastjac.bench.plots.style import (
    CEILING,
    COLOURS,
    INK,
    MUTED,
    OTHER,
    PHASE_TITLES,
    compose,
    in_order,
)
from fastjac.bench.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: heights in inches: of the axes without rows, and of a row
BODY, ROW = 0.73, 0.27

Value = Callable[[Record], float]


def roofline(figure: Figure, records: Sequence[Record]) -> bool:
    """Steps: rate of the matrix products and convolutions against the GEMM ceiling."""
    rows = [r for r in records if r.kind == "step" and r.pct_gemm and r.gemm_gflops and not r.axes]
    if not rows:
        return False
    cases = list(dict.fromkeys(r.case for r in rows))
    compose(
        *(figure, rows, in_order(rows)),
        title="Training steps: rate of the matrix products",
        note="operations that the case needs over the whole step's time; the bar behind, and the "
        "percentage:\nof the rate of a large matrix product in the same rounds",
        width=8.6,
        body=BODY + ROW * len(cases),
        extra={"GEMM ceiling": CEILING},
    )
    ax = figure.subplots()
    _dots(
        *(ax, rows, cases, lambda r: r.case),
        ceiling=lambda r: r.gemm_gflops or 0.0,
        value=lambda r: (r.pct_gemm or 0.0) * (r.gemm_gflops or 0.0) / 100,
    )
    ax.set_xlabel("GFLOP/s")
    return True


def bandwidth(figure: Figure, records: Sequence[Record]) -> bool:
    """Elementwise: GB/s against the copy bandwidth."""
    rows = [
        r
        for r in records
        if r.kind == "elementwise" and r.pct_copy is not None and r.contestant != "plain"
    ]
    if not rows:
        return False
    phases = [p for p in PHASE_TITLES if any(r.phase == p for r in rows)]
    functions = list(dict.fromkeys(r.activation for r in rows))
    compose(
        *(figure, rows, in_order(rows)),
        title="Activations: memory bandwidth",
        note="bytes the op must move over its time; the bar behind, and the percentage:\n"
        "of the bandwidth of Tensor.clone in the same rounds",
        width=1.6 + 3.1 * len(phases),
        body=BODY + ROW * len(functions),
        extra={"copy": CEILING},
    )
    axes = figure.subplots(1, len(phases), sharey=True, squeeze=False)[0]
    for ax, phase in zip(axes, phases, strict=True):
        _dots(
            *(ax, [r for r in rows if r.phase == phase], functions, lambda r: r.activation),
            ceiling=lambda r: r.copy_gbps or 0.0,
            value=lambda r: r.gbps or 0.0,
        )
        ax.set_title(PHASE_TITLES[phase])
        ax.set_xlabel("GB/s")
    return True


def _dots(
    ax: Axes,
    records: Sequence[Record],
    names: Sequence[str],
    name_of: Callable[[Record], str],
    *,
    ceiling: Value,
    value: Value,
) -> None:
    """A row per name: a bar up to the ceiling, a dot per contestant, ours with its percentage."""
    top = 0.0
    for k, name in enumerate(names):
        mine = [r for r in records if name_of(r) == name]
        if not mine:
            continue
        roof = ceiling(mine[0])
        values = [value(r) for r in mine]
        top = max(top, roof, *values)
        ax.barh(k, roof, height=0.7, color=CEILING)
        ax.plot([min(values), max(values)], [k, k], color=MUTED, linewidth=1.2, zorder=2)
        # ours last, on top of a dot at the same place
        for record in sorted(mine, key=lambda r: r.contestant == "fastjac"):
            ours = record.contestant == "fastjac"
            colour = COLOURS.get(record.contestant, OTHER)
            ax.scatter(value(record), k, s=46 if ours else 26, color=colour, zorder=3)
            if ours and roof:
                ax.annotate(
                    f"{100 * value(record) / roof:.0f}%",
                    (max(*values, roof), k),
                    xytext=(6, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    fontweight="bold",
                    color=INK,
                )
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(0, 1.16 * max(top, 1e-9))
