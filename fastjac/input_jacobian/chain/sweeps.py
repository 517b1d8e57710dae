"""The sweeps of a network in C++, one call each (`ops.net`), for `mlp` and `network`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjac.ops.registration import raw
from fastjac.torch_private import below_autograd

TILED = 1 << 16
"""Elements of a weight up to which each thread takes a tile of the rows through all layers.

Compared with threads that share each product, a step takes 0.7 to 0.85 of the time (2 threads,
width 64, batch 100 to 2048), and 0.9 at width 256. From width 512 on there is no gain, and each
thread needs memory for weight gradients of its own. `Program::small_weight` in csrc/cpu/program.h
is the same number.
"""

FLAT = 1 << 18
"""Pre-activations up to which a sweep returns one tensor instead of one for each layer.

Making a tensor takes a good part of the time of a small layer. From a few MB on, the memory of one
tensor is new in each step, and the first access to its pages takes longer than the sweep itself.
"""


GRADIENTS = 1 << 20
"""Elements of the gradients of all threads but the first, up to which a thread takes a tile.

Each thread adds up gradients of its own. Without a limit, those of 64 threads would take 70 MB for
a network of 270,000 parameters. They may always take as much as the pre-activations.
"""


def rows_of_a_thread(n: int, parameters: int, numbers: int) -> int:
    """The rows of a tile, for the elements of the parameters and of the pre-activations."""
    most = 1 + max(GRADIENTS, numbers) // parameters
    return max(-(-n // min(most, torch.get_num_threads())), 16)


class Sweeps:
    """The sweeps of one run. w, u and their products have a first dimension of K.

    Attributes:
        x: the input, ``[N, d]``, contiguous.
        shape, output_shape: those of x and of the output in the model.
        weights, saved, plan, tile, flat: arguments of the ops.
        evaluates: whether the first VJP shall evaluate φ' and φ'' for all sweeps.
        large: whether the backward goes layer by layer, which `gradients_of` does.
        wanted: the argument of `net_backward`.
        places: for each weight and bias, where its gradient is among those of `parameters`, or -1.
    """

    x: Tensor
    shape: Any
    output_shape: Any
    weights: list[Tensor]
    saved: list[Tensor]
    plan: Tensor
    tile: int
    flat: bool
    evaluates = False
    large = False
    of_x: bool
    wanted: Tensor
    places: list[int]
    parameters: Any
    deltas: list[Any]
    pushes: list[tuple[Any, ...]]

    def pull(self, w: Tensor) -> Tensor:
        """``Jᵀ w``."""
        return self.norms(w)[0]

    def norms(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``v = Jᵀ w`` and ``Σ_k ‖v_k‖²`` of each sample."""
        k, n = w.shape[0], self.x.shape[0]
        with below_autograd():
            v, norms, *self.deltas = raw("net_pull")(
                *(w.reshape(k * n, -1).contiguous(), self.weights, self.saved, n, self.tile),
                *(self.evaluates, self.flat, self.plan),
            )
        if self.evaluates:
            self.saved = [*self.saved, self.deltas.pop(0)]
            self.evaluates = False
        return v.view(k, *self.shape), norms if k == 1 else norms.view(k, n).sum(0)

    def _up(self, u: Tensor, factor: Any, deltas: list[Any], wanted: bool) -> list[Tensor]:
        with below_autograd():
            return raw("net_push")(
                *(u, factor, self.weights, self.saved, deltas, self.x.shape[0], self.tile),
                *(wanted, self.flat, self.plan),
            )

    def jvp(self, u: Tensor) -> Tensor:
        """``J u``."""
        k = u.shape[0]
        out = self._up(u.reshape(k * self.x.shape[0], -1).contiguous(), None, [], True)[0]
        return out.view(k, *self.output_shape)

    def push(
        self, u: Tensor, keep: bool, wanted: bool, factor: Tensor | None = None
    ) -> Tensor | None:
        """``J u``, or None if it is not wanted; see `GraphRun`. `down` takes the push along."""
        k = u.shape[0]
        u = u.detach().reshape(k * self.x.shape[0], -1).contiguous()
        if factor is not None:
            factor = factor.repeat(k) if k > 1 else factor.contiguous()
        out, pushed = None, []
        if wanted or self.large:
            out, *pushed = self._up(u, factor, self.deltas, wanted)
        self.pushes.append((u, factor, self.deltas, pushed))
        return out.view(k, *self.output_shape) if out is not None and wanted else None

    def down(self, grad: Tensor | None, keep: bool) -> list[Tensor | None]:
        """The gradients of x and the parameters."""
        pushes, self.pushes = self.pushes or [(None, None, [], [])], []
        if grad is not None:
            grad = grad.reshape(self.x.shape[0], -1).contiguous()
        total: list[Any] = [None] * (1 + len(self.parameters))
        while pushes:
            push = pushes.pop(0)
            if grad is None and push[0] is None:
                continue
            *found, of_x = self.gradients_of(grad, push, not (keep or pushes))
            grad = None
            if self.of_x:
                of_x = of_x.view(self.shape)
                total[0] = of_x if total[0] is None else total[0] + of_x
            for place, gradient in zip(self.places, found, strict=True):
                if place >= 0:
                    before = total[1 + place]
                    total[1 + place] = gradient if before is None else before + gradient
        if not keep:
            self.saved, self.deltas = [], []
        return total

    def gradients_of(self, grad: Tensor | None, push: Any, last: bool) -> list[Any]:
        """The gradients of the weights, the biases and x, for one push."""
        with below_autograd():
            return raw("net_backward")(
                *(grad, *push[:2], self.x, self.weights, self.saved, *push[2:], self.x.shape[0]),
                *(self.tile, 1, len(self.plan), self.wanted, self.plan),
            )
