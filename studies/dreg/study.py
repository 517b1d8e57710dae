"""The declaration of the study: its runs and its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.data import SOURCES, found
from studies.dreg import report
from studies.dreg.cost import compare
from studies.dreg.training import STRENGTHS, VARIANTS, Run, train
from studies.experiment import Experiment, Study
from studies.networks import ACTIVATIONS
from studies.settings import cross
from studies.tables import runs

SCARCE = (0.1, 0.3)
MEAN = "mean over positions"


def experiments(quick: bool, data: Path | None) -> Sequence[Experiment]:
    """The sweep of 960 runs, and the experiments beside it; with ``quick`` a sample of each."""
    own = list(found(data)) if data else []
    names = [*SOURCES, *own]
    activations = list(ACTIVATIONS)
    steps = [1000]
    seeds = range(5)
    if quick:
        names, activations, steps, seeds = ["mnist1d", "cancer"], ["relu", "gelu"], [60], range(2)
    every = {
        "data": names,
        "activation": activations,
        "regularizer": list(STRENGTHS),
        "seed": seeds,
        "steps": steps,
    }
    some = every | {"data": names[:2] if quick else ["digits", "mnist1d", "segments", "words"]}
    some["activation"] = [name for name in activations if name in ("tanh", "gelu")]
    dreg = some | {"regularizer": ["DREG"]}
    # With one position, as in an MLP, the mean over positions is the default.
    mean = every | {"regularizer": ["DREG"], "variant": [MEAN], "fraction": [*SCARCE, 1.0]}
    mean["data"] = [name for name in names if name in ("mnist", "mnist1d", *own)]
    tuned = some | {"regularizer": ["weight decay", "dropout", "IGPen", "DREG"]}
    cost = every | {"activation": ["relu", "gelu"], "seed": [0], "steps": [s // 5 for s in steps]}
    return (
        Experiment.of("sweep", train, cross(Run, **every), directory=data),
        Experiment.of("scarcity", train, cross(Run, **every, fraction=SCARCE), directory=data),
        Experiment.of("mean", train, cross(Run, **mean), directory=data),
        Experiment.of(
            "options", train, cross(Run, **dreg, variant=list(VARIANTS)[1:]), directory=data
        ),
        Experiment.of(
            "strengths", train, cross(Run, **tuned, scale=[0.1, 0.3, 3.0]), directory=data
        ),
        Experiment.of("cost", compare, cross(Run, **cost), alone=True, directory=data),
    )


STUDY = Study(
    name="dreg",
    title="The sweep of DREG (arXiv 2606.23942)",
    experiments=experiments,
    sections={
        "runs": runs,
        "claims": report.claims,
        "accuracy": report.accuracy,
        "activations": report.activations,
        "noise": report.noise,
        "scarcity": report.scarcity,
        "options": report.options,
        "strengths": report.strengths,
        "gradients": report.gradients,
        "cost": report.cost,
    },
)
