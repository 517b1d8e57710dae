"""Networks and data of the benchmark cases.

A problem is built in the dtype of the run; its truth is computed from the same numbers widened to
float64, so that rounding of the inputs is never counted as an error of a contestant.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class StepProblem:
    """One training step: network, batch, task loss and the penalty that is added to it.

    Attributes:
        model: network in training mode, parameters of the run's dtype.
        x: input, ``[N, ...]``.
        target: class indices ``[N]``, or float labels ``[N]`` for a network with one output.
        loss: mean task loss of ``(output, target)``.
        penalty: key of :data:`fastjac.bench.idioms.INPUT_JACOBIAN`, or ``"dreg"``.
        projection: explicit cotangents ``w``, ``[K, N, m]``, so that every contestant projects on
            the same numbers; None for penalties that draw nothing.
        weight: factor of the penalty. The runner sets it so that penalty and loss have gradients
            of like norm: with a small weight a wrong second-order term would hide under the
            tolerance of the gate.
    """

    model: nn.Module
    x: Tensor
    target: Tensor
    loss: Loss
    penalty: str
    projection: Tensor | None = None
    weight: float = 1.0

    def double(self) -> StepProblem:
        """The same problem in float64 (class indices stay integers)."""

        def widen(tensor: Tensor) -> Tensor:
            return tensor.double() if tensor.is_floating_point() else tensor

        return replace(
            self,
            model=copy.deepcopy(self.model).double(),
            x=widen(self.x),
            target=widen(self.target),
            projection=None if self.projection is None else widen(self.projection),
        )


@dataclass
class ElementwiseProblem:
    """One activation in one phase, on buffers that are used in turn.

    ``forward`` is ``phi(z)``, ``backward`` is ``phi'(z) g``, ``double`` maps a cotangent ``u`` of
    ``phi'(z) g`` to ``(phi''(z) g u, phi'(z) u)``.

    Attributes:
        fn: name in ``fastjac.activations.TABLE``.
        phi: torch's own function.
        phase: ``"forward"``, ``"backward"`` or ``"double"``.
        z, g, u: one tensor per buffer. With one buffer only the cache would be measured.
    """

    fn: str
    phi: Callable[[Tensor], Tensor]
    phase: str
    z: list[Tensor]
    g: list[Tensor]
    u: list[Tensor]
    #: tensors that the phase must read or write, whatever the implementation
    accesses: int = field(init=False)

    def __post_init__(self) -> None:
        self.accesses = {"forward": 2, "backward": 3, "double": 5}[self.phase]

    @property
    def bytes_moved(self) -> int:
        """Bytes that one call must read and write."""
        return self.accesses * self.z[0].numel() * self.z[0].element_size()

    def double(self) -> ElementwiseProblem:
        """The first buffer in float64: the gate looks at one call."""
        return ElementwiseProblem(
            self.fn, self.phi, self.phase, *([t[0].double()] for t in (self.z, self.g, self.u))
        )


Problem = StepProblem | ElementwiseProblem


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """Linear layers of the given sizes, an activation between each two."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return nn.Sequential(*layers[:-1])


