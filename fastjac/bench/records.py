"""The record of one contestant on one case, and where it was measured."""

from __future__ import annotations

import csv
import functools
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
        case, penalty, kind, suite: of the case; several suites are separated by spaces.
        activation, phase: of an elementwise case, else empty.
        contestant: its registered name.
        status: ``"ok"``, ``"wrong"`` (the gate refused it, it was not timed) or ``"failed"``.
        device, dtype, threads: what it ran on.
        n_rounds: samples behind the median; each sample is at least 2 ms of repeated calls.
        median_ms, p20_ms, p80_ms: time of one call.
        overhead: median over the plain step's median in the same run.
        ratio, ratio_se: what two runs are compared by: median over the rounds of its time over
            plain's in the same round, and the standard error of its logarithm.
        vs_eager: eager's median over this one's; above 1 is faster than eager.
        peak_mb: 10^6 bytes allocated at the peak of one call, above what was there before it
            (parameters and inputs are not counted; activations, gradients and temporaries are).
        rel_err, rel_err_limit: relative L2 error of the gradients against float64, and the gate.
        compile_s: set-up and first call of a contestant that compiles.
        gbps, copy_gbps, pct_copy: elementwise only. Bytes the op must move over its time; the same
            of ``Tensor.clone`` on buffers of that size in the same rounds; their ratio in percent.
            An op that reads more than it writes can pass 100: a CPU reads a line to write it.
        gflop, gemm_gflops, pct_gemm: steps only. 10^9 floating-point operations of the matrix
            products and convolutions that the case takes (of the eager idiom, whoever is timed;
            of the plain step for plain); operations per second of a large matrix product in the
            same rounds; how much of that the contestant reaches, in percent.
        impl: the implementation of the fused ops that a fastjac contestant ran; ``fastjac`` alone
            takes what ``impl="auto"`` chooses.
        engine: what ran a fastjac penalty on the input Jacobian.
        kernels: how many kernels one step launches; on a GPU only.
        axes: of a scaling case, see `Case`.
        message: what went wrong.
        torch, triton, fastjac, machine, commit: versions and processor or GPU name.
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
    kernels: int | None = None
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


def to_json(records: Iterable[Record]) -> str:
    """A list of objects, one per record; NaN and infinity (not JSON) become null."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    rows = [{key: plain(value) for key, value in asdict(r).items()} for r in records]
    return json.dumps(rows, indent=1)


def check_csv(path: Path) -> bool:
    """Whether records may be added to the file; True if it needs a header line first.

    Raises:
        ValueError: the file has other columns.
    """
    header = _header(path)
    if header and not _REQUIRED <= {*header} <= {*COLUMNS}:
        raise ValueError(f"{path} has other columns than this version writes; name a new file")
    return not header


def append_csv(records: Sequence[Record], path: Path) -> None:
    """Add the records to a CSV file, which is made with a header line if it is not there.

    A file that lacks columns of this version is rewritten with all of them, its rows as they were.
    """
    new = check_csv(path)
    if not new and _header(path) != COLUMNS:
        aside = path.with_name(path.name + ".new")
        append_csv(load(path), aside)
        aside.replace(path)  # in one step: the records of months are in there
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(asdict(record) for record in records)


def _header(path: Path) -> tuple[str, ...]:
    if not path.exists() or path.stat().st_size == 0:
        return ()
    with path.open(newline="") as file:
        return tuple(next(csv.reader(file)))


def load(path: Path) -> list[Record]:
    """Records of a ``.json`` or ``.csv`` file that this module wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
        else:
            rows = json.loads(path.read_text())
        return [_parse(row) for row in rows]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a list of benchmark records: {error}") from error


def _parse(row: dict[str, Any]) -> Record:
    """A row whose values may be text. Columns that it lacks are as in a record by default."""
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
    """The columns of a record that say where and with what it was measured."""
    try:
        import triton
    except ImportError:
        triton_version = ""
    else:
        triton_version = triton.__version__
    processor = fastjac.info.collect()["machine"]["processor"]
    return {
        "torch": torch.__version__,
        "triton": triton_version,
        "fastjac": fastjac.__version__,
        "machine": torch.cuda.get_device_name() if device_type == "cuda" else processor,
        "commit": commit(),
    }


def commit() -> str:
    """Short hash of the checkout fastjac runs from, with ``-dirty`` if it is modified, or empty."""
    root = Path(fastjac.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # installed: a repository around it is someone else's
        return ""
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""
