"""The tables and figures of the paper, from the records alone, beside the paper's own numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from studies import plots
from studies.experiment import Frames
from studies.gradient_regularization.choices import (
    SWEEP,
    TABLES,
    USUAL,
    Choices,
    choose,
    lenet,
    like,
    of_method,
    where,
)
from studies.gradient_regularization.sin import GRID, samples
from studies.statistics import paired
from studies.tables import markdown

METHODS = ("none", "CP", "SpectReg", "DataGrad", "JacReg")
LOOKS = plots.look(METHODS)

# Mean accuracies of the paper, by table, row and column.
PAPER = {
    "table 1": {
        "plain": {"none": 96.99, "SpectReg": 97.59, "DataGrad": 97.56},
        "batch norm": {"none": 96.89, "SpectReg": 96.94, "DataGrad": 96.89},
        "dropout": {"none": 97.29, "SpectReg": 97.65, "DataGrad": 97.98},
    },
    "table 2": {
        "no CP": {"none": 97.39, "SpectReg": 97.79, "DataGrad": 97.89},
        "CP": {"none": 97.57, "SpectReg": 97.89, "DataGrad": 98.07},
    },
    "table 4": {
        "no weight decay": {"none": 97.25, "SpectReg": 97.69, "DataGrad": 97.95},
        "weight decay 0.0005": {"none": 97.40, "SpectReg": 97.73, "DataGrad": 97.92},
    },
    "table 6": {"": {"SpectReg": 97.79, "JacReg": 97.63, "FrobReg": 97.76}},
}
SIN_PAPER = {
    **{0.0: 16.6e-5, 0.001: 24.5e-5, 0.003: 2.5e-5, 0.01: 2.3e-5, 0.03: 1.6e-5, 0.1: 3.4e-5},
    **{0.3: 74.9e-5, 1.0: 497.7e-5, 3.0: 1264.4e-5, 10.0: 2002.2e-5},
}


def beside(table: str, choices: Choices) -> str:
    """Ours with λ, and the paper's accuracy in brackets, by row and penalty."""
    rows = {}
    for row, cells in choices.items():
        rows[row] = {
            penalty: f"{choice or '–'} [{PAPER[table][row][penalty]:.2f}]"
            for penalty, choice in cells.items()
        }
    return markdown(pd.DataFrame(rows).T)


def tables(frames: Frames, _pictures: Path) -> str:
    """Tables 1, 2, 4 and 6."""
    frame = lenet(frames, SWEEP)
    if frame.empty:
        return ""
    parts = []
    for name, make in TABLES.items():
        parts.append(f"**{name.capitalize()}**\n\n{beside(name, make(frame))}")
    found = TABLES["table 6"](frame)[""]
    one, exact = found["SpectReg"], found["FrobReg"]
    if one and exact:
        difference = paired(exact.tests, one.tests)
        parts.append(
            "FrobReg, the exact norm, minus SpectReg, one projection of it: "
            f"{difference.effect:+.2f} points, 95% interval {difference.low:+.2f} to "
            f"{difference.high:+.2f}, {difference.n} seeds."
        )
    return "\n\n".join(parts)


def convergence(frames: Frames, pictures: Path) -> str:
    """Test accuracy during training, and with fewer and more iterations."""
    usual, longer = lenet(frames), frames.get("longer", pd.DataFrame())
    if usual.empty or longer.empty:
        return ""
    everything = pd.concat([frames["fewer"], usual, longer])
    points, rows = [], {}
    for (penalty, weight), long in longer.groupby(["penalty", "weight"]):
        runs = where(everything, **USUAL, penalty=penalty, weight=weight)
        runs = runs[runs["seed"].isin(long["seed"])]
        rows[f"{penalty}, λ {weight:g}" if weight else "none"] = {
            f"{iterations:,} iterations": f"{tests.mean():.2f} ({tests.std():.2f})"
            for iterations, tests in runs.groupby("iterations")["test"]
        }
        for _, run in runs[runs["iterations"].isin(usual["iterations"])].iterrows():
            values = [float(value) for value in run["curve"].split()]
            for number, value in enumerate(values, 1):
                step = run["iterations"] * number // len(values)
                points.append({"iteration": step, "accuracy": value, "method": penalty})
    plots.lines(
        pd.DataFrame(points),
        "iteration",
        "accuracy",
        "method",
        pictures / "convergence.png",
        title="Accuracy on 500 test images, 2,000 training images",
        y_label="accuracy, %",
        looks=LOOKS,
    )
    return f"{markdown(pd.DataFrame(rows).T)}\n\n![convergence](pictures/convergence.png)"


def figure_2(frames: Frames, pictures: Path) -> str:
    """Accuracy by the number of training images, each at its best weight."""
    sizes = frames.get("sizes", pd.DataFrame())
    if sizes.empty:
        return ""
    frame = like(lenet(frames), sizes)
    rows = []
    for size in sorted(frame["size"].unique()):
        for method in METHODS:
            choice = choose(frame, **USUAL | {"size": size} | of_method(frame, method, size))
            if choice is not None:
                found = pd.DataFrame({"accuracy": choice.tests, "size": size, "method": method})
                rows.append(found)
    long = pd.concat(rows)
    plots.lines(
        long,
        "size",
        "accuracy",
        "method",
        pictures / "figure_2.png",
        title="Test accuracy by the number of training images",
        x_label="training images",
        y_label="accuracy, %",
        log_x=True,
        looks=LOOKS,
    )
    means = long.groupby(["method", "size"])["accuracy"].mean().unstack()
    means = means.loc[[name for name in METHODS if name in means.index]]
    return f"{markdown(means, '.2f')}\n\n![figure 2](pictures/figure_2.png)"


