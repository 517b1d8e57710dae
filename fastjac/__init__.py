"""fastjac: fused kernels for Jacobian and gradient-norm regularisation in PyTorch."""

from importlib import import_module
from typing import Any

from fastjac import nn, penalties, presets, reference, schedules
from fastjac._version import __version__
from fastjac.cli import check, info
from fastjac.compiled import compile
from fastjac.explain import explain
from fastjac.functional import FUNCTIONS as _FUNCTIONS
from fastjac.fusing import fuse, unfuse
from fastjac.nn import Act
from fastjac.ops import *  # noqa: F403
from fastjac.ops import __all__ as _ops
from fastjac.ops.native import backend as _backend
from fastjac.penalties import *  # noqa: F403
from fastjac.penalties import __all__ as _penalties
from fastjac.schedules import Warmup, WeightSchedule

for _name in ("cpu", "cuda"):  # before any op runs: the kernels register with torch's dispatcher
    _backend(_name)

globals().update(_FUNCTIONS)

__all__ = [
    "Act",
    "Warmup",
    "WeightSchedule",
    "__version__",
    "check",
    "compile",
    "explain",
    "fuse",
    "info",
    "nn",
    "penalties",
    "presets",
    "reference",
    "schedules",
    "unfuse",
    *_FUNCTIONS,
    *_ops,
    *_penalties,
]


def __getattr__(name: str) -> Any:
    if name != "bench_model":
        raise AttributeError(f"module 'fastjac' has no attribute {name!r}")
    # Imported when it is asked for, and not in __all__: it needs rich, and imports this module.
    try:
        return import_module("fastjac.bench.model").bench_model
    except ModuleNotFoundError as error:
        raise ImportError(
            f'fastjac.bench_model needs {error.name}: pip install "fastjac[bench]"'
        ) from error
