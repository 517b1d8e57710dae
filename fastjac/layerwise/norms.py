"""The factor in the Jacobian of a layer that comes from a norm before its activation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastjac.layerwise.batch_norm import Normed, inverse_variance
from fastjac.layerwise.layers import LayerCall, Norm
from fastjac.ops.autograd import Function, recorded
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.torch_private import saved_tensor_hooks

BATCH_NORM_NODES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")


class Gain(NamedTuple):
    """The factor ``k²`` of a layer's squared Jacobian, for a norm ``y = k (z − μ) + β``.

    The Jacobian treats the statistics of the norm as constants. The gain itself is differentiable
    with respect to them. It is the product of ``gamma²`` and the others; None stands for 1.
    """

    gamma: Tensor | None = None  # the weight of the norm, [C]
    inverse: Tensor | None = None  # 1 / (σ² + ε) of a BatchNorm, [C]
    place: Tensor | None = None  # 1 / (σ² + ε) of a LayerNorm, per sample and position, [N, ...]
    group: Tensor | None = None  # 1 / (σ² + ε) of a GroupNorm, per sample and channel, [N, C]

    def channel(self) -> Tensor | None:
        """The factor per channel."""
        if self.gamma is None:
            return self.inverse
        squared = self.gamma.square()
        return squared if self.inverse is None else squared * self.inverse


def norm_gain(call: LayerCall) -> Gain:
    """The gain of the norm that followed the layer."""
    norm, z = call.norm, call.before_norm
    if norm is None or z is None:
        return Gain()
    dtype = accumulate_dtype(z.dtype)
    gamma = None if norm.weight is None else norm.weight.to(dtype)
    if norm.kind == "layer":
        return Gain(gamma, place=1 / (z.to(dtype).var(-1, unbiased=False) + norm.eps))
    if norm.kind == "group":
        groups = z.to(dtype).reshape(z.shape[0], norm.groups, -1)
        inverse = 1 / (groups.var(-1, unbiased=False) + norm.eps)
        return Gain(gamma, group=inverse.repeat_interleave(z.shape[1] // norm.groups, 1))
    if norm.running_var is not None:
        return Gain(gamma, 1 / (norm.running_var.to(dtype) + norm.eps))
    if call.normed is not None:
        return Gain(gamma, InverseVariance.apply(z, *call.normed[2:5]))
    return Gain(gamma, inverse_variance(z, norm.eps))


def batch_normed(y: Tensor, norm: Norm) -> Normed | None:
    """The result of a BatchNorm in training mode, read from the node of y; None without one."""
    if norm.kind != "batch":
        return None
    node = y.grad_fn
    # Under a checkpoint, reading the tensors that the node saved would run the model again.
    if node is None or node.name() not in BATCH_NORM_NODES or saved_tensor_hooks() is not None:
        return None
    if not node._saved_training:  # type: ignore[attr-defined]
        return None
    version = 0 if norm.bias is None else norm.bias._version
    mean, invstd = node._saved_result1, node._saved_result2  # type: ignore[attr-defined]
    return Normed(y, version, mean, invstd, norm.eps, node)


class InverseVariance(Function):
    """``1 / (σ_c² + ε)`` of a batch, from the statistics that BatchNorm saved.

    ``Tensor.var`` and its backward would read z again. Here the forward does not read z, and the
    backward reads it once.
    """

    @staticmethod
    def forward(ctx, z, mean, invstd, eps):
        ctx.save_for_backward(z, mean, invstd)
        ctx.eps = eps
        return invstd.square()

    @staticmethod
    def backward(ctx, c):
        z, mean, invstd = ctx.saved_tensors
        if recorded(c):
            with torch.enable_grad():
                inverse = inverse_variance(z, ctx.eps)
                (grad,) = torch.autograd.grad(inverse, z, c, create_graph=True)
            return grad, None, None, None
        shape = [-1 if d == 1 else 1 for d in range(z.dim())]
        slope = -2 * z.shape[1] / z.numel() * c * invstd.square().square()
        shift = (-slope * mean).to(z.dtype).view(shape)
        return torch.addcmul(shift, z, slope.to(z.dtype).view(shape)), None, None, None
