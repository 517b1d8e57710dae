"""Weights: train with each penalty over five decades of weights, and write records of it.

Small networks are trained on few samples of several data sets, none of which is downloaded. The
weights of a penalty are in steps of about three. The trainings of a seed differ only in the penalty
and its weight; the weight 0 is the training without a penalty. ``examples/weights_page.py`` makes
the tables and the picture of docs/WEIGHT.md from the records.

    python examples/weights.py [--quick] [--seeds N] [--steps N] [--jobs N] [--out DIR]
"""

import csv
import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastjac
from fastjac.bench.records import versions

Row = dict[str, Any]
PENALTIES: dict[str, Callable[[nn.Module], Any]] = {
    "DREG": fastjac.DREG,  # attached to the model
    "DREG, mean": lambda model: fastjac.DREG(model, positions="mean"),
    "SpectReg": lambda _model: fastjac.SpectReg(),
    "DataGrad": lambda _model: fastjac.DataGrad(),
    "FrobReg": lambda _model: fastjac.FrobReg(),
}
WEIGHTS = {  # 0 and 1, 3, 10, 30, ... between these powers of ten
    "DREG": (-6, 0),
    "DREG, mean": (-5, 1),
    "SpectReg": (-4, 3),
    "DataGrad": (-2, 4),
    "FrobReg": (-5, 2),
}
# Name of a data set: the number of training samples, the width and the activation of an MLP with
# two hidden layers, or the side of the images of the convolutional network in pixels.
MLPS = {
    "digits": (100, 128, nn.GELU),
    "cancer": (30, 64, nn.Tanh),
    "wine": (18, 64, nn.SiLU),
    "clusters": (100, 256, nn.GELU),
    "moons": (60, 128, nn.ReLU),
}
SIDES = {"digits, 8 px": 8, "digits, 16 px": 16, "digits, 32 px": 32}
MOMENTS = ("start", "later", "end")  # of the training; later is after a tenth of the steps
FIELDS = [
    *("data", "penalty", "weight", "seed", "train", "test", "spread", "diverged"),
    *(f"{what}_{when}" for when in MOMENTS for what in ("value", "loss", "gradients")),
    *("share_start", "share_end"),
]


def weights_of(penalty: str) -> list[float]:
    low, high = WEIGHTS[penalty]
    steps = [float(f"{digit}e{power}") for power in range(low, high) for digit in (1, 3)]
    return [0.0, *steps, 10.0**high]


def penalties_of(data: str) -> tuple[str, ...]:
    """FrobReg is left out for images, because it takes ten times as long as SpectReg there."""
    if data in MLPS:
        return ("DREG", "SpectReg", "DataGrad", "FrobReg")
    return tuple(PENALTIES)[: 4 if SIDES[data] == 8 else 2]


def upsampled(digits: Tensor, side: int) -> Tensor:
    """Images ``[N, 1, side, side]`` of the 64 pixels of each digit."""
    images = digits.view(-1, 1, 8, 8)
    return F.interpolate(images, (side, side), mode="bilinear", align_corners=False)


@cache
def samples(data: str) -> tuple[Tensor, Tensor]:
    """All samples of a data set, and their labels."""
    if data == "cancer":
        x, y = datasets.load_breast_cancer(return_X_y=True)
    elif data == "wine":
        x, y = datasets.load_wine(return_X_y=True)
    elif data == "clusters":  # 4 classes of 2 clusters each; 10 of the 40 numbers say which
        x, y = datasets.make_classification(
            1500, 40, n_informative=10, n_classes=4, class_sep=1.5, random_state=0
        )
    elif data == "moons":  # two moons in a plane of a space of 50 dimensions, with noise in all
        plane, y = datasets.make_moons(1500, noise=0.1, random_state=0)
        generator = torch.Generator().manual_seed(0)
        noise = 0.3 * torch.randn(1500, 48, generator=generator)
        turned = torch.linalg.qr(torch.randn(50, 50, generator=generator)).Q
        x = torch.cat([torch.tensor(plane, dtype=torch.float32), noise], 1) @ turned
    else:
        pixels, y = datasets.load_digits(return_X_y=True)
        x = torch.tensor(pixels / 16, dtype=torch.float32)
        if data in SIDES:
            x = upsampled(x, SIDES[data])
    return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y)


@cache
def split(data: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Samples and labels to train on, and up to 1000 to test on."""
    x, y = samples(data)
    size = MLPS[data][0] if data in MLPS else 100
    train, test = train_test_split(range(len(y)), train_size=size, stratify=y, random_state=seed)
    if data in ("cancer", "wine"):  # their columns have units of their own
        x = (x - x[train].mean(0)) / x[train].std(0).clamp(min=1e-3)
    return x[train], y[train], x[test[:1000]], y[test[:1000]]


def mlp(inputs: int, width: int, classes: int, activation: type[nn.Module] = nn.GELU) -> nn.Module:
    hidden = (nn.Linear(inputs, width), activation(), nn.Linear(width, width), activation())
    return nn.Sequential(*hidden, nn.Linear(width, classes))


def cnn() -> nn.Module:
    """A network for images of any size, with the same parameters for each."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.GELU()),
        *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10)),
    )


