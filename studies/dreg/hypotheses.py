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
MEAN = "DREG (mean)"
METHODS = [*STRENGTHS, MEAN]


def both_readings(frames: Frames, name: str) -> pd.DataFrame:
    """The records of an experiment, and DREG with the mean over the positions of a convolution.

    A network without convolutions has one position for each sample, and its records of DREG count
    for both readings.
    """
    frame, mean = frames[name], frames["mean"]
    if frame.empty or mean.empty:
        return frame
    mean = mean[mean["fraction"].isin(frame["fraction"].unique())]
    dreg = frame[(frame["regularizer"] == "DREG") & ~frame["data"].isin(mean["data"].unique())]
    return pd.concat([frame, pd.concat([dreg, mean]).assign(regularizer=MEAN)], ignore_index=True)


def hypotheses(frames: Frames, dreg: str = "DREG") -> list[Claim]:
    """The claims for a reading of DREG, ``"DREG"`` or ``"DREG (mean)"``.

    The p-values are corrected over the comparisons of a claim, all of which must be significant for
    it to hold; over all claims would ask for more than that.
    """
    sweep = both_readings(frames, "sweep")
    if sweep.empty:
        return []
    noisy = [f"noise_{level}" for level in NOISE]
    sweep = sweep.assign(
        robust=sweep[noisy].mean(axis=1), overall=sweep[["test", *noisy]].mean(axis=1)
    )

    def of(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[frame["regularizer"].isin([*OTHERS, dreg])]

    def wide(metric: str) -> pd.DataFrame:
        return cells(of(sweep), metric, cell=CELL, method="regularizer")

    clean, overall, robust = wide("test"), wide("overall"), wide("robust")
    gelu = clean[clean.index.get_level_values("activation") == "gelu"]
    noisy_gelu = robust[robust.index.get_level_values("activation") == "gelu"]
    rest = [name for name in OTHERS if name != "spectral norm"]
    found = [
        Claim("The highest accuracy without noise", "abstract", against(clean, dreg, OTHERS)),
        Claim("The highest accuracy overall", "abstract", against(overall, dreg, OTHERS)),
        Claim(
            "Spectral normalisation is more robust to noise than DREG",
            "abstract",
            against(robust, "spectral norm", [dreg]),
        ),
        Claim(
            "DREG is more robust to noise than all others",
            "abstract",
            against(robust, dreg, rest),
        ),
        Claim("The best under GELU", "abstract", against(gelu, dreg, OTHERS)),
        Claim("The best under GELU with noise", "abstract", against(noisy_gelu, dreg, OTHERS)),
    ]
    scarce = both_readings(frames, "scarcity")
    if not scarce.empty:
        fewest = scarce[scarce["fraction"] == scarce["fraction"].min()]
        few = cells(of(fewest), "test", cell=CELL, method="regularizer")
        common = clean.index.intersection(few.index)
        pairs = {
            f"gain over {other} with {fewest['fraction'].iloc[0]:.0%} − with all": paired(
                (few[dreg] - few[other])[common], (clean[dreg] - clean[other])[common]
            )
            for other in OTHERS
        }
        found.append(Claim("The gain is larger under scarcity", "abstract", compared(pairs)))
    return found
