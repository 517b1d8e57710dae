"""fastjac: fused kernels for Jacobian and gradient-norm regularisation in PyTorch."""

from typing import TYPE_CHECKING, Any

from fastjac import nn, penalties, presets, reference, schedules
from fastjac._version import __version__
from fastjac.cli import check, info
from fastjac.compiled import compile
from fastjac.functional import FUNCTIONS as _FUNCTIONS
from fastjac.nn import Act, fuse, unfuse
from fastjac.ops import *  # noqa: F403
from fastjac.ops import __all__ as _ops
from fastjac.ops.dispatch import explain
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

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
