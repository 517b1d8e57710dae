"""Digits: classify handwritten digits after training on 100 images, with each penalty.

The data are scikit-learn's 1797 images of 8 x 8 pixels. Each seed draws a stratified split: 100
images to train on, 400 to choose the weight of each penalty with, and 1297 to test on. The
trainings of a seed differ only in the penalty.

    python examples/digits.py [--quick] [--seeds N] [--out DIR]
"""

import csv
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastjac

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# The penalties, and the weights among which the validation images choose. ConfidencePenalty and
# weight decay are not Jacobian penalties: they are here for comparison.
BASELINE = "no penalty"
WEIGHTS: dict[str, tuple[float, ...]] = {
    BASELINE: (0.0,),
    "weight decay": (0.03, 0.1, 0.3, 1.0, 3.0),
    "ConfidencePenalty": (0.1, 0.3, 1.0, 3.0, 10.0),
    "DREG": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "AccumulatedDREG": (1e-3, 3e-3, 0.01, 0.03, 0.1),
    "DataGrad": (0.3, 1.0, 3.0, 10.0, 30.0),
    "JacReg": (0.3, 1.0, 3.0, 10.0, 30.0),
    "FrobReg": (1e-3, 3e-3, 0.01, 0.03, 0.1),
    "SpectReg": (0.01, 0.03, 0.1, 0.3, 1.0),
}
INK, GREY, GREEN, ORANGE = "#22262b", "#9aa0a8", "#13865b", "#d1622f"


@cache
def split(seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Images and labels to train on, to choose the weight with, and to test on."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    rest: Any = range(len(y))
    train, rest = train_test_split(rest, train_size=100, stratify=y, random_state=seed)
    choose, test = train_test_split(rest, train_size=400, stratify=y[rest], random_state=seed)
    return tuple((x[part], y[part]) for part in (train, choose, test))


def accuracies(name: str, weight: float, seed: int, steps: int) -> tuple[float, float]:
    """Train with full-batch AdamW; return the validation and the test accuracy in percent."""
    (x, y), *held_out = split(seed)
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10)
    )
    model = fastjac.fuse(model)
    penalty = getattr(fastjac, name)(weight=weight) if hasattr(fastjac, name) else None
    targets = (y,) if name == "DataGrad" else ()

    decay = weight if name == "weight decay" else 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        logits, value = penalty(model, x, *targets) if penalty else (model(x), 0.0)
        loss = F.cross_entropy(logits, y) + value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = [model(images).argmax(1) == labels for images, labels in held_out]
    return 100 * right[0].double().mean().item(), 100 * right[1].double().mean().item()


Runs = dict[tuple[str, float, int], tuple[float, float]]  # name, weight, seed: the accuracies


def run_all(seeds: int, steps: int, jobs: int) -> Runs:
    """Train with every penalty, weight and seed. Each of the ``jobs`` processes trains one."""
    keys = [
        (name, w, s) for name, weights in WEIGHTS.items() for w, s in product(weights, range(seeds))
    ]
    columns = (*zip(*keys, strict=True), [steps] * len(keys))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        run: Any = map if jobs == 1 else pool.map
        results = track(
            run(accuracies, *columns), "training", total=len(keys), console=Console(stderr=True)
        )
        return dict(zip(keys, results, strict=True))


