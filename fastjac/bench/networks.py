"""Networks of the benchmark cases."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear layers of the given sizes, with an activation between each two."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


class FunctionalMlp(nn.Module):
    """An MLP with GELU as people write it by hand: layers in a list, the activation a function."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        *hidden, head = (nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes))
        self.hidden, self.head = nn.ModuleList(hidden), head

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = F.gelu(layer(x))
        return self.head(x)


def lenet() -> nn.Sequential:
    """LeNet-5 of the 2017 gradient-regularization paper for ``[N, 1, 28, 28]``: 61706 parameters.

    The paper's dropout is left out, because the gate compares gradients.
    """
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


class ResidualBlock(nn.Module):
    """conv - BatchNorm - activation - conv - BatchNorm, plus the shortcut, then the activation."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.GELU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act2 = nn.GELU()
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels_in == channels
            else nn.Conv2d(channels_in, channels, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        a = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(a)) + self.shortcut(x))


def small_resnet(channels: tuple[int, int, int] = (16, 32, 64)) -> nn.Sequential:
    """CIFAR ResNet with eight layers, BatchNorm and GELU for ``[N, 3, 32, 32]``."""
    a, b, c = channels
    return nn.Sequential(
        *(nn.Conv2d(3, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.GELU()),
        *(ResidualBlock(a, a, 1), ResidualBlock(a, b, 2), ResidualBlock(b, c, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)),
    )


class TransformerClassifier(nn.Module):
    """Pre-norm encoder with GELU for ``[N, T, d]``, no dropout, mean over T, linear head."""

    def __init__(self, d: int = 256, heads: int = 4, hidden: int = 1024, layers: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            *(d, heads, hidden), dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))
