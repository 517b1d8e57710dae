"""The file of records of an experiment: one row for each finished run, appended."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

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

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the file for this process, and cut off a last line that was not finished.

        Raises:
            RuntimeError: Another process holds it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"another process is writing {self.path}: wait for it, or run a shard "
                    "(--shard i/n), which has a file of its own"
                ) from None
            if self.path.exists():
                with self.path.open("rb+") as file:
                    file.truncate(file.read().rfind(b"\n") + 1)
            yield
        self.path.with_suffix(".lock").unlink(missing_ok=True)

    def append(self, record: Record) -> None:
        """Add a record, and return when it is on the disk. Call it in `writing`.

        A record with a column that the file does not have rewrites the file in one step.
        """
        with self.path.open("a+", newline="") as file:
            file.seek(0)
            header = next(csv.reader(file), [])
            if set(record) <= set(header):
                csv.DictWriter(file, header, restval="", lineterminator="\n").writerow(record)
                _flush(file)
                return
        rows = _rows(self.path)
        header += [name for name in record if name not in header]
        aside = self.path.with_suffix(".new")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, record])
            _flush(file)
        aside.replace(self.path)

    def keys(self, *, failed: bool = True) -> set[str]:
        """The keys of all runs that finished, without those that failed if ``failed`` is False."""
        rows = (row for path in self._paths() for row in _rows(path))
        return {row["key"] for row in rows if failed or not row["error"]}

    def frame(self, experiment: Experiment) -> pd.DataFrame:
        """The latest record of each setting of this experiment, of the present code.

        ``attrs["other"]`` is the number of further records in the files.
        """
        rows = [row for path in self._paths() for row in _rows(path)]
        kept = {row["key"]: row for row in rows if row["key"] in experiment.keys}
        text = io.StringIO()
        if kept:
            writer = csv.DictWriter(text, list(dict.fromkeys(n for row in rows for n in row)))
            writer.writeheader()
            # By key: independent of which run finished first.
            writer.writerows(kept[key] for key in sorted(kept))
            text.seek(0)
        # A hash such as 12e4567 would be a number.
        frame = pd.read_csv(text, dtype={"key": str, "commit": str}) if kept else pd.DataFrame()
        frame.attrs["other"] = len({row["key"] for row in rows}) - len(kept)
        return frame

    def _paths(self) -> list[Path]:
        shards = sorted(self.folder.glob(f"{self.name}.shard-*-of-*.csv"))
        return [path for path in (self.folder / f"{self.name}.csv", *shards) if path.exists()]


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file without a last line that a killed process did not finish."""
    text = path.read_text()
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


def _flush(file: IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())


@cache
def here() -> Record:
    """The columns of a record that say where it was made; a worker may be on another machine."""
    return {
        "torch": torch.__version__,
        "fastjac": fastjac.__version__,
        "machine": fastjac.info.collect()["machine"]["processor"] or platform.machine(),
    }


def commit() -> str:
    """The commit of the checkout, with ``-dirty`` if a file other than a result was changed."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    if not (ROOT / ".git").exists():
        return ""
    results = [f":!*.{suffix}" for suffix in ("csv", "png", "md")]
    changed = git("status", "--porcelain", "--", ".", *results)
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
