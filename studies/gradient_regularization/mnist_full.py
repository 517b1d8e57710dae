"""One run of LeNet-5 on few images of the whole MNIST, where somebody has the files.

A module of its own, so that these runs do not have the records of those of `mnist`.
"""

from __future__ import annotations

from pathlib import Path

from studies.gradient_regularization import mnist
from studies.settings import Metrics


def train(run: mnist.Run, directory: Path) -> Metrics:
    """Train as `mnist.train` does; 10,000 images each are for development and testing."""
    return mnist.train(run, directory)
