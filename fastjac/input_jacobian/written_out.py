"""Norms as plain operations, for a JVP inside ``torch.compile``.

Torch differentiates the JVP of its own norms wrongly (`guards.WRONG_THIRD`), and the operations
that they consist of rightly. A compiler fuses these as well as it fuses the norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastjac.ops.dispatch import accumulate_dtype


class NormsWrittenOut(TorchFunctionMode):
    """In this block torch's norms with statistics of their input are computed by `FUNCTIONS`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return FUNCTIONS.get(func, func)(*args, **(kwargs or {}))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    dtype = input.dtype
    if torch.is_autocast_enabled(input.device.type):  # where torch returns float32
        dtype = accumulate_dtype(dtype)
    y, _, _ = _normalised(input, list(range(-len(normalized_shape), 0)), eps)
    return _scaled(y, weight, bias).to(dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    dims = [0, *range(2, input.dim())]
    y, mean, var = _normalised(input, dims, eps)
    _update(running_mean, running_var, mean, var, input.numel() // input.shape[1], momentum)
    return _scaled(y, _channels(weight, y), _channels(bias, y)).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    y, mean, var = _normalised(input, list(range(2, input.dim())), eps)
    positions = input[0, 0].numel()
    _update(running_mean, running_var, mean.mean(0), var.mean(0), positions, momentum)
    return _scaled(y, _channels(weight, y), _channels(bias, y)).to(input.dtype)


def _normalised(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(x − μ)/√(σ² + ε)`` in at least float32, μ and σ²."""
    x = x.to(accumulate_dtype(x.dtype))
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + eps), mean, var


def _channels(t: Tensor | None, y: Tensor) -> Tensor | None:
    """A tensor of the channels, in dimension 1 of y."""
    return None if t is None else t.view(-1, *[1] * (y.dim() - 2))


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """Updates the running statistics, the variance without bias."""
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.flatten().to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var.flatten() * (count / max(count - 1, 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)


FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: layer_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
}
