"""The data sets of a directory in the layout of torchvision.

torchvision requires one version of torch exactly, so the files are read here.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import scipy.io
import torch
from torch import Tensor


class Samples(NamedTuple):
    """All samples of a data set.

    Attributes:
        x: the samples, float32, or uint8 for images of 256 levels.
        y: their labels, int64.
        own_test: how many of the last samples are the test set that the data set comes with.
    """

    x: Tensor
    y: Tensor
    own_test: int = 0


class Source(NamedTuple):
    """Where a data set comes from.

    Attributes:
        name: the name that `split` takes.
        kind: ``"vision"``, ``"tabular"`` or ``"text"``.
        load: returns the samples.
        package: the distribution to install, or ``""`` if the user has the files.
        licence: the licence in the metadata of the package.
        note: what the samples are.
    """

    name: str
    kind: Literal["vision", "tabular", "text"]
    load: Callable[[], Samples]
    package: str
    licence: str
    note: str


def found(directory: str | Path) -> dict[str, Source]:
    """Return the data sets that are in a directory in the layout of torchvision.

    The names are mnist-full, fashion-mnist, cifar10, cifar100 and svhn. A data set is there if all
    its files are; those of MNIST and Fashion-MNIST may be compressed (``.gz``). The files of CIFAR
    are pickles, and can run any code when they are read: use only files that you trust.
    """
    sources = {}
    for name, (files, read, note) in _FILES.items():
        paths = [Path(directory, file) for file in files]
        if read is _idx_parts:
            paths = [p if p.exists() else p.with_name(f"{p.name}.gz") for p in paths]
        if all(path.is_file() for path in paths):
            load = partial(_joined, read, paths)
            sources[name] = Source(name, "vision", load, "", "that of your copy", note)
    if not sources:
        expected = "; ".join(f"{name}: {', '.join(row[0])}" for name, row in _FILES.items())
        raise FileNotFoundError(
            f"directory is {str(directory)!r}: it must contain all files of a data set. {expected}"
        )
    return sources


_Parts = list[tuple[np.ndarray, np.ndarray]]


def _joined(read: Callable[[Sequence[Path]], _Parts], paths: Sequence[Path]) -> Samples:
    images, labels = zip(*read(paths), strict=True)
    x, y = np.concatenate(images), np.concatenate(labels).astype(np.int64)
    return Samples(torch.from_numpy(x), torch.from_numpy(y), own_test=len(labels[-1]))


def _idx_parts(paths: Sequence[Path]) -> _Parts:
    arrays = [_idx(path) for path in paths]
    return [(arrays[0][:, None], arrays[1]), (arrays[2][:, None], arrays[3])]


def _idx(path: Path) -> np.ndarray:
    raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.decompress(raw)
    dims = raw[3]
    shape = np.frombuffer(raw, ">u4", dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def _cifar_parts(paths: Sequence[Path]) -> _Parts:
    batches = []
    for path in paths:
        with path.open("rb") as file:
            batches.append(pickle.load(file, encoding="bytes"))  # the files are of Python 2
    return [
        (
            batch[b"data"].reshape(-1, 3, 32, 32),
            np.array(batch[b"fine_labels" if b"fine_labels" in batch else b"labels"]),
        )
        for batch in batches
    ]


def _svhn_parts(paths: Sequence[Path]) -> _Parts:
    files = [scipy.io.loadmat(path) for path in paths]
    # The label of the digit 0 is 10.
    return [(file["X"].transpose(3, 2, 0, 1), file["y"].ravel() % 10) for file in files]


_IDX = [
    f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
]
_FILES: dict[str, tuple[list[str], Callable[[Sequence[Path]], _Parts], str]] = {
    "mnist-full": (
        [f"MNIST/raw/{file}" for file in _IDX],
        _idx_parts,
        "70,000 handwritten digits of 28 x 28 pixels, 10,000 of them to test on",
    ),
    "fashion-mnist": (
        [f"FashionMNIST/raw/{file}" for file in _IDX],
        _idx_parts,
        "70,000 pictures of clothes, 28 x 28 pixels, 10 classes, 10,000 of them to test on",
    ),
    "cifar10": (
        [
            f"cifar-10-batches-py/{f}"
            for f in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
        ],
        _cifar_parts,
        "60,000 colour photographs of 32 x 32 pixels, 10 classes, 10,000 of them to test on",
    ),
    "cifar100": (
        ["cifar-100-python/train", "cifar-100-python/test"],
        _cifar_parts,
        "60,000 colour photographs of 32 x 32 pixels, 100 classes, 10,000 of them to test on",
    ),
    "svhn": (
        ["train_32x32.mat", "test_32x32.mat"],
        _svhn_parts,
        "99,289 colour photographs of house numbers, 32 x 32 pixels, 26,032 of them to test on",
    ),
}
