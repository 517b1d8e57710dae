"""What the machine is, what can run on it, and its two ceilings: a copy and a matrix product.

The copy moves 2 GiB from one buffer to another and counts the bytes read plus the bytes written.
All data is random, because matrix products of zeros run faster.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
from collections.abc import Callable, Iterator

import torch

import fastjac
from benchmarks.gpu.work import Item, Row, main
from fastjac.bench.measure import Options, timed
from fastjac.bench.records import commit
from fastjac.bench.runner import settings
from fastjac.ops.native import backend

#: Commands that only read. The settings of the card are left as they are.
TOOLS = {
    "gpu": "nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,"
    "clocks.mem,temperature.gpu,power.limit --format=csv,noheader",
    "nvcc": "nvcc --version",
    "ncu": "ncu --version",
    "compute-sanitizer": "compute-sanitizer --version",
}


def versions(device: str) -> Iterator[Row]:
    row: Row = {"commit": commit(), **fastjac.info.collect()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row["capability"] = f"{properties.major}.{properties.minor}"
        row["multiprocessors"] = properties.multi_processor_count
        row["l2_mb"] = properties.L2_cache_size / 1e6
    yield row


def library(device: str) -> Iterator[Row]:
    """Whether the compiled library of this device runs; if not, the runner builds it."""
    found = backend(device)
    yield {"runs": found.runs, "why_not": found.why_not}


def tools() -> Iterator[Row]:
    def said(command: str) -> str:
        try:
            done = subprocess.run(command.split(), capture_output=True, text=True, timeout=20)
            return (done.stdout + done.stderr).strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)

    yield {name: said(command) for name, command in TOOLS.items()}


def _median(step: Callable[[], object], device: str) -> float:
    for _ in range(3):
        step()
    return statistics.median(timed(step, 1, torch.device(device)) for _ in range(10))


def copy(device: str) -> Iterator[Row]:
    size = (2 << 30 if device == "cuda" else 8 << 20) // 4
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source), device)
    yield {"gbps": 2 * source.nbytes / seconds / 1e9, "bytes": source.nbytes, "seconds": seconds}


def gemm(device: str, dtype: torch.dtype, tf32: bool) -> Iterator[Row]:
    n = 8192 if device == "cuda" else 256
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with settings(Options(torch.device(device))):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        seconds = _median(lambda: torch.mm(a, b, out=out), device)
    yield {"tflops": 2e-12 * n**3 / seconds, "n": n, "seconds": seconds}


def items(device: str) -> Iterator[Item]:
    yield "versions", functools.partial(versions, device)
    yield "library", functools.partial(library, device)
    yield "copy", functools.partial(copy, device)
    products = (("float32", False), ("float32, TF32", True), ("bfloat16", False))
    for name, tf32 in products:
        dtype = getattr(torch, name.split(",")[0])
        yield f"GEMM {name}", functools.partial(gemm, device, dtype, tf32)
    yield "tools", tools


if __name__ == "__main__":
    main(items)
