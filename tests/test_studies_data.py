"""The data of the studies: the packages' sets, the division, and the readers of files."""

from __future__ import annotations

import gzip
import pickle
import random
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
from torch import Tensor

from studies.data import SOURCES, Split, _load, _signs, found, split

SHAPES = {  # of a sample, and the numbers of samples and classes
    "digits": ((1, 8, 8), 1797, 10),
    "mnist": ((1, 28, 28), 5000, 10),
    "mnist1d": ((1, 40), 5000, 10),
    "cancer": ((30,), 569, 2),
    "phishing": ((9,), 1250, 2),
    "segments": ((18,), 2310, 7),
    "words": ((512,), 7492, 2),
    "glosses": ((512,), 1506, 2),
}
MODULES = {"scikit-learn": "sklearn"}


def need(name: str) -> None:
    package = SOURCES[name].package
    pytest.importorskip(MODULES.get(package, package))


def numbers(x: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in x.flatten(1).tolist()}


@pytest.mark.parametrize("name", SOURCES)
def test_a_data_set_is_complete_learnable_and_in_proportion(name: str) -> None:
    need(name)
    shape, total, classes = SHAPES[name]
    got = split(name, 0, dev=0.1)
    assert SOURCES[name].name == name
    assert got.classes == classes
    assert len(got.y) + len(got.y_dev) + len(got.y_test) == total
    for x, y in ((got.x, got.y), (got.x_dev, got.y_dev), (got.x_test, got.y_test)):
        assert x.shape == (len(y), *shape)
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert x.isfinite().all()
        share = [part.bincount(minlength=classes) / len(part) for part in (y, got.y)]
        assert (share[0] - share[1]).abs().max() < 2 / len(y)

    x, x_test = got.x.flatten(1), got.x_test.flatten(1)
    # Ridge regression on the labels, with the most frequent one for comparison.
    targets = torch.nn.functional.one_hot(got.y).float()
    center = targets.mean(0)
    gram = x.T @ x + 0.3 * len(x) * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, x.T @ (targets - center))
    accuracy = ((x_test @ weight + center).argmax(1) == got.y_test).float().mean()
    chance = got.y_test.bincount().max() / len(got.y_test)
    assert chance + 0.05 < accuracy < 0.98


def test_a_text_is_labelled_with_its_sign_if_that_is_one() -> None:
    pairs = [("Bad", -1.0), ("bad ", -3.0), ("good", 0.5), ("good", 0.0)]
    got = _signs([*pairs, ("so", 0.0), ("odd", 1.0), ("odd", -1.0), (" ", 1.0)])
    assert got.y.tolist() == [0, 1]
    assert not torch.equal(got.x[0], got.x[1])


