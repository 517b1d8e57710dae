"""SIN: fit sin(5x) from 100 noisy points, with and without SpectReg.

The experiment of Varga, Csiszárik, Zombori 2017 (arXiv 1712.09936, section 6, Table 7, Figures 5
and 6): x uniform on [-1, 1], y = sin(5x) + 0.1 N(0, 1), an MLP of 5 layers of 64 ReLU units, the
mean squared error on a clean grid, 900 points without noise. The trainings of a seed differ only in
the weight of the penalty.

    python examples/sin.py [--quick] [--seeds N] [--out DIR]
"""

import csv
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product, repeat
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

# Table 7 has 0 and 0.001 to 10. Two smaller weights are added to show both sides of the minimum.
WEIGHTS = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
GRID = torch.linspace(-1, 1, 900).unsqueeze(1)
TRUTH = torch.sin(5 * GRID)
INK, GREY, GREEN, ORANGE = "#22262b", "#9aa0a8", "#13865b", "#d1622f"


def mlp() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(1, 64), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 1))


def points(seed: int) -> tuple[Tensor, Tensor]:
    """The 100 noisy training points of a seed: x and y, each ``[100, 1]``."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(100, 1, generator=generator) - 1
    return x, torch.sin(5 * x) + 0.1 * torch.randn(100, 1, generator=generator)


def train(
    weight: float, seed: int, steps: int, fused: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Any, list[float]]:
    """Train a network with Adam on full batches.

    Returns its outputs on the grid, ``[900]``, and its loss at each step. With ``fused=False`` the
    penalty is computed in plain PyTorch, by `fastjac.reference`.
    """
    x, y = (t.to(dtype) for t in points(seed))
    torch.manual_seed(seed)
    model: nn.Module = mlp().to(dtype)
    generator = torch.Generator().manual_seed(seed)  # for the random projections
    if fused:
        model = fastjac.fuse(model)
        penalty = fastjac.SpectReg(weight=weight, generator=generator)

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        if fused:
            output, value = penalty(model, x)
        else:
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
    with torch.no_grad():
        return model(GRID.to(dtype)).squeeze(1).numpy(), losses


def largest_difference(steps: int) -> float:
    """The largest relative difference between the losses of the fused and the plain network.

    Both are trained in float64 for a few hundred steps. Over thousands of steps two runs that sum
    in a different order drift apart: where a ReLU switches, a difference in the last bit grows.
    """
    fused, plain = (
        torch.tensor(train(1e-3, 0, steps, way, torch.float64)[1], dtype=torch.float64)
        for way in (True, False)
    )
    return ((fused - plain).abs() / plain).max().item()


def learned_curves(seeds: int, steps: int, jobs: int) -> Tensor:
    """The learned curves, ``[weights, seeds, 900]``. Each of the ``jobs`` processes trains one."""
    weights, numbers = zip(*product(WEIGHTS, range(seeds)), strict=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        run: Any = map if jobs == 1 else pool.map
        results = track(
            run(train, weights, numbers, repeat(steps)),
            "training",
            total=len(weights),
            console=Console(stderr=True),
        )
        curves = [torch.from_numpy(curve) for curve, _losses in results]
    return torch.stack(curves).view(len(WEIGHTS), seeds, -1)


def report(errors: Tensor, console: Console) -> None:
    """Print the errors ``[weights, seeds]`` as a table. The differences are paired by seed."""
    seeds = errors.shape[1]
    table = Table(title=f"SIN: MSE × 1000 on the clean grid, {seeds} seeds")
    for column in ("weight", "mean", "sd", "minus weight 0", "± s.e.", "seeds better"):
        table.add_column(column, justify="right")
    best = int(errors.mean(1).argmin())
    for i, row in enumerate(1000 * errors):
        gain = row - 1000 * errors[0]
        cells = [f"{WEIGHTS[i]:g}", f"{row.mean():.2f}", f"{row.std():.2f}"]
        if i > 0:
            error = gain.std() / seeds**0.5
            cells += [f"{gain.mean():+.2f}", f"{error:.2f}", f"{(gain < 0).sum()}/{seeds}"]
        table.add_row(*cells, style="bold green" if i == best else None)
    console.print(table)


def draw_errors(errors: Tensor, path: Path) -> None:
    """Draw the MSE against the weight: a dot for each seed, and a line for the mean."""
    figure, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
    places = torch.tensor([WEIGHTS[1] / 6, *WEIGHTS[1:]])  # 0, which a log axis does not have
    mean = errors.mean(1)
    for seed, row in enumerate(errors.T):
        axis.plot(places, row, "o", color=GREY, ms=3.5, mew=0, label=None if seed else "one seed")
    axis.plot(places[1:], mean[1:], "o-", color=GREEN, lw=1.5, ms=5, label="mean with SpectReg")
    axis.plot(places[:1], mean[:1], "D", color=ORANGE, ms=6, label="mean without")
    axis.axhline(float(mean[0]), color=ORANGE, lw=0.8, ls="--")
    axis.set(xscale="log", yscale="log", xlabel="SpectReg weight", ylabel="MSE on the clean grid")
    axis.set_xticks(places, [f"{weight:g}" for weight in WEIGHTS], fontsize=8)
    axis.minorticks_off()
    axis.grid(color="#eceef0")
    axis.legend(frameon=False, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def draw_curves(curves: Tensor, errors: Tensor, path: Path) -> None:
    """Draw the learned functions of the seed whose error without a penalty is the median."""
    seed = int(errors[0].argsort()[errors.shape[1] // 2])
    shown = (0, int(errors.mean(1).argmin()), *map(WEIGHTS.index, (3e-3, 1e-2, 0.1, 1.0)))
    figure, axes = plt.subplot_mosaic(
        "aabb;cdef", figsize=(8, 5.4), height_ratios=(1.6, 1), layout="constrained"
    )
    for axis, i in zip(axes.values(), shown, strict=True):
        axis.plot(*points(seed), ".", color=GREY, ms=5, mew=0, label="training points")
        axis.plot(GRID, TRUTH, color=INK, lw=1, ls="--", label="sin(5x)")
        colour, name = (GREEN, f"weight {WEIGHTS[i]:g}") if i else (ORANGE, "no penalty")
        axis.plot(GRID, curves[i, seed], color=colour, lw=1.7, label="learned")
        axis.set_title(f"{name}: MSE {errors[i, seed]:.2g}", fontsize=9, loc="left")
        axis.set(xlim=(-1, 1), ylim=(-1.4, 1.4), xticks=(-1, 0, 1), yticks=(-1, 0, 1), xlabel="x")
        axis.spines[["top", "right"]].set_visible(False)
    axes["b"].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.2, 1))
    figure.savefig(path, dpi=130)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, 300 steps.")] = False,
    seeds: Annotated[int | None, typer.Option(min=2, help="Training sets; default 10.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of Adam; default 2000.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = min(os.cpu_count() or 1, 8),
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("results"),
) -> None:
    """Fit sin(5x) from noisy points with each SpectReg weight; write two pictures and a CSV."""
    seeds, steps = seeds or (2 if quick else 10), steps or (300 if quick else 2000)
    torch.set_num_threads(1)  # the matrices are too small for two
    out.mkdir(parents=True, exist_ok=True)
    console, checked = Console(), min(steps, 300)
    difference = largest_difference(checked)
    print(
        f"The losses of the fused and the reference network, trained for {checked} steps in "
        f"float64, differ by at most {difference:.1e} (relative)."
    )
    curves = learned_curves(seeds, steps, jobs)
    errors = (curves - TRUTH.squeeze(1)).square().mean(2)
    report(errors, console)
    with (out / "sin.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["weight", "seed", "mse"])
        for (i, weight), seed in product(enumerate(WEIGHTS), range(seeds)):
            rows.writerow([weight, seed, f"{errors[i, seed]:.6g}"])
    draw_errors(errors, out / "sin_mse.png")
    draw_curves(curves, errors, out / "sin_curves.png")
    print(f"wrote sin.csv, sin_mse.png and sin_curves.png to {out}")


if __name__ == "__main__":
    typer.run(main)
