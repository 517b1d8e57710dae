"""The command of a study: run what is missing, then write the report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from studies.experiment import ROOT, Study
from studies.page import write_report
from studies.records import Records
from studies.running import run_missing


def main(study: Study) -> None:
    """Run the command line of a study, ``python -m studies.<name>``."""

    def command(
        quick: Annotated[bool, typer.Option("--quick", help="A sample, in two minutes.")] = False,
        out: Annotated[
            Path | None,
            typer.Option(help="The folder of records and report, by default that of the study."),
        ] = None,
        data: Annotated[
            Path | None, typer.Option(help="A directory with data sets of torchvision.")
        ] = None,
        only: Annotated[
            list[str] | None, typer.Option(help="Run this experiment only; may be repeated.")
        ] = None,
        jobs: Annotated[int, typer.Option(help="Processes; -1 is one for each core.")] = -1,
        backend: Annotated[str, typer.Option(help="loky, or dask for a cluster.")] = "loky",
        scheduler: Annotated[
            str | None, typer.Option(help="The address of the scheduler of a Dask cluster.")
        ] = None,
        shard: Annotated[
            str, typer.Option(help="i/n: every n-th run, for a batch system; no report is written.")
        ] = "1/1",
        again: Annotated[
            bool, typer.Option("--again", help="Repeat the runs that have failed.")
        ] = False,
        report: Annotated[
            bool, typer.Option("--report", help="Write the report of the records; run nothing.")
        ] = False,
    ) -> None:
        console = Console()
        folder = out or (ROOT / "runs" / f"{study.name}-quick" if quick else study.folder)
        experiments = list(study.experiments(quick, data and data.resolve()))
        names = [experiment.name for experiment in experiments]
        for name in only or []:
            if name not in names:
                raise typer.BadParameter(
                    f"{name!r} is no experiment: {', '.join(names)}", param_hint="--only"
                )
        if (scheduler is None) != (backend != "dask"):
            raise typer.BadParameter("a Dask cluster needs --backend dask --scheduler ADDRESS")
        found = re.fullmatch(r"(\d+)/(\d+)", shard)
        part, parts = map(int, found.groups()) if found else (0, 0)
        if not 1 <= part <= parts:
            raise typer.BadParameter(f"{shard!r} is not i/n with 1 ≤ i ≤ n", param_hint="--shard")

        paired = [(e, Records(folder / "records", e.name, (part, parts))) for e in experiments]
        if not report:
            chosen = [pair for pair in paired if not only or pair[0].name in only]
            try:
                run_missing(
                    chosen,
                    jobs=jobs,
                    backend=backend,
                    scheduler=scheduler,
                    again=again,
                    console=console,
                )
            except KeyboardInterrupt:
                console.print("Stopped. The same command goes on from here.")
                raise typer.Exit(130) from None
        if parts > 1:
            console.print(f"Shard {shard} is done. --report writes the report of all shards.")
            return
        frames = {experiment.name: records.frame(experiment) for experiment, records in paired}
        for name, frame in frames.items():
            if frame.attrs["other"]:
                console.print(
                    f"[yellow]{name}: {frame.attrs['other']} records of other settings or of "
                    "other code are not in the report",
                    soft_wrap=True,
                )
            for error, count in frame.get("error", frame).dropna().value_counts().items():
                console.print(f"[red]{name}: {count} × {error}", soft_wrap=True)
        console.print(f"The report is {write_report(study, frames, folder)}.", soft_wrap=True)

    command.__doc__ = f"""{study.title}: run what has no record yet, then write the report."""
    typer.run(command)
