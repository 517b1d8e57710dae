"""The benchmark behind ``fastjac bench``: cases, contestants, measurement, report, plots.

A case is a penalty on a network, or one phase of one activation. A contestant is a way of computing
it. No contestant is timed before its gradients agree with the float64 truth. A run goes

    case -> problem -> contestants -> gate -> rounds of samples -> records -> tables and pictures

through the modules ``cases``, ``problems``, ``contestants`` (which are set up in ``steps`` and
``phases``), ``gate``, ``measure``, ``runner`` and ``records``; ``report``, ``plots``, ``compare``
and ``page`` need only records.
"""

from fastjac.bench.cases import Case, all_cases, select_cases
from fastjac.bench.contestants import Contestant, all_contestants, select_contestants
from fastjac.bench.measure import Options
from fastjac.bench.records import Record
from fastjac.bench.runner import Outcome, run
from fastjac.bench.steps import Prepared

__all__ = [
    "Case",
    "Contestant",
    "Options",
    "Outcome",
    "Prepared",
    "Record",
    "all_cases",
    "all_contestants",
    "run",
    "select_cases",
    "select_contestants",
]
