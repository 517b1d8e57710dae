"""The picture of the kernels: per cent of the copy, measured and predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastjac.bench.painters import CEILING, MUTED, STYLE, colour_of
from fastjac.bench.records import Record

Key = tuple[str, ...]


def draw_kernels(
    cases: Mapping[Key, Mapping[str, Record]], predicted: Mapping[Key, float], folder: Path
) -> list[Path]:
    """A dot for each measurement, a ring for its prediction, and a bar up to the copy.

    Args:
        cases: (op, activation, dtype, pass) -> contestant -> record.
        predicted: (op, implementation, activation, dtype, pass) -> per cent of the copy.
        folder: Where the file goes.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not cases:
        return []
    dtypes = list(dict.fromkeys(dtype for _, _, dtype, _ in cases))
    rows = list(dict.fromkeys((op, fn, phase) for op, fn, _, phase in cases))
    names = list(dict.fromkeys(name for found in cases.values() for name in found))
    with matplotlib.rc_context(STYLE):
        size = (2.4 + 3.2 * len(dtypes), 1.4 + 0.26 * len(rows))
        figure = Figure(layout="constrained", figsize=size)
        grid = figure.subplots(1, len(dtypes), squeeze=False, sharey=True)
        for ax, dtype in zip(grid.flat, dtypes, strict=True):
            for y, (op, fn, phase) in enumerate(rows):
                ax.barh(y, 100, height=0.7, color=CEILING)
                for name, record in cases.get((op, fn, dtype, phase), {}).items():
                    guess = predicted.get((op, name.removeprefix("fastjac:"), fn, dtype, phase))
                    if record.pct_copy is not None:
                        ax.scatter(record.pct_copy, y, s=30, color=colour_of(name), zorder=3)
                    if guess is not None:
                        ring = {"facecolors": "none", "edgecolors": colour_of(name)}
                        ax.scatter(guess, y, s=60, zorder=2, **ring)
            ax.set_title(dtype)
            ax.set_xlabel("% of a copy; ring: predicted", color=MUTED)
        grid[0, 0].set_yticks(range(len(rows)), [" ".join(filter(None, row)) for row in rows])
        grid[0, 0].invert_yaxis()
        patches = [Patch(color=colour_of(name), label=name) for name in names]
        figure.legend(handles=patches, loc="outside upper left", ncols=len(patches))
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "kernels.png")
    return [folder / "kernels.png"]
