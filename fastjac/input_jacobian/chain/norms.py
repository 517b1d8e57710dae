"""Links of normalisations, with their second derivatives in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjac.input_jacobian.chain.links import Link, plus_

aten = torch.ops.aten


class Norm(Link):
    """``out = γ x̂ + β``; γ and β may be missing or need no gradient."""

    def __init__(self, a: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        self.a: Any = a
        self.weight: Any = None if weight is None else weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.needs = tuple(t is not None and t.requires_grad for t in (weight, bias))
        self.parameters = self._needed(weight, bias)
        self.eps = eps
        self.delta: Any = None
        self.pulled: Any = None  # what the VJP computed of δ
        self.extra: Any = None  # the gradient of ⟨δ, f_a u⟩ with respect to a
        self.weight_extra: Any = None  # and to γ

    def _needed(self, *of_weight_and_bias: Any) -> tuple[Any, ...]:
        """Those of the two whose tensor requires grad."""
        return tuple(t for t, need in zip(of_weight_and_bias, self.needs, strict=True) if need)

    def _gradients(self, grad: Tensor, wanted: bool) -> tuple[Tensor | None, ...]:
        """The gradients of a (where it is wanted), γ and β without second-order terms."""
        raise NotImplementedError

    def backward(self, grad, wanted, keep):
        extra, weight_extra = self.extra, self.weight_extra
        self.extra = self.weight_extra = None
        found = (None, None, None) if grad is None else self._gradients(grad, wanted[0])
        into, of_weight, of_bias = found
        if not keep:
            self.a = None
        return (plus_(into, extra),), self._needed(plus_(of_weight, weight_extra), of_bias)


class BatchNorm(Norm):
    """``out = γ x̂ + β``, ``x̂ = (a − μ) ι``, μ and ``ι = 1/√(σ² + ε)`` those of the batch.

    The Jacobian ``P: u → γ ι (u − mean u − x̂ mean(x̂ u))`` is symmetric, so torch's backward kernel
    is VJP and JVP. With ``p = mean(x̂ u)``, ``q = mean(x̂ δ)`` and
    ``B = mean(δ u) − mean δ mean u − q p``

        ∂⟨δ, P u⟩/∂a = −ι (p P δ + q P u + γ ι B x̂)       ∂/∂γ = ι M B
    """

    name = "batch_norm"

    def __init__(self, a: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
        super().__init__(a, weight, bias, eps)
        self.count = a.numel() // a.shape[1]

    def forward(self, running: tuple[Any, Any], momentum: float) -> Tensor:
        out, self.mean, self.invstd = torch.native_batch_norm(
            self.a, self.weight, self.bias, *running, True, momentum, self.eps
        )
        return out

    def _project(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``P t``, ``Σ x̂ t`` and ``Σ t``."""
        return aten.native_batch_norm_backward(
            *(t, self.a, self.weight, None, None, self.mean, self.invstd, True, self.eps),
            [True, True, True],
        )

    def vjp(self, delta):
        self.delta = delta
        parts = self.pulled = [self._project(d) for d in delta.split(len(self.a))]
        return (parts[0][0] if len(parts) == 1 else torch.cat([p[0] for p in parts]),)

    def push(self, tangents, keep, out):
        (u,) = tangents
        n, m, iota = len(self.a), self.count, self.invstd
        shape = [1, -1, *[1] * (self.a.dim() - 2)]
        others = [d for d in range(self.a.dim()) if d != 1]
        scale = iota if self.weight is None else iota * self.weight
        pushed = []
        for d, u_k, (pulled, q, d_sum) in zip(
            self.delta.split(n), u.split(n), self.pulled, strict=True
        ):
            t, p, u_sum = self._project(u_k)
            b = ((d * u_k).sum(others) - d_sum * u_sum / m - q * p / m) / m
            slope = -iota * iota * scale * b
            extra = torch.addcmul((-slope * self.mean).view(shape), self.a, slope.view(shape))
            extra.addcmul_(pulled, (-iota * p / m).view(shape))
            extra.addcmul_(t, (-iota * q / m).view(shape))
            self.extra = plus_(self.extra, extra)
            self.weight_extra = plus_(self.weight_extra, iota * m * b)
            pushed.append(t)
        if not keep:
            self.delta = self.pulled = None
        return pushed[0] if len(pushed) == 1 else torch.cat(pushed)

    def jvp(self, tangents):
        parts = [self._project(u)[0] for u in tangents[0].split(len(self.a))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _gradients(self, grad, wanted):
        return self._project(grad)


class LayerNorm(Norm):
    """``out = γ x̂ + β``, ``x̂ = (a − μ) ι`` over the last dimensions of each sample and position.

    As `BatchNorm`, with ``P u = ι (u − mean u − x̂ mean(x̂ u))`` without γ, which is symmetric: VJP
    ``P (γ δ)``, JVP ``γ P u``, and for ``d = γ δ``, ``p``, ``q`` and ``B`` of d and u

        ∂⟨d, P u⟩/∂a = −ι (p P d + q P u + ι B x̂)       ∂/∂γ = Σ δ P u
    """

    name = "layer_norm"

    def __init__(
        self, a: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> None:
        super().__init__(a, weight, bias, eps)
        self.shape, self.last = shape, list(range(-len(shape), 0))

    def forward(self) -> Tensor:
        out, self.mean, self.invstd = torch.native_layer_norm(
            self.a, self.shape, self.weight, self.bias, self.eps
        )
        return out

    def _split(self, rows: Tensor) -> Tensor:
        """``[K, N, ...]`` of ``[K N, ...]``."""
        return rows.view(-1, *self.a.shape)

    def _project(self, t: Tensor) -> Tensor:
        """``P t`` of ``[K, N, ...]``; the kernel takes K copies of a."""
        a, mean, invstd = (s.expand(len(t), *s.shape) for s in (self.a, self.mean, self.invstd))
        return aten.native_layer_norm_backward(
            t, a.contiguous(), self.shape, mean.contiguous(), invstd.contiguous(), None, None,
            [True, False, False],
        )[0]  # fmt: skip

    def vjp(self, delta):
        self.delta = self._split(delta)
        self.pulled = self._project(self.delta if self.weight is None else self.delta * self.weight)
        return (self.pulled.view(delta.shape),)

    def push(self, tangents, keep, out):
        u = self._split(tangents[0])
        pushed = self._project(u)
        iota = self.invstd
        hat = (self.a - self.mean) * iota
        d = self.delta if self.weight is None else self.delta * self.weight

        def mean(t: Tensor) -> Tensor:
            return t.mean(self.last, keepdim=True)

        p, q = mean(hat * u), mean(hat * d)
        b = mean(d * u) - mean(d) * mean(u) - q * p
        extra = -iota * (p * self.pulled + q * pushed + iota * b * hat).sum(0)
        self.extra = plus_(self.extra, extra)
        if self.needs[0]:
            lead = list(range(u.dim() - len(self.shape)))
            self.weight_extra = plus_(self.weight_extra, (self.delta * pushed).sum(lead))
        if not keep:
            self.delta = self.pulled = None
        pushed = pushed if self.weight is None else pushed * self.weight
        return pushed.view(tangents[0].shape)

    def jvp(self, tangents):
        pushed = self._project(self._split(tangents[0]))
        pushed = pushed if self.weight is None else pushed * self.weight
        return pushed.view(tangents[0].shape)

    def _gradients(self, grad, wanted):
        return aten.native_layer_norm_backward(
            *(grad.contiguous(), self.a, self.shape, self.mean, self.invstd),
            *(self.weight, self.bias, [wanted, *self.needs]),
        )
