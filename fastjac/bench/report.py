"""Tables of records on the terminal, the list of cases, and the progress bar of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastjac.bench.cases import SUITES, Case
from fastjac.bench.contestants import Contestant, contestants_of, why_not
from fastjac.bench.measure import Options
from fastjac.bench.records import Record, by_run

TITLES = {
    "elementwise": "Elementwise op (plain is torch's forward kernel)",
    "host": "Host cost: a training step with batch 2 and width 4, on one thread\n"
    "Launches are the dispatched operations that are not views. Compiled code does not dispatch.",
    "step": "Training step",
}


def number(value: float | None) -> str:
    """Three significant digits without an exponent."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def time_of(record: Record, value: float | None) -> str:
    """A time of a record: µs of a host case, else ms."""
    return number(value and value * (1e3 if record.kind == "host" else 1))


def ratio(value: float | None) -> str:
    """``2.27×``."""
    return "" if value is None else f"{value:.2f}×"


def place(record: Record) -> str:
    """The GPU, or the processor and the number of threads."""
    if record.device != "cpu":
        return record.machine
    return f"{record.machine}, {record.threads} thread{'s' if record.threads > 1 else ''}"


def versions_of(record: Record) -> str:
    """The versions with which a record was measured."""
    return f"torch {record.torch}, fastjac {record.fastjac} {record.commit}".rstrip()


def _versus(value: float | None) -> Text:
    """Green if faster than eager, red if slower, without colour within 2%."""
    style = "" if value is None else "green" if value > 1.02 else "red" if value < 0.98 else ""
    return Text(ratio(value), style=style)


def _launches(record: Record) -> str:
    if record.launches is None:
        return "–" if record.kind == "host" else ""
    return str(record.launches)


#: Heading -> cell. A column that no row has a value for is left out.
COLUMNS: dict[str, Callable[[Record], str | Text]] = {
    "ms": lambda r: "" if r.kind == "host" else Text(number(r.median_ms), style="bold"),
    "µs": lambda r: Text(time_of(r, r.median_ms), style="bold") if r.kind == "host" else "",
    "p20 - p80": lambda r: f"{time_of(r, r.p20_ms)} - {time_of(r, r.p80_ms)}" if r.p80_ms else "",
    "× plain": lambda r: "" if r.kind == "elementwise" else ratio(r.overhead),
    "% GEMM": lambda r: "" if r.pct_gemm is None else f"{r.pct_gemm:.0f}%",
    "GB/s": lambda r: number(r.gbps),
    "% copy": lambda r: "" if r.pct_copy is None else f"{r.pct_copy:.0f}%",
    "vs eager": lambda r: _versus(r.vs_eager),
    "peak MB": lambda r: number(r.peak_mb),
    "launches": _launches,
    "rel err": lambda r: "" if r.rel_err is None else f"{r.rel_err:.1e}",
    "compile s": lambda r: "" if r.compile_s is None else f"{r.compile_s:.1f}",
}
#: What the columns mean.
LEGEND = {
    "ms": "the median time of a step or an op",
    "µs": "the median time of a step",
    "p20 - p80": "the middle 60% of the times",
    "× plain": "the time divided by that of the step without penalty, in eager PyTorch",
    "% GEMM": "the share of the speed of a large matrix product that the step reaches; above "
    "100% if its products are faster than PyTorch's",
    "GB/s": "the bytes that the op must read and write, divided by its time",
    "% copy": "the share of the speed of a copy that the op reaches",
    "vs eager": "how many times as fast as eager PyTorch",
    "peak MB": "the memory that a step allocates at its peak, without parameters and inputs",
    "launches": "the operations that a step starts",
    "rel err": "the error of the gradients, relative to float64",
    "compile s": "the time of the first call, which compiles",
}
#: What the contestants are; those of one implementation or engine are named after it.
WAYS = {
    "plain": "a step without penalty (of an op: PyTorch's forward)",
    "plain-compiled": "the same under torch.compile",
    "eager": "the PyTorch idiom: torch.autograd.grad(..., create_graph=True); for DREG, the slopes",
    "compiled": "the PyTorch idiom under torch.compile, by torch.func (fastjac/bench/idioms.py)",
    "jacobianreg": "the algorithm of facebookresearch's jacobian_regularizer",
    "jax": "the same step in JAX, under jax.jit",
    "fastjac": "the penalty of fastjac",
    "fastjac+compile": "the penalty of fastjac in a step under fastjac.compile",
}
#: The columns that a terminal narrower than WIDE_FROM does not show; launches it shows of the host.
WIDE = ("p20 - p80", "% GEMM", "launches", "rel err", "compile s")
WIDE_FROM = 130