def runner(penalty: str, model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """A function that runs the model; it returns the output and the value of the penalty."""
    term = PENALTIES[penalty](model)
    if penalty.startswith("DREG"):
        return lambda: (model(x), term())
    return lambda: term(model, x, *((y,) if penalty == "DataGrad" else ()))


def train(data: str, penalty: str, weight: float, seed: int, steps: int) -> Row:
    """Train with Adam on all training samples at once; return the record of the training."""
    x, y, x_test, y_test = split(data, seed)
    torch.manual_seed(seed)
    if data in SIDES:
        model = cnn()
    else:
        _, width, activation = MLPS[data]
        model = mlp(x.shape[1], width, int(y.max()) + 1, activation)
    model = fastjac.fuse(model)
    run = runner(penalty, model, x, y)
    row: Row = {"data": data, "penalty": penalty, "weight": weight, "seed": seed}
    parameters = list(model.parameters())

    def measure(when: str) -> None:
        """Write down the penalty without its weight, the loss, and ‖∇penalty‖/‖∇loss‖."""
        output, value = run()
        loss = F.cross_entropy(output, y)
        norms = []
        for number in (value, loss):
            grads = torch.autograd.grad(number, parameters, retain_graph=True, allow_unused=True)
            flat = torch.cat([grad.flatten() for grad in grads if grad is not None])
            norms.append(torch.linalg.vector_norm(flat.double()).item())
        row[f"value_{when}"], row[f"loss_{when}"] = value.item(), loss.item()
        row[f"gradients_{when}"] = norms[0] / norms[1] if norms[1] else math.nan

    optimizer = torch.optim.Adam(parameters, lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step in (0, max(steps // 10, 1)):
            measure("later" if step else "start")
        output, value = run()
        loss = F.cross_entropy(output, y) + weight * value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    measure("end")
    with torch.no_grad():
        outputs = model(x_test)
        row["train"] = 100 * (model(x).argmax(1) == y).double().mean().item()
    row["test"] = 100 * (outputs.argmax(1) == y_test).double().mean().item()
    row["spread"] = outputs.std(0).mean().item()  # 0 if all samples have the same output
    row["diverged"] = int(not outputs.isfinite().all())
    for when in ("start", "end"):
        row[f"share_{when}"] = weight * row[f"value_{when}"] / (row[f"loss_{when}"] or math.nan)
    return row


def scaling(seeds: int) -> list[Row]:
    """Values of untrained networks, the mean of the seeds; one size is varied."""
    rows = []
    usual = {"inputs": 64, "width": 256, "classes": 10}
    sizes = {"inputs": (16, 64, 256), "width": (64, 256, 1024), "classes": (2, 10, 100)}
    cells = [(name, size) for name, several in sizes.items() for size in several]
    for (varied, size), penalty in product(
        [*cells, *(("side", s) for s in (8, 32, 64))], PENALTIES
    ):
        values = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            if varied == "side":
                part = slice(100 * seed, 100 * seed + 100)
                images, y = (tensor[part] for tensor in samples("digits"))
                x, model = upsampled(images, size), cnn()
            elif penalty == "DREG, mean":  # an MLP has one position
                continue
            else:
                inputs, width, classes = {**usual, varied: size}.values()
                x, y = torch.randn(100, inputs), torch.randint(classes, (100,))
                model = mlp(inputs, width, classes)
            values.append(runner(penalty, fastjac.fuse(model), x, y)()[1].item())
        if values:
            value = sum(values) / len(values)
            rows.append({"varied": varied, "size": size, "penalty": penalty, "value": value})
    return rows


def run_all(seeds: int, steps: int, jobs: int, only: tuple[str, ...]) -> list[Row]:
    """All trainings. Each of the ``jobs`` processes trains one."""
    keys = [
        (data, penalty, weight, seed, steps)
        for data in only
        for penalty in penalties_of(data)
        for weight, seed in product(weights_of(penalty), range(seeds))
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        run: Any = map if jobs == 1 else pool.map
        columns = zip(*keys, strict=True)
        results = run(train, *columns)
        return list(track(results, "training", total=len(keys), console=Console(stderr=True)))


def write(path: Path, rows: list[Row], note: str) -> None:
    with path.open("w", newline="") as file:
        file.write(f"# {note}\n")
        table = csv.DictWriter(file, FIELDS if "test" in rows[0] else rows[0])
        table.writeheader()
        for row in rows:
            cells = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            table.writerow(cells)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Two data sets, 2 seeds.")] = False,
    seeds: Annotated[int | None, typer.Option(min=2, help="Number of splits; default 6.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of Adam; default 200.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = min(os.cpu_count() or 1, 8),
    out: Annotated[Path, typer.Option(help="Folder for the records.")] = Path("results"),
) -> None:
    """Train with every penalty and weight; write weights.csv and weights_scale.csv."""
    seeds, steps = seeds or (2 if quick else 6), steps or (10 if quick else 200)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    where = versions("cpu")
    note = f"{where['machine']}, torch {where['torch']}, float32, commit {where['commit']}"
    write(out / "weights_scale.csv", scaling(1 if quick else 5), note)
    rows = run_all(seeds, steps, jobs, ("wine", "digits, 8 px") if quick else (*MLPS, *SIDES))
    write(out / "weights.csv", rows, f"{note}, {steps} steps")
    diverged = sum(row["diverged"] for row in rows)
    print(f"{len(rows)} trainings, of which {diverged} have outputs that are not finite")
    print(f"wrote weights.csv and weights_scale.csv to {out}")


if __name__ == "__main__":
    typer.run(main)
