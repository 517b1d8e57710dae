"""The parts of the report, each made from the records alone."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from studies import plots
from studies.dreg.hypotheses import (
    CELL,
    MEAN,
    METHODS,
    OTHERS,
    both_readings,
    hypotheses,
    with_noise,
)
from studies.dreg.training import NOISE, STRENGTHS
from studies.experiment import Frames
from studies.statistics import cells, claims_table, matching, paired, ranks
from studies.tables import markdown

LOOKS = plots.look(METHODS)


def claims(frames: Frames, pictures: Path) -> str:
    """The claims of the abstract, tested for both readings of DREG."""
    if frames["sweep"].empty:
        return ""
    parts, rows = [], []
    for dreg, reading in (("DREG", "sum"), (MEAN, "mean")):
        if dreg == MEAN and frames["mean"].empty:
            continue
        found = hypotheses(frames, dreg)
        parts += [f"**DREG with the {reading} over positions**", claims_table(found)]
        rows += [claim.results for claim in found[:2]]
    kinds = [f"{kind}: " for _ in range(len(rows) // 2) for kind in ("no noise", "overall")]
    both = pd.concat([r.rename(index=kind.__add__) for kind, r in zip(kinds, rows, strict=True)])
    plots.effects(
        both,
        pictures / "claims.png",
        "Accuracy without noise, and over all levels of noise",
        x_label="points of accuracy",
    )
    return "\n\n".join([*parts, "![effects](pictures/claims.png)"])


def accuracy(frames: Frames, pictures: Path) -> str:
    """Accuracy without noise by data set, and the ranks."""
    frame = both_readings(frames, "sweep")
    if frame.empty:
        return ""
    clean = in_order(cells(frame, "test", cell=CELL, method="regularizer"))
    plots.critical_difference(
        clean[_six(clean)], pictures / "ranks.png", "Accuracy without noise", looks=LOOKS
    )
    by_data = clean.groupby("data").mean().T
    by_data["mean"] = clean.mean()
    by_data["mean rank of six"] = ranks_of_six(clean)
    return f"{markdown(by_data, '.2f')}\n\n![ranks](pictures/ranks.png)\n\n{_by_seed(frame)}"


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """The columns, which are methods, in the order of METHODS."""
    return table[[name for name in METHODS if name in table.columns]]


def _six(table: pd.DataFrame) -> list[str]:
    """The methods with one reading of DREG, that with the mean where there is one."""
    return [*OTHERS, MEAN if MEAN in table.columns else "DREG"]


def ranks_of_six(table: pd.DataFrame) -> pd.Series:
    """Mean ranks among the six methods; that of the other reading of DREG is in place of it."""
    found = ranks(table[_six(table)])
    if MEAN in table.columns:
        found["DREG"] = ranks(table[[*OTHERS, "DREG"]])["DREG"]
    return found


def _by_seed(frame: pd.DataFrame) -> str:
    """The comparison with one mean for each seed, as the p-values of the abstract suggest."""
    by_seed = cells(frame, "test", cell=["seed"], method="regularizer")
    rows: dict[str, dict[str, str]] = {}
    for dreg in ("DREG", MEAN):
        for other in OTHERS:
            if dreg in by_seed:
                pair = paired(by_seed[dreg], by_seed[other])
                row = rows.setdefault(other, {})
                row[f"{dreg}: mean difference"] = f"{pair.effect:+.2f}"
                row[f"{dreg}: higher in"] = f"{pair.wins} of {pair.n} seeds"
    return markdown(pd.DataFrame(rows).T, corner="against")


def activations(frames: Frames, pictures: Path) -> str:
    """Clean accuracy and mean rank by activation."""
    frame = both_readings(frames, "sweep")
    if frame.empty:
        return ""
    clean = in_order(cells(frame, "test", cell=CELL, method="regularizer"))
    by = clean.groupby("activation")
    means = by.mean().T
    found = pd.DataFrame({name: ranks_of_six(part) for name, part in by})
    both = {
        name: [f"{means[name][r]:.2f} ({found[name][r]:.2f})" for r in means.index]
        for name in means
    }
    return markdown(pd.DataFrame(both, index=means.index), corner="regularizer")


def noise(frames: Frames, pictures: Path) -> str:
    """Accuracy with noise at the input."""
    frame = both_readings(frames, "sweep")
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
    rows = long.groupby(["regularizer", "noise"])["accuracy"].mean().unstack()
    rows = in_order(rows.T).T
    rows.columns = [f"σ = {level:g}" for level in rows.columns]
    noisy = cells(with_noise(frame), "robust", cell=CELL, method="regularizer")
    rows["mean rank of six with noise"] = ranks_of_six(noisy)
    return f"{markdown(rows, '.2f')}\n\n![noise](pictures/noise.png)"


def scarcity(frames: Frames, pictures: Path) -> str:
    """What DREG gains over each, by the part of the training samples that is used."""
    if frames["scarcity"].empty or frames["sweep"].empty:
        return ""
    both = pd.concat([both_readings(frames, name) for name in ("scarcity", "sweep")])
    wide = cells(both, "test", cell=[*CELL, "fraction"], method="regularizer")
    mine = MEAN if MEAN in wide else "DREG"
    gains = pd.DataFrame({other: wide[mine] - wide[other] for other in OTHERS})
    long = gains.stack().rename("gain").rename_axis([*CELL, "fraction", "regularizer"])
    plots.lines(
        long.reset_index(),
        "fraction",
        "gain",
        "regularizer",
        pictures / "scarcity.png",
        title=f"Accuracy of {mine} minus that of each other",
        x_label="part of the training samples",
        y_label="points",
        log_x=True,
        looks=LOOKS,
    )
    means = in_order(wide.groupby("fraction").mean()).T
    means.columns = [f"{fraction:.0%}" for fraction in means.columns]
    return f"{markdown(means, '.2f')}\n\n![scarcity](pictures/scarcity.png)"


def options(frames: Frames, pictures: Path) -> str:
    """What each option of DREG changes."""
    if frames["options"].empty:
        return ""
    mine = frames["options"]
    default = _matching(frames["sweep"], mine)
    default = default[default["regularizer"] == "DREG"]
    both = with_noise(pd.concat([default, mine]))
    rows = {}
    for metric, name in (("test", "accuracy"), ("robust", "accuracy with noise")):
        wide = cells(both, metric, cell=CELL, method="variant")
        rows[name] = wide.mean()
        better = wide.gt(wide["default"], axis=0).sum()
        worse = wide.lt(wide["default"], axis=0).sum()
        counts = [f"{k}–{m}" for k, m in zip(better, worse, strict=True)]
        rows[f"{name}: cells higher–lower"] = pd.Series(counts, index=wide.columns)
    rows["p99/mean"] = both.groupby("variant")["tail"].median()
    return markdown(pd.DataFrame(rows).loc[["default", *mine["variant"].unique()]], ".2f")


def strengths(frames: Frames, pictures: Path) -> str:
    """Accuracy by the strength of each regularizer."""
    if frames["strengths"].empty:
        return ""
    mine = frames["strengths"]
    usual = _matching(frames["sweep"], mine)
    usual = usual[usual["regularizer"].isin(mine["regularizer"].unique())]
    both = with_noise(pd.concat([mine, usual]))
    parts = []
    for metric, name in (("test", "accuracy"), ("robust", "accuracy with noise")):
        rows = both.groupby(["regularizer", "data", "scale"])[metric].mean().unstack()
        means = rows.groupby("regularizer").mean()
        means.index = pd.MultiIndex.from_product([means.index, ["mean"]])
        rows = pd.concat([rows, means]).sort_index(level=0, sort_remaining=False)
        rows.columns = [f"× {scale:g}" for scale in rows.columns]
        rows.index = [f"{r} {STRENGTHS[r]:.3g}, {data}" for r, data in rows.index]
        parts.append(markdown(rows, ".2f", corner=name))
    return "\n\n".join(parts)


def gradients(frames: Frames, pictures: Path) -> str:
    """The norm of the input gradient of the loss of each test sample, and its tail."""
    frame = both_readings(frames, "sweep")
    if frame.empty:
        return ""
    by = in_order(frame.groupby("regularizer")[["gradient", "tail", "loss"]].median().T).T
    by.columns = ["mean norm", "p99/mean", "test loss"]
    return markdown(by, ".3g")


def cost(frames: Frames, pictures: Path) -> str:
    """The time of the sweep with fastjac and in plain torch."""
    timed, sweep = frames["cost"], frames["sweep"]
    if timed.empty or sweep.empty:
        return ""
    by = timed.groupby("regularizer")
    ratio = (timed["torch_seconds"] / timed["fastjac_seconds"]).groupby(timed["regularizer"])
    rows = pd.DataFrame(
        {
            "torch / fastjac, median": ratio.median(),
            "lowest": ratio.min(),
            "highest": ratio.max(),
            "of the sums": by["torch_seconds"].sum() / by["fastjac_seconds"].sum(),
            "minutes with fastjac": sweep.groupby("regularizer")["training"].sum() / 60,
        }
    ).loc[list(STRENGTHS)]
    rows["minutes in plain torch"] = rows["minutes with fastjac"] * rows["of the sums"]
    ours, theirs = rows["minutes with fastjac"].sum(), rows["minutes in plain torch"].sum()
    rows.loc["all"] = [*[math.nan] * 3, theirs / ours, ours, theirs]
    return markdown(rows, ".2f")


def _matching(frame: pd.DataFrame, like: pd.DataFrame) -> pd.DataFrame:
    """The records whose data set, activation, number of steps and seed occur in another frame."""
    return matching(frame, like, [*CELL, "steps", "seed"])
