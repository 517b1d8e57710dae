"""The declaration of the study: its runs and its report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from studies.data import found
from studies.experiment import Experiment, Study
from studies.gradient_regularization import cifar, mnist, questions, report, sin
from studies.settings import cross
from studies.tables import runs

SPECTREG = (0.003, 0.01, 0.03, 0.1)
DATAGRAD = (0.3, 1.0, 3.0, 10.0, 30.0)
DECADES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
HIDDEN = ("conv1", "conv2", "fc1", "fc2")


def tables(seeds: Sequence[int], few: Sequence[int]) -> Iterable[mnist.Run]:
    """Tables 1, 2, 4 and 6: 2,000 images."""
    base = {"seed": seeds}
    for network, decay in (("dropout", 5e-4), ("plain", 5e-4), ("dropout", 0.0)):
        cell = {**base, "network": [network], "decay": [decay]}
        yield from cross(mnist.Run, **cell)
        yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=SPECTREG)
        yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=DATAGRAD)
    cell = {**base, "network": ["batch norm"]}
    yield from cross(mnist.Run, **cell)
    yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=(3e-4, 1e-3, 3e-3, 1e-2))
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=(1e-3, 1e-2, 1e-1, 1.0))
    yield from cross(mnist.Run, **base, confidence=(0.01, 0.03, 0.1))
    cell = {**base, "confidence": [0.03]}
    yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=(0.003, 0.01, 0.03))
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=(1.0, 3.0, 10.0))
    exact = {"seed": few, "weight": (0.003, 0.01, 0.03)}
    yield from cross(mnist.Run, **exact, penalty=["FrobReg"])
    yield from cross(mnist.Run, **exact | {"weight": (0.3, 1.0, 3.0)}, penalty=["JacReg"])


def sizes(seeds: Sequence[int]) -> Iterable[mnist.Run]:
    """Figure 2: the number of training images."""
    cell = {"seed": seeds, "size": (200, 500, 1000, 2000)}
    yield from cross(mnist.Run, **cell)
    yield from cross(mnist.Run, **cell, confidence=(0.01, 0.1))
    yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=(0.01, 0.03, 0.1))
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=(1.0, 3.0, 10.0))
    yield from cross(mnist.Run, **cell, penalty=["JacReg"], weight=[1.0])


def decays(seeds: Sequence[int]) -> Iterable[mnist.Run]:
    """Figure 4: the weight of DataGrad and the weight decay."""
    cell = {"seed": seeds, "decay": (0.0, 5e-4, 5e-3)}
    yield from cross(mnist.Run, **cell)
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=DECADES[::2])
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=(30.0, 300.0))


def hidden(seeds: Sequence[int]) -> Iterable[mnist.Run]:
    """The second open question: gradients with respect to hidden layers."""
    cell = {"seed": seeds, "at": HIDDEN}
    yield from cross(mnist.Run, **cell, penalty=["SpectReg"], weight=(0.01, 0.1, 1.0, 10.0))
    yield from cross(mnist.Run, **cell, penalty=["DataGrad"], weight=(0.3, 3.0, 30.0, 300.0))


def untuned(seeds: Sequence[int]) -> Iterable[mnist.Run]:
    """The first open question: DataGrad over four decades of λ, and the one that needs no λ."""
    yield from cross(mnist.Run, seed=seeds, penalty=["DataGrad"], weight=DECADES)


def experiments(quick: bool, data: Path | None) -> Sequence[Experiment]:
    """The tables and figures of the paper, and its two open questions; or a sample of each."""
    seen: set[mnist.Run] = set()

    def lenet(name: str, settings: Iterable[mnist.Run]) -> Experiment:
        new = [setting for setting in settings if setting not in seen]
        seen.update(new)
        return Experiment.of(name, mnist.train, new, **({"directory": data} if data else {}))

    ten, five = range(10), range(5)
    weights = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    declared = [
        lenet("tables", tables(ten, five)),
        lenet("untuned", untuned(ten)),
        lenet("hidden", hidden(five)),
        lenet("decays", decays(five)),
        lenet("sizes", sizes(five)),
        Experiment.of(
            "sin",
            sin.train,
            cross(sin.Run, data=["SIN", "SIN2"], seed=ten, penalty=["SpectReg"], weight=weights),
        ),
    ]
    if data and "cifar10" in found(data):
        rates = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
        few = {"seed": five}
        full = {"size": [50_000], "augment": [True], "iterations": [200_000]}
        both = ["SpectReg", "DataGrad"]
        settings = [
            *cross(cifar.Run, **few),
            *cross(cifar.Run, **few, confidence=[0.003]),
            *cross(cifar.Run, **few, penalty=["SpectReg"], weight=[0.003]),
            *cross(cifar.Run, **few, penalty=["DataGrad"], weight=[1.0]),
            *cross(cifar.Run, **full),
            *cross(cifar.Run, **full, penalty=both, weight=rates),
        ]
        extra = {"directory": data}
        declared.append(Experiment.of("cifar", cifar.train, settings, **extra))
    return [_sample(experiment) for experiment in declared] if quick else declared
