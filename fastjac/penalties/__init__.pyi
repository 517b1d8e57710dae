# Written by python -m fastjac.cli.support.
from collections.abc import Callable
from typing import Any

from fastjac.input_jacobian.penalty import InputPenalty as InputPenalty
from fastjac.input_jacobian.pullback import Pullback as Pullback
from fastjac.penalties.accumulated_dreg import AccumulatedDREG as AccumulatedDREG
from fastjac.penalties.confidence import ConfidencePenalty as ConfidencePenalty
from fastjac.penalties.contractive import Contractive as Contractive
from fastjac.penalties.contractive import GuRigazio as GuRigazio
from fastjac.penalties.datagrad import DataGrad as DataGrad
from fastjac.penalties.dreg import DREG as DREG
from fastjac.penalties.finite_difference import FiniteDifferenceDataGrad as FiniteDifferenceDataGrad
from fastjac.penalties.frobreg import FrobReg as FrobReg
from fastjac.penalties.gradient_penalty import Eikonal as Eikonal
from fastjac.penalties.gradient_penalty import GradientPenalty as GradientPenalty
from fastjac.penalties.igpen import IGPen as IGPen
from fastjac.penalties.jacobian_reg import JacobianReg as JacobianReg
from fastjac.penalties.jacreg import JacReg as JacReg
from fastjac.penalties.onehot import OneHot as OneHot
from fastjac.penalties.onehot import RandomOneHot as RandomOneHot
from fastjac.penalties.registry import Example as Example
from fastjac.penalties.registry import PenaltySpec as PenaltySpec
from fastjac.penalties.sobolev import Sobolev as Sobolev
from fastjac.penalties.spectreg import SpectReg as SpectReg
from fastjac.penalties.tangentprop import TangentProp as TangentProp
from fastjac.penalty import Penalty as Penalty

__all__: list[str]
PENALTIES: dict[str, PenaltySpec]
accumulated_dreg: Callable[..., Any]
contractive: Callable[..., Any]
dreg: Callable[..., Any]
gu_rigazio: Callable[..., Any]
datagrad: Callable[..., Any]
eikonal: Callable[..., Any]
finite_difference_datagrad: Callable[..., Any]
frobreg: Callable[..., Any]
gradient_penalty: Callable[..., Any]
igpen: Callable[..., Any]
jacobian_reg: Callable[..., Any]
jacreg: Callable[..., Any]
onehot: Callable[..., Any]
random_onehot: Callable[..., Any]
sobolev: Callable[..., Any]
spectreg: Callable[..., Any]
tangentprop: Callable[..., Any]
confidence_penalty: Callable[..., Any]
