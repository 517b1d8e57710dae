"""The rules of normalisations, with their second derivatives in closed form."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjac.input_jacobian.chain.rules import Rule, over_lead
from fastjac.ops.dispatch import accumulate_dtype, why_not
from fastjac.ops.native import triton_interpreted
from fastjac.ops.registration import raw
from fastjac.torch_private import below_autograd


class Statistics(NamedTuple):
    """What a norm has computed, in a layout whose last dimensions are those of the means."""

    shape: tuple[int, ...]  # of the layout; a tensor [*lead, *a.shape] is [*lead, *shape] in it
    over: tuple[int, ...]  # the dimensions of the means, counted from the end
    mean: Tensor
    iota: Tensor
    weight: Tensor | None  # γ


class Norm(Rule):
    """``out = γ x̂ + β`` with ``x̂ = (a − μ) ι`` and ``ι = 1/√(σ² + ε)``; γ and β may be missing.

    The Jacobian of x̂, ``P: u → ι (u − mean u − x̂ mean(x̂ u))``, is symmetric, so the JVP is
    ``γ P u``. With ``d = γ δ``, ``p = mean(x̂ u)``, ``q = mean(x̂ d)`` and
    ``B = mean(d u) − mean d mean u − q p``, the gradient of ``⟨δ, γ P u⟩`` is

        −ι² (p (d − mean d) + q (u − mean u) + (B − 2 p q) x̂)  with respect to a,

    and the sum of δ P u with respect to γ. Computed in at least float32.
    """

    def statistics(self, node: Any, a: Tensor) -> Statistics:
        raise NotImplementedError

    def takes(self, node, inside):
        return inside[0] and not any(inside[1:])

    def targets(self, node, inside):
        return node._saved_input, node._saved_weight

    def jvp(self, node, lead, us):
        a, u, stats = self._start(node, lead, us[0])
        hat = (a - stats.mean) * stats.iota
        p = (hat * u).mean(stats.over, keepdim=True)
        pushed = stats.iota * (u - u.mean(stats.over, keepdim=True) - hat * p)
        out = pushed if stats.weight is None else pushed * stats.weight
        return out.reshape(us[0].shape).to(us[0].dtype)

    def push(self, node, lead, us, delta, wanted):
        a, u, stats = self._start(node, lead, us[0])
        _, mean, iota, weight = stats[1:]
        over = stats.over
        given = delta.to(u.dtype).reshape(u.shape)
        d = given if weight is None else given * weight
        hat = (a - mean) * iota
        u_mean, d_mean = u.mean(over, keepdim=True), d.mean(over, keepdim=True)
        p, q = (hat * u).mean(over, keepdim=True), (hat * d).mean(over, keepdim=True)
        b = (d * u).mean(over, keepdim=True)
        b.addcmul_(d_mean, u_mean, value=-1).addcmul_(p, q, value=-3)  # B − 2 p q
        u, d = u - u_mean, d - d_mean
        pushed = torch.addcmul(u, hat, p, value=-1).mul_(iota)
        extra = (p * d).addcmul_(q, u).addcmul_(b, hat).mul_(-iota * iota)
        of_weight = None
        if node._saved_weight is not None and node._saved_weight.requires_grad:
            of_weight = (given * pushed).sum_to_size(weight.shape).view(node._saved_weight.shape)
        out = None
        if wanted:
            out = pushed if weight is None else pushed * weight
            out = out.reshape(us[0].shape).to(us[0].dtype)
        extra = over_lead(extra, lead).reshape(node._saved_input.shape)
        return out, (extra, of_weight)

    def _start(self, node: Any, lead: tuple[int, ...], u: Tensor) -> Any:
        a = node._saved_input
        dtype = accumulate_dtype(a.dtype)
        stats = self.statistics(node, a)
        return (
            a.to(dtype).reshape(stats.shape),
            u.to(dtype).reshape(*lead, *stats.shape),
            stats,
        )


@functools.cache
def kernel_suffix(device: str, dtype: torch.dtype) -> str | None:
    """The suffix of `ops.norm` for a device and dtype, or None if there is no kernel."""
    if dtype in (torch.float32, torch.float64) and why_not("cpu", device, dtype) is None:
        return ""
    if why_not("triton", device, dtype) is None and not triton_interpreted():
        return "_triton"
    return None


class LayerNorm(Norm):
    """Means over the last dimensions, for each sample and position.

    Where there is a kernel, the push is one launch in place of 22; if γ is trained, two of 26.
    """

    def push(self, node, lead, us, delta, wanted):
        a, u, weight = node._saved_input, us[0], node._saved_weight
        suffix = kernel_suffix(a.device.type, a.dtype)
        if suffix is None:
            return super().push(node, lead, us, delta, wanted)
        shape = node._saved_normalized_shape
        trained = weight is not None and weight.requires_grad
        with below_autograd():
            out, extra, product = raw("norm_push" + suffix)(
                *(u, delta, a, node._saved_result1, node._saved_result2, weight),
                *(math.prod(shape), wanted, trained),
            )
        of_weight = product.sum_to_size(weight.shape) if trained else None
        return out if wanted else None, (extra, of_weight)

    def statistics(self, node, a):
        over = tuple(range(-len(node._saved_normalized_shape), 0))
        return Statistics(
            a.shape, over, node._saved_result1, node._saved_result2, node._saved_weight
        )


class GroupNorm(Norm):
    """Means over the channels of a group and all positions, for each sample."""

    def statistics(self, node, a):
        n, c, groups = node._saved_N, node._saved_C, node._saved_group
        mean, iota = (s.view(n, groups, 1, 1) for s in (node._saved_result1, node._saved_result2))
        weight = node._saved_weight
        weight = None if weight is None else weight.view(groups, c // groups, 1)
        return Statistics((n, groups, c // groups, node._saved_HxW), (-2, -1), mean, iota, weight)


class BatchNorm(Norm):
    """Means over the batch and all positions, for each channel; in eval mode constants."""

    def statistics(self, node, a):
        wide = (-1, *(1,) * (a.dim() - 2))
        mean, iota = (s.view(wide) for s in (node._saved_result1, node._saved_result2))
        over = (-a.dim(), *range(2 - a.dim(), 0))
        weight = node._saved_weight
        return Statistics(a.shape, over, mean, iota, None if weight is None else weight.view(wide))

    def targets(self, node, inside):
        a = node._saved_input if node._saved_training else None
        return a, node._saved_weight

    def _scale(self, node: Any) -> Tensor:
        """ι in eval mode, ``[C, 1, ...]``."""
        eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon
        iota = (node._saved_running_var + eps).rsqrt()
        return iota.view(-1, *(1,) * (node._saved_input.dim() - 2))

    def jvp(self, node, lead, us):
        if node._saved_training:
            return super().jvp(node, lead, us)
        scale, weight = self._scale(node), node._saved_weight
        scale = scale if weight is None else scale * weight.view(scale.shape)
        return (us[0] * scale).to(us[0].dtype)

    def push(self, node, lead, us, delta, wanted):
        if node._saved_training:
            return super().push(node, lead, us, delta, wanted)
        scale = self._scale(node)
        of_weight = (delta * us[0] * scale).sum_to_size(scale.shape).view(-1)
        return self.jvp(node, lead, us) if wanted else None, (None, of_weight)
