"""PNG plots, drawn from records alone.

Bars start at 0 on linear axes. A contestant has one colour everywhere: torch's are warm or grey,
fastjac's green.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fastjac.bench.plots.elementwise import speedup
from fastjac.bench.plots.roofline import bandwidth, roofline
from fastjac.bench.plots.scaling import scaling
from fastjac.bench.plots.steps import memory, overhead
from fastjac.bench.plots.style import COLOURS, STYLE
from fastjac.bench.records import Record

__all__ = ["COLOURS", "PAINTERS", "draw", "require_matplotlib"]

PAINTERS = {
    "overhead": overhead,
    "scaling": scaling,
    "roofline": roofline,
    "memory": memory,
    "speedup": speedup,
    "bandwidth": bandwidth,
}


def require_matplotlib() -> None:
    """Raise RuntimeError with the remedy where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RuntimeError('plots need matplotlib: pip install "fastjac[bench]"') from error


def draw(records: Iterable[Record], folder: Path) -> list[Path]:
    """Draw every plot the records allow, one set per machine, device, dtype and thread count.

    Of several records of one contestant on one case (a CSV that grew) the last one counts.

    Args:
        records: those that are not ``"ok"`` are left out.
        folder: made if it is not there.

    Returns:
        The files, named by :data:`PAINTERS`: ``overhead-*``, ``scaling-*`` and so on.
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
