"""The backends: what was built, what can run on this machine, and why not.

The backends ``cpu`` and ``cuda`` are the shared libraries that ``setup.py`` builds; ``triton`` does
not have to be built. A library is loaded once, and loading never raises: a backend that cannot run
keeps the reason, which the error messages of the ops and ``fastjac info`` show.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastjac.activations import table_hash

_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Backend:
    """Whether a backend was built, and why it cannot run here; `why_not` is None if it can."""

    name: str
    built: bool
    why_not: str | None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def runs(self) -> bool:
        return self.why_not is None


@functools.cache
def build_info() -> dict[str, Any]:
    """The record that ``setup.py`` wrote; empty if the package was never installed."""
    path = _PACKAGE / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _library(name: str) -> Backend:
    info = build_info()
    record = info.get(name, {"built": False, "why": "the package was never built (pip install .)"})
    details = {k: v for k, v in record.items() if k not in ("built", "why")}
    if not record["built"]:
        return Backend(name, False, f"the {name} library is not built: {record['why']}", details)
    if info["table_hash"] != table_hash():
        why = f"the {name} library was built with another activation table: reinstall fastjac"
        return Backend(name, True, why, details)
    if name == "cuda" and torch.version.cuda is None:
        return Backend(name, True, "this torch was built without CUDA", details)
    try:
        torch.ops.load_library(str(_PACKAGE / f"_{name}.so"))
    except OSError as error:
        return Backend(
            name, True, f"the {name} library cannot be loaded: {error.__cause__ or error}", details
        )
    if name == "cuda" and not torch.cuda.is_available():
        return Backend(name, True, "torch cannot find a GPU", details)
    return Backend(name, True, None, details)


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend("triton", False, "triton is not installed (pip install triton)")
    import triton

    details: dict[str, Any] = {"version": triton.__version__, "interpreter": triton_interpreted()}
    if not (_PACKAGE / "kernels" / "_phi.py").exists():
        why = "the Triton functions are not generated: reinstall fastjac"
        return Backend("triton", False, why, details)
    if build_info().get("table_hash") != table_hash():  # other ids for the same functions
        why = "the Triton functions are those of another activation table: reinstall fastjac"
        return Backend("triton", True, why, details)
    if not triton_interpreted() and not torch.cuda.is_available():
        why = "torch cannot find a GPU (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
        return Backend("triton", True, why, details)
    return Backend("triton", True, None, details)


def triton_interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors, in the interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def backend(name: str) -> Backend:
    """The backend ``"cpu"``, ``"cuda"`` or ``"triton"``."""
    return _triton() if name == "triton" else _library(name)
