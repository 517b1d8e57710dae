"""What a benchmark case computes on: a network and a batch, or the buffers of an op.

A problem is built in the dtype of the run. Its truth is computed from the same numbers in float64,
so that the rounding of the inputs is not counted as an error of a contestant.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.activations import TABLE
from fastjac.model_output import Part, part_of
from fastjac.torch_private import tree_leaves

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class StepProblem:
    """One training step: network, batch, task loss and the penalty that is added to it.

    Attributes:
        model: The network in training mode, with parameters of the run's dtype.
        x: The input, ``[N, ...]``.
        target: Class indices ``[N]``, or float labels ``[N]`` for a network with one output.
        loss: The mean task loss of ``(output, target)``.
        penalty: A key of :data:`fastjac.bench.idioms.IDIOMS`.
        projection: The cotangents ``w``, ``[K, N, m]``, given so that every contestant of a penalty
            that draws them projects on the same numbers.
        output: Which part of what the model returns is the output; see `fastjac.Penalty`.
        at: The submodule whose output takes the place of ``x``; see `fastjac.InputPenalty`.
        own: Whether the network is not one of the benchmark's, but a user's.
        weight: The factor of the penalty. The gate sets it so that the gradients of penalty and
            loss have similar norm. With a small weight, a wrong second-order term would be smaller
            than the tolerance of the gate.
    """

    model: nn.Module
    x: Tensor
    target: Tensor
    loss: Loss
    penalty: str
    projection: Tensor
    output: Part = None
    at: str | None = None
    own: bool = False
    weight: float = 1.0

    def task_loss(self, whole: Any) -> Tensor:
        """The task loss of what the model returned."""
        return self.loss(part_of(whole, self.output), self.target)

    def double(self) -> StepProblem:
        """The same problem in float64; integers stay integers."""
        return replace(
            self,
            model=copied(self.model).double(),
            x=_wide(self.x),
            target=_wide(self.target),
            projection=self.projection.double(),
        )

    @property
    def gemm_size(self) -> int:
        """n of the n×n product: large enough for the full rate, small enough for every round."""
        return 8192 if self.x.is_cuda else 1024

    def ceiling(self) -> Callable[[], object]:
        """A large square product in the dtype of the step, into memory that exists."""
        shape, generator = (self.gemm_size, self.gemm_size), torch.Generator().manual_seed(0)
        like = self.projection
        a, b = (torch.randn(shape, generator=generator).to(like) for _ in range(2))
        return functools.partial(torch.mm, a, b, out=torch.empty_like(a))


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model, also of one that keeps a tensor which it has computed.

    The copy of such a tensor is a constant. ``copy.deepcopy`` alone refuses it; among others
    ``torch.nn.utils.weight_norm`` and ``prune`` keep the weight, which they compute in each call.
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for _, t in computed(model)}
    return copy.deepcopy(model, memo)


def computed(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The tensors that a model has computed and keeps, with the names of the attributes."""
    return [
        (f"{path}.{name}" if path else name, tensor)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        for tensor in tree_leaves(value)
        if isinstance(tensor, Tensor) and not tensor.is_leaf
    ]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


#: Phase of an op -> the number of tensors that any implementation must read or write.
PHASES = {"forward": 2, "backward": 3, "double": 5}
#: The same of an op whose output is much smaller than its input.
SMALL_OUTPUT = {"row_sqnorm": {"forward": 1, "backward": 2}}


@dataclass
class OpProblem:
    """A fused op on one activation in one phase, on buffers that are used in turn.

    ``forward`` computes the outputs from ``z``. ``backward`` computes the gradient with respect to
    ``z`` from the cotangents of the outputs. ``double`` maps a cotangent ``u`` of ``φ'(z) g`` to
    ``(φ''(z) g u, φ'(z) u)``.

    Attributes:
        op: A key of :data:`fastjac.bench.phases.OPS`.
        fn: A name in ``fastjac.activations.TABLE``; "identity" for an op without an activation.
        phase: A key of :data:`PHASES`.
        z, g, u: One tensor for each buffer. With one buffer only the cache would be measured.
        q: The cotangent of the statistic, for an op that has one, or of the norms of the rows.
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
        """The bytes that one call must read and write."""
        return SMALL_OUTPUT.get(self.op, PHASES)[self.phase] * self.z[0].nbytes

    def double(self) -> OpProblem:
        """The first buffer in float64, because the gate compares one call."""
        z, g, u = ([column[0].double()] for column in (self.z, self.g, self.u))
        return replace(self, z=z, g=g, u=u, q=self.q.double())

    def ceiling(self) -> Callable[[], object]:
        """A copy of the buffers in turn, into memory that is allocated as the op's results are."""
        turn = itertools.cycle(self.z)
        return lambda: next(turn).clone()


Problem = StepProblem | OpProblem


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
        network: The constructor of the model.
        shape: The shape of the input, batch first.
        penalty: See :class:`StepProblem`.
        device, dtype: The device and the dtype of the step.
        outputs: m; with 1 the labels are floats, 0 or 1.
        kinks: The network is only piecewise smooth; see :func:`away_from_kinks`.
        n_proj: K of a penalty that projects.
        loss: The default is cross entropy, or the logistic loss for one output.
    """

    def logistic(output: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(output.flatten(), target)

    batch = shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network().train()
        x = torch.randn(4 * batch if kinks else batch, *shape[1:])
        if kinks:
            x = away_from_kinks(model, x, batch)
        target = torch.randint(max(outputs, 2), (batch,))
        projection = torch.randn(n_proj, batch, outputs) / outputs**0.5
    return StepProblem(
        model.to(device, dtype),
        x.to(device, dtype),
        target.to(device, dtype) if outputs == 1 else target.to(device),
        loss or (logistic if outputs == 1 else F.cross_entropy),
        penalty,
        projection.to(device, dtype),
    )


def away_from_kinks(model: nn.Module, candidates: Tensor, n: int) -> Tensor:
    """The ``n`` candidates whose input gradient changes least when the input changes by 1e-5.

    If the input of a ReLU is within rounding of 0, or a pool has two equal maxima, then two correct
    implementations may take different branches, and their gradients differ.
    """
    wide, candidates64 = copy.deepcopy(model).double(), candidates.double()

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
    """Gaussian data with standard deviation 2, so that the tails of ``φ`` take part.

    The buffers together have ``buffers`` bytes, more than a cache holds; there are at least three.
    ``q`` is such that the two terms of the gradient with respect to ``z`` have similar size.
    """
    z, g, u = _buffers([*PHASES].index(phase) + 1, device, dtype, shape, buffers)
    kept = shape[0] if op == "row_sqnorm" else shape[1]
    q = torch.randn(kept, generator=torch.Generator().manual_seed(1)) * shape[0] ** 0.5
    return OpProblem(op, fn, phase, z, g, u, q.to(device))


@functools.lru_cache(maxsize=1)  # consecutive cases share their inputs, and none writes to them
def _buffers(
    inputs: int, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], buffers: int
) -> tuple[list[Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    first = [(2 * torch.randn(*shape, generator=generator)).to(device, dtype) for _ in range(3)]
    n = max(3, -(-buffers // (inputs * first[0].nbytes)))
    return tuple(
        # A phase that does not read g or u has one tensor of each.
        [values, *(values.clone() for _ in range(n - 1 if k < inputs else 0))]
        for k, values in enumerate(first)
    )
