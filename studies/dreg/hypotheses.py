"""The claims of the abstract of arXiv 2606.23942 as comparisons of matched cells.

A cell is a data set and an activation, with the mean of its seeds: 32 in the full sweep.
"""

from __future__ import annotations

import pandas as pd

from studies.dreg.training import NOISE, STRENGTHS
from studies.experiment import Frames
from studies.statistics import Claim, against, cells, compared, paired

CELL = ["data", "activation"]
OTHERS = [name for name in STRENGTHS if name != "DREG"]


def with_mean(frames: Frames) -> Frames:
    """The records in which DREG takes the mean over the positions of a convolution."""
    mean = frames["mean"]
    found = dict(frames)
    for name in ("sweep", "scarcity"):
        frame = found[name]
        fractions = mean[mean["fraction"].isin(frame["fraction"].unique())]
        replaced = (frame["regularizer"] == "DREG") & frame["data"].isin(mean["data"].unique())
        found[name] = pd.concat([frame[~replaced], fractions], ignore_index=True)
    return found


def hypotheses(frames: Frames) -> list[Claim]:
    """The claims. The p-values are corrected over the comparisons of a claim, which are those that
    must all be significant for it to hold; over all claims would ask for more than that."""
    sweep = frames["sweep"]
    if sweep.empty:
        return []
    noisy = [f"noise_{level}" for level in NOISE]
    sweep = sweep.assign(
        robust=sweep[noisy].mean(axis=1), overall=sweep[["test", *noisy]].mean(axis=1)
    )

    def wide(metric: str) -> pd.DataFrame:
        return cells(sweep, metric, cell=CELL, method="regularizer")

    clean, overall, robust = wide("test"), wide("overall"), wide("robust")
    gelu = clean[clean.index.get_level_values("activation") == "gelu"]
    noisy_gelu = robust[robust.index.get_level_values("activation") == "gelu"]
    rest = [name for name in OTHERS if name != "spectral norm"]
    found = [
        Claim("The highest accuracy without noise", "abstract", against(clean, "DREG", OTHERS)),
        Claim("The highest accuracy overall", "abstract", against(overall, "DREG", OTHERS)),
        Claim(
            "Spectral normalisation is more robust to noise than DREG",
            "abstract",
            against(robust, "spectral norm", ["DREG"]),
        ),
        Claim(
            "DREG is more robust to noise than all others",
            "abstract",
            against(robust, "DREG", rest),
        ),
        Claim("The best under GELU", "abstract", against(gelu, "DREG", OTHERS)),
        Claim("The best under GELU with noise", "abstract", against(noisy_gelu, "DREG", OTHERS)),
    ]
    scarce = frames["scarcity"]
    if not scarce.empty:
        fewest = scarce[scarce["fraction"] == scarce["fraction"].min()]
        few = cells(fewest, "test", cell=CELL, method="regularizer")
        common = clean.index.intersection(few.index)
        pairs = {
            f"gain over {other} with {fewest['fraction'].iloc[0]:.0%} − with all": paired(
                (few["DREG"] - few[other])[common], (clean["DREG"] - clean[other])[common]
            )
            for other in OTHERS
        }
        found.append(Claim("The gain is larger under scarcity", "abstract", compared(pairs)))
    return found
