"""What became faster or slower between two sets of records, beyond the noise.

Ratios are compared, not times: the median over the rounds of a contestant's time over plain's in
the same round (`Record.ratio`). A slower machine does not change them.

The noise of ``d = log(new / old)`` is the largest of three standard deviations:

- the errors of both medians (`Record.ratio_se`) in quadrature;
- the movement between the two sets of the contestants that run no code of fastjac, the controls:
  the 90th percentile of their ``|d|`` over 1.645, times ``1 + 2/n``, because n controls may be
  close by chance;
- `FLOOR`.

A change is reported if ``d`` exceeds z times the noise. z is such that, of a hundred comparisons
without a change, one reports anything (Bonferroni). The change must exceed the same limit relative
to each control of the same case, because plain itself has moved if all of a case moved together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, quantiles
from typing import Any

from rich.console import Console
from rich.text import Text

from fastjac.bench.records import Record
from fastjac.bench.report import empty_table, ratio

#: Three runs of five steps had ratios 0.4 to 1.7% apart (history.csv, db0c7c7); two differ by 2.4%.
FLOOR = 0.02
#: The probability of reporting anything if nothing changed.
FALSE_ALARM = 0.01

#: Machine, device, dtype, threads, torch, kind, then case and contestant.
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Change:
    """The times over plain's of one contestant on one case, and the verdict.

    ``limit`` is what ``|log(new / old)|`` must exceed; ``verdict`` is ``"faster"``, ``"slower"``,
    or empty within the noise.
    """

    case: str
    contestant: str
    old: float
    new: float
    limit: float
    verdict: str


def compare(old: Iterable[Record], new: Iterable[Record]) -> tuple[list[Change], list[str]]:
    """Compare two sets of records; if a key has several records, the last one counts.

    Returns:
        The changes of fastjac's contestants, and ``case (contestant)`` of each record that only one
        of the sets has.
    """
    before, after = _by_key(old), _by_key(new)
    moved = {
        key: math.log(new / before[key][0]) for key, (new, _) in after.items() if key in before
    }
    ours = [key for key in moved if key[-1].startswith("fastjac")]
    z = NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * max(1, len(ours))))
    changes = []
    for key in ours:
        (was, was_error), (now, now_error) = before[key], after[key]
        controls = [c for c in moved if c not in ours and c[:-2] == key[:-2]]
        within = math.hypot(was_error, now_error)
        limit = z * max(within, _between([abs(moved[c]) for c in controls]), FLOOR)
        apart = [moved[key], *(moved[key] - moved[c] for c in controls if c[-2] == key[-2])]
        verdict = "slower" if min(apart) > limit else "faster" if max(apart) < -limit else ""
        changes.append(Change(key[-2], key[-1], was, now, limit, verdict))
    return changes, sorted({f"{key[-2]} ({key[-1]})" for key in before.keys() ^ after.keys()})


def _by_key(records: Iterable[Record]) -> dict[Key, tuple[float, float]]:
    """Ratio and its error of every record that can be compared."""
    return {
        (r.machine, r.device, r.dtype, r.threads, r.torch, r.kind, r.case, r.contestant): (
            r.ratio,
            r.ratio_se or 0.0,
        )
        for r in records
        if r.status == "ok" and r.ratio and r.contestant != "plain"
    }


def _between(moved: list[float]) -> float:
    """The standard deviation between the two sets, by the contestants that did not change."""
    if not moved:
        return 0.0
    ninth = quantiles(moved, n=10, method="inclusive")[-1] if len(moved) > 1 else moved[0]
    return ninth / NormalDist().inv_cdf(0.95) * (1 + 2 / len(moved))


def render(changes: list[Change], alone: list[str], console: Console) -> None:
    """Print the changes beyond the noise, or that there are none, and what was not compared."""
    beyond = sorted((c for c in changes if c.verdict), key=lambda c: c.old / c.new)
    if beyond:
        numbers = ("old", "new", "change", "noise", "verdict")
        title = "Beyond the noise: time over plain's"
        table = empty_table(title, "case", "contestant", numbers=numbers)
        for c in beyond:
            cells = [ratio(c.old), ratio(c.new), f"{100 * (c.new / c.old - 1):+.1f}%"]
            noise = f"±{100 * math.expm1(c.limit):.1f}%"
            style = "bold red" if c.verdict == "slower" else "green"
            table.add_row(c.case, c.contestant, *cells, noise, Text(c.verdict, style=style))
        console.print(table)
    console.print(f"{len(changes)} ratios compared, {len(beyond)} beyond the noise")
    if alone:
        text = f"not in both files, {len(alone)}: {', '.join(alone)}"
        console.print(Text(text, style="yellow"), soft_wrap=True)
