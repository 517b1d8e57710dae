"""The examples run, write their files, and show what they claim."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    plt.close("all")


@pytest.fixture
def sin():
    yield from loaded("sin")


@pytest.fixture
def digits():
    yield from loaded("digits")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_pictures(folder, *names):
    assert {path.name for path in folder.glob("*.png")} == set(names)
    for name in names:
        content = (folder / name).read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000


def test_sin_writes_its_results(sin, tmp_path, capsys):
    sin.main(seeds=2, steps=3, jobs=1, out=tmp_path / "new")
    rows = rows_of(tmp_path / "new" / "sin.csv")
    keys = [(float(row["weight"]), int(row["seed"])) for row in rows]
    assert keys == [(weight, seed) for weight in sin.WEIGHTS for seed in range(2)]
    assert all(0 < float(row["mse"]) < 10 for row in rows)
    assert_pictures(tmp_path / "new", "sin_mse.png", "sin_curves.png")
    printed = capsys.readouterr().out
    assert "differ by at most" in printed
    assert "0/2" in printed


def test_fused_and_reference_train_alike(sin):
    # Rounding of 50 steps: the largest difference in runs of up to 100 steps was 2e-14. A missing
    # second-order term makes a difference of 1e-3 or more.
    assert sin.largest_difference(50) < 1e-12


def test_sin_training_depends_on_seed_and_weight_alone(sin):
    once, again = (sin.train(0.01, 1, 5)[1] for _ in range(2))
    assert once == again
    assert once != sin.train(0.01, 0, 5)[1]
    assert once != sin.train(0.02, 1, 5)[1]


@pytest.mark.slow
def test_spectreg_lowers_the_error_on_sin(sin, monkeypatch):
    monkeypatch.setattr(sin, "WEIGHTS", (0.0, 3e-4))
    curves = sin.learned_curves(seeds=4, steps=1500, jobs=1)
    without, best = (curves - sin.TRUTH.squeeze(1)).square().mean(2).mean(1).tolist()
    assert best < 0.8 * without


def test_digits_writes_its_results(digits, tmp_path, capsys):
    digits.main(seeds=2, steps=2, jobs=1, out=tmp_path)
    rows = rows_of(tmp_path / "digits.csv")
    keys = [(row["penalty"], float(row["weight"]), int(row["seed"])) for row in rows]
    assert keys == [
        (name, weight, seed)
        for name, weights in digits.WEIGHTS.items()
        for weight in weights
        for seed in range(2)
    ]
    assert all(0 <= float(row[part]) <= 100 for row in rows for part in ("validation", "test"))
    assert_pictures(tmp_path, "digits_gain.png", "digits_weights.png")
    printed = capsys.readouterr().out
    assert all(name in printed for name in digits.WEIGHTS)


def test_digits_splits_are_disjoint_and_stratified(digits):
    parts = digits.split(0)
    assert [len(labels) for _images, labels in parts] == [100, 400, 1297]
    images = torch.cat([images for images, _labels in parts])
    assert len(images.unique(dim=0)) == 1797  # no two of the data set are equal
    assert images.min() == 0
    assert images.max() == 1
    counts = parts[0][1].bincount()
    assert 9 <= counts.min() <= counts.max() <= 11
    assert not torch.equal(parts[0][1], digits.split(1)[0][1])


def test_digits_weight_is_chosen_on_the_validation_images(digits, monkeypatch):
    monkeypatch.setattr(digits, "WEIGHTS", {"DREG": (0.1, 1.0, 10.0)})
    scores = {0.1: (80.0, 99.0), 1.0: (90.0, 70.0), 10.0: (90.0, 95.0)}
    runs = {("DREG", weight, 0): both for weight, both in scores.items()}
    assert digits.chosen(runs, "DREG", 1) == [1.0]


@pytest.mark.parametrize("name", ["no penalty", "weight decay", "SpectReg", "DataGrad", "DREG"])
def test_digits_learns(digits, name):
    validation, test = digits.accuracies(name, digits.WEIGHTS[name][0], seed=0, steps=60)
    assert validation > 75
    assert test > 75


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sin", "digits"])
def test_command_with_two_processes(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--steps", "2"]
    done = subprocess.run(
        [*command, "--jobs", "2", "--out", str(tmp_path)], capture_output=True, text=True,
        timeout=300, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"wrote {name}.csv" in done.stdout
    assert len(list(tmp_path.iterdir())) == 3
