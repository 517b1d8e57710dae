"""The tables of the README and of ``benchmarks/README.md``, written from measured records alone.

    python -m fastjac.bench.page README.md benchmarks/README.md

replaces the text between ``<!-- bench: TABLE -->`` and ``<!-- bench: end -->``, where TABLE is a
key of :data:`TABLES`. Each case is taken from the last commit at which it was measured on a
machine, with all contestants that took part then. ``-dirty`` marks a working tree with uncommitted
changes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from fastjac.bench import verdict
from fastjac.bench.records import Record, load
from fastjac.bench.report import number, place, ratio, time_of

HISTORY = Path("benchmarks/history.csv")  # relative to the root of the project
CONTESTANTS = (
    "plain",
    "plain-compiled",
    "eager",
    "jacobianreg",
    "compiled",
    "jax",
    "fastjac",
    "fastjac+compile",
)
PENALISED = CONTESTANTS[2:]

#: Case -> contestant -> record, all of one machine; the records of a case are of one commit.
Cases = dict[str, dict[str, Record]]
Rows = list[list[str]]


def by_machine(records: Iterable[Record]) -> dict[str, Cases]:
    """The cases to show, by where they were measured, the latest place first."""
    places: dict[str, Cases] = {}
    for record in records:
        if record.status != "ok" or record.median_ms is None:
            continue
        where = f"{place(record)}, {record.dtype}"
        places[where] = places.pop(where, {})  # moves it to the end
        mine = places[where].setdefault(record.case, {})
        if any(other.commit != record.commit for other in mine.values()):
            mine.clear()
        mine[record.contestant] = record
    return dict(reversed(places.items()))


def sections(
    places: dict[str, Cases], kind: str, rows: Callable[[Cases], Rows], latest: bool
) -> list[str]:
    """The lines of a table, one section for each machine that has cases of this kind.

    The cases of the scaling suite are left to the pictures. With ``latest`` only the last machine
    of each kind of device is shown.
    """
    lines: list[str] = []
    devices: set[str] = set()
    for where, all_cases in places.items():
        cases = {
            case: found
            for case, found in all_cases.items()
            if "fastjac" in found and _kind(found["fastjac"]) == kind and not found["fastjac"].axes
        }
        shown = [record for found in cases.values() for record in found.values()]
        if not shown or (latest and shown[0].device in devices):
            continue
        devices.add(shown[0].device)
        torch = " and ".join(dict.fromkeys(f"torch {record.torch}" for record in shown))
        commits = list(dict.fromkeys(record.commit for record in shown))
        built = f"{torch}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
        if rows is _claims:
            sentences = verdict.of_cases(list(cases.values()))
            lines += ["", f"{where}, {built}:", "", *(f"- {text}" for text in sentences)]
            continue
        head, *body = [f"| {' | '.join(cells)} |" for cells in rows(cases)]
        rule = "|" + " --- |" * (head.count("|") - 1)
        lines += ["", f"{where}, {built}:", "", head, rule, *body]
    return lines[1:] or ["Nothing was measured yet."]


def _kind(record: Record) -> str:
    """What a table is of; steps of the suite ``networks`` have a table of their own."""
    return "networks" if "networks" in record.suite.split() else record.kind


def _grid(cases: Cases, first: str, cell: Callable[[str, dict[str, Record]], str]) -> Rows:
    """A row for each case and a column for each contestant."""
    columns = [name for name in CONTESTANTS if any(name in found for found in cases.values())]
    headings = ["JacobianReg" if name == "jacobianreg" else name for name in columns]
    rows = [[f"`{case}`", *(cell(c, found) for c in columns)] for case, found in cases.items()]
    return [[first, *headings], *rows]


def _time(cases: Cases) -> Rows:
    def cell(name: str, found: dict[str, Record]) -> str:
        if name not in found:
            return "–"
        if name == "plain":
            return number(found[name].median_ms)
        fastest = min(found[c].overhead or 0 for c in PENALISED if c in found)
        text = ratio(found[name].overhead)
        return f"**{text}**" if found[name].overhead == fastest else text

    (first, plain, *rest), *rows = _grid(cases, "case", cell)
    return [[first, plain.replace("plain", "plain, ms"), *rest], *rows]


def _over_compiled(cases: Cases) -> Rows:
    """Times over that of the plain step under torch.compile."""

    def cell(name: str, found: dict[str, Record]) -> str:
        base = found["plain-compiled"].overhead
        if name not in found or not base:
            return "–"
        return ratio((found[name].overhead or 0) / base)

    rows = {case: found for case, found in cases.items() if "plain-compiled" in found}
    return _grid(rows, "time / plain-compiled", cell)


def _compile_seconds(cases: Cases) -> Rows:
    """Seconds of the set-up and the first call, of what compiles."""

    def cell(name: str, found: dict[str, Record]) -> str:
        return number(found[name].compile_s if name in found else None) or "–"

    rows = {}
    for case, found in cases.items():
        compiling = {name: r for name, r in found.items() if r.compile_s is not None}
        if compiling:
            rows[case] = compiling
    return _grid(rows, "seconds to the first step", cell)


def _peak(name: str, found: dict[str, Record]) -> str:
    return number(found[name].peak_mb if name in found else None) or "–"


def _memory(cases: Cases) -> Rows:
    return _grid(cases, "case, MB", _peak)


def _summary(cases: Cases) -> Rows:
    peaks = ["MB: fastjac (eager)"]
    for found in cases.values():
        both = f"{_peak('fastjac', found)} ({_peak('eager', found)})"
        peaks.append(both if "eager" in found else "–")
    return [[*row, peak] for row, peak in zip(_time(cases), peaks, strict=True)]


def _host(cases: Cases) -> Rows:
    def cell(name: str, found: dict[str, Record]) -> str:
        if name not in found:
            return "–"
        launched = found[name].launches
        text = time_of(found[name], found[name].median_ms)
        return f"{text} ({'–' if launched is None else launched})"

    return _grid(cases, "µs (launches)", cell)


def _elementwise(cases: Cases) -> Rows:
    cells: dict[str, dict[str, str]] = {}
    for found in cases.values():
        eager, ours = found.get("eager"), found["fastjac"]
        if eager is not None:
            times = f"{number(eager.median_ms)} / {number(ours.median_ms)}"
            cell = f"{times}: **{ratio(ours.vs_eager)}**"
            cells.setdefault(ours.activation, {})[ours.phase] = cell
    phases = list(dict.fromkeys(phase for row in cells.values() for phase in row))
    rows = [[f"`{name}`", *(row.get(p, "–") for p in phases)] for name, row in cells.items()]
    return [["eager / fastjac, ms", *phases], *rows]


def _claims(cases: Cases) -> Rows:
    """Not a table: what that of ``summary`` says, in words."""
    raise NotImplementedError


#: Name of a table -> the arguments of :func:`sections` after the places.
TABLES = {
    "summary": ("step", _summary, True),
    "claims": ("step", _claims, True),
    "time": ("step", _time, False),
    "over-compiled": ("step", _over_compiled, True),
    "compile": ("step", _compile_seconds, True),
    "memory": ("step", _memory, False),
    "networks": ("networks", _summary, False),
    "host": ("host", _host, False),
    "elementwise": ("elementwise", _elementwise, False),
}


def update(text: str, records: Iterable[Record]) -> str:
    """The text of a page with the tables between its markers renewed.

    Raises:
        ValueError: The text has no marker, or a marker names no table.
    """
    places = by_machine(records)

    def renewed(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise ValueError(f"There is no table {name!r}; choose from {', '.join(TABLES)}.")
        lines = sections(places, *TABLES[name])
        return "\n".join([f"<!-- bench: {name} -->", *lines, "<!-- bench: end -->"])

    pattern = r"<!-- bench: (?!end)(\S+) -->.*?<!-- bench: end -->"
    page, count = re.subn(pattern, renewed, text, flags=re.DOTALL)
    if count == 0:
        raise ValueError("The page has no <!-- bench: TABLE --> … <!-- bench: end -->.")
    return page


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(update(path.read_text(), load(HISTORY)))
