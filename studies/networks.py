"""The networks of the studies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def network(shape: torch.Size, classes: int, activation: str, dropout: float = 0.0) -> nn.Module:
    """A network for samples of a shape: convolutions for images and signals, else an MLP.

    Images of fewer than 100 pixels have nothing to convolve over and get the MLP too. Dropout
    follows the fully connected hidden layers.
    """
    act = ACTIVATIONS[activation]
    drop = [nn.Dropout(dropout)] if dropout else []
    spatial = len(shape) - 1
    size = shape[1:].numel()
    if spatial == 0 or (spatial == 2 and size < 100):
        first = [nn.Flatten(), nn.Linear(shape.numel(), 128), act(), *drop]
        return nn.Sequential(*first, nn.Linear(128, 128), act(), *drop, nn.Linear(128, classes))
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[spatial]
    kernel = {1: 5, 2: 3}[spatial]
    layers = [
        *(conv(shape[0], 16, kernel, stride=2, padding=kernel // 2), act()),
        *(conv(16, 32, kernel, stride=2, padding=kernel // 2), act()),
        nn.Flatten(),
    ]
    with torch.no_grad():
        features = nn.Sequential(*layers)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*layers, nn.Linear(features, 64), act(), *drop, nn.Linear(64, classes))


class LeNet5(nn.Sequential):
    """LeNet-5 with max pooling and ReLU, 61,706 parameters (Varga et al. 2017, section 6.1.1).

    The activation follows the pooling: the same function, since ReLU is monotone, on a quarter of
    the elements.

    Arguments:
        batch_norm: A BatchNorm after each convolution and hidden layer.
        dropout: The rate after the last hidden layer. The paper says "after the dense hidden
            layer", and this network has two.
    """

    def __init__(self, *, batch_norm: bool = False, dropout: float = 0.0) -> None:
        def norm(channels: int, spatial: bool) -> list[nn.Module]:
            kind = nn.BatchNorm2d if spatial else nn.BatchNorm1d
            return [kind(channels)] if batch_norm else []

        super().__init__()
        blocks = {
            "conv1": [nn.Conv2d(1, 6, 5, padding=2), *norm(6, True), nn.MaxPool2d(2), nn.ReLU()],
            "conv2": [nn.Conv2d(6, 16, 5), *norm(16, True), nn.MaxPool2d(2), nn.ReLU()],
            "fc1": [nn.Flatten(), nn.Linear(400, 120), *norm(120, False), nn.ReLU()],
            "fc2": [nn.Linear(120, 84), *norm(84, False), nn.ReLU(), nn.Dropout(dropout)],
            "logits": [nn.Linear(84, 10)],
        }
        for name, layers in blocks.items():
            self.add_module(name, nn.Sequential(*layers))  # type: ignore[misc]


class _Block(nn.Module):
    """conv-BatchNorm-ReLU-conv-BatchNorm, added to the input, then ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            *(nn.BatchNorm2d(outputs), nn.ReLU()),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """Three levels of residual blocks with 48, 96 and 192 filters (section 6.1.2).

    The paper says about 2.5 million parameters and not how many blocks; three in each level make
    2.44 million.
    """

    def __init__(self, *, channels: int = 3, classes: int = 10, blocks: int = 3) -> None:
        widths = (48, 96, 192)
        layers: list[nn.Module] = [
            *(nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0])),
            nn.ReLU(),
        ]
        inputs = widths[0]
        for level, width in enumerate(widths):
            for block in range(blocks):
                layers.append(_Block(inputs, width, 2 if level and not block else 1))
                inputs = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def sin_network() -> nn.Module:
    """Five hidden layers of 64 neurons with ReLU, one output (section 6.1.3)."""
    layers: list[nn.Module] = []
    for width in (1, 64, 64, 64, 64):
        layers += [nn.Linear(width, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 1))
