"""A comparison on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastjac.bench.compare import Change, Comparison
from fastjac.bench.report import ratio

STYLES = {"slower": "bold red", "faster": "green", "": ""}
#: cases that a list names before it only counts
NAMED = 12


def render(comparison: Comparison, console: Console) -> None:
    """Print what is beyond the noise, or that nothing is; then what was not compared."""
    changes = comparison.changes
    cases = len({case for change in changes for case in change.cases})
    compared = f"{_count(cases, 'case')} compared ({_count(len(changes), 'ratio')})"
    beyond = comparison.beyond
    if beyond:
        console.print(_table(beyond))
        console.print(f"{compared}, {len(beyond)} beyond the noise", highlight=False)
    elif changes:
        console.print(f"{compared}, nothing beyond the noise{_range(changes)}", highlight=False)
    if comparison.controls:
        n, half = len(comparison.controls), _half(comparison.controls)
        noise = f"{_count(n, 'ratio')} of torch alone moved by {half} between the runs (median)"
        console.print(noise, style="dim", highlight=False)
    for reason, records in comparison.left_out.items():
        names = [(record.case, record.contestant) for record in records]
        _line(console, f"left out, {_count(len(records), 'record')}, {reason}", names)
    for side, names in (("old", comparison.only_old), ("new", comparison.only_new)):
        if names:
            _line(console, f"only among the {side} records, {len(names)}", names)


def _table(changes: Sequence[Change]) -> Table:
    table = Table(
        title="Beyond the noise: time over plain's, by run",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for heading in ("case", "contestant"):
        table.add_column(heading, no_wrap=True)
    for heading in ("old", "new", "change", "noise"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for change in changes:
        style = STYLES[change.verdict]
        table.add_row(
            *(change.name, change.contestant, ratio(change.old), ratio(change.new)),
            Text(f"{100 * math.expm1(change.log_ratio):+.1f}%", style=style),
            f"±{_percent(change.limit)}",
            Text(change.verdict, style=style),
        )
    return table


def _range(changes: Sequence[Change]) -> str:
    limits = sorted(change.limit for change in changes)
    low, high = _percent(limits[0]), _percent(limits[-1])
    return f" of ±{low}" if low == high else f" of ±{low} to ±{high}"


def _half(controls: Sequence[Change]) -> str:
    moved = sorted(abs(change.log_ratio) for change in controls)
    return _percent(moved[len(moved) // 2])


def _percent(log_ratio: float) -> str:
    return f"{100 * math.expm1(log_ratio):.1f}%"


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _line(console: Console, what: str, names: Iterable[tuple[str, str]]) -> None:
    by_case: dict[str, list[str]] = {}
    for case, contestant in names:
        mine = by_case.setdefault(case, [])
        if contestant not in mine:
            mine.append(contestant)
    listed = [f"{case} ({', '.join(mine)})" for case, mine in by_case.items()]
    more = f", and {len(listed) - NAMED} more cases" if len(listed) > NAMED else ""
    text = Text(f"{what}: {', '.join(listed[:NAMED])}{more}", style="yellow")
    console.print(text, soft_wrap=True)
