"""fastjac: fused kernels for Jacobian and gradient-norm regularisation in PyTorch."""

from fastjac._version import __version__
from fastjac.dispatch import explain
from fastjac.native import backend as _backend
from fastjac.ops import act

for _name in ("cpu", "cuda"):
    _backend(_name)

__all__ = ["__version__", "act", "explain"]
