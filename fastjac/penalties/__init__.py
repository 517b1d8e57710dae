"""The penalties, each as a module and as a function, and the registry that lists them.

A penalty is one file in this folder that ends with a `PenaltySpec`, and a function in
``fastjac/reference.py``. The registry finds the files; tests, benchmarks and the support table of
the README iterate over `PENALTIES`.
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fastjac.input_jacobian.penalty import InputPenalty
from fastjac.input_jacobian.pullback import Pullback
from fastjac.penalties.registry import Example, PenaltySpec
from fastjac.penalty import Penalty


def _specs() -> list[PenaltySpec]:
    # Not by getattr: the attribute `spectreg` of this package is the function.
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found = [s for m in modules for s in vars(m).values() if isinstance(s, PenaltySpec)]
    return sorted(found, key=lambda spec: spec.place)


PENALTIES: dict[str, PenaltySpec] = {spec.name: spec for spec in _specs()}
"""Every penalty by the name of its function, by kind and then alphabetically."""

_FORMS: dict[str, Any] = {}
for _spec in PENALTIES.values():
    _spec.functional.__module__ = __name__  # pickle finds it there
    _FORMS |= {_spec.module.__name__: _spec.module, _spec.name: _spec.functional}
globals().update(_FORMS)

__all__ = ["PENALTIES", "Example", "InputPenalty", "Penalty", "PenaltySpec", "Pullback", *_FORMS]
