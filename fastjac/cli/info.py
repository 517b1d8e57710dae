"""``fastjac info``: what was built, what can run here, and why anything can't."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import torch

from fastjac._version import __version__
from fastjac.activations import TABLE
from fastjac.ops.dispatch import FLOAT_DTYPES, OPS
from fastjac.ops.native import backend

BACKENDS = ("cpu", "cuda", "triton")


def cpu_name() -> str:
    """The processor's model name."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def collect() -> dict[str, Any]:
    """Everything ``fastjac info`` prints, as plain data (JSON-ready).

    Returns:
        ``fastjac``, ``python``, ``torch``, ``cuda`` (torch's, or None): versions; ``machine``:
        processor, cores, threads, GPUs; ``backends``: per backend whether it was built, whether it
        runs here, the reason if not, and the build's details; ``ops``: per op, device and dtype,
        the implementation that ``auto`` takes; ``activations``: their names.
    """
    backends = {}
    for name in BACKENDS:
        b = backend(name)
        backends[name] = {"built": b.built, "runs": b.runs, "why_not": b.why_not, **b.details}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    ops = {
        op: {
            device: {
                str(dtype).removeprefix("torch."): OPS[op].select(
                    "auto", torch.device(device), dtype
                )
                for dtype in FLOAT_DTYPES
            }
            for device in devices
        }
        for op in OPS
    }
    return {
        "fastjac": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "machine": {
            "processor": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [
                torch.cuda.get_device_name(i)
                for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            ],
        },
        "backends": backends,
        "ops": ops,
        "activations": list(TABLE),
    }


def render(console: Any = None) -> None:
    """Prints `collect` as tables on a ``rich.console.Console`` (default: standard output)."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    info = collect()
    machine = info["machine"]
    console.print(
        f"fastjac {info['fastjac']}  ·  torch {info['torch']}  ·  Python {info['python']}\n"
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
        f"  ·  GPU: {', '.join(machine['gpus']) or 'none'}",
        highlight=False,
    )
    table = Table(
        "backend", "built", "runs here", "details", title="Backends", title_justify="left"
    )
    for name, b in info["backends"].items():
        extra = {k: v for k, v in b.items() if k not in ("built", "runs", "why_not")}
        details = [f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in extra.items()]
        text = "\n".join([*([b["why_not"]] if b["why_not"] else []), *details])
        table.add_row(name, "yes" if b["built"] else "no", "yes" if b["runs"] else "no", text)
    table.add_row("reference", "yes", "yes", "plain torch, every device and dtype")
    console.print(table)
    table = Table("op", "device", *map(_short, FLOAT_DTYPES), title="What impl='auto' takes",
                  title_justify="left")  # fmt: skip
    for op, devices in info["ops"].items():
        for device, chosen in devices.items():
            table.add_row(op, device, *chosen.values())
    console.print(table)
    console.print(f"activations: {', '.join(info['activations'])}", highlight=False)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
