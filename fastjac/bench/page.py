"""The tables of the README and of ``benchmarks/README.md``, from measured records alone.

    python -m fastjac.bench.page README.md benchmarks/README.md

renews what stands between ``<!-- bench: TABLE -->`` and ``<!-- bench: end -->``, TABLE a key of
`TABLES`. A case is quoted from the last commit it was measured at on a machine, with everybody who
took part then; ``-dirty`` marks a working tree with uncommitted changes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastjac.bench.records import Record, load
from fastjac.bench.report import number, place, ratio

HISTORY = Path("benchmarks/history.csv")  # from the root of the project
OURS = "fastjac"
CONTESTANTS = ("plain", "eager", "jacobianreg", "compiled", OURS)
HEADINGS = {"jacobianreg": "JacobianReg"}

Cases = dict[str, dict[str, Record]]
"""Records by case and contestant, all of one commit and machine."""


def by_machine(records: Iterable[Record]) -> dict[str, Cases]:
    """What is quoted, by where it was measured, the latest place first."""
    places: dict[str, Cases] = {}
    for record in records:
        if record.status != "ok" or record.median_ms is None:
            continue
        where = f"{place(record)}, {record.dtype}"
        cases = places.pop(where, {})  # to the end
        places[where] = cases
        mine = cases.setdefault(record.case, {})
        if any(other.commit != record.commit for other in mine.values()):
            mine.clear()
        mine[record.contestant] = record
    return dict(reversed(places.items()))


@dataclass(frozen=True)
class Table:
    """What stands between two markers.

    Attributes:
        kind: of the cases; those of a scaling series are left to the plots.
        body: cases -> lines.
        latest: only where they were measured last, once a kind of device.
    """

    kind: str
    body: Callable[[Cases], list[str]]
    latest: bool = False

    def lines(self, places: dict[str, Cases]) -> list[str]:
        """A section for every machine that has such cases, with the machine above it."""
        lines: list[str] = []
        devices: set[str] = set()
        for where, all_cases in places.items():
            cases = {
                case: rows
                for case, rows in all_cases.items()
                if OURS in rows and rows[OURS].kind == self.kind and not rows[OURS].axes
            }
            device = next((rows[OURS].device for rows in cases.values()), None)
            if device is None or (self.latest and device in devices):
                continue
            devices.add(device)
            lines += ["", f"{where}, {_versions(cases)}:", "", *self.body(cases)]
        return lines[1:]


def _versions(cases: Cases) -> str:
    records = [record for rows in cases.values() for record in rows.values()]
    torch = " and ".join(dict.fromkeys(f"torch {record.torch}" for record in records))
    commits = list(dict.fromkeys(record.commit for record in records))
    return f"{torch}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def _columns(cases: Cases) -> list[str]:
    return [name for name in CONTESTANTS if any(name in rows for rows in cases.values())]


def _times_and_memory(cases: Cases) -> list[str]:
    heading, rule, *rows = _times(cases)
    memories = [
        f" {number(r[OURS].peak_mb) or '–'} ({number(r['eager'].peak_mb) or '–'}) |"
        if "eager" in r
        else " – |"
        for r in cases.values()
    ]
    heading, rule = f"{heading} MB: fastjac (eager) |", f"{rule} --- |"
    return [heading, rule, *(row + more for row, more in zip(rows, memories, strict=True))]


def _times(cases: Cases) -> list[str]:
    columns = _columns(cases)
    rows = [["case", *("plain, ms" if c == "plain" else HEADINGS.get(c, c) for c in columns)]]
    for case, records in cases.items():
        fastest = min(r.overhead or 0 for name, r in records.items() if name in columns[1:])
        cells = [f"`{case}`"]
        for name in columns:
            record = records.get(name)
            if record is None:
                cells.append("–")
            elif name == "plain":
                cells.append(number(record.median_ms))
            else:
                text = ratio(record.overhead)
                cells.append(f"**{text}**" if record.overhead == fastest else text)
        rows.append(cells)
    return _table(rows)


def _memory(cases: Cases) -> list[str]:
    columns = _columns(cases)
    rows = [["case, MB", *(HEADINGS.get(c, c) for c in columns)]]
    for case, records in cases.items():
        found = [records.get(name) for name in columns]
        rows.append([f"`{case}`", *(number(r.peak_mb) or "–" if r else "–" for r in found)])
    return _table(rows)


def _elementwise(cases: Cases) -> list[str]:
    by_name: dict[str, dict[str, str]] = {}
    for records in cases.values():
        eager, ours = records.get("eager"), records[OURS]
        if eager is not None:
            times = f"{number(eager.median_ms)} / {number(ours.median_ms)}"
            by_name.setdefault(ours.activation, {})[ours.phase] = (
                f"{times}: **{ratio(ours.vs_eager)}**"
            )
    phases = list(dict.fromkeys(phase for cells in by_name.values() for phase in cells))
    rows = [["eager / fastjac, ms", *phases]]
    for name, cells in by_name.items():
        rows.append([f"`{name}`", *(cells.get(phase, "–") for phase in phases)])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


TABLES = {
    "summary": Table("step", _times_and_memory, latest=True),
    "time": Table("step", _times),
    "memory": Table("step", _memory),
    "elementwise": Table("elementwise", _elementwise),
}


def update(text: str, records: Iterable[Record]) -> str:
    """A page's text with the tables between its markers renewed.

    Raises:
        ValueError: no marker, or one that names no table.
    """
    places = by_machine(records)

    def renewed(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; choose from {', '.join(TABLES)}")
        lines = TABLES[name].lines(places) or ["Nothing was measured yet."]
        return "\n".join([f"<!-- bench: {name} -->", *lines, "<!-- bench: end -->"])

    page, count = re.subn(
        r"<!-- bench: (?!end)(\S+) -->.*?<!-- bench: end -->", renewed, text, flags=re.DOTALL
    )
    if count == 0:
        raise ValueError("the page has no <!-- bench: TABLE --> … <!-- bench: end -->")
    return page


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(update(path.read_text(), load(HISTORY)))