def test_a_smaller_training_set_is_part_of_a_larger_one_and_the_rest_stays() -> None:
    raw = {"standardise": False, "dev": 300, "test": 400}
    small, large = (split("digits", 3, train=n, **raw) for n in (50, 500))
    everything = split("digits", 3, train=1.0, **raw)
    half = split("digits", 3, train=0.5, **raw)
    assert torch.equal(small.x, large.x[:50]) and torch.equal(large.x, everything.x[:500])
    assert len(everything.y) == 1797 - 700 and len(half.y) == round((1797 - 700) / 2)
    for other in (large, everything, half):
        assert torch.equal(small.x_dev, other.x_dev) and torch.equal(small.y_dev, other.y_dev)
        assert torch.equal(small.x_test, other.x_test) and torch.equal(small.y_test, other.y_test)
    assert (small.y.bincount() - 5).abs().max() <= 1
    parts = [numbers(x) for x in (everything.x, everything.x_dev, everything.x_test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 1797


def test_test_samples_depend_on_the_seed_and_not_on_dev() -> None:
    one, same, dev, other = (
        split("digits", seed, dev=n, standardise=False)
        for seed, n in ((1, 0), (1, 0), (1, 200), (2, 0))
    )
    assert torch.equal(one.x, same.x) and len(one.x_dev) == 0
    assert torch.equal(one.x_test, dev.x_test)
    assert not torch.equal(one.y_test, other.y_test)


def test_the_split_keeps_each_label_with_its_sample() -> None:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    label = {tuple(row): int(digit) for row, digit in zip(x / 16, y, strict=True)}
    got = split("digits", 0, dev=100, standardise=False)
    for part, labels in ((got.x, got.y), (got.x_dev, got.y_dev), (got.x_test, got.y_test)):
        assert [label[tuple(row)] for row in part.flatten(1).tolist()] == labels.tolist()


def test_tabular_columns_are_standardised_by_the_training_samples() -> None:
    got, raw = (split("cancer", 0, train=100, standardise=s) for s in (True, False))
    torch.testing.assert_close(got.x.mean(0), torch.zeros(30), atol=1e-4, rtol=0)
    torch.testing.assert_close(got.x.std(0, correction=0), torch.ones(30))
    mean, std = raw.x.mean(0), raw.x.std(0, correction=0)
    torch.testing.assert_close(got.x_test, (raw.x_test - mean) / std, atol=1e-4, rtol=1e-4)


def test_a_column_that_is_constant_in_training_is_only_centred() -> None:
    need("segments")
    got, raw = (split("segments", 0, train=20, standardise=s) for s in (True, False))
    constant = raw.x.amin(0) == raw.x.amax(0)
    assert raw.x_test[:, constant].std() > 0
    expected = raw.x_test[:, constant] - raw.x[0, constant]
    torch.testing.assert_close(got.x_test[:, constant], expected)


@pytest.mark.parametrize(("name", "steps"), [("digits", 16), ("mnist", 255)])
def test_images_have_one_mean_and_std_or_stay_between_0_and_1(name: str, steps: int) -> None:
    need(name)
    got, raw = (split(name, 0, standardise=s) for s in (True, False))
    assert raw.x.min() == 0 and raw.x.max() == 1
    torch.testing.assert_close(raw.x * steps, (raw.x * steps).round(), atol=1e-4, rtol=0)
    expected = (raw.x_test - raw.x.mean()) / raw.x.std()
    torch.testing.assert_close(got.x_test, expected, atol=1e-3, rtol=1e-3)


def test_signals_are_generated_without_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need("mnist1d")
    from mnist1d import data

    made: list[dict[str, np.ndarray]] = []
    make_dataset = data.make_dataset
    monkeypatch.setattr(data, "make_dataset", lambda: made.append(make_dataset()) or made[0])
    monkeypatch.chdir(tmp_path)
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5)
    np.random.seed(5)
    samples = SOURCES["mnist1d"].load()
    assert (random.random(), np.random.rand()) == expected
    assert not list(tmp_path.iterdir())

    for at, x, y in ((0, "x", "y"), (-1, "x_test", "y_test")):
        signal = torch.tensor(made[0][x][at], dtype=torch.float32)
        assert torch.equal(samples.x[at, 0], signal) and samples.y[at] == made[0][y][at]


def test_a_process_loads_a_data_set_once() -> None:
    assert _load("digits", None) is _load("digits", None)
    got = split("digits", 0)
    got.x.zero_(), got.y.zero_()
    assert split("digits", 0).x.any() and split("digits", 0).y.any()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="name is 'digit': it must be one of 'digits', 'mnist',"):
        split("digit", 0)
    with pytest.raises(ValueError, match="train is 1349, which is 1349 samples: .* 1 to 1348"):
        split("digits", 0, train=1349)
    with pytest.raises(ValueError, match="train is 0, .* 1 to 1348"):
        split("digits", 0, train=0)
    with pytest.raises(ValueError, match="test is -1, .* 0 to 1797"):
        split("digits", 0, test=-1)
    with pytest.raises(ValueError, match="dev is 0.9, .* 0 to 1348"):
        split("digits", 0, dev=0.9)


