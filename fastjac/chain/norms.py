"""Links of normalisations, with their second derivatives in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjac.chain.links import Link, aten, plus


class BatchNorm(Link):
    """``out = γ x̂ + β``, ``x̂ = (a − μ) ι``, μ and ``ι = 1/√(σ² + ε)`` those of the batch.

    The Jacobian ``P: u → γ ι (u − mean u − x̂ mean(x̂ u))`` is symmetric, so torch's backward kernel
    is VJP and JVP. With ``p = mean(x̂ u)``, ``q = mean(x̂ δ)`` and
    ``B = mean(δ u) − mean δ mean u − q p``

        ∂⟨δ, P u⟩/∂a = −ι (p P δ + q P u + γ ι B x̂)       ∂/∂γ = ι M B
    """

    def __init__(self, a: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> None:
        self.a: Any = a
        self.gamma, self.eps = None if gamma is None else gamma.detach(), eps
        self.beta = None if beta is None else beta.detach()
        self.parameters = tuple(t for t in (gamma, beta) if t is not None and t.requires_grad)
        self.needs = tuple(t is not None and t.requires_grad for t in (gamma, beta))
        self.count = a.numel() // a.shape[1]
        self.delta: Any = None
        self.pulled: Any = None  # of each cotangent: P δ, Σ x̂ δ, Σ δ
        self.extra: Any = None
        self.gamma_extra: Any = None

    def forward(self, running: tuple[Any, Any], momentum: float) -> Tensor:
        out, self.mean, self.invstd = torch.native_batch_norm(
            self.a, self.gamma, self.beta, *running, True, momentum, self.eps
        )
        return out

    def _project(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``P t``, ``Σ x̂ t`` and ``Σ t``."""
        return aten.native_batch_norm_backward(
            *(t, self.a, self.gamma, None, None, self.mean, self.invstd, True, self.eps),
            [True, True, True],
        )

    def vjp(self, delta):
        self.delta = delta
        parts = self.pulled = [self._project(d) for d in delta.split(len(self.a))]
        return (parts[0][0] if len(parts) == 1 else torch.cat([p[0] for p in parts]),)

    def jvp(self, tangents, keep, out):
        (u,) = tangents
        n, m, iota = len(self.a), self.count, self.invstd
        shape = [1, -1, *[1] * (self.a.dim() - 2)]
        others = [d for d in range(self.a.dim()) if d != 1]
        scale = iota if self.gamma is None else iota * self.gamma
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
            self.extra = extra if self.extra is None else self.extra.add_(extra)
            self.gamma_extra = plus(self.gamma_extra, iota * m * b)
            pushed.append(t)
        if not keep:
            self.delta = self.pulled = None
        return pushed[0] if len(pushed) == 1 else torch.cat(pushed)

    def backward(self, grad, wanted, keep):
        extra, gamma_extra = self.extra, self.gamma_extra
        self.extra = self.gamma_extra = None
        into, of_gamma, of_beta = extra, gamma_extra, None
        if grad is not None:
            into, of_gamma, of_beta = self._project(grad)
            into = into if extra is None else into.add_(extra)
            of_gamma = plus(of_gamma, gamma_extra)
        if not keep:
            self.a = None
        pairs = zip((of_gamma, of_beta), self.needs, strict=True)
        return (into,), tuple(g for g, need in pairs if need)


class LayerNorm(Link):
    """``out = γ x̂ + β``, ``x̂ = (a − μ) ι`` over the last dimensions of each sample and position.

    As `BatchNorm`, with ``P u = ι (u − mean u − x̂ mean(x̂ u))`` without γ, which is symmetric: VJP
    ``P (γ δ)``, JVP ``γ P u``, and for ``d = γ δ``, ``p``, ``q`` and ``B`` of d and u

        ∂⟨d, P u⟩/∂a = −ι (p P d + q P u + ι B x̂)       ∂/∂γ = Σ δ P u
    """

    def __init__(
        self, a: Tensor, shape: list[int], gamma: Tensor | None, beta: Tensor | None, eps: float
    ) -> None:
        self.a: Any = a
        self.shape, self.eps = shape, eps
        self.gamma = None if gamma is None else gamma.detach()
        self.beta = None if beta is None else beta.detach()
        self.parameters = tuple(t for t in (gamma, beta) if t is not None and t.requires_grad)
        self.needs = tuple(t is not None and t.requires_grad for t in (gamma, beta))
        self.last = list(range(-len(shape), 0))
        self.delta: Any = None
        self.pulled: Any = None  # P d
        self.extra: Any = None
        self.gamma_extra: Any = None

    def forward(self) -> Tensor:
        out, self.mean, self.invstd = torch.native_layer_norm(
            self.a, self.shape, self.gamma, self.beta, self.eps
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
        self.pulled = self._project(self.delta if self.gamma is None else self.delta * self.gamma)
        return (self.pulled.view(delta.shape),)

    def jvp(self, tangents, keep, out):
        u = self._split(tangents[0])
        pushed = self._project(u)
        iota = self.invstd
        hat = (self.a - self.mean) * iota
        d = self.delta if self.gamma is None else self.delta * self.gamma

        def mean(t: Tensor) -> Tensor:
            return t.mean(self.last, keepdim=True)

        p, q = mean(hat * u), mean(hat * d)
        b = mean(d * u) - mean(d) * mean(u) - q * p
        extra = -iota * (p * self.pulled + q * pushed + iota * b * hat).sum(0)
        self.extra = plus(self.extra, extra)
        if self.needs[0]:
            lead = list(range(u.dim() - len(self.shape)))
            self.gamma_extra = plus(self.gamma_extra, (self.delta * pushed).sum(lead))
        if not keep:
            self.delta = self.pulled = None
        pushed = pushed if self.gamma is None else pushed * self.gamma
        return pushed.view(tangents[0].shape)

    def backward(self, grad, wanted, keep):
        extra, gamma_extra = self.extra, self.gamma_extra
        self.extra = self.gamma_extra = None
        into, of_gamma, of_beta = extra, gamma_extra, None
        if grad is not None:
            into, of_gamma, of_beta = aten.native_layer_norm_backward(
                grad.contiguous(), self.a, self.shape, self.mean, self.invstd, self.gamma,
                self.beta, [wanted[0], *self.needs],
            )  # fmt: skip
            into, of_gamma = plus(into, extra), plus(of_gamma, gamma_extra)
        if not keep:
            self.a = None
        pairs = zip((of_gamma, of_beta), self.needs, strict=True)
        return (into,), tuple(g for g, need in pairs if need)
