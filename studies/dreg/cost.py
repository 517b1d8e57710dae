"""The time of a run with fastjac, and of the same run in plain eager torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median

from studies.dreg.training import Run, train
from studies.settings import Metrics

ROUNDS = 3


def compare(run: Run, directory: Path | None = None) -> Metrics:
    """Train by turns with fastjac and in plain torch, and return the median seconds of each.

    The test accuracies are those of the last turn; they agree up to the rounding that training
    amplifies.
    """
    metrics: Metrics = {}
    seconds: dict[str, list[float]] = {"fastjac": [], "torch": []}
    for _ in range(ROUNDS):
        for way, times in seconds.items():
            found = train(replace(run, way=way), directory)
            times.append(found["training"])
            metrics[f"{way}_test"] = found["test"]
    return metrics | {f"{way}_seconds": median(times) for way, times in seconds.items()}
