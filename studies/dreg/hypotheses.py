"""The claims of the abstract of arXiv 2606.23942 as comparisons of matched cells.

A cell is a data set and an activation, with the mean of its seeds: 32 in the full sweep. The four
cells of a data set share their samples, so each comparison is also made with the eight data sets.
"""

from __future__ import annotations

import pandas as pd

from studies.dreg.training import NOISE, STRENGTHS
from studies.experiment import Frames
from studies.statistics import Claim, against, cells, holm, paired

CELL = ["data", "activation"]
OTHERS = [name for name in STRENGTHS if name != "DREG"]
MEAN = "DREG (mean)"
METHODS = [*STRENGTHS, MEAN]
DATA_SETS = "p, data sets, uncorrected"


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


def with_noise(frame: pd.DataFrame) -> pd.DataFrame:
    """The records with the mean accuracy over the levels of noise, and over these and no noise."""
    noisy = [f"noise_{level}" for level in NOISE]
    return frame.assign(
        robust=frame[noisy].mean(axis=1), overall=frame[["test", *noisy]].mean(axis=1)
    )


def hypotheses(frames: Frames, dreg: str = "DREG") -> list[Claim]:
    """The claims for a reading of DREG, ``"DREG"`` or ``"DREG (mean)"``.

    The p-values are corrected over the comparisons of a claim, all of which must be significant for
    it to hold; over all claims would ask for more than that.
    """
    sweep = both_readings(frames, "sweep")
    if sweep.empty:
        return []
    sweep = with_noise(sweep)

    def of(frame: pd.DataFrame) -> pd.DataFrame:
        return frame[frame["regularizer"].isin([*OTHERS, dreg])]

    def wide(metric: str) -> pd.DataFrame:
        return cells(of(sweep), metric, cell=CELL, method="regularizer")

    clean, overall, robust = wide("test"), wide("overall"), wide("robust")
    gelu = clean[clean.index.get_level_values("activation") == "gelu"]
    noisy_gelu = robust[robust.index.get_level_values("activation") == "gelu"]
    rest = [name for name in OTHERS if name != "spectral norm"]
    tested = [
        ("The highest accuracy without noise", clean, dreg, OTHERS),
        ("The highest accuracy over all levels of noise", overall, dreg, OTHERS),
        ("Spectral normalisation is more robust than DREG", robust, "spectral norm", [dreg]),
        ("DREG is more robust to noise than all others", robust, dreg, rest),
        ("The best under GELU", gelu, dreg, OTHERS),
        ("The best under GELU with noise", noisy_gelu, dreg, OTHERS),
    ]
    found = [
        Claim(text, "abstract", _with_data_sets(against(table, method, others), table))
        for text, table, method, others in tested
    ]
    scarce = both_readings(frames, "scarcity")
    if not scarce.empty:
        fewest = scarce[scarce["fraction"] == scarce["fraction"].min()]
        few = cells(of(fewest), "test", cell=CELL, method="regularizer")
        common = clean.index.intersection(few.index)
        gains = pd.DataFrame(
            {
                part: (table[dreg] - table[other])[common]
                for other in OTHERS
                for part, table in ((f"few {other}", few), (f"all {other}", clean))
            }
        )
        part = f"{fewest['fraction'].iloc[0]:.0%}"
        results = pd.concat(
            [
                against(gains, f"few {other}", [f"all {other}"]).set_axis(
                    [f"gain over {other} with {part} − with all"]
                )
                for other in OTHERS
            ]
        )
        by_data = gains.groupby("data").mean()
        results["p_holm"] = holm(results["p"])
        results[DATA_SETS] = [
            paired(by_data[f"few {other}"], by_data[f"all {other}"]).p for other in OTHERS
        ]
        found.append(Claim("The gain is larger under scarcity", "abstract", results))
    return found


def _with_data_sets(results: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """The results with the p-values of the same tests of the means of the data sets."""
    by_data = table.groupby("data").mean()
    pairs = [name.split(" vs ") for name in results.index]
    return results.assign(**{DATA_SETS: [paired(by_data[a], by_data[b]).p for a, b in pairs]})
