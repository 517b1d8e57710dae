"""From the files of a run: the page ``benchmarks/gpu/README.md`` with pictures, or a short summary.

    python -m benchmarks.gpu.report OUT [OUT2] [--to FOLDER]
    python -m benchmarks.gpu.report --summary OUT

OUT2 has the files of the second call. Files may be missing or end early: the page shows what there
is, and says what was running when its process died. Each kernel stands next to what was predicted
(``predictions.csv``).
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from benchmarks.gpu.pictures import draw_kernels
from benchmarks.gpu.work import Row, load, right, states
from fastjac.bench import plots, records
from fastjac.bench.records import Record
from fastjac.bench.report import empty_table, number, ratio

HERE = Path(__file__).resolve().parent
MEASURED = ("kernels.jsonl", "steps.jsonl")
FILES = ("run.jsonl", "ops.jsonl", "checks.jsonl", "tests.jsonl", *MEASURED, "host.jsonl")

#: A heading, the names of the columns, and the rows.
Table = tuple[str, Sequence[str], list[list[str]]]


def of_file(out: Path, name: str) -> list[Row]:
    """The records of a file, without the events."""
    return [row for row in load(out / name) if "event" not in row]


def measured(out: Path, name: str) -> list[Record]:
    """The records that ``fastjac.bench`` made."""
    return records.parse(of_file(out, name))


def stages(out: Path) -> Table:
    rows = [
        [row["stage"], row["verdict"], f"{row['seconds']:.0f}"]
        for row in load(out / "run.jsonl")
        if row.get("event") == "stage"
    ]
    return "Stages", ("stage", "verdict", "seconds"), rows


def ceilings(out: Path) -> Table:
    rows = []
    for row in of_file(out, "run.jsonl"):
        if "gbps" in row:
            text = f"{row['gbps']:.0f} GB/s, {row['bytes'] / 1e9:.2g} GB read and as much written"
            rows.append([row["item"], text])
        elif "tflops" in row:
            rows.append([row["item"], f"{row['tflops']:.3g} TFLOP/s, n = {row['n']}"])
    return "Ceilings", ("what", "measured"), rows


def correctness(out: Path) -> Table:
    """One row for each op and implementation, with the dtype that is nearest to its bound."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for name in ("ops.jsonl", "checks.jsonl"):
        for row in of_file(out, name):
            key = (row["op"], row["impl"], row["device"])
            groups.setdefault(key, []).append(row)
    rows = []
    for group, found in groups.items():
        dtypes = dict.fromkeys(row["dtype"] for row in found)
        shares = [
            (row["error"] / row["tolerance"], row["dtype"])
            for row in found
            if row["error"] is not None
        ]
        worst = "{:.2f}, {}".format(*max(shares)) if shares else "–"
        missed = sum(not right(row) for row in found)
        rows.append([*group, " ".join(dtypes), str(len(found)), str(missed), worst])
    columns = ("op", "impl", "device", "dtypes", "checked", "missed", "worst error / bound")
    return "Ops against float64", columns, rows


def tests(out: Path) -> Table:
    files: dict[str, dict[str, int]] = {}
    for row in of_file(out, "tests.jsonl"):
        counts = files.setdefault(row["test"].split("::")[0], {})
        counts[row["outcome"]] = counts.get(row["outcome"], 0) + 1
    outcomes = ("passed", "failed", "skipped")
    rows = [[name, *(str(counts.get(o, 0)) for o in outcomes)] for name, counts in files.items()]
    return "Tests", ("file", *outcomes), sorted(rows)


