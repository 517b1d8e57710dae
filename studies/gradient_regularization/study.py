"""The declaration of the study: its runs and its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from studies.data import found
from studies.experiment import Experiment, Study
from studies.gradient_regularization import (
    cifar,
    elsewhere,
    mnist,
    mnist_full,
    questions,
    report,
    sin,
)
from studies.gradient_regularization.choices import BOUND
from studies.gradient_regularization.hypotheses import hypotheses
from studies.settings import cross
from studies.statistics import claims_table
from studies.tables import runs

ITERATIONS = 2000
FEWER, MORE = 1000, 10_000  # to see whether these are enough
SPECTREG = (0.01, 0.03, 0.1)
DATAGRAD = (0.3, 1.0, 3.0, 10.0)
DECADES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
BOUNDS = (0.0001, 0.001, 0.1, 1.0)

#: The λ of tables 1, 2, 4 and 6 that seeds 0 to 4 choose on the development images.
CHOSEN = (
    mnist.Run(network="plain"),
    mnist.Run(network="plain", penalty="SpectReg", weight=0.03),
    mnist.Run(network="plain", penalty="DataGrad", weight=3.0),
    mnist.Run(network="batch norm"),
    mnist.Run(network="batch norm", penalty="SpectReg", weight=0.01),
    mnist.Run(network="batch norm", penalty="DataGrad", weight=3.0),
    mnist.Run(),
    mnist.Run(penalty="SpectReg", weight=0.1),
    mnist.Run(penalty="DataGrad", weight=3.0),
    mnist.Run(confidence=0.03),
    mnist.Run(confidence=0.03, penalty="SpectReg", weight=0.03),
    mnist.Run(confidence=0.03, penalty="DataGrad", weight=1.0),
    mnist.Run(decay=0.0),
    mnist.Run(decay=0.0, penalty="SpectReg", weight=0.03),
    mnist.Run(decay=0.0, penalty="DataGrad", weight=0.3),
    mnist.Run(penalty="JacReg", weight=0.3),
    mnist.Run(penalty="FrobReg", weight=0.003),
)

Runs = Iterable[mnist.Run]


def tables(seeds: Sequence[int]) -> Runs:
    """Tables 1, 2, 4 and 6: 2,000 images."""
    base = {"seed": seeds}
    for network, decay in (("dropout", 5e-4), ("plain", 5e-4), ("dropout", 0.0)):
        cell = {**base, "network": [network], "decay": [decay]}
        yield from cross(mnist.Run, **cell)
        yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=SPECTREG)
        yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=DATAGRAD)
    cell = {**base, "network": ["batch norm"]}
    yield from cross(mnist.Run, **cell)
    yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=(0.003, 0.01, 0.03))
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=(0.1, 1.0, 3.0))
    yield from cross(mnist.Run, **base, confidence=(0.01, 0.03, 0.1))
    cell = {**base, "confidence": [0.03]}
    yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=(0.01, 0.03))
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=(0.3, 1.0))
    yield from cross(mnist.Run, **base, penalty=["FrobReg"], weight=(0.003, 0.01))
    yield from cross(mnist.Run, **base, penalty=["JacReg"], weight=(0.3, 1.0))


def chosen(seeds: Sequence[int]) -> Runs:
    """More seeds of those, and of a λ that is not tuned: with five pairs, no p-value is small."""
    bounded = mnist.Run(penalty="DataGrad", weight=DECADES[-1], bound=BOUND)
    for run in (*CHOSEN, bounded):
        yield from (replace(run, seed=seed) for seed in seeds)


def sizes(seeds: Sequence[int]) -> Runs:
    """Figure 2: the number of training images."""
    cell = {"seed": seeds, "size": (200, 500, 1000, 2000)}
    yield from cross(mnist.Run, **cell)
    yield from cross(mnist.Run, **cell, confidence=(0.01, 0.1))
    yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=(0.03, 0.1))
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=(0.3, 1.0, 3.0))
    yield from cross(mnist.Run, **cell, penalty=["JacReg"], weight=[1.0])


def decays(seeds: Sequence[int]) -> Runs:
    """Figure 4: the weight of DataGrad and the weight decay."""
    cell = {"seed": seeds, "decay": (0.0, 5e-4, 5e-3)}
    yield from cross(mnist.Run, **cell)
    weights = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0)
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=weights)


def hidden(seeds: Sequence[int]) -> Runs:
    """The second open question: gradients with respect to hidden layers."""
    cell = {"seed": seeds, "at": questions.PLACES}
    yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=(0.01, 0.1, 1.0))
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=(0.3, 3.0, 30.0))


def untuned(seeds: Sequence[int]) -> Runs:
    """The first open question: DataGrad over five decades of λ, as it is and with a bound."""
    cell = {"seed": seeds, "penalty": ["DataGrad"]}
    yield from cross(mnist.Run, **cell, bound=[0.0, BOUND], weight=DECADES)
    yield from cross(mnist.Run, **cell, bound=BOUNDS, weight=DECADES[-1:])


def longer(seeds: Sequence[int]) -> Runs:
    """The iterations of the paper, to see what more of them change."""
    cell = {"seed": seeds}
    yield from cross(mnist.Run, **cell)
    yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=[0.03])
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=[1.0])


def experiments(quick: bool, data: Path | None) -> Sequence[Experiment]:
    """The tables and figures of the paper, and its two open questions; or a sample of each."""
    own = found(data) if data else {}
    seen: set[mnist.Run] = set()

    def lenet(name: str, settings: Runs, iterations: int = ITERATIONS) -> Experiment:
        new = [replace(setting, iterations=iterations) for setting in settings]
        new = [setting for setting in new if setting not in seen]
        seen.update(new)
        if "mnist-full" in own:
            return Experiment.of(name, mnist_full.train, new, directory=data)
        return Experiment.of(name, mnist.train, new)

    ten, five = range(10), range(5)
    small = (0.0, 1e-4, 3e-4)  # not in the paper; a squared norm needs smaller weights
    weights = (*small, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    declared = [
        lenet("tables", tables(five)),
        lenet("seeds", chosen(ten[5:])),
        lenet("untuned", untuned(five)),
        lenet("hidden", hidden(ten)),
        lenet("longer", longer(range(3)), MORE),
        lenet("fewer", tables(five), FEWER),
        lenet("decays", decays(five)),
        lenet("sizes", sizes(five)),
        Experiment.of(
            "sin",
            sin.train,
            (
                *cross(sin.Run, data=["SIN"], seed=range(20), penalty=["SpectReg"], weight=weights),
                *cross(sin.Run, data=["SIN2"], seed=ten, penalty=["SpectReg"], weight=weights),
            ),
        ),
        Experiment.of(
            "elsewhere",
            elsewhere.train,
            cross(
                elsewhere.Run,
                data=("digits", "cancer", "segments", "phishing"),
                seed=five,
                weight=(0.0, 0.1, 1.0, 10.0, 100.0, 1000.0),
                bound=(0.0, 10 * BOUND),  # their variance is 1; that of the pixels is 0.095
            ),
        ),
    ]
    if "cifar10" in own:
        rates = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
        full = partial(
            cross, cifar.Run, size=[50_000], augment=[True], iterations=[200_000], seed=[0]
        )
        few = partial(cross, cifar.Run, seed=five)
        settings = [
            *few(),
            *few(confidence=[0.003]),
            *few(penalty=["SpectReg"], weight=[0.003]),
            *few(penalty=["DataGrad"], weight=[1.0]),
            *full(),
            *full(penalty=["SpectReg", "DataGrad"], weight=rates),
        ]
        declared.append(Experiment.of("cifar", cifar.train, settings, directory=data))
    return [_sample(experiment) for experiment in declared] if quick else declared


def _sample(experiment: Experiment) -> Experiment:
    """Two seeds of each cell, with one weight, and with two in the tables; a few iterations."""
    most = 2 if experiment.name == "tables" else 1
    weights: dict[object, set[float]] = {}
    kept = []
    for setting in experiment.settings:
        assert isinstance(setting, (mnist.Run, sin.Run, cifar.Run, elsewhere.Run))
        tried = weights.setdefault(replace(setting, seed=0, weight=0.0), set())
        if setting.seed < 2 and (len(tried) < most or setting.weight in tried):
            tried.add(setting.weight)
            kept.append(replace(setting, iterations=20))
    return replace(experiment, settings=tuple(kept))


STUDY = Study(
    name="gradient_regularization",
    title="Gradient regularisation improves accuracy of discriminative models (Varga et al. 2017)",
    experiments=experiments,
    sections={
        "runs": runs,
        "claims": lambda frames, _pictures: claims_table(hypotheses(frames)),
        "tables": report.tables,
        "convergence": report.convergence,
        "figure-2": report.figure_2,
        "figure-4": report.figure_4,
        "sin": report.table_7,
        "untuned": questions.untuned,
        "hidden": questions.hidden,
        "cifar": report.cifar_tables,
    },
)
