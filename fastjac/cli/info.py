"""``fastjac info``: what was built, what can run here, and the reasons for what cannot."""

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

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}


def cpu_name() -> str:
    """The model name of the processor."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def collect() -> dict[str, Any]:
    """Everything that ``fastjac info`` prints, as plain data (JSON-ready).

    Returns:
        ``fastjac``, ``python``, ``torch``, ``cuda`` (torch's, or None): versions; ``machine``:
        processor, cores, threads, GPUs; ``backends``: for each backend whether it was built,
        whether it runs here, the reason if not, and the details of the build; ``ops``: for each op,
        device and dtype, the implementation that ``auto`` takes; ``activations``: their names.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backends = {}
    for name in ("cpu", "cuda", "triton"):
        b = backend(name)
        backends[name] = {"built": b.built, "runs": b.runs, "why_not": b.why_not, **b.details}
    ops = {
        name: {
            device: {d: op.select("auto", torch.device(device), DTYPES[d]) for d in DTYPES}
            for device in (("cpu", "cuda") if gpus else ("cpu",))
        }
        for name, op in OPS.items()
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
            "gpus": [torch.cuda.get_device_name(i) for i in range(gpus)],
        },
        "backends": backends,
        "ops": ops,
        "activations": list(TABLE),
    }


def render(console: Any = None) -> None:
    """Print `collect` as tables on a ``rich.console.Console``; the default is standard output."""
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
    headings = ("backend", "built", "runs here", "details")
    table = Table(*headings, title="Backends", title_justify="left")
    for name, b in info["backends"].items():
        yes = ["yes" if b.pop(key) else "no" for key in ("built", "runs")]
        reason = b.pop("why_not")
        details = [f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in b.items()]
        table.add_row(name, *yes, "\n".join([*([reason] if reason else []), *details]))
    table.add_row("reference", "yes", "yes", "plain torch, every device and dtype")
    console.print(table)
    table = Table("op", "device", *DTYPES, title="What impl='auto' takes", title_justify="left")
    for op, devices in info["ops"].items():
        for device, chosen in devices.items():
            table.add_row(op, device, *chosen.values())
    console.print(table)
    console.print(f"activations: {', '.join(info['activations'])}", highlight=False)
