"""The examples run, write their files, and show what they claim."""

import csv
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import fastjac

EXAMPLES = Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    plt.close("all")


@pytest.fixture
def digits():
    yield from loaded("digits")


@pytest.fixture
def weights():
    yield from loaded("weights")


@pytest.fixture
def weights_page():
    yield from loaded("weights_page")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_pictures(folder, *names):
    assert {path.name for path in folder.glob("*.png")} == set(names)
    for name in names:
        content = (folder / name).read_bytes()
        assert content.startswith(PNG)
        assert len(content) > 10_000


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


def test_weights_writes_its_records(weights, weights_page, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(weights, "WEIGHTS", dict.fromkeys(weights.PENALTIES, (-2, -1)))
    weights.main(quick=True, steps=3, jobs=1, out=tmp_path)
    assert "64 trainings, of which 0 have outputs that are not finite" in capsys.readouterr().out
    note, rows = weights_page.read("weights.csv", tmp_path)
    assert "torch" in note and note.endswith(", 3 steps")
    assert [*rows[0]] == weights.FIELDS
    assert sorted({row["weight"] for row in rows}) == [0, 0.01, 0.03, 0.1]
    assert len({(row["data"], row["penalty"], row["weight"], row["seed"]) for row in rows}) == 64
    for row in rows:
        share = row["weight"] * row["value_end"] / row["loss_end"]
        assert row["share_end"] == pytest.approx(share, rel=2e-3)  # the records have four digits
    # Without a weight, a penalty takes no part in the training.
    plain = [row for row in rows if row["weight"] == 0 and row["data"] == "wine"]
    assert len({(row["seed"], row["loss_end"], row["test"]) for row in plain}) == 2
    scale = weights_page.read("weights_scale.csv", tmp_path)[1]
    value = {(row["penalty"], row["varied"], row["size"]): row["value"] for row in scale}
    assert value["DREG", "side", 32] / value["DREG", "side", 8] == pytest.approx(16, rel=0.1)


def test_weights_the_penalty_is_minimised(weights):
    plain, penalised = (weights.train("wine", "DREG", weight, 0, 30) for weight in (0.0, 0.1))
    assert plain["value_start"] == penalised["value_start"]
    assert penalised["value_end"] < 0.7 * plain["value_end"]


def test_weights_page_is_that_of_the_records(weights_page):
    page = (EXAMPLES.parent / "docs/WEIGHT.md").read_text()
    assert weights_page.update(page) == page
    with pytest.raises(ValueError, match="TABLE --> for scale"):
        weights_page.update(page.replace("weights: scale", "none: scale"))


def test_weights_page_draws_its_picture(weights_page, tmp_path):
    rows = weights_page.read("weights.csv")[1]
    weights_page.draw(weights_page.curves_of(rows), tmp_path / "weights.png")
    assert_pictures(tmp_path, "weights.png")


def test_weights_the_advice_is_that_of_the_tables(weights_page):
    """The starts that the page advises, and what they lose, in its text and in its table."""
    page = " ".join((EXAMPLES.parent / "docs/WEIGHT.md").read_text().split())
    curves = weights_page.curves_of(weights_page.read("weights.csv")[1])

    def lost(penalty, start):
        return max(c.lost(start(c)) for (name, _), c in curves.items() if name == penalty)

    tenth = lost("DREG", lambda curve: curve.start(weights_page.TENTH, 0.1))
    losses = [f"{tenth:.1f} points (DREG)"]
    for name in ("SpectReg", "FrobReg", "DataGrad"):
        start = re.search(rf"{name} at ([\d.]*\d)", page)[1]
        assert f"the weight {start} for all" in page
        losses.append(f"{lost(name, lambda _curve, at=float(start): at):.1f} ({name})")
    assert f"lose up to {', '.join(losses[:-1])} and {losses[-1]}" in page


def test_weights_dreg_names_the_values_of_the_records(weights_page):
    text = " ".join(fastjac.DREG.__doc__.split())
    rows = weights_page.read("weights_scale.csv")[1]
    sums, means = (
        [
            f"{float(format(row['value'], '.2g')):g}"
            for row in rows
            if row["penalty"] == name and row["varied"] == "side"
        ]
        for name in ("DREG", "DREG, mean")
    )
    assert "{}, {} and {} for 8, 32 and 64 pixels; ".format(*sums) in text
    assert set(means) == {"2.2"} and "those of the mean are 2.2." in text


def test_weights_as_good_is_paired_by_seed(weights_page):
    """Three weights: the seeds differ much, the weights by 1 ± 2 and by 1 ± 0.1."""
    tests = {0.0: (50, 70, 90), 0.03: (47, 69, 91), 0.3: (50, 70, 90), 1.0: (49.1, 69, 88.9)}
    rows = [
        {"weight": weight, "seed": seed, "test": test, "value_start": value, "loss_start": 2.0}
        for weight, row in tests.items()
        for seed, (test, value) in enumerate(zip(row, (5, 20, 80), strict=True))
    ]
    curve = weights_page.Curve(rows)
    assert (curve.weights, curve.best, curve.low, curve.high) == ([0.03, 0.3, 1.0], 1, 0, 1)
    assert curve.lost(0.3) == 0
    assert curve.lost(0.3 * (1 / 0.3) ** 0.5) == pytest.approx(0.5)
    assert curve.start(weights_page.TENTH, 0.1) == pytest.approx(0.1 * 2 / 20)
    assert [curve.factor(0.9), curve.factor(0.1)] == pytest.approx([3, 3])
    assert curve.lands(0.03) and curve.lands(1.0)
    assert not curve.lands(0.02) and not curve.lands(1.1)
    assert curve.harm(0.5) == pytest.approx(0.3 * (1 / 0.3) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "weights"])
def test_command_with_two_processes(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick", "--steps", "2"]
    done = subprocess.run(
        [*command, "--jobs", "2", "--out", str(tmp_path)], capture_output=True, text=True,
        timeout=300, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"wrote {name}.csv" in done.stdout
    assert len(list(tmp_path.iterdir())) == (2 if name == "weights" else 3)
