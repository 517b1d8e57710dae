"""The fused ops, one file each: function, derivatives, fake kernels and schema.

The files are found when the package is imported. An op that is registered with `dispatch.Op` is a
function of this package and of ``fastjac``.
"""

from importlib import import_module
from pkgutil import iter_modules

# By import_module: the attribute `act` of this package becomes the function.
_MODULES = {m.name: import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)}
_OPS = _MODULES["dispatch"].OPS
globals().update({name: getattr(_MODULES[name], name) for name in _OPS})

__all__ = list(_OPS)
