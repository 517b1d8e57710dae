"""Links of normalisations, with their second derivatives in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.input_jacobian.chain.links import Link, plus_

aten = torch.ops.aten


class Norm(Link):
    """``out = γ x̂ + β`` with ``x̂ = (a − μ) ι`` and ``ι = 1/√(σ² + ε)``; γ and β may be missing.

    The Jacobian of x̂, ``P: u → ι (u − mean u − x̂ mean(x̂ u))``, is symmetric. So the VJP is
    ``P d`` with ``d = γ δ``, and the JVP is ``γ P u``. With ``p = mean(x̂ u)``, ``q = mean(x̂ d)``
    and ``B = mean(d u) − mean d mean u − q p``, the gradient of ``⟨δ, γ P u⟩`` is

        −ι (p P d + q P u + ι B x̂)  with respect to a, and the sum of δ P u with respect to γ.

    A subclass has torch's kernels for one kind of normalisation. If γ is constant over the
    dimensions of the means, it may be a part of P instead of d; ``scale`` is then ``γ ι``.
    """

    over: tuple[int, ...]  # the dimensions, from the last, that the means are taken over
    mean: Tensor
    iota: Tensor
    scale: Tensor
    gradients: Callable[..., Any]  # (g, wanted): of a, γ and β, without second-order terms
    times_weight: Callable[..., Any]  # (t): γ t, or t if γ is a part of P
    project: Callable[..., Any]  # (t): P t, and sums that `means` can use
    means: Callable[..., Any]  # (t, *sums): mean t and mean(x̂ t)
    into_weight: Callable[..., Any]  # (P u, B): the sum of δ P u in the shape of γ

    def __init__(self, a: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self.a: Any = a
        self.weight: Any = None if weight is None else weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.needs = [t is not None and t.requires_grad for t in (weight, bias)]
        self.parameters = self.needed(weight, bias)
        self.eps = eps
        self.delta: Any = None
        self.pulled: Any = None  # what `project` returned for d
        self.extra: Any = None  # the second-order term with respect to a
        self.weight_extra: Any = None  # and with respect to γ

    def needed(self, *of_weight_and_bias: Any) -> tuple[Any, ...]:
        """Those of the two whose tensor requires grad."""
        return tuple(t for t, need in zip(of_weight_and_bias, self.needs, strict=True) if need)

    def split(self, rows: Tensor) -> Tensor:
        """``[K N, ...]`` as ``[K, N, ...]``, or as ``[N, ...]`` if K is 1."""
        return rows if rows.shape[0] == self.a.shape[0] else rows.view(-1, *self.a.shape)

    def summed(self, t: Tensor) -> Tensor:
        """The sum over K."""
        return t if t.dim() == self.a.dim() else t.sum(0)

    def vjp(self, delta):
        self.delta = self.split(delta)
        self.pulled = self.project(self.times_weight(self.delta))
        return (self.pulled[0].view(delta.shape),)

    def push(self, tangents, keep, out):
        u, d, iota = self.split(tangents[0]), self.times_weight(self.delta), self.iota
        pulled, *sums = self.pulled
        d_mean, q = self.means(d, *sums)
        pushed, *sums = self.project(u)
        u_mean, p = self.means(u, *sums)
        b = (d * u).mean(self.over, keepdim=True)
        b.addcmul_(d_mean, u_mean, value=-1).addcmul_(q, p, value=-1)
        slope = iota * iota * self.scale * b
        extra = torch.addcmul(slope * self.mean, self.a, slope, value=-1)
        extra.addcmul_(pulled, iota * p, value=-1).addcmul_(pushed, iota * q, value=-1)
        self.extra = plus_(self.extra, self.summed(extra))
        if self.needs[0]:
            self.weight_extra = plus_(self.weight_extra, self.into_weight(pushed, b))
        if not keep:
            self.delta = self.pulled = None
        return self.times_weight(pushed).view(tangents[0].shape)

    def jvp(self, tangents):
        pushed, *_ = self.project(self.split(tangents[0]))
        return self.times_weight(pushed).view(tangents[0].shape)

    def backward(self, grad, wanted, keep):
        extra, weight_extra = self.extra, self.weight_extra
        self.extra = self.weight_extra = None
        found = (None, None, None) if grad is None else self.gradients(grad, wanted[0])
        into, of_weight, of_bias = found
        if not keep:
            self.a = None
        return (plus_(into, extra),), self.needed(plus_(of_weight, weight_extra), of_bias)


class BatchNorm(Norm):
    """Means over the batch, for each channel; γ is part of P, as in torch's kernel."""

    name = "batch_norm"

    def forward(self, running: tuple[Any, Any], momentum: float) -> Tensor:
        a, weight = self.a, self.weight
        out, *self.saved = torch.native_batch_norm(
            a, weight, self.bias, *running, True, momentum, self.eps
        )
        self.wide = [-1, *[1] * (a.dim() - 2)]
        self.over, self.count = (-a.dim(), *range(2 - a.dim(), 0)), a.numel() // a.shape[1]
        self.mean, self.iota = (s.view(self.wide) for s in self.saved)
        self.scale = self.iota if weight is None else self.iota * weight.view(self.wide)
        return out

    def gradients(self, grad, wanted):
        return aten.native_batch_norm_backward(
            *(grad, self.a, self.weight, None, None, *self.saved, True, self.eps),
            [True, True, True],
        )

    def project(self, t):
        if t.dim() == self.a.dim():
            return self.gradients(t, True)  # of a: P t, of γ: Σ x̂ t, of β: Σ t
        projected, *sums = zip(*[self.gradients(part, True) for part in t], strict=True)
        return torch.cat(projected).view(t.shape), *map(torch.stack, sums)

    def means(self, t, *sums):
        shape = *t.shape[: -self.a.dim()], 1, *self.wide
        of_hat, of_t = (s.view(shape) / self.count for s in sums)
        return of_t, of_hat

    def times_weight(self, t):
        return t

    def into_weight(self, pushed, b):
        return self.summed(self.iota * b).view(-1) * self.count


class LayerNorm(Norm):
    """Means over the last dimensions, for each sample and position."""

    name = "layer_norm"

    def __init__(
        self, a: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> None:
        super().__init__(a, weight, bias, eps)
        self.shape, self.over = shape, tuple(range(-len(shape), 0))

    def forward(self) -> Tensor:
        out, self.mean, self.iota = torch.native_layer_norm(
            self.a, self.shape, self.weight, self.bias, self.eps
        )
        self.scale = self.iota
        return out

    def gradients(self, grad, wanted):
        return aten.native_layer_norm_backward(
            *(grad.contiguous(), self.a, self.shape, self.mean, self.iota),
            *(self.weight, self.bias, [wanted, *self.needs]),
        )

    def times_weight(self, t):
        return t if self.weight is None else t * self.weight

    def project(self, t):
        lead = t.shape[: -self.a.dim()]  # the kernel takes K copies of a
        a, mean, iota = (s.expand(*lead, *s.shape) for s in (self.a, self.mean, self.iota))
        return aten.native_layer_norm_backward(
            t, a.contiguous(), self.shape, mean.contiguous(), iota.contiguous(), None, None,
            [True, False, False],
        )[:1]  # fmt: skip

    def means(self, t, *sums):
        of_t = t.mean(self.over, keepdim=True)
        of_a = (self.a * t).mean(self.over, keepdim=True)
        return of_t, self.iota * (of_a - self.mean * of_t)

    def into_weight(self, pushed, b):
        return (self.delta * pushed).sum(list(range(pushed.dim() - len(self.shape))))
