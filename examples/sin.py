"""SIN: fit sin(5x) from 100 noisy points, with and without SpectReg.

The experiment of Varga, Csiszárik, Zombori 2017 (arXiv 1712.09936, section 6, Table 7, Figures 5
and 6): x uniform on [-1, 1], y = sin(5x) + 0.1 N(0, 1), an MLP of 5 layers of 64 ReLU units, the
mean squared error on a clean grid of 900 points. Only the penalty's weight differs between runs.

    python examples/sin.py            # 10 seeds
    python examples/sin.py --quick    # 2 seeds, fewer steps
"""

from __future__ import annotations

import csv
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import fastjac

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Table 7 has 0 and 0.001 to 10; two smaller weights show the left side of the minimum.
WEIGHTS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
GRID = torch.linspace(-1, 1, 900).unsqueeze(1)
LEARNING_RATE = 1e-2


def mlp() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(1, 64), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 1))


def points(seed: int) -> tuple[Tensor, Tensor]:
    """The 100 noisy training points of a seed."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(100, 1, generator=generator) - 1
    return x, torch.sin(5 * x) + 0.1 * torch.randn(100, 1, generator=generator)


def train(
    seed: int, weight: float, steps: int, *, fused: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, list[float]]:
    """A trained network and its training loss, step by step; full batches, Adam, cosine decay."""
    x, y = (t.to(dtype) for t in points(seed))
    torch.manual_seed(seed)
    model: nn.Module = mlp().to(dtype)
    generator = torch.Generator().manual_seed(seed)  # of the random projections
    if fused:
        model = fastjac.fuse(model)
        penalty = fastjac.SpectReg(weight=weight, generator=generator)

    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        if fused:
            output, value = penalty(model, x)
        else:  # plain torch, from the definition
            inputs = x.clone().requires_grad_()
            output = model(inputs)
            samples = fastjac.reference.spectreg(inputs, output, generator=generator)
            value = weight * samples.mean()
        loss = (output - y).square().mean() + value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model, losses


def largest_difference(
    steps: int, weight: float = 1e-3, dtype: torch.dtype = torch.float64
) -> float:
    """Between the loss curves of the fused and the plain network, relative, in float64.

    For a short training: a ReLU that switches turns a difference in the last bit into a larger one,
    and over thousands of steps any two orders of summation drift apart.
    """
    fused, plain = (
        torch.tensor(train(0, weight, steps, fused=way, dtype=dtype)[1], dtype=dtype)
        for way in (True, False)
    )
    return ((fused - plain).abs() / plain).max().item()


def learned_curve(job: tuple[float, int], steps: int) -> Any:
    """The function a network has learned, on the grid."""
    weight, seed = job
    model, _losses = train(seed, weight, steps)
    with torch.no_grad():
        return model(GRID).squeeze(1).numpy()


def curves_of(seeds: int, steps: int, jobs: int) -> Tensor:
    """The learned curves, ``[weights, seeds, 900]``; one process per core."""
    todo = [(weight, seed) for weight in WEIGHTS for seed in range(seeds)]
    run = partial(learned_curve, steps=steps)

    def show(curves: Iterator[Any]) -> Tensor:
        shown = track(curves, "training", len(todo), console=Console(stderr=True))
        return torch.stack([torch.from_numpy(c) for c in shown]).view(len(WEIGHTS), seeds, -1)

    if jobs == 1:
        return show(map(run, todo))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        return show(pool.map(run, todo))


def report(errors: Tensor, console: Console) -> None:
    """Errors ``[weights, seeds]`` as a table; differences are paired, seed by seed."""
    seeds = errors.shape[1]
    table = Table(title=f"SIN: MSE × 1000 on the clean grid, {seeds} seeds")
    for column in ("weight", "mean", "sd", "minus weight 0", "± s.e.", "seeds better"):
        table.add_column(column, justify="right")
    best = errors.mean(1).argmin()
    for i, (weight, row) in enumerate(zip(WEIGHTS, 1000 * errors, strict=True)):
        gain = row - 1000 * errors[0]
        spread = [row.std(), gain.std() / seeds**0.5] if seeds > 1 else [torch.nan, torch.nan]
        cells = [f"{weight:g}", f"{row.mean():.2f}", f"{spread[0]:.2f}"]
        if i:
            cells += [f"{gain.mean():+.2f}", f"{spread[1]:.2f}", f"{(gain < 0).sum()}/{seeds}"]
        table.add_row(*cells, style="bold green" if i == best else None)
    console.print(table)


def draw_errors(errors: Tensor, path: Path) -> None:
    """MSE against the weight: each seed a dot, the mean a line."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    left = WEIGHTS[1] / 6  # where 0 stands on the log axis, apart from the rest
    places = torch.tensor([left, *WEIGHTS[1:]])
    mean = errors.mean(1)
    axis.plot(places, errors, "o", color="#7fb89f", ms=3, mew=0, alpha=0.6)
    axis.plot([], [], "o", color="#7fb89f", ms=4, mew=0, label="one seed")
    axis.plot(places[1:], mean[1:], "o-", color="#13865b", lw=2, ms=5, label="mean, SpectReg")
    axis.plot(places[:1], mean[:1], "D", color="#22262b", ms=6, label="mean, no penalty")
    axis.axhline(float(mean[0]), color="#22262b", lw=0.8, ls="--")
    axis.axvline(WEIGHTS[1] / 2.5, color="#c9ccd1", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel="SpectReg weight", ylabel="MSE on the clean grid")
    axis.set_xticks([left, *WEIGHTS[1::2]], ["0", *(f"{w:g}" for w in WEIGHTS[1::2])])
    axis.minorticks_off()
    axis.grid(color="#eceef0")
    axis.set_axisbelow(True)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.14, 1))
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_curves(curves: Tensor, errors: Tensor, path: Path) -> None:
    """What the networks of seed 0 have learned, the two that compete above, heavier weights below.

    The other seeds' curves are thin.
    """
    best = int(errors.mean(1).argmin())
    heavy = [i for i, weight in enumerate(WEIGHTS) if weight in (1e-2, 0.1, 1.0, 10.0)]
    figure = plt.figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    axes = [*above.subplots(1, 2, sharey=True), *below.subplots(1, 4, sharey=True)]
    x, y = points(0)
    for axis, i in zip(axes, (0, best, *heavy), strict=True):
        colour = "#d1622f" if i == 0 else "#13865b"
        axis.plot(x, y, ".", color="#9aa0a8", ms=4, mew=0, label="training points")
        axis.plot(GRID, torch.sin(5 * GRID), color="#22262b", lw=1, ls="--", label="sin(5x)")
        axis.plot(GRID, curves[i, 0], color=colour, lw=1.6, label="learned")
        name = "no penalty" if i == 0 else f"weight {WEIGHTS[i]:g}"
        axis.set_title(f"{name}: MSE {errors[i, 0]:.2g}", fontsize=9, loc="left")
        axis.set(xlim=(-1, 1), ylim=(-1.4, 1.4), yticks=(-1, 0, 1))
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, 500 steps.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Training sets; default 10.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of Adam; default 3000.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = min(os.cpu_count() or 1, 8),
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
) -> None:
    """Fit sin(5x) from noisy points under each SpectReg weight; writes two pictures and a CSV."""
    seeds = seeds or (2 if quick else 10)
    steps = steps or (500 if quick else 3000)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    short = min(steps, 300)
    difference = largest_difference(short)
    console.print(
        f"fused and reference: loss curves of {short} steps in float64 differ by at most "
        f"{difference:.1e} (relative)"
    )
    curves = curves_of(seeds, steps, jobs)
    errors = (curves - torch.sin(5 * GRID).squeeze(1)).square().mean(2)
    report(errors, console)
    with (out / "sin.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["weight", "seed", "mse"])
        for weight, row in zip(WEIGHTS, errors.tolist(), strict=True):
            rows.writerows([weight, seed, f"{value:.6g}"] for seed, value in enumerate(row))
    draw_errors(errors, out / "sin_mse.png")
    draw_curves(curves, errors, out / "sin_curves.png")
    console.print(f"wrote sin.csv, sin_mse.png and sin_curves.png to {out}")


if __name__ == "__main__":
    typer.run(main)