def predictions() -> dict[tuple[str, ...], float]:
    """(op, implementation, activation, dtype, pass) -> the predicted share of copy, in per cent."""
    with (HERE / "predictions.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    found: dict[tuple[str, ...], float] = {}
    for row in rows:
        activation = row["activation"] if row["op"].startswith("act") else ""
        key = (row["op"], row["implementation"], activation, row["dtype"], row["pass"])
        found[key] = 100 * float(row["predicted_share"])
    return found


def kernel_cases(out: Path) -> dict[tuple[str, ...], dict[str, Record]]:
    """(op, activation, dtype, pass) -> contestant -> record."""
    cases: dict[tuple[str, ...], dict[str, Record]] = {}
    for record in measured(out, "kernels.jsonl"):
        has_one = record.penalty.startswith("act")
        activation = record.activation.partition(",")[0] if has_one else ""
        key = (record.penalty, activation, record.dtype, record.phase)
        cases.setdefault(key, {}).setdefault(record.contestant, record)
    return cases


def kernels(out: Path, few: bool = False) -> Table:
    """Per cent of the copy, GB/s, and the prediction; ``few`` shows one activation."""
    predicted, cases = predictions(), kernel_cases(out)
    if few:
        cases = {key: found for key, found in cases.items() if key[1] in ("", "gelu")}
    names = list(dict.fromkeys(name for found in cases.values() for name in found))
    rows = []
    for (op, activation, dtype, phase), found in cases.items():
        cells = []
        for name in names:
            record = found.get(name)
            impl = name.removeprefix("fastjac:")
            guess = predicted.get((op, impl, activation, dtype, phase))
            text = "–"
            if record is not None and record.pct_copy is None:
                text = record.status
            elif record is not None:
                text = f"{record.pct_copy:.0f}% ({number(record.gbps)})"
            cells.append(text if guess is None else f"{text}, predicted {guess:.0f}%")
        rows.append([op, activation or "–", dtype, phase, *cells])
    return "Kernels: % of copy (GB/s)", ("op", "activation", "dtype", "pass", *names), rows


def host(out: Path) -> Table:
    cells: dict[str, dict[str, str]] = {}
    for row in of_file(out, "host.jsonl"):
        what = row.get("step") or f"{row['op']} {row['phase']}"
        text = "wrong"
        if right(row):
            text = f"{row['host_us']:.0f} / {row['done_us']:.0f} / {row['launches']}"
        cells.setdefault(what, {})[row["contestant"]] = text
    names = list(dict.fromkeys(name for found in cells.values() for name in found))
    rows = [[what, *(found.get(name, "–") for name in names)] for what, found in cells.items()]
    return "Host: µs to issue / µs until done / launches", ("call", *names), rows


def steps(out: Path) -> Table:
    cases: dict[tuple[str, str], dict[str, Record]] = {}
    for record in measured(out, "steps.jsonl"):
        mine = cases.setdefault((record.case, record.dtype), {})
        mine.setdefault(record.contestant, record)  # the first set of contestants counts
    names = list(dict.fromkeys(name for found in cases.values() for name in found))
    rows = []
    for key, found in cases.items():
        cells = []
        for name in names:
            one = found.get(name)
            if one is None or one.median_ms is None:
                cells.append("–" if one is None else one.status)
            else:
                alone = number(one.median_ms)
                cells.append(alone if name == "plain" else f"{ratio(one.overhead)} ({alone})")
        rows.append([*key, *cells])
    return "Steps: × plain (ms)", ("step", "dtype", *names), rows


def wrong(out: Path) -> Table:
    """Every record that is not right, and every item that raised or did not end."""
    rows = []
    for name in FILES:
        for item, state in states(load(out / name)).items():
            if state not in ("ok", "wrong"):
                rows.append([name, item, state])
        for row in of_file(out, name):
            if not right(row):
                why = row.get("reason") or row.get("message") or row.get("why_not")
                if why is None:
                    error = "not finite" if row["error"] is None else f"{row['error']:.2e}"
                    why = f"{row['worst_output']}: {error} > {row['tolerance']:.2e}"
                last = why.strip().splitlines()[-1] if why.strip() else ""
                what = row.get("test") or f"{row['item']}: {row.get('contestant', '')}"
                rows.append([name, what.strip(" :"), last[:200]])
    return "What was not right", ("file", "what", "why"), rows


TABLES: tuple[Callable[[Path], Table], ...] = (
    *(stages, ceilings, correctness, tests, kernels, host, steps, wrong),
)


def show(tables: Iterable[Table], most: int = 40) -> None:
    """Short tables for the terminal; the reply of a run keeps its last 12,000 characters."""
    console = Console(width=118, color_system=None)
    with console.capture() as text:
        for title, columns, rows in tables:
            table = empty_table(title, *columns)
            for row in rows[:most]:
                table.add_row(*map(escape, row))
            if rows:
                console.print(table)
            if len(rows) > most:
                console.print(f"… and {len(rows) - most} more")
    print("\n".join(line.rstrip() for line in text.get().splitlines() if line.strip()))


def markdown(table: Table) -> list[str]:
    title, columns, rows = table
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *escaped)]
    return [f"## {title}", "", *(lines if rows else ["Nothing."]), ""]


def page(out: Path, second: Path | None, folder: Path) -> str:
    """The text of the page; its pictures are drawn into ``pictures`` of the folder."""
    made = {row["item"]: row for row in of_file(out, "run.jsonl")}
    seen, tools = made.get("versions", {}), made.get("tools", {})
    built = made.get("library", {})
    machine = seen.get("machine", {})
    where = ", ".join(machine.get("gpus") or [machine.get("processor", "a machine")])
    lines = [
        "# The run on a GPU",
        "",
        "Written by `python -m benchmarks.gpu.report` from the files of `benchmarks/gpu.sh`.",
        "",
        f"- Machine: {where}; {tools.get('gpu', '')}",
        f"- torch {seen.get('torch')}, CUDA {seen.get('cuda')}, Python {seen.get('python')}, "
        f"Triton {seen.get('backends', {}).get('triton', {}).get('version')}, "
        f"fastjac {seen.get('fastjac')} {seen.get('commit', '')}",
        f"- Library: {'carried' if built.get('runs') else built.get('why_not', 'unknown')}",
        "- How each number is measured: the first lines of the modules in this folder.",
        "",
    ]
    for make in TABLES:
        lines += markdown(make(out))
    if second is not None:
        lines += markdown(("Second call: memcheck, racecheck, ncu", *stages(second)[1:]))
        for name in ("memcheck.txt", "racecheck.txt", "ncu.csv"):
            path = second / name
            last = path.read_text(errors="replace").splitlines()[-6:] if path.exists() else []
            lines += [f"The end of `{name}`:", "", "```", *last, "```", ""]
    found = [record for name in MEASURED for record in measured(out, name)]
    pictures = draw_kernels(kernel_cases(out), predictions(), folder / "pictures")
    pictures += plots.draw(found, folder / "pictures")
    lines += ["## Pictures", ""] if pictures else []
    lines += [f"![{path.stem}](pictures/{path.name})" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("second", type=Path, nargs="?")
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--to", type=Path, default=HERE)
    args = parser.parse_args()
    if args.summary:
        # What matters most stands last.
        show(make(args.out) for make in (host, tests, correctness, steps))
        show([kernels(args.out, few=True), ceilings(args.out)])
        show([wrong(args.out), stages(args.out)], most=15)
        return
    args.to.mkdir(parents=True, exist_ok=True)
    (args.to / "README.md").write_text(page(args.out, args.second, args.to))


if __name__ == "__main__":
    main()
