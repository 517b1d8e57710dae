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


def _of_kind(places: dict[str, Cases], kind: str) -> dict[str, Cases]:
    """Cases of a kind that fastjac took part in; those of a scaling series are for the plots."""
    chosen = {
        where: {
            case: rows
            for case, rows in cases.items()
            if OURS in rows and rows[OURS].kind == kind and not rows[OURS].axes
        }
        for where, cases in places.items()
    }
    return {where: cases for where, cases in chosen.items() if cases}


# ---- tables


def summary(places: dict[str, Cases]) -> list[str]:
    """Training steps where they were measured last, one table a kind of device."""
    latest: dict[str, str] = {}
    steps = _of_kind(places, "step")
    for where, cases in steps.items():
        latest.setdefault(_any(cases).device, where)
    return _sections({where: steps[where] for where in latest.values()}, _times_and_memory)


def time(places: dict[str, Cases]) -> list[str]:
    """Training steps of every machine."""
    return _sections(_of_kind(places, "step"), _times)


def memory(places: dict[str, Cases]) -> list[str]:
    """Peak memory of their steps."""
    return _sections(_of_kind(places, "step"), _memory)


def elementwise(places: dict[str, Cases]) -> list[str]:
    """Activations of every machine."""
    return _sections(_of_kind(places, "elementwise"), _elementwise)


TABLES: dict[str, Callable[[dict[str, Cases]], list[str]]] = {
    "summary": summary,
    "time": time,
    "memory": memory,
    "elementwise": elementwise,
}


def _sections(places: dict[str, Cases], body: Callable[[Cases], list[str]]) -> list[str]:
    lines: list[str] = []
    for where, cases in places.items():
        lines += ["", f"{where}, {_versions(cases)}:", "", *body(cases)]
    return lines[1:]


def _versions(cases: Cases) -> str:
    records = [record for rows in cases.values() for record in rows.values()]
    torch = " and ".join(dict.fromkeys(f"torch {record.torch}" for record in records))
    commits = list(dict.fromkeys(record.commit for record in records))
    return f"{torch}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"


def _any(cases: Cases) -> Record:
    return next(iter(next(iter(cases.values())).values()))


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
    rows = [["eager / fastjac, ms", *(phase.removeprefix("act-") for phase in phases)]]
    for name, cells in by_name.items():
        rows.append([f"`{name}`", *(cells.get(phase, "–") for phase in phases)])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


# ---- the files


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
        lines = TABLES[name](places) or ["Nothing was measured yet."]
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
