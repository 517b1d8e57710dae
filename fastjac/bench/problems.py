"""What a benchmark case computes on: a network and a batch, or the buffers of an op.

A problem is built in the dtype of the run; its truth is computed from the same numbers widened to
float64, so that rounding of the inputs is never counted as an error of a contestant.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.activations import TABLE

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class StepProblem:
    """One training step: network, batch, task loss and the penalty that is added to it.

    Attributes:
        model: network in training mode, parameters of the run's dtype.
        x: input, ``[N, ...]``.
        target: class indices ``[N]``, or float labels ``[N]`` for a network with one output.
        loss: mean task loss of ``(output, target)``.
        penalty: key of :data:`fastjac.bench.idioms.IDIOMS`.
        projection: explicit cotangents ``w``, ``[K, N, m]``, so that every contestant of a penalty
            that draws them projects on the same numbers.
        weight: factor of the penalty. The runner sets it so that penalty and loss have gradients
            of like norm: with a small weight a wrong second-order term would hide under the
            tolerance of the gate.
    """

    model: nn.Module
    x: Tensor
    target: Tensor
    loss: Loss
    penalty: str
    projection: Tensor
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
            projection=self.projection.double(),
        )


#: phase of an op -> tensors that it must read or write, whatever the implementation
PHASES = {"forward": 2, "backward": 3, "double": 5}


@dataclass
class OpProblem:
    """A fused op on one activation in one phase, on buffers that are used in turn.

    ``forward`` computes the outputs from ``z``; ``backward`` the gradient with respect to ``z``
    from the cotangents of the outputs; ``double`` maps a cotangent ``u`` of ``φ'(z) g`` to
    ``(φ''(z) g u, φ'(z) u)``.

    Attributes:
        op: key of :data:`fastjac.bench.phases.OPS`.
        fn: name in ``fastjac.activations.TABLE``.
        phase: key of :data:`PHASES`.
        z, g, u: one tensor per buffer. With one buffer only the cache would be measured.
        q: cotangent of the statistic, for an op that has one.
    """

    op: str
    fn: str
    phase: str
    z: list[Tensor]
    g: list[Tensor]
    u: list[Tensor]
    q: Tensor

    @property
    def phi(self) -> Callable[[Tensor], Tensor]:
        """torch's own function."""
        return TABLE[self.fn].torch_function()

    @property
    def bytes_moved(self) -> int:
        """Bytes that one call must read and write."""
        return PHASES[self.phase] * self.z[0].numel() * self.z[0].element_size()

    def double(self) -> OpProblem:
        """The first buffer in float64: the gate looks at one call."""
        z, g, u = ([column[0].double()] for column in (self.z, self.g, self.u))
        return replace(self, z=z, g=g, u=u, q=self.q.double())


Problem = StepProblem | OpProblem


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
        n_proj: K of a penalty that projects.
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
        projection = torch.randn(n_proj, batch, outputs) / outputs**0.5
    return StepProblem(
        model.to(device, dtype),
        x.to(device, dtype),
        target.to(device, dtype) if outputs == 1 else target.to(device),
        loss or (binary_cross_entropy if outputs == 1 else F.cross_entropy),
        penalty,
        projection.to(device, dtype),
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


def op_problem(
    op: str,
    fn: str,
    phase: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int] = (4096, 1024),
    buffers: int = 256 << 20,
) -> OpProblem:
    """Gaussian data (standard deviation 2, so that the tails of ``φ`` take part).

    The buffers together have ``buffers`` bytes, more than a cache holds, but there are at least
    three. ``q`` is such that the two terms of the gradient with respect to ``z`` are of like size.
    """
    z, g, u = _buffers([*PHASES].index(phase) + 1, device, dtype, shape, buffers)
    q = torch.randn(shape[1], generator=torch.Generator().manual_seed(1)) * shape[0] ** 0.5
    return OpProblem(op, fn, phase, z, g, u, q.to(device))


@functools.lru_cache(maxsize=1)  # consecutive cases share their inputs; nobody writes to them
def _buffers(
    inputs: int, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], buffers: int
) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    first = [(2 * torch.randn(*shape, generator=generator)).to(device, dtype) for _ in range(3)]
    n = max(3, -(-buffers // (inputs * first[0].numel() * dtype.itemsize)))
    return tuple(
        # a phase that does not read g or u still carries one of each, for a uniform interface
        [values, *(values.clone() for _ in range(n - 1 if k < inputs else 0))]
        for k, values in enumerate(first)
    )
