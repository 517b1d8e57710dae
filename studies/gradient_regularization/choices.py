"""Choose λ on the development set, as the paper does, and take the test accuracies at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from studies.experiment import Frames
from studies.statistics import matching

MNIST = ("tables", "seeds", "untuned", "hidden", "decays", "sizes")
SWEEP = ("tables", "seeds")  # the λ among which the tables choose
USUAL: dict[str, Any] = {
    "size": 2000,
    "network": "dropout",
    "decay": 5e-4,
    "confidence": 0.0,
    "at": "input",
    "bound": 0.0,
}

BOUND = 0.01  # the κ of the first open question

#: Row of a table -> penalty -> the choice.
Choices = dict[str, dict[str, "Choice | None"]]


@dataclass(frozen=True)
class Choice:
    """The runs at the chosen weight.

    Attributes:
        weight: The λ whose mean accuracy on the development set is the highest, and the smallest of
            several such.
        tests: The test accuracy of each seed.
    """

    weight: float
    tests: pd.Series

    def __str__(self) -> str:
        """``97.39 (0.11)``, the mean and the standard deviation of the seeds, and λ."""
        text = f"{self.tests.mean():.2f} ({self.tests.std():.2f})"
        return f"{text}, λ {self.weight:g}" if self.weight else text


def where(frame: pd.DataFrame, **levels: Any) -> pd.DataFrame:
    """The records that have these levels of these factors."""
    for name, level in levels.items():
        frame = frame[frame[name] == level]
    return frame


def like(frame: pd.DataFrame, sweep: pd.DataFrame) -> pd.DataFrame:
    """The records whose penalty, weights and seed are in a sweep.

    Other experiments may have tried more of them in some cells, where the best would be better.
    """
    return matching(frame, sweep, ["penalty", "weight", "confidence", "seed"])


def choose(frame: pd.DataFrame, **levels: Any) -> Choice | None:
    """The choice among the records with these levels, or None if there are none.

    Raises:
        ValueError: A weight and a seed occur twice, so the levels do not fix all factors.
    """
    frame = where(frame, **levels)
    if frame.empty:
        return None
    if frame.duplicated(["weight", "seed"]).any():
        raise ValueError(f"several runs of one weight and seed have the levels {levels}")
    weight = best(frame, "weight")
    if weight is None:
        return None
    return Choice(weight, where(frame, weight=weight).set_index("seed")["test"])


def best(frame: pd.DataFrame, factor: str) -> float | None:
    """The level with the highest mean accuracy on the development set, the first of several such.

    A level counts only if it ran with as many seeds as the others, and none of them failed.
    """
    by = frame.groupby(factor)["dev"]
    scores = by.mean()[by.count() == by.size().max()]
    return None if scores.empty else float(scores.idxmax())


def span(scores: pd.Series, within: float = 0.3) -> tuple[float, float]:
    """The lowest and the highest weight around the best whose score is within 0.3 of the best.

    Arguments:
        scores: Mean accuracies by weight, in ascending order.
    """
    good = scores >= scores.max() - within
    best = int(scores.to_numpy().argmax())
    low = high = best
    while low > 0 and good.iloc[low - 1]:
        low -= 1
    while high < len(scores) - 1 and good.iloc[high + 1]:
        high += 1
    return float(scores.index[low]), float(scores.index[high])


def lenet(frames: Frames, experiments: Sequence[str] = MNIST) -> pd.DataFrame:
    """The records of some experiments on LeNet-5, or of all of them."""
    found = [frames[name] for name in experiments if name in frames and not frames[name].empty]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def table_1(frame: pd.DataFrame) -> Choices:
    """Network × penalty."""
    return {
        network: {
            penalty: choose(frame, **USUAL | {"network": network, "penalty": penalty})
            for penalty in ("none", "SpectReg", "DataGrad")
        }
        for network in ("plain", "batch norm", "dropout")
    }


def table_2(frame: pd.DataFrame) -> Choices:
    """Confidence penalty × penalty. The weight of CP is chosen without another penalty."""
    confidence = best_confidence(frame)
    rows = {"no CP": 0.0, "CP": confidence}
    both = {}
    for row, value in rows.items():
        both[row] = {
            penalty: choose(frame, **USUAL | {"confidence": value, "penalty": penalty})
            for penalty in ("none", "SpectReg", "DataGrad")
        }
    # Beside another penalty CP ran with one weight, 0.03.
    for penalty in ("SpectReg", "DataGrad"):
        both["CP"][penalty] = choose(frame, **USUAL | {"confidence": 0.03, "penalty": penalty})
    return both


def best_confidence(frame: pd.DataFrame, size: int = 2000) -> float:
    """The weight of the confidence penalty with the best accuracy on the development set."""
    usual = {name: level for name, level in USUAL.items() if name != "confidence"}
    alone = where(frame, **usual | {"penalty": "none", "size": size})
    return best(alone[alone["confidence"] > 0], "confidence") or 0.0


def of_method(frame: pd.DataFrame, method: str, size: int) -> dict[str, Any]:
    """The levels of a method of figure 2; CP has the weight that is best alone."""
    if method == "CP":
        return {"penalty": "none", "confidence": best_confidence(frame, size)}
    return {"penalty": method, "confidence": 0.0}


def table_4(frame: pd.DataFrame) -> Choices:
    """Weight decay × penalty."""
    rows = {"no weight decay": 0.0, "weight decay 0.0005": 5e-4}
    return {
        row: {
            penalty: choose(frame, **USUAL | {"decay": decay, "penalty": penalty})
            for penalty in ("none", "SpectReg", "DataGrad")
        }
        for row, decay in rows.items()
    }


def table_6(frame: pd.DataFrame) -> Choices:
    """One projection of the logits' Jacobian, all of the probabilities', all of the logits'."""
    return {
        "": {
            penalty: choose(frame, **USUAL | {"penalty": penalty})
            for penalty in ("SpectReg", "JacReg", "FrobReg")
        }
    }


#: Table of the paper -> its choices.
TABLES = {"table 1": table_1, "table 2": table_2, "table 4": table_4, "table 6": table_6}
