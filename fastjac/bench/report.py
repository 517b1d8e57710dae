"""Tables of records on the terminal, and the progress bar of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from fastjac.bench.cases import SUITES, Case
from fastjac.bench.contestants import Contestant
from fastjac.bench.options import Options, contestants_of
from fastjac.bench.records import Record

#: seconds one torch.compile of a step takes, for the estimate only (6 to 55 s on 2 cores)
COMPILE_S = 12.0
TITLES = {
    "step": "Training step",
    "elementwise": "Elementwise op (plain is torch's forward kernel)",
}


def render(records: Sequence[Record], console: Console) -> None:
    """Print the tables: steps, then elementwise ops, then what was wrong."""
    if not records:
        console.print("no records")
        return
    runs = dict.fromkeys((r.machine, r.device, r.dtype, r.threads) for r in records)
    for run in runs:
        mine = [r for r in records if (r.machine, r.device, r.dtype, r.threads) == run]
        where = place(mine[0])
        first = mine[0]
        built = f"torch {first.torch}, fastjac {first.fastjac} {first.commit}".rstrip()
        console.print(Text.assemble("\n", (where, "bold"), f", {first.dtype} ({built})"))
        for kind in TITLES:
            rows = [record for record in mine if record.kind == kind]
            if rows:
                console.print(_table(kind, rows, console))
    bad = [record for record in records if record.status != "ok"]
    for record in bad:
        console.print(
            Text.assemble(
                (f"{record.status.upper()} ", "bold red"),
                f"{record.case}, {record.contestant}: {record.message}",
            )
        )


def _percent(value: float | None) -> Text:
    return Text("" if value is None else f"{value:.0f}%")


#: heading -> cell; a column without a value in any row is left out
COLUMNS: dict[str, Callable[[Record], Text]] = {
    "ms": lambda r: Text(number(r.median_ms), style="bold"),
    "p20 - p80": lambda r: Text(
        f"{number(r.p20_ms)} - {number(r.p80_ms)}" if r.p80_ms else "", style="dim"
    ),
    "× plain": lambda r: Text(ratio(r.overhead) if r.kind == "step" else ""),
    "% GEMM": lambda r: _percent(r.pct_gemm),
    "GB/s": lambda r: Text(number(r.gbps)),
    "% copy": lambda r: _percent(r.pct_copy),
    "vs eager": lambda r: _versus(r.vs_eager),
    "peak MB": lambda r: Text(number(r.peak_mb)),
    "kernels": lambda r: Text("" if r.kernels is None else str(r.kernels)),
    "rel err": lambda r: Text(f"{r.rel_err:.1e}" if r.rel_err is not None else "", style="dim"),
    "compile s": lambda r: Text("" if r.compile_s is None else f"{r.compile_s:.1f}"),
}
#: columns that are left out on a terminal narrower than WIDE_FROM
WIDE = ("p20 - p80", "% GEMM", "rel err", "compile s")
WIDE_FROM = 108


def _table(kind: str, records: Sequence[Record], console: Console) -> Table:
    table = empty_table(TITLES[kind], "contestant")
    columns = {
        heading: cell
        for heading, cell in COLUMNS.items()
        if (console.width >= WIDE_FROM or heading not in WIDE) and any(map(cell, records))
    }
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for case in dict.fromkeys(record.case for record in records):
        rows = [record for record in records if record.case == case]
        for k, record in enumerate(rows):
            if record.status == "ok":
                cells = [cell(record) for cell in columns.values()]
            else:
                cells = [Text(record.status.upper(), style="bold red")]
            name = Text(record.contestant, style=_style(record))
            table.add_row(case if k == 0 else "", name, *cells, end_section=k == len(rows) - 1)
    return table


def empty_table(title: str, *names: str) -> Table:
    """A table with a column for the case, and further ones for text."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("case", *names):
        table.add_column(name, no_wrap=True)
    return table


def _style(record: Record) -> str:
    if record.status != "ok":
        return "bold red"
    if record.contestant == "fastjac":
        return "bold green"
    return "dim" if record.contestant == "plain" else ""


def _versus(value: float | None) -> Text:
    """Faster than eager in green, slower in red, within 2% without colour."""
    if value is None:
        return Text("")
    style = "green" if value > 1.02 else "red" if value < 0.98 else ""
    return Text(ratio(value), style=style)


def place(record: Record) -> str:
    """Processor and threads, or GPU."""
    if record.device != "cpu":
        return record.machine
    return f"{record.machine}, {record.threads} thread{'s' if record.threads > 1 else ''}"


def number(value: float | None) -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def ratio(value: float | None) -> str:
    """``2.27×``."""
    return "" if value is None else f"{value:.2f}×"


def render_list(
    cases: Iterable[Case],
    contestants: Sequence[Contestant],
    options: Options,
    console: Console,
) -> None:
    """Print the suites, the cases with the contestants that would run, and why others would not."""
    suites = Table(
        "suite", "", title="Suites", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    for suite, what in SUITES.items():
        suites.add_row(suite, what)
    console.print(suites)
    table = empty_table("Cases")
    table.add_column("suites", overflow="fold")
    table.add_column("contestants", overflow="fold")
    cases = list(cases)
    for case in cases:
        entered = " ".join(c.name for c in contestants_of(case, contestants, options))
        table.add_row(case.name, " ".join(case.suites), entered)
    console.print(table)
    reasons: dict[str, set[str]] = {}
    for contestant in contestants:
        for case in cases:
            reason = contestant.why_not(case, options.device, options.dtype)
            if reason is not None:
                reasons.setdefault(contestant.name, set()).add(reason)
    for name, why in reasons.items():
        console.print(f"{name} is left out: {'; '.join(sorted(why))}", style="dim", highlight=False)


class ProgressBar:
    """Told how far a run has come, draws a bar with an estimate of the rest."""

    def __init__(
        self,
        cases: Sequence[Case],
        contestants: Sequence[Contestant],
        options: Options,
        console: Console,
    ) -> None:
        self._expected = {
            case.name: expected_seconds(contestants_of(case, contestants, options), options)
            for case in cases
        }
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[position]}", style="bold"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            _Remaining(),
            TextColumn("{task.description}", style="dim"),
            console=console,
            transient=True,
        )
        total = sum(self._expected.values())
        self._task = self.progress.add_task("", total=total, position="")

    def __enter__(self) -> ProgressBar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, case: Case, doing: str) -> None:
        """Show the case and what is being done; "" says that the case is finished."""
        if not doing:
            self.progress.advance(self._task, self._expected[case.name])
            return
        number = [*self._expected].index(case.name) + 1
        position = f"{number}/{len(self._expected)} {case.name}"
        self.progress.update(self._task, position=position, description=doing)


class _Remaining(ProgressColumn):
    """What is left: the expected seconds, scaled by how the finished cases kept to theirs."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        elapsed, total = task.finished_time or task.elapsed or 0.0, task.total or 0.0
        done = task.completed
        left = total - elapsed if done <= 0 else (total - done) * elapsed / done
        minutes, seconds = divmod(max(0, round(left)), 60)
        return Text(f"about {minutes}:{seconds:02d} left", style="cyan")


def expected_seconds(contestants: Sequence[Contestant], options: Options) -> float:
    """Rough duration of a case: sampling, one compile per contestant that compiles, the gate."""
    compiling = COMPILE_S * sum(contestant.compiles for contestant in contestants)
    # and the ceiling, which is sampled like a contestant
    return 0.5 + 1.3 * options.budget_s * (len(contestants) + 1) + compiling