def figure_4(frames: Frames, pictures: Path) -> str:
    """The weight of DataGrad against accuracy and the sum of the squares of the parameters."""
    decays = frames.get("decays", pd.DataFrame())
    if decays.empty:
        return ""
    frame = like(lenet(frames), decays)
    cell = {name: level for name, level in USUAL.items() if name != "decay"}
    mine = where(frame, **cell)
    mine = mine[mine["penalty"].isin(["none", "DataGrad"])]
    levels = sorted(mine["decay"].unique())
    with plots.style():
        figure = Figure(figsize=(4 * len(levels), 3.8))
        for number, (axes, decay) in enumerate(
            zip(figure.subplots(1, len(levels), sharey=True, squeeze=False)[0], levels, strict=True)
        ):
            part = where(mine, decay=decay, penalty="DataGrad").groupby("weight")
            squares, accuracy = part["weight_loss"].mean(), part["test"].mean()
            right = axes.twinx()
            right.plot(squares.index, squares, color="black", marker="s", linestyle="--")
            axes.plot(accuracy.index, accuracy, color=plots.COLORS[0], marker="o")
            axes.set(xscale="log", xlabel="λ of DataGrad", title=f"weight decay {decay:g}")
            right.spines["right"].set_visible(True)
            right.set_ylim(0, None)
            if number == 0:
                axes.set_ylabel("test accuracy, % (circles)")
            if number == len(levels) - 1:
                right.set_ylabel("sum of squares (squares)")
        plots.save(figure, pictures / "figure_4.png")
    means = mine.groupby(["decay", "weight"])[["test", "weight_loss"]].mean()
    text = {
        f"{decay:g}": {
            f"λ {weight:g}": f"{row['test']:.2f} ({row['weight_loss']:.0f})"
            for weight, row in means.loc[decay].iterrows()
        }
        for decay in levels
    }
    shown = pd.DataFrame(text).T.reindex(
        columns=[f"λ {weight:g}" for weight in sorted(mine["weight"].unique())]
    )
    return (
        f"{markdown(shown.fillna('–'), corner='weight decay')}\n\n"
        "![figure 4](pictures/figure_4.png)"
    )


def table_7(frames: Frames, pictures: Path) -> str:
    """SIN and SIN2: the mean squared error by the weight of SpectReg, and the curves."""
    frame = frames.get("sin", pd.DataFrame())
    if frame.empty:
        return ""
    rows = {}
    for weight, both in frame.groupby("weight"):
        paper = SIN_PAPER.get(float(str(weight)))
        row = {"paper: MSE, 1e-5": f"{1e5 * paper:.1f}" if paper else "–"}
        for data, part in both.groupby("data"):
            ratio = part["slope"] / part["slope_at_samples"]
            row[f"{data}: MSE, 1e-5"] = f"{1e5 * part['mse'].median():.0f}"
            row[f"{data}: MSE at the samples"] = f"{part['train'].median():.2g}"
            row[f"{data}: slope, grid / samples"] = f"{ratio.median():.2f}"
        rows[f"λ {weight:g}"] = row
    _curves(frame, pictures / "figure_5.png", zoom=None)
    _curves(frame, pictures / "figure_6.png", zoom=(0.0, 0.4))
    shown = "![figure 5](pictures/figure_5.png)\n\n![figure 6](pictures/figure_6.png)"
    return f"{markdown(pd.DataFrame(rows).T)}\n\n{shown}"


def _curves(frame: pd.DataFrame, path: Path, zoom: tuple[float, float] | None) -> None:
    """The functions that seed 0 learned, for a few weights, SIN above SIN2."""
    chosen = [w for w in (0.0, 3e-4, 0.003, 0.03) if (frame["weight"] == w).any()]
    grid = GRID[::5, 0].numpy()
    x, y = samples(0)
    with plots.style():
        figure = Figure(figsize=(9, 6.4))
        for axes, data in zip(figure.subplots(2, 1, sharex=True), ("SIN", "SIN2"), strict=True):
            axes.scatter(x[:, 0], y[:, 0], s=14, color="0.55", label="samples")
            axes.plot(grid, np.sin(5 * grid), color="black", linestyle=":", label="sin(5x)")
            for weight, color in zip(chosen, plots.COLORS, strict=False):
                run = where(frame, data=data, weight=weight, seed=0)
                if len(run):
                    values = [float(value) for value in run["curve"].iloc[0].split()]
                    axes.plot(grid, values, color=color, label=f"λ = {weight:g}")
            axes.set(title=data, ylabel="output")
            if zoom:
                axes.set(xlim=zoom, ylim=(-0.4, 1.3))
        axes.set_xlabel("x")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        plots.save(figure, path)


def cifar_tables(frames: Frames, _pictures: Path) -> str:
    """Tables 3 and 5, where somebody has CIFAR-10."""
    frame = frames.get("cifar", pd.DataFrame())
    if frame.empty:
        return ""
    by = frame.groupby(["size", "penalty", "weight", "confidence"])["test"]
    return markdown(by.agg(["mean", "std", "count"]).reset_index().set_index("size"), ".4g")
