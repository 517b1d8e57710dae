"""The record of one contestant on one case, and where it was measured."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import json
import math
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import fastjac


@dataclass
class Record:
    """One contestant on one case. Times are medians over rounds; None means not measured.

    Attributes:
        case, penalty, kind, suite: Of the case; several suites are separated by spaces.
            A case of the kind ``"host"`` has no peak_mb and no rate of matrix products.
        activation, phase: Of an elementwise case, else empty.
        contestant: Its registered name.
        status: ``"ok"``, ``"wrong"`` (it missed the gate and was not timed) or ``"failed"``.
        device, dtype, threads: Where and in what it ran.
        n_rounds: The number of samples; each has at least 10 ms of repeated
            calls (2 ms before commit 795d4d6).
        median_ms, p20_ms, p80_ms: The time of one call.
        overhead: Its median over the median of the plain step in the same run.
        ratio, ratio_se: The median over the rounds of its time over plain's in the same round, and
            the standard error of the logarithm. Two runs are compared by these.
        vs_eager: Eager's median over its median; above 1 is faster than eager.
        peak_mb: 10^6 bytes allocated at the peak of one call, above the level before it.
            Activations, gradients and temporaries count; parameters and inputs do not.
        rel_err, rel_err_limit: The relative L2 error of the gradients against float64, and the
            limit of the gate.
        compile_s: The set-up and the first call of a contestant that compiles.
        gbps, copy_gbps, pct_copy: Of elementwise cases. The bytes that the op must move over its
            time; the same of ``Tensor.clone`` on buffers of that size in the same rounds; their
            ratio in per cent. An op that reads more than it writes can exceed 100, because a CPU
            reads a cache line before it writes to it.
        gflop, gemm_gflops, pct_gemm: Of steps. 10^9 operations of the matrix products and
            convolutions of the eager idiom (for plain: of the plain step); operations per second
            of a large matrix product in the same rounds, over 10^9; the share of that rate which
            the contestant reaches, in per cent.
        impl: The implementation of the fused ops that a fastjac contestant ran.
        engine: The engine of a fastjac penalty on the input Jacobian.
        launches: The dispatched operations of one call that are not views. None of a contestant
            that compiles, because its kernels do not go through the dispatcher; 0 of a CUDA graph.
        axes: Of a scaling case, see `Case`.
        message: What went wrong.
        torch, triton, fastjac, machine, commit: Versions, and the name of the processor or GPU.
    """

    case: str
    penalty: str
    kind: str
    suite: str
    activation: str
    phase: str
    contestant: str
    status: str
    device: str
    dtype: str
    threads: int
    n_rounds: int = 0
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    overhead: float | None = None
    vs_eager: float | None = None
    peak_mb: float | None = None
    rel_err: float | None = None
    rel_err_limit: float | None = None
    compile_s: float | None = None
    gbps: float | None = None
    copy_gbps: float | None = None
    pct_copy: float | None = None
    ratio: float | None = None
    ratio_se: float | None = None
    gflop: float | None = None
    gemm_gflops: float | None = None
    pct_gemm: float | None = None
    launches: int | None = None
    impl: str = ""
    engine: str = ""
    axes: str = ""
    message: str = ""
    torch: str = ""
    triton: str = ""
    fastjac: str = ""
    machine: str = ""
    commit: str = ""


COLUMNS = tuple(field.name for field in fields(Record))
_REQUIRED = {field.name for field in fields(Record) if field.default is MISSING}


def by_run(records: Iterable[Record]) -> dict[tuple[str, str, str, int], list[Record]]:
    """The records of each machine, device, dtype and thread count."""
    runs: dict[tuple[str, str, str, int], list[Record]] = {}
    for r in records:
        runs.setdefault((r.machine, r.device, r.dtype, r.threads), []).append(r)
    return runs


def to_json(records: Iterable[Record]) -> str:
    """A list of objects, one for each record. NaN and infinity are not JSON and become null."""
    rows = [
        {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(record).items()
        }
        for record in records
    ]
    return json.dumps(rows, indent=1)


def check_csv(path: Path) -> tuple[str, ...]:
    """The columns of a CSV file to which records may be added; empty if it is new.

    Raises:
        ValueError: The file has other columns.
    """
    if not path.exists() or path.stat().st_size == 0:
        return ()
    with path.open(newline="") as file:
        header = tuple(next(csv.reader(file)))
    if not _REQUIRED <= {*header} <= {*COLUMNS}:
        raise ValueError(f"{path} has other columns than a file of records; name a new file.")
    return header


def append_csv(records: Sequence[Record], path: Path) -> None:
    """Add records to a CSV file, which is created with a header line if it does not exist.

    A file that lacks columns of this version is rewritten with all of them.
    """
    header = check_csv(path)
    if header and header != COLUMNS:
        aside = path.with_name(path.name + ".new")
        append_csv(load(path), aside)
        aside.replace(path)  # in one step, so that no record can be lost
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not header:
            writer.writeheader()
        writer.writerows(asdict(record) for record in records)


def load(path: Path) -> list[Record]:
    """The records of a ``.json`` or ``.csv`` file that this module wrote.

    Raises:
        ValueError: The file holds something else.
    """
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                return parse(csv.DictReader(file))
        return parse(json.loads(path.read_text()))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a list of benchmark records: {error}") from error


def parse(rows: Iterable[dict[str, Any]]) -> list[Record]:
    """The records of rows, which may have further columns."""
    return [_parse(row) for row in rows]


def _parse(row: dict[str, Any]) -> Record:
    """The record of a row, whose values may be text. A column that is missing has its default."""
    values: dict[str, Any] = {}
    for field in fields(Record):
        value = row[field.name] if field.name in _REQUIRED else row.get(field.name)
        kind = str(field.type).removesuffix(" | None")
        if value not in (None, ""):
            values[field.name] = {"str": str, "int": int, "float": float}[kind](value)
        elif kind == "str":
            values[field.name] = ""
    return Record(**values)


@functools.cache
def versions(device_type: str) -> dict[str, Any]:
    """The columns of a record that say where, and with what, it was measured."""
    processor = fastjac.info.collect()["machine"]["processor"]
    return {
        "torch": torch.__version__,
        "triton": _version_of("triton"),
        "fastjac": fastjac.__version__,
        "machine": torch.cuda.get_device_name() if device_type == "cuda" else processor,
        "commit": commit(),
    }


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Short hash of the checkout that fastjac runs from, ``-dirty`` if it is modified, or empty."""
    root = Path(fastjac.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # an installed package: a repository around it is another
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
