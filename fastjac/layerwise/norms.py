"""The part that a norm between a layer and its activation has in the layer's Jacobian."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastjac.layerwise.batch_norm import Normed, inverse_variance
from fastjac.layerwise.layers import LayerCall
from fastjac.ops.act_stats import recorded
from fastjac.ops.autograd import Function
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.torch_private import saved_tensor_hooks

BATCH_NORM_NODES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")


class Gain(NamedTuple):
    """``k²`` of a norm ``y = k (z − μ) + β``: what a layer's squared Jacobian is multiplied by.

    In the Jacobian the norm's statistics are held constant. The gain itself is differentiable with
    respect to them. It is the product of three factors; None stands for 1.
    """

    gamma: Tensor | None = None  # the norm's weight, [C], not yet squared
    inverse: Tensor | None = None  # 1 / (σ² + ε), [C]
    place: Tensor | None = None  # 1 / (σ² + ε) of a LayerNorm: per sample and position, [N, ...]

    def channel(self) -> Tensor | None:
        """The factor per channel."""
        if self.gamma is None or self.inverse is None:
            return self.inverse if self.gamma is None else self.gamma.square()
        return self.gamma.square() * self.inverse


def norm_gain(call: LayerCall) -> Gain:
    """The gain of the norm that followed the layer."""
    norm, z = call.norm, call.before_norm
    if norm is None or z is None:
        return Gain()
    dtype = accumulate_dtype(z.dtype)
    gamma = None if norm.weight is None else norm.weight.to(dtype)
    if isinstance(norm, nn.LayerNorm):
        return Gain(gamma, place=1 / (z.to(dtype).var(-1, unbiased=False) + norm.eps))
    if not norm.training and norm.running_var is not None:
        return Gain(gamma, 1 / (norm.running_var.to(dtype) + norm.eps))
    if call.normed is not None:
        return Gain(gamma, InverseVariance.apply(z, *call.normed[2:]))
    return Gain(gamma, inverse_variance(z, norm.eps))


def batch_normed(y: Tensor, norm: Any) -> Normed | None:
    """What a BatchNorm in training mode has just computed; None for any other call of it."""
    node = y.grad_fn
    # Under a checkpoint, reading what the node saved would run the model again.
    if node is None or node.name() not in BATCH_NORM_NODES or saved_tensor_hooks() is not None:
        return None
    if not node._saved_training:  # type: ignore[attr-defined]
        return None
    version = 0 if norm.bias is None else norm.bias._version
    mean, invstd = node._saved_result1, node._saved_result2  # type: ignore[attr-defined]
    return Normed(y, version, mean, invstd, norm.eps)


class InverseVariance(Function):
    """``1 / (σ_c² + ε)`` of a batch, from the statistics that BatchNorm saved.

    ``Tensor.var`` and its backward would read z again; here the forward costs nothing and the
    backward reads z once.
    """

    @staticmethod
    def forward(ctx, z, mean, invstd, eps):
        ctx.save_for_backward(z, mean, invstd)
        ctx.eps = eps
        return invstd.square()

    @staticmethod
    def backward(ctx, c):
        z, mean, invstd = ctx.saved_tensors
        shape = [-1 if d == 1 else 1 for d in range(z.dim())]
        count = z.numel() // z.shape[1]
        if recorded(c):
            others = [d for d in range(z.dim()) if d != 1]
            mean, inverse = z.mean(others), inverse_variance(z, ctx.eps)
            slope = (-2 / count * c * inverse.square()).view(shape)
            return (slope * (z - mean.view(shape))).to(z.dtype), None, None, None
        slope = -2 / count * c * invstd.square().square()
        shift = (-slope * mean).to(z.dtype).view(shape)
        return torch.addcmul(shift, z, slope.to(z.dtype).view(shape)), None, None, None
