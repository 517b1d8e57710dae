"""Norms in forward mode, whose derivative can be taken again.

Torch's forward-mode derivative of ``layer_norm``, and of ``batch_norm`` and ``instance_norm`` with
the statistics of the batch, is right, but its gradient takes mean and variance for constants (seen
on torch 2.13; a test tells when that is mended). Here the tangent is that of the same norm written
in elementary operations. The output is torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastjac.ops.dispatch import accumulate_dtype


def _normed(x: Tensor, dims: list[int], weight: Any, bias: Any, eps: float) -> Tensor:
    """``weight`` and ``bias`` broadcast with x."""
    x = x.to(accumulate_dtype(x.dtype))
    centred = x - x.mean(dims, keepdim=True)
    y = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _channels(t: Tensor | None, x: Tensor) -> Tensor | None:
    return None if t is None else t.view(-1, *[1] * (x.dim() - 2))


# The parameters are those of torch's functions.


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return _normed(input, list(range(-len(normalized_shape), 0)), weight, bias, eps)


def _batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    if not training:
        return None
    dims = [d for d in range(input.dim()) if d != 1]
    return _normed(input, dims, _channels(weight, input), _channels(bias, input), eps)


def _instance_norm(
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps=1e-5,
):
    if not use_input_stats:
        return None
    dims = list(range(2, input.dim()))
    return _normed(input, dims, _channels(weight, input), _channels(bias, input), eps)


WRITTEN: dict[Any, Callable[..., Tensor | None]] = {
    F.layer_norm: _layer_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
"""The same functions in elementary operations; None if torch's derivative is right."""

REFUSED: dict[Any, str] = {
    torch.layer_norm: "F.layer_norm",
    torch.batch_norm: "F.batch_norm",
    torch.instance_norm: "F.instance_norm",
    torch.native_layer_norm: "F.layer_norm",
    torch.native_batch_norm: "F.batch_norm",
}
for _name in (
    "layer_norm",
    "native_layer_norm",
    "batch_norm",
    "native_batch_norm",
    "instance_norm",
):
    _packet = getattr(torch.ops.aten, _name)  # as exported models call it
    REFUSED |= dict.fromkeys((_packet, _packet.default), "F." + _name.removeprefix("native_"))


class NormTangents(TorchFunctionMode):
    """In this block the tangents of norms can be differentiated."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in REFUSED:
            raise NotImplementedError(
                f"torch.{func.__name__} has a forward-mode derivative whose gradient is wrong: "
                f"call {REFUSED[func]}"
            )
        written = WRITTEN.get(func)
        if written is None:
            return func(*args, **kwargs)
        dual = written(*args, **kwargs)
        tangent = None if dual is None else forward_ad.unpack_dual(dual).tangent
        if tangent is None:
            return func(*args, **kwargs)
        y = func(*(_primal(a) for a in args), **{k: _primal(a) for k, a in kwargs.items()})
        return forward_ad.make_dual(y, tangent.to(y.dtype))


def _primal(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    primal, tangent = forward_ad.unpack_dual(t)
    return t if tangent is None else primal