def render(records: Sequence[Record], console: Console) -> None:
    """Print a table for each kind of case, the meaning of the columns, and what was wrong."""
    if not records:
        console.print("no records")
    shown: set[str] = set()
    for mine in by_run(records).values():
        where = (place(mine[0]), "bold")
        console.print(Text.assemble("\n", where, f", {mine[0].dtype} ({versions_of(mine[0])})"))
        for kind in TITLES:
            rows = [record for record in mine if record.kind == kind]
            if rows:
                table = _table(kind, rows, console)
                console.print(table)
                shown |= {str(column.header) for column in table.columns}
    names = {record.contestant for record in records}
    for legend in (WAYS, LEGEND):
        for name, meaning in legend.items():
            if name in names | shown:
                console.print(Text.assemble((f"{name:>15}", "bold"), f"  {meaning}"))
    bad: dict[tuple[str, str, str], list[str]] = {}
    for r in records:
        if r.status != "ok":
            bad.setdefault((r.status, r.case, r.message), []).append(r.contestant)
    for (status, case, message), ways in bad.items():
        what = f"{case}, {', '.join(ways)}: {message}"
        console.print(Text.assemble((f"{status.upper()} ", "bold red"), what))


def _table(kind: str, records: Sequence[Record], console: Console) -> Table:
    hidden = {*WIDE} if console.width < WIDE_FROM else set()
    if kind == "host":
        hidden.discard("launches")
    columns = {
        heading: cell
        for heading, cell in COLUMNS.items()
        if heading not in hidden and any(map(cell, records))
    }
    table = empty_table(TITLES[kind], "case", "contestant", numbers=list(columns))
    cases: dict[str, list[Record]] = {}
    for record in records:
        cases.setdefault(record.case, []).append(record)
    for case, rows in cases.items():
        for record in rows:
            style = {"fastjac": "bold green", "plain": "dim"}.get(record.contestant, "")
            cells = [cell(record) for cell in columns.values()]
            if record.status != "ok":
                style, cells = "bold red", [Text(record.status.upper(), style="bold red")]
            table.add_row(case, Text(record.contestant, style=style), *cells)
            case = ""
        table.add_section()
    return table


def empty_table(title: str, *names: str, numbers: Sequence[str] = ()) -> Table:
    """A table with columns of text, and columns of numbers on the right."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=name in ("case", "contestant"), overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def render_list(
    cases: Sequence[Case], contestants: Sequence[Contestant], options: Options, console: Console
) -> None:
    """Print the suites, the cases with the contestants that would run, and why others would not."""
    suites = empty_table("Suites", "suite", "what it holds")
    for suite, what in SUITES.items():
        suites.add_row(suite, what)
    table = empty_table("Cases", "case", "suites", "contestants")
    for case in cases:
        entered = " ".join(c.name for c in contestants_of(case, contestants, options))
        table.add_row(case.name, " ".join(case.suites), entered)
    console.print(suites, table)
    for contestant in contestants:
        reasons = {why_not(contestant, case, options) for case in cases} - {None}
        if reasons:
            text = f"{contestant.name} is left out: {'; '.join(sorted(map(str, reasons)))}"
            console.print(text, style="dim", highlight=False)


class ProgressBar(Progress):
    """A bar with an estimate of the remaining time; call it as ``run`` calls its ``watch``."""

    def __init__(
        self,
        cases: Sequence[Case],
        contestants: Sequence[Contestant],
        options: Options,
        console: Console,
    ) -> None:
        super().__init__(
            TextColumn("{task.fields[position]}", style="bold"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("about {task.fields[left]} left", style="cyan"),
            TextColumn("{task.description}", style="dim"),
            console=console,
            transient=True,
        )
        self._expected = {
            case.name: expected_seconds(contestants_of(case, contestants, options), options)
            for case in cases
        }
        self._task = self.add_task("", total=sum(self._expected.values()), position="", left="")

    def __call__(self, case: Case, doing: str) -> None:
        """Show the case and what is being done; an empty text says that the case is finished."""
        if not doing:
            self.advance(self._task, self._expected[case.name])
            return
        total, done = sum(self._expected.values()), self.tasks[0].completed
        # The finished cases say how long an expected second takes on this machine.
        pace = (self.tasks[0].elapsed or 0.0) / done if done else 1.0
        self.update(
            self._task,
            position=f"{[*self._expected].index(case.name) + 1}/{len(self._expected)} {case.name}",
            left=timedelta(seconds=round(pace * (total - done))),
            description=doing,
        )


def expected_seconds(contestants: Sequence[Contestant], options: Options) -> float:
    """Rough duration of a case: the gate, the sampling, and torch.compile (6 to 55 s on 2 cores).

    The ceiling is sampled like a contestant.
    """
    compiling = 12.0 * sum(bool(contestant.compiler) for contestant in contestants)
    return 0.5 + 1.3 * options.budget_s * (len(contestants) + 1) + compiling
