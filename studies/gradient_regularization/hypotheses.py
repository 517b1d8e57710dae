"""The claims of the paper as comparisons of runs of the same seed.

Those share the images, their order and the initial weights.
"""

from __future__ import annotations

import pandas as pd

from studies.experiment import Frames
from studies.gradient_regularization.choices import (
    SWEEP,
    TABLES,
    USUAL,
    Choice,
    choose,
    lenet,
    like,
    of_method,
)
from studies.gradient_regularization.report import METHODS
from studies.statistics import Claim, Paired, compared, paired


def hypotheses(frames: Frames) -> list[Claim]:
    """The claims that the records can test; the p-values are corrected within each."""
    found = []
    frame = lenet(frames)
    if not frame.empty:
        found += _of_tables(lenet(frames, SWEEP))
        found += _of_sizes(frames)
    sin = frames.get("sin", pd.DataFrame())
    if not sin.empty:
        found += _of_sin(sin)
    return found


def _pairs(choices: dict[str, tuple[Choice | None, Choice | None]]) -> dict[str, Paired]:
    return {
        name: paired(a.tests, b.tests)
        for name, (a, b) in choices.items()
        if a is not None and b is not None
    }


def _of_tables(frame: pd.DataFrame) -> list[Claim]:
    one, two, four, six = (make(frame) for make in TABLES.values())
    dropout, plain = one["dropout"], one["plain"]
    best = dropout["DataGrad"]
    six_ = six[""]
    claims = {
        ("SpectReg and DataGrad improve on no penalty", "table 1"): {
            f"{penalty} vs none, {network}": (one[network][penalty], one[network]["none"])
            for network in ("plain", "dropout")
            for penalty in ("SpectReg", "DataGrad")
        },
        ("Both outperform dropout and batch normalisation", "table 1"): {
            f"{penalty}, plain vs {network}": (plain[penalty], one[network]["none"])
            for network in ("dropout", "batch norm")
            for penalty in ("SpectReg", "DataGrad")
        },
        ("Dropout with DataGrad is the best of the table", "table 1"): {
            f"dropout with DataGrad vs {network} with {penalty}": (best, one[network][penalty])
            for network in one
            for penalty in one[network]
            if (network, penalty) != ("dropout", "DataGrad")
        },
        ("DataGrad is better than the confidence penalty", "table 2"): {
            "DataGrad vs CP": (two["no CP"]["DataGrad"], two["CP"]["none"])
        },
        ("CP with DataGrad is better than either", "table 2"): {
            "both vs DataGrad": (two["CP"]["DataGrad"], two["no CP"]["DataGrad"]),
            "both vs CP": (two["CP"]["DataGrad"], two["CP"]["none"]),
        },
        ("Both improve more than weight decay does", "table 4"): {
            f"{penalty} vs weight decay": (
                four["no weight decay"][penalty],
                four["weight decay 0.0005"]["none"],
            )
            for penalty in ("SpectReg", "DataGrad")
        },
        ("The logits' Jacobian is the better one to penalise", "table 6"): {
            "SpectReg vs JacReg": (six_["SpectReg"], six_["JacReg"])
        },
    }
    tested = ((text, source, _pairs(choices)) for (text, source), choices in claims.items())
    return [Claim(text, source, compared(pairs)) for text, source, pairs in tested if pairs]


def _of_sizes(frames: Frames) -> list[Claim]:
    sizes = frames.get("sizes", pd.DataFrame())
    if sizes.empty:
        return []
    frame = like(lenet(frames), sizes)
    choices = {}
    for size in sorted(frame["size"].unique()):
        cell = USUAL | {"size": size}
        datagrad = choose(frame, **cell | {"penalty": "DataGrad"})
        for method in METHODS:
            if method == "DataGrad":
                continue
            other = choose(frame, **cell | of_method(frame, method, size))
            choices[f"DataGrad vs {method}, {size} images"] = (datagrad, other)
    pairs = _pairs(choices)
    text = "DataGrad is the best for all sizes"
    return [Claim(text, "figure 2", compared(pairs))] if pairs else []


def _of_sin(sin: pd.DataFrame) -> list[Claim]:
    """λ is chosen by the errors of half the seeds, and tested on the others."""
    one = sin[sin["data"] == "SIN"].pivot(index="seed", columns="weight", values="mse")
    first, second = one[one.index % 2 == 0], one[one.index % 2 == 1]
    best = first.mean().idxmin()
    if best == 0:
        return []
    second = 1e5 * second[[0.0, best]].dropna()
    pairs = {f"λ = 0 vs λ = {best:g}, MSE, 1e-5": paired(second[0.0], second[best])}
    return [Claim("SpectReg reduces the mean squared error on SIN", "table 7", compared(pairs))]
