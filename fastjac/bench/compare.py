"""What became faster or slower between two sets of records, beyond the noise.

Ratios are compared, not times: the median over the rounds of a contestant's time over plain's in
the same round (`Record.ratio`). What slows the whole machine does not move it.

The noise of ``d = log(new / old)`` is the largest of three standard deviations: the errors of both
medians (`Record.ratio_se`) in quadrature; how far the contestants that run no code of ours moved
between the two sets (the 90th percentile of their ``|d|`` over 1.645, so that nine in ten lie where
they should, times 1 + 2/n because n of them may be close by chance); and `FLOOR`. A change counts
if ``d`` exceeds z of these, with z such that of a hundred comparisons without a change one reports
anything (Bonferroni), and if it does so relative to each control of the same case too: where all of
a case moved together, it was plain that moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastjac.bench.contestants import runs_ours
from fastjac.bench.records import Record
from fastjac.bench.report import empty_table, ratio

#: three runs of five steps had ratios 0.4 to 1.7% apart (history.csv, db0c7c7): two differ by 2.4%
FLOOR = 0.02
#: probability of reporting anything where nothing changed
FALSE_ALARM = 0.01

#: machine, device, dtype, threads, torch, then case and contestant
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Change:
    """The ratios of one contestant on one case, and the verdict.

    Attributes:
        case, contestant, old, new: ``old`` and ``new`` are times over plain's.
        limit: what ``|log(new / old)|`` must exceed.
        verdict: ``"faster"``, ``"slower"``, or empty within the noise.
    """

    case: str
    contestant: str
    old: float
    new: float
    limit: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """The changes of what runs code of ours, and ``case (contestant)`` of what is on one side."""

    changes: list[Change]
    alone: list[str]


def compare(old: Iterable[Record], new: Iterable[Record]) -> Comparison:
    """Compare two sets of records. Of several records of one key the last one counts."""
    before, after = _by_key(old), _by_key(new)
    shared = [key for key in after if key in before]
    moved = {key: math.log(_ratio(after[key]) / _ratio(before[key])) for key in shared}
    ours = [key for key in shared if runs_ours(key[-1])]
    controls = [key for key in shared if not runs_ours(key[-1])]
    z = NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * max(1, len(ours))))
    changes = []
    for key in ours:
        record, other = after[key], before[key]
        alike = [c for c in controls if c[:5] == key[:5] and after[c].kind == record.kind]
        within = math.hypot(record.ratio_se or 0.0, other.ratio_se or 0.0)
        limit = z * max(within, _between([abs(moved[c]) for c in alike]), FLOOR)
        apart = [moved[key], *(moved[key] - moved[c] for c in alike if c[5] == record.case)]
        verdict = "slower" if min(apart) > limit else "faster" if max(apart) < -limit else ""
        change = (record.case, record.contestant, _ratio(other), _ratio(record), limit, verdict)
        changes.append(Change(*change))
    alone = dict.fromkeys(f"{key[5]} ({key[6]})" for key in before.keys() ^ after.keys())
    return Comparison(changes, sorted(alone))


def _by_key(records: Iterable[Record]) -> dict[Key, Record]:
    return {
        (r.machine, r.device, r.dtype, r.threads, r.torch, r.case, r.contestant): r
        for r in records
        if r.status == "ok" and r.ratio and r.contestant != "plain"
    }


def _ratio(record: Record) -> float:
    assert record.ratio is not None
    return record.ratio


def _between(moved: list[float]) -> float:
    """Standard deviation between the two sets, by the contestants that did not change."""
    if not moved:
        return 0.0
    ninth = quantiles(moved, n=10, method="inclusive")[-1] if len(moved) > 1 else moved[0]
    return ninth / NormalDist().inv_cdf(0.95) * (1 + 2 / len(moved))


def render(comparison: Comparison, console: Console) -> None:
    """Print the changes beyond the noise, or that there are none, and what was not compared."""
    changes = comparison.changes
    beyond = sorted((c for c in changes if c.verdict), key=lambda c: c.old / c.new)
    if beyond:
        table: Table = empty_table("Beyond the noise: time over plain's", "contestant")
        for heading in ("old", "new", "change", "noise", "verdict"):
            table.add_column(heading, justify="right", no_wrap=True)
        for c in beyond:
            style = "bold red" if c.verdict == "slower" else "green"
            cells = [ratio(c.old), ratio(c.new), f"{100 * (c.new / c.old - 1):+.1f}%"]
            noise = f"±{100 * math.expm1(c.limit):.1f}%"
            table.add_row(c.case, c.contestant, *cells, noise, Text(c.verdict, style=style))
        console.print(table)
    console.print(f"{len(changes)} ratios compared, {len(beyond)} beyond the noise")
    if comparison.alone:
        text = f"not in both files, {len(comparison.alone)}: {', '.join(comparison.alone)}"
        console.print(Text(text, style="yellow"), soft_wrap=True)
