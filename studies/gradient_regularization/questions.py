"""The two questions that the paper leaves open."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from studies import plots
from studies.experiment import Frames
from studies.gradient_regularization.choices import (
    BOUND,
    SWEEP,
    USUAL,
    choose,
    lenet,
    like,
    span,
    where,
)
from studies.statistics import Claim, claims_table, compared, paired
from studies.tables import markdown

PLACES = ("input", "conv1", "conv2", "fc1", "fc2")


def hidden(frames: Frames, pictures: Path) -> str:
    """Gradients with respect to hidden layers: the best layer, and whether it beats the input."""
    mine = frames.get("hidden", pd.DataFrame())
    if mine.empty:
        return ""
    rows, pairs = {}, {}
    none = choose(lenet(frames), **USUAL | {"penalty": "none"})
    frame = like(lenet(frames), mine)
    for penalty in ("SpectReg", "DataGrad"):
        found = {
            place: choose(frame, **USUAL | {"at": place, "penalty": penalty}) for place in PLACES
        }
        rows[penalty] = {place: str(choice or "–") for place, choice in found.items()}
        for place in PLACES[1:]:
            a, b = found[place], found["input"]
            if a is not None and b is not None:
                pairs[f"{penalty}, {place} vs input"] = paired(a.tests, b.tests)
    claim = Claim("A hidden layer is better than the input", "open question", compared(pairs))
    text = f"No penalty: {none}.\n\n" if none else ""
    return f"{text}{markdown(pd.DataFrame(rows).T)}\n\n{claims_table([claim])}"


def untuned(frames: Frames, pictures: Path) -> str:
    """DataGrad over five decades of λ, as it is and with a bound."""
    frame = frames.get("untuned", pd.DataFrame())
    if frame.empty:
        return ""
    usual = {name: level for name, level in USUAL.items() if name != "bound"}
    frame = where(lenet(frames), **usual)
    frame = frame[frame["seed"].isin(frames["untuned"]["seed"].unique())]
    none = where(frame, penalty="none")["test"].mean()
    rows, scores = {"none": {"best": f"{none:.2f}"}}, {}
    mine = where(frame, penalty="DataGrad")
    for bound, part in mine.groupby("bound"):
        if part["weight"].nunique() < 3:  # of the other bounds
            continue
        name = f"DataGrad, bound {bound:g}" if bound else "DataGrad"
        scores[name] = part.groupby("weight")["test"].mean().sort_index()
        rows[name] = {
            "best": f"{scores[name].max():.2f} at λ = {scores[name].idxmax():g}",
            "within 0.3 points of it": _span(scores[name]),
            "worst": f"{scores[name].min():.2f}",
        }
    with plots.style():
        figure = Figure(figsize=(9, 4))
        left, right = figure.subplots(1, 2)
        for axes in (left, right):
            for name, look in plots.look(list(scores)).items():
                axes.plot(scores[name].index, scores[name], label=name, **look)
            axes.axhline(none, color="0.4", linestyle=":", label="none")
            axes.set(xscale="log", xlabel="λ")
        left.set(ylabel="test accuracy, %", title="all accuracies")
        right.set(ylim=(none - 0.5, none + 0.7), title="the highest ones")
        handles = left.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
        plots.save(figure, pictures / "untuned.png")
    most = mine[mine["weight"] == mine["weight"].max()]
    bounds = most.groupby("bound")[["test"]].mean()
    bounds.columns = [f"λ = {mine['weight'].max():g}"]
    parts = [markdown(pd.DataFrame(rows).T), "![untuned](pictures/untuned.png)"]
    parts.append(claims_table(_claims(lenet(frames, (*SWEEP, "untuned")))))
    parts.append(markdown(bounds, ".2f", corner="bound"))
    elsewhere = frames.get("elsewhere", pd.DataFrame())
    if not elsewhere.empty:
        means = elsewhere.groupby(["data", "bound", "weight"])["test"].mean().unstack()
        means.columns = [f"λ = {weight:g}" for weight in means.columns]
        means.index = [f"{data}, {f'bound {b:g}' if b else 'no bound'}" for data, b in means.index]
        parts.append(markdown(means, ".2f"))
    return "\n\n".join(parts)


def _span(scores: pd.Series) -> str:
    low, high = span(scores)
    less = " or less" if low == scores.index[0] else ""
    more = " or more" if high == scores.index[-1] else ""
    return f"{low:g}{less} to {high:g}{more}, a factor of {high / low:,.0f}"


def _claims(frame: pd.DataFrame) -> list[Claim]:
    """The largest λ with a bound, against no penalty and the λ that are chosen."""
    mine = frame[frame["weight"] == where(frame, bound=BOUND)["weight"].max()]
    free = choose(mine, **USUAL | {"bound": BOUND, "penalty": "DataGrad"})
    none, datagrad, spectreg = (
        choose(frame, **USUAL | {"penalty": name}) for name in ("none", "DataGrad", "SpectReg")
    )
    claims = {
        "With a bound, the largest λ improves on no penalty, and on DataGrad with the chosen λ": {
            "no penalty": none,
            "DataGrad without a bound": datagrad,
        },
        "It improves on SpectReg with the chosen λ": {"SpectReg": spectreg},
    }
    return [
        Claim(
            text,
            "open question 1",
            compared(
                {
                    f"λ {free.weight:g} vs {name}": paired(free.tests, other.tests)
                    for name, other in others.items()
                    if free is not None and other is not None
                }
            ),
        )
        for text, others in claims.items()
    ]
