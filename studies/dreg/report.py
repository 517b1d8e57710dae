"""The parts of the report, each made from the records alone."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from studies import plots
from studies.dreg.hypotheses import hypotheses, with_mean
from studies.dreg.training import NOISE, STRENGTHS
from studies.experiment import Frames
from studies.statistics import against, cells, claims_table, paired, ranks
from studies.tables import markdown

LOOKS = plots.look(list(STRENGTHS))
CELL = ["data", "activation"]
OTHERS = [name for name in STRENGTHS if name != "DREG"]


def claims(frames: Frames, pictures: Path) -> str:
    """The claims of the abstract, tested for both readings of DREG."""
    if frames["sweep"].empty:
        return ""
    found = hypotheses(frames)
    parts = ["**The sum over positions, the default of fastjac**", claims_table(found)]
    rows = {"sum": found[0].results}
    if not frames["mean"].empty:
        found = hypotheses(with_mean(frames))
        parts += ["**The mean over positions**", claims_table(found)]
        rows["mean"] = found[0].results
    both = pd.concat(rows)
    both.index = [f"{comparison}, {reading}" for reading, comparison in both.index]
    plots.effects(
        both,
        pictures / "claims.png",
        "DREG against each, without noise",
        x_label="points of accuracy",
    )
    return "\n\n".join([*parts, "![effects](pictures/claims.png)"])


def accuracy(frames: Frames, pictures: Path) -> str:
    """Clean accuracy by data set, and the ranks."""
    frame = frames["sweep"]
    if frame.empty:
        return ""
    clean = cells(frame, "test", cell=CELL, method="regularizer")[list(STRENGTHS)]
    plots.critical_difference(clean, pictures / "ranks.png", "Accuracy without noise", looks=LOOKS)
    by_data = clean.groupby("data").mean().T
    if not frames["mean"].empty:
        mean = cells(with_mean(frames)["sweep"], "test", cell=CELL, method="regularizer")["DREG"]
        by_data.loc["DREG, mean over positions"] = mean.groupby("data").mean()
    by_data["mean"] = by_data.mean(axis=1)
    by_data["mean rank"] = ranks(clean)
    return f"{markdown(by_data, '.2f')}\n\n![ranks](pictures/ranks.png)\n\n{_by_seed(frame)}"


def _by_seed(frame: pd.DataFrame) -> str:
    """The comparison with one mean for each seed, as the p-values of the abstract suggest."""
    by_seed = cells(frame, "test", cell=["seed"], method="regularizer")
    rows = {}
    for other in OTHERS:
        pair = paired(by_seed["DREG"], by_seed[other])
        rows[f"DREG − {other}"] = {
            "mean of the seeds": f"{pair.effect:+.2f}",
            "seeds in which DREG is higher": f"{pair.wins} of {pair.n}",
            "p, two-sided": f"{pair.p:.3f}",
        }
    return markdown(pd.DataFrame(rows).T)


def activations(frames: Frames, pictures: Path) -> str:
    """Clean accuracy and mean rank by activation."""
    frame = frames["sweep"]
    if frame.empty:
        return ""
    clean = cells(frame, "test", cell=CELL, method="regularizer")[list(STRENGTHS)]
    by = clean.groupby("activation")
    means = by.mean().T
    found = pd.DataFrame({name: ranks(part) for name, part in by})
    both = {
        name: [f"{means[name][r]:.2f} ({found[name][r]:.2f})" for r in STRENGTHS] for name in means
    }
    return markdown(pd.DataFrame(both, index=list(STRENGTHS)))


def noise(frames: Frames, pictures: Path) -> str:
    """Accuracy with noise at the input."""
    frame = frames["sweep"]
    if frame.empty:
        return ""
    levels = {0.0: "test", **{level: f"noise_{level}" for level in NOISE}}
    long = pd.concat(
        [
            frame[[*CELL, "regularizer", "seed"]].assign(noise=level, accuracy=frame[column])
            for level, column in levels.items()
        ]
    )
    by_seed = long.groupby(["regularizer", "seed", "noise"], as_index=False)["accuracy"].mean()
    plots.lines(
        by_seed,
        "noise",
        "accuracy",
        "regularizer",
        pictures / "noise.png",
        title="Mean accuracy over data sets and activations",
        x_label="standard deviation of the noise (that of the inputs is 1)",
        y_label="accuracy, %",
        looks=LOOKS,
    )
    rows = long.groupby(["regularizer", "noise"])["accuracy"].mean().unstack().loc[list(STRENGTHS)]
    rows.columns = [f"σ = {level:g}" for level in rows.columns]
    noisy = cells(robust(frame), "robust", cell=CELL, method="regularizer")
    rows["mean rank with noise"] = ranks(noisy)
    return f"{markdown(rows, '.2f')}\n\n![noise](pictures/noise.png)"


def robust(frame: pd.DataFrame) -> pd.DataFrame:
    """The records with the mean accuracy over the levels of noise."""
    return frame.assign(robust=frame[[f"noise_{level}" for level in NOISE]].mean(axis=1))


def scarcity(frames: Frames, pictures: Path) -> str:
    """What DREG gains over each, by the part of the training samples that is used."""
    if frames["scarcity"].empty or frames["sweep"].empty:
        return ""
    both = pd.concat([frames["scarcity"], frames["sweep"]])
    wide = cells(both, "test", cell=[*CELL, "fraction"], method="regularizer")
    gains = pd.DataFrame({other: wide["DREG"] - wide[other] for other in OTHERS})
    long = gains.stack().rename("gain").rename_axis([*CELL, "fraction", "regularizer"])
    plots.lines(
        long.reset_index(),
        "fraction",
        "gain",
        "regularizer",
        pictures / "scarcity.png",
        title="Accuracy of DREG minus that of each other",
        x_label="part of the training samples",
        y_label="points",
        log_x=True,
        looks=LOOKS,
    )
    means = wide.groupby("fraction").mean().T.loc[list(STRENGTHS)]
    means.columns = [f"{fraction:.0%}" for fraction in means.columns]
    return f"{markdown(means, '.2f')}\n\n![scarcity](pictures/scarcity.png)"


def options(frames: Frames, pictures: Path) -> str:
    """What each option of DREG changes."""
    if frames["options"].empty:
        return ""
    mine = frames["options"]
    default = _matching(frames["sweep"], mine)
    default = default[default["regularizer"] == "DREG"]
    both = robust(pd.concat([default, mine]))
    cell = [*CELL]
    rows = {}
    for metric in ("test", "robust"):
        wide = cells(both, metric, cell=cell, method="variant")
        compared = against(-wide, "default", [c for c in wide.columns if c != "default"])
        rows[metric] = wide.mean()
        rows[f"{metric}: p"] = compared["p_holm"].set_axis(
            [name.removeprefix("default vs ") for name in compared.index]
        )
    rows["tail"] = both.groupby("variant")["tail"].median()
    frame = pd.DataFrame(rows).loc[["default", *mine["variant"].unique()]]
    frame.columns = ["accuracy", "p", "accuracy with noise", "p with noise", "p99/mean"]
    return markdown(frame, ".3g")


def strengths(frames: Frames, pictures: Path) -> str:
    """Accuracy by the strength of each regularizer."""
    if frames["strengths"].empty:
        return ""
    mine = frames["strengths"]
    usual = _matching(frames["sweep"], mine)
    usual = usual[usual["regularizer"].isin(mine["regularizer"].unique())]
    both = robust(pd.concat([mine, usual]))
    parts = []
    for metric, name in (("test", "accuracy"), ("robust", "accuracy with noise")):
        rows = both.groupby(["regularizer", "scale"])[metric].mean().unstack()
        rows.columns = [f"× {scale:g}" for scale in rows.columns]
        rows.insert(0, "strength", [f"{STRENGTHS[r]:.3g}" for r in rows.index])
        rows.index.name = name
        parts.append(markdown(rows, ".2f"))
    return "\n\n".join(parts)


def gradients(frames: Frames, pictures: Path) -> str:
    """The norm of the input gradient of the loss of each test sample, and its tail."""
    frame = frames["sweep"]
    if frame.empty:
        return ""
    by = frame.groupby("regularizer")[["gradient", "tail", "loss"]].median().loc[list(STRENGTHS)]
    by.columns = ["mean norm", "p99/mean", "test loss"]
    return markdown(by, ".3g")


def cost(frames: Frames, pictures: Path) -> str:
    """The time of the sweep with fastjac and in plain torch."""
    timed, sweep = frames["cost"], frames["sweep"]
    if timed.empty or sweep.empty:
        return ""
    ratio = timed["torch_seconds"] / timed["fastjac_seconds"]
    rows = pd.DataFrame(
        {
            "torch / fastjac, median": ratio.groupby(timed["regularizer"]).median(),
            "lowest": ratio.groupby(timed["regularizer"]).min(),
            "highest": ratio.groupby(timed["regularizer"]).max(),
            "minutes with fastjac": sweep.groupby("regularizer")["training"].sum() / 60,
        }
    ).loc[list(STRENGTHS)]
    sums = timed.groupby("regularizer")[["torch_seconds", "fastjac_seconds"]].sum()
    whole = sums["torch_seconds"] / sums["fastjac_seconds"]
    rows["minutes in plain torch"] = rows["minutes with fastjac"] * whole
    total = rows[["minutes with fastjac", "minutes in plain torch"]].sum()
    rows.loc["all"] = [math.nan, math.nan, math.nan, *total]
    return markdown(rows, ".2f")


def _matching(frame: pd.DataFrame, like: pd.DataFrame) -> pd.DataFrame:
    """The records whose data set, activation, number of steps and seed occur in another frame."""
    names = [*CELL, "steps", "seed"]
    return frame.merge(like[names].drop_duplicates(), on=names)