def chosen(runs: Runs, name: str, seeds: int) -> list[float]:
    """The weight of each seed with the best validation accuracy, and the smallest of several."""
    return [max(WEIGHTS[name], key=lambda w: runs[name, w, s][0]) for s in range(seeds)]


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean over the seeds, and its standard error."""
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def report(scores: dict[str, Tensor], picked: dict[str, list[float]], console: Console) -> None:
    """Print the test accuracy at the chosen weights.

    ``better`` counts the seeds whose accuracy is higher than without a penalty.
    """
    seeds = len(scores[BASELINE])
    table = Table(title=f"digits: test accuracy in %, 100 training images, {seeds} seeds")
    table.add_column("penalty")
    for column in ("mean", "± s.e.", "gain", "± s.e.", "better", "weights"):
        table.add_column(column, justify="right")
    for name, row in scores.items():
        cells = [name, *(f"{v:.2f}" for v in mean_and_error(row))]
        if name != BASELINE:
            gain = row - scores[BASELINE]
            mean, error = mean_and_error(gain)
            cells += [f"{mean:+.2f}", f"{error:.2f}", f"{(gain > 0).sum()}/{seeds}"]
            cells += ["–".join(f"{w:g}" for w in sorted({min(picked[name]), max(picked[name])}))]
        table.add_row(*cells)
    console.print(table)


def draw_gains(scores: dict[str, Tensor], path: Path) -> None:
    """Draw the gain over no penalty, paired by seed: a dot for each seed, and the mean."""
    figure, axis = plt.subplots(figsize=(7.6, 3.8), layout="constrained")
    names = list(scores)[:0:-1]  # from the bottom up, without the baseline
    for height, name in enumerate(names):
        gain = scores[name] - scores[BASELINE]
        mean, error = mean_and_error(gain)
        axis.plot(gain, [height - 0.28] * len(gain), "o", color=GREY, ms=4, mew=0, alpha=0.7)
        axis.errorbar(mean, height, xerr=error, fmt="D", color=GREEN, ms=6, capsize=4, lw=2)
    axis.axvline(0, color=INK, lw=0.8, ls="--")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlabel("gain in test accuracy, percentage points; mean ± standard error; dots: seeds")
    axis.tick_params(left=False)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", color="#eceef0")
    figure.savefig(path, dpi=130)


def draw_weights(runs: Runs, seeds: int, path: Path) -> None:
    """Draw the test accuracy against the weight: one panel for each penalty."""
    figure, axes = plt.subplots(2, 4, figsize=(9, 4.4), sharey=True, layout="constrained")
    base = sum(runs[BASELINE, 0.0, s][1] for s in range(seeds)) / seeds
    for axis, name in zip(axes.flat, list(WEIGHTS)[1:], strict=True):
        rows = [torch.tensor([runs[name, w, s][1] for s in range(seeds)]) for w in WEIGHTS[name]]
        mean, error = zip(*map(mean_and_error, rows), strict=True)
        axis.axhline(base, color=ORANGE, lw=1, ls="--")
        axis.errorbar(WEIGHTS[name], mean, error, fmt="o-", color=GREEN, ms=4, capsize=3)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_title(name, fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#eceef0")
    axes[0, 0].locator_params(axis="y", integer=True)
    figure.supylabel("test accuracy, %; mean ± standard error", fontsize=10)
    figure.supxlabel("weight of the penalty (dashed: no penalty)", fontsize=10)
    figure.savefig(path, dpi=130)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, 60 steps.")] = False,
    seeds: Annotated[int | None, typer.Option(min=2, help="Number of splits; default 10.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of AdamW; default 300.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = min(os.cpu_count() or 1, 8),
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
) -> None:
    """Compare the classification penalties on few digits; write two pictures and a CSV."""
    seeds, steps = seeds or (2 if quick else 10), steps or (60 if quick else 300)
    out.mkdir(parents=True, exist_ok=True)
    runs = run_all(seeds, steps, jobs)
    picked = {name: chosen(runs, name, seeds) for name in WEIGHTS}
    scores = {
        name: torch.tensor([runs[name, w, s][1] for s, w in enumerate(picked[name])])
        for name in WEIGHTS
    }
    report(scores, picked, Console())
    with (out / "digits.csv").open("w", newline="") as file:
        csv.writer(file).writerow(["penalty", "weight", "seed", "validation", "test"])
        csv.writer(file).writerows([*key, *(f"{v:.2f}" for v in row)] for key, row in runs.items())
    draw_gains(scores, out / "digits_gain.png")
    draw_weights(runs, seeds, out / "digits_weights.png")
    print(f"wrote digits.csv, digits_gain.png and digits_weights.png to {out}")


if __name__ == "__main__":
    typer.run(main)