def lenet() -> nn.Sequential:
    """LeNet-5 of the 2017 gradient-regularization paper for ``[N, 1, 28, 28]``: 61706 parameters.

    Max pooling and ReLU. Its dropout is left out: the gate compares gradients, so the network must
    be deterministic.
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
    """Eight-layer CIFAR ResNet for ``[N, 3, 32, 32]``, BatchNorm and GELU."""
    a, b, c = channels
    return nn.Sequential(
        *(nn.Conv2d(3, a, 3, padding=1, bias=False), nn.BatchNorm2d(a), nn.GELU()),
        *(ResidualBlock(a, a, 1), ResidualBlock(a, b, 2), ResidualBlock(b, c, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)),
    )


class TransformerClassifier(nn.Module):
    """Pre-norm encoder with GELU for ``[N, T, d]``, mean over the sequence, linear head.

    No dropout: the gate compares gradients, so the network must be deterministic.
    """

    def __init__(self, d: int = 256, heads: int = 4, hidden: int = 1024, layers: int = 4) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            *(d, heads, hidden), dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean logistic loss of a network with one output, ``[N, 1]`` against ``[N]``."""
    return F.binary_cross_entropy_with_logits(output.flatten(), target)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of a network with one output, ``[N, 1]`` against ``[N]``."""
    return F.mse_loss(output.flatten(), target)


def step_problem(
    network: Callable[[], nn.Module],
    shape: Sequence[int],
    penalty: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    outputs: int = 10,
    kinks: bool = False,
    n_proj: int = 1,
    loss: Loss | None = None,
) -> StepProblem:
    """A seeded network on a seeded Gaussian batch.

    Args:
        network: constructor of the model.
        shape: shape of the input, batch first.
        penalty: see :class:`StepProblem`.
        device, dtype: where and in what the step runs.
        outputs: ``m``; with 1 the labels are floats, 0 or 1.
        kinks: the network is only piecewise smooth; see :func:`away_from_kinks`.
        n_proj: K of SpectReg.
        loss: None is cross entropy, logistic for one output.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network().train()
        batch = shape[0]
        x = torch.randn(4 * batch, *shape[1:]) if kinks else torch.randn(*shape)
        if kinks:
            x = away_from_kinks(model, x, batch)
        target = torch.randint(max(outputs, 2), (batch,))
        projection = (
            torch.randn(n_proj, batch, outputs) / outputs**0.5 if penalty == "spectreg" else None
        )
    return StepProblem(
        model.to(device, dtype),
        x.to(device, dtype),
        target.to(device, dtype) if outputs == 1 else target.to(device),
        loss or (binary_cross_entropy if outputs == 1 else F.cross_entropy),
        penalty,
        None if projection is None else projection.to(device, dtype),
    )


def away_from_kinks(model: nn.Module, candidates: Tensor, n: int) -> Tensor:
    """The ``n`` candidates whose input gradient moves least when the input moves by 1e-5.

    A ReLU within rounding of 0, or two equal maxima of a pool, may fall either way in two correct
    implementations, and the gradient jumps there. Such samples would make the gate a lottery.
    """
    wide = copy.deepcopy(model).double()
    candidates64 = candidates.double()

    def gradient(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        output = wide(x)
        ramp = torch.linspace(1, 2, output.shape[1], dtype=output.dtype)
        return torch.autograd.grad(output, x, ramp.expand_as(output))[0].flatten(1)

    base = gradient(candidates64)
    moved = torch.zeros(len(candidates))
    for _ in range(4):
        nudge = 1e-5 * torch.randn_like(candidates64)
        for side in (nudge, -nudge):
            change = (gradient(candidates64 + side) - base).norm(dim=1) / base.norm(dim=1)
            moved = torch.maximum(moved, change.float())
    keep = moved.argsort(stable=True)[:n]
    return candidates[keep.sort().values]


def elementwise_problem(
    fn: str,
    phi: Callable[[Tensor], Tensor],
    phase: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shape: Sequence[int] = (4096, 1024),
) -> ElementwiseProblem:
    """Gaussian buffers (standard deviation 2, so that the tails of ``phi`` take part)."""
    inputs = {"forward": 1, "backward": 2, "double": 3}[phase]
    z, g, u = _buffers(inputs, device, dtype, tuple(shape))
    return ElementwiseProblem(fn, phi, phase, z, g, u)


@functools.lru_cache(maxsize=1)  # consecutive cases share their inputs; nobody writes to them
def _buffers(
    inputs: int, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    first = [(2 * torch.randn(*shape, generator=generator)).to(device, dtype) for _ in range(3)]
    # twice the cache, within reason: a virtual machine may report the cache of the whole host
    wanted = min(2 * last_level_cache(device), 256 << 20)
    n = max(3, -(-wanted // (inputs * first[0].numel() * dtype.itemsize)))
    return tuple(
        # a phase that does not read g or u still carries one of each, for a uniform interface
        [values, *(values.clone() for _ in range(n - 1 if k < inputs else 0))]
        for k, values in enumerate(first)
    )


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache of the device (32 MiB where the system does not tell)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(_cpu_cache_sizes(), default=32 << 20)


def _cpu_cache_sizes() -> Iterator[int]:
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            yield int(text[:-1]) << 10
