"""The file of records of an experiment: one row for each finished run, appended."""

from __future__ import annotations

import csv
import io
import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import fastjac
from studies.experiment import ROOT, Experiment

Record = dict[str, Any]


@dataclass(frozen=True)
class Records:
    """The records of an experiment, in ``<name>.csv`` of a folder.

    Each shard appends to a file of its own, ``<name>.shard-1-of-4.csv``, so that the machines of a
    batch system may share the folder. All of them are read.
    """

    folder: Path
    name: str
    shard: tuple[int, int] = (1, 1)

    @property
    def path(self) -> Path:
        i, n = self.shard
        return self.folder / (f"{self.name}.csv" if n == 1 else f"{self.name}.shard-{i}-of-{n}.csv")

    def append(self, record: Record) -> None:
        """Add a record, and return when it is on the disk.

        A record with a column that the file does not have rewrites the file in one step.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = list(csv.DictReader(io.StringIO(_lines(self.path))))
        header = list(rows[0]) if rows else []
        if set(record) <= set(header):
            line = io.StringIO()
            csv.DictWriter(line, header, restval="", lineterminator="\n").writerow(record)
            with self.path.open("rb+") as file:
                file.truncate(len(_lines(self.path).encode()))
                file.seek(0, os.SEEK_END)
                file.write(line.getvalue().encode())
                file.flush()
                os.fsync(file.fileno())
            return
        header += [name for name in record if name not in header]
        aside = self.path.with_suffix(".new")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, record])
        aside.replace(self.path)

    def keys(self) -> set[str]:
        """The keys of all runs that finished."""
        found: set[str] = set()
        for path in self._paths():
            found |= {row["key"] for row in csv.DictReader(io.StringIO(_lines(path)))}
        return found

    def frame(self, experiment: Experiment) -> pd.DataFrame:
        """The records of the settings of this experiment. Others in the files are left out."""
        texts = [text for path in self._paths() if (text := _lines(path))]
        if not texts:
            return pd.DataFrame()
        frame = pd.concat([pd.read_csv(io.StringIO(text)) for text in texts], ignore_index=True)
        frame = frame[frame["key"].isin(experiment.keys)].drop_duplicates("key")
        return frame.sort_values("key", ignore_index=True)  # independent of who finished first

    def _paths(self) -> list[Path]:
        shards = sorted(self.folder.glob(f"{self.name}.shard-*-of-*.csv"))
        return [path for path in (self.folder / f"{self.name}.csv", *shards) if path.exists()]


def _lines(path: Path) -> str:
    """The text of a file without a last line that a killed process did not finish."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1]


@cache
def provenance() -> Record:
    """The columns of a record that say where, and with what, it was made."""
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "fastjac": fastjac.__version__,
        "machine": fastjac.info.collect()["machine"]["processor"] or platform.machine(),
    }


def _commit() -> str:
    """The commit of the checkout, with ``-dirty`` if a file other than a result was changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    if not (ROOT / ".git").exists():
        return ""
    results = [f":!*.{suffix}" for suffix in ("csv", "png", "md")]
    changed = git("status", "--porcelain", "--", ".", *results)
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
