"""The penalties, each a module and a function of one name, and the registry that lists them.

Tests, benchmarks and the README's support table iterate over ``PENALTIES``. A new penalty is one
file that ends in a ``PenaltySpec``, its name in ``_FILES`` and among the imports, and a function of
its name in ``fastjac/reference.py``.
"""

from importlib import import_module

from fastjac.penalties.accumulated_dreg import AccumulatedDREG, accumulated_dreg
from fastjac.penalties.confidence import ConfidencePenalty, confidence_penalty
from fastjac.penalties.contractive import Contractive, GuRigazio, contractive, gu_rigazio
from fastjac.penalties.datagrad import DataGrad, datagrad
from fastjac.penalties.dreg import DREG, dreg
from fastjac.penalties.finite_difference import (
    FiniteDifferenceDataGrad,
    finite_difference_datagrad,
)
from fastjac.penalties.frobreg import FrobReg, frobreg
from fastjac.penalties.gradient_penalty import Eikonal, GradientPenalty, eikonal, gradient_penalty
from fastjac.penalties.igpen import IGPen, igpen
from fastjac.penalties.jacobian_reg import JacobianReg, jacobian_reg
from fastjac.penalties.jacreg import JacReg, jacreg
from fastjac.penalties.onehot import OneHot, RandomOneHot, onehot, random_onehot
from fastjac.penalties.registry import Example, PenaltySpec
from fastjac.penalties.sobolev import Sobolev, sobolev
from fastjac.penalties.spectreg import SpectReg, spectreg
from fastjac.penalties.tangentprop import TangentProp, tangentprop
from fastjac.penalty import Penalty

# In the order of the README's table. By import_module, since the package attribute `spectreg` is
# the function.
_FILES = (
    "dreg",
    "contractive",
    "accumulated_dreg",
    "spectreg",
    "datagrad",
    "igpen",
    "frobreg",
    "jacreg",
    "onehot",
    "jacobian_reg",
    "gradient_penalty",
    "tangentprop",
    "sobolev",
    "finite_difference",
    "confidence",
)

PENALTIES: dict[str, PenaltySpec] = {
    spec.name: spec
    for file in _FILES
    for spec in vars(import_module(f"{__name__}.{file}")).values()
    if isinstance(spec, PenaltySpec)
}

__all__ = [
    "DREG",
    "PENALTIES",
    "AccumulatedDREG",
    "ConfidencePenalty",
    "Contractive",
    "DataGrad",
    "Eikonal",
    "Example",
    "FiniteDifferenceDataGrad",
    "FrobReg",
    "GradientPenalty",
    "GuRigazio",
    "IGPen",
    "JacReg",
    "JacobianReg",
    "OneHot",
    "Penalty",
    "PenaltySpec",
    "RandomOneHot",
    "Sobolev",
    "SpectReg",
    "TangentProp",
    "accumulated_dreg",
    "confidence_penalty",
    "contractive",
    "datagrad",
    "dreg",
    "eikonal",
    "finite_difference_datagrad",
    "frobreg",
    "gradient_penalty",
    "gu_rigazio",
    "igpen",
    "jacobian_reg",
    "jacreg",
    "onehot",
    "random_onehot",
    "sobolev",
    "spectreg",
    "tangentprop",
]