# Files as torchvision unpacks them: the pixel (row, column) of channel c of sample i is
# (31 i + 7 c + 5 row + column) modulo 256, so no two axes can be exchanged.


def pixels(count: int, channels: int, size: int, first: int = 0) -> np.ndarray:
    i, c, row, column = np.ogrid[first : first + count, :channels, :size, :size]
    return (31 * i + 7 * c + 5 * row + column).astype(np.uint8)


def write_idx(directory: Path, pack: bool) -> None:
    directory.mkdir(parents=True)
    for part, count, first in (("train", 6, 0), ("t10k", 4, 6)):
        images = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        images += pixels(count, 1, 28, first).tobytes()
        labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(range(first, first + count))
        for what, content in (("images-idx3", images), ("labels-idx1", labels)):
            name = f"{part}-{what}-ubyte{'.gz' if pack else ''}"
            (directory / name).write_bytes(gzip.compress(content) if pack else content)


def python_2(batch: dict[str, np.ndarray | list[int]]) -> bytes:
    """A pickle as Python 2 wrote those of CIFAR: strings of bytes, and 0 and 1 for booleans."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    out = b"\x80\x02}"
    for key, value in batch.items():
        out += text(key.encode())
        if isinstance(value, list):
            out += b"](" + b"".join(map(number, value)) + b"e"
        else:
            dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
            dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) * 2 + b"K\x00tb"
            out += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            out += b"K\x00\x85" + text(b"b") + b"\x87R(K\x01"
            out += number(value.shape[0]) + number(value.shape[1]) + b"\x86"
            out += dtype + b"\x89" + text(value.tobytes()) + b"tb"
        out += b"s"
    return out + b"."


def write_cifar(directory: Path, names: list[str], key: str) -> None:
    directory.mkdir()
    for at, name in enumerate(names):
        data = pixels(2, 3, 32, 2 * at).reshape(2, 3072)
        batch = {"data": data, key: [2 * at, 2 * at + 1], "coarse_labels": [0, 0]}
        (directory / name).write_bytes(python_2(batch))


def write_svhn(directory: Path) -> None:
    for part, count, first in (("train", 6, 0), ("test", 4, 6)):
        x = pixels(count, 3, 32, first).transpose(2, 3, 1, 0)
        y = np.array([i or 10 for i in range(first, first + count)], np.uint8)[:, None]
        scipy.io.savemat(directory / f"{part}_32x32.mat", {"X": x, "y": y})


@pytest.fixture(params=[False, True], ids=["plain", "gz"])
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write_idx(tmp_path / "MNIST/raw", request.param)
    write_idx(tmp_path / "FashionMNIST/raw", request.param)
    batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    write_cifar(tmp_path / "cifar-10-batches-py", batches, "labels")
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], "fine_labels")
    write_svhn(tmp_path)
    return tmp_path


FILES = {  # channels, size, training samples, test samples
    "mnist-full": (1, 28, 6, 4),
    "fashion-mnist": (1, 28, 6, 4),
    "cifar10": (3, 32, 10, 2),
    "cifar100": (3, 32, 2, 2),
    "svhn": (3, 32, 6, 4),
}


def test_each_file_is_read_to_the_right_place(directory: Path) -> None:
    assert set(found(directory)) == set(FILES)
    for name, (channels, size, train, test) in FILES.items():
        got = split(name, 0, standardise=False, directory=directory)
        assert len(got.y) == train and got.classes == train + test
        # The label of a sample is its place in the files.
        assert sorted(got.y.tolist()) == list(range(train))
        assert sorted(got.y_test.tolist()) == list(range(train, train + test))
        expected = torch.tensor(pixels(train + test, channels, size)) / 255
        assert torch.equal(got.x, expected[got.y]), name
        assert torch.equal(got.x_test, expected[got.y_test]), name


@pytest.mark.parametrize("name", ["mnist-full", "fashion-mnist", "cifar10", "cifar100", "svhn"])
def test_the_sweep_runs_on_each(directory: Path, name: str) -> None:
    """What ``python -m studies.dreg --data DIR`` runs."""
    from studies.dreg.study import STUDY
    from studies.dreg.training import Run, train

    declared = {e.name: e for e in STUDY.experiments(False, directory)}
    assert {name, "digits"} < {run.data for run in declared["sweep"].settings}
    assert declared["sweep"].extra == {"directory": directory}
    assert name in {run.data for run in declared["mean"].settings}
    for regularizer in ("DREG", "spectral norm"):
        run = Run(data=name, regularizer=regularizer, steps=2)
        assert 0 <= train(run, **declared["sweep"].extra)["test"] <= 100


def test_the_other_study_takes_mnist_and_cifar10(directory: Path, monkeypatch: Any) -> None:
    from studies.gradient_regularization import cifar, mnist
    from studies.gradient_regularization.study import STUDY

    declared = {e.name: e for e in STUDY.experiments(False, directory)}
    run = declared["cifar"].settings[0]
    assert isinstance(run, cifar.Run)
    run = replace(run, size=4, iterations=1, blocks=1)
    assert 0 <= cifar.train(run, **declared["cifar"].extra)["test"] <= 100
    usual = {e.name: e for e in STUDY.experiments(False, None)}
    assert not set(usual["tables"].keys) & set(declared["tables"].keys)
    asked = {}

    def seen(name: str, seed: int, **options: Any) -> Split:
        asked.update(options, name=name)
        options |= {"train": 4, "dev": 1, "test": 2}
        return split(name, seed, **options)

    monkeypatch.setattr(mnist, "split", seen)
    declared["tables"].run(mnist.Run(iterations=1, size=4), **declared["tables"].extra)
    assert asked["name"] == "mnist-full"
    assert (asked["dev"], asked["test"]) == (10_000, 10_000)


def test_a_test_set_of_its_own(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    assert set(found(tmp_path)) == {"svhn"}

    def get(**options: int | float) -> Split:
        return split("svhn", 0, directory=tmp_path, standardise=False, **options)

    got = get(test=3, dev=2, train=0.5)
    assert len(got.y_test) == 3 and got.y_test.min() >= 6
    assert len(got.y_dev) == 2 and len(got.y) == 2
    assert set(got.y_dev.tolist()) | set(get(dev=2).y.tolist()) == set(range(6))
    with pytest.raises(ValueError, match="test is 5, .* 0 to 4"):
        get(test=5)
    with pytest.raises(ValueError, match="name is 'cifar10': it must be one of .* 'svhn'"):
        split("cifar10", 0, directory=tmp_path)
    assert len(split("digits", 0, directory=tmp_path).y) == 1348


def test_only_complete_data_sets_are_found(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST/raw", False)
    write_cifar(tmp_path / "cifar-100-python", ["train"], "fine_labels")
    assert set(found(tmp_path)) == {"fashion-mnist"}
    (tmp_path / "FashionMNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="directory is .*cifar-100-python/train.*svhn"):
        found(tmp_path)


def test_pickles_of_python_3_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    batch = {b"data": pixels(2, 3, 32).reshape(2, 3072), b"fine_labels": [0, 1]}
    for name in ("train", "test"):
        (tmp_path / "cifar-100-python" / name).write_bytes(pickle.dumps(batch))
    assert split("cifar100", 0, directory=tmp_path).x.shape == (2, 3, 32, 32)


def test_the_page_lists_every_data_set():
    text = (Path(__file__).parents[1] / "studies" / "README.md").read_text()
    for source in SOURCES.values():
        assert f"| `{source.name}` | {source.package} | {source.licence} | {source.note} |" in text
