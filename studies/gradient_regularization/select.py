"""Choose λ on the development set, as the paper does, and take the test accuracies at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Choice:
    """The runs at the chosen weight.

    Attributes:
        weight: The λ whose mean accuracy on the development set is the highest, and the smallest of
            several such.
        tests: The test accuracy of each seed.
        tried: The number of weights that were compared.
    """

    weight: float
    tests: pd.Series
    tried: int

    def __str__(self) -> str:
        """``97.39 (0.11)``, the mean and the standard deviation of the seeds, and λ."""
        text = f"{self.tests.mean():.2f} ({self.tests.std():.2f})"
        return f"{text}, λ {self.weight:g}" if self.weight else text


def where(frame: pd.DataFrame, **levels: Any) -> pd.DataFrame:
    """The records that have these levels of these factors."""
    for name, level in levels.items():
        frame = frame[frame[name] == level]
    return frame


def choose(frame: pd.DataFrame, **levels: Any) -> Choice | None:
    """The choice among the records with these levels, or None if there are none.

    A weight counts only if all its seeds finished: one that diverges in one of ten is no choice.
    """
    frame = where(frame, **levels)
    if frame.empty:
        return None
    scores = frame.groupby("weight")["dev"].apply(lambda dev: dev.mean(skipna=False))
    if scores.isna().all():
        return None
    weight = float(scores.idxmax())
    return Choice(weight, where(frame, weight=weight).set_index("seed")["test"], len(scores))


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
