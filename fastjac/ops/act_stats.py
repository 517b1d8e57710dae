"""``act_stats``: an activation and a statistic of its derivative, in one pass over ``z``.

    a = φ(z)
    per channel:  s_c = scale Σ_{n,p} w_n φ'(z_ncp)²      [C]
    per sample:   s_n = scale Σ_{c,p} w_c φ'(z_ncp)²      [N]

For cotangents ``g`` of ``a`` and ``q`` of ``s``, one pass over ``z, g`` computes

    ∂z = φ'(z) g + 2 scale w q φ'(z) φ''(z)

If ``w`` requires grad, the pass also sums the other statistic: ``∂w_n = scale Σ_{c,p} q_c φ'²`` for
the first, ``∂w_c = scale Σ_{n,p} q_n φ'²`` for the second. Both statistics are the same bilinear
form in the weights of samples and channels, so one pair of kernels computes both.

The fused pass is for a backward that is not differentiated again. A backward with
``create_graph=True``, forward mode and the transforms of ``torch.func`` use the same formulas
written with :func:`fastjac.act`, which is differentiable up to φ'''.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import IDS, ROWS, TABLE, get
from fastjac.ops.act import act, check_z
from fastjac.ops.autograd import Function, recorded, transformed
from fastjac.ops.dispatch import Example, Op, accumulate_dtype
from fastjac.ops.registration import check_like, impl_of, raw, register, suffix_of
from fastjac.torch_private import below_autograd

# What the backward sums in addition to computing ∂z (csrc/common/stats.h).
NONE, CHANNEL, SAMPLE, BIAS = range(4)


def _examples() -> Iterator[Example]:
    """Both statistics of every activation in each layout, with the gradients of z and w."""
    line = torch.linspace(-7, 7, 1540, dtype=torch.float64)
    shapes = {"[N, C]": (220, 7), "[N, L, C]": (44, 5, 7), "[N, C, L]": (44, 7, 5)}

    def call(inputs: dict[str, Tensor], impl: str, fn: str, shape: Any) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = {}
        dim = 1 if shape[1] == 7 else -1
        z = inputs["z"].reshape(shape).detach().requires_grad_()
        g = inputs["g"].reshape(shape)
        for per in ("channel", "sample"):
            size = shape[0] if per == "channel" else shape[dim]
            w = inputs["w"][:size].detach().requires_grad_()
            a, s = act_stats(z, fn, dim=dim, per=per, weights=w, impl=impl)
            q = 1 + torch.cos(torch.arange(len(s), device=s.device)).to(s) / 2
            grads = torch.autograd.grad((a, s), (z, w), (g, q))
            results = (a, s, *grads)
            outputs |= {
                f"{per}, {k}": v for k, v in zip(("a", "s", "z", "w"), results, strict=True)
            }
        return {name: out.detach() for name, out in outputs.items()}

    for fn in TABLE:
        for label, shape in shapes.items():
            inputs = {"z": line, "g": torch.cos(3 * line + 1), "w": 1 + torch.sin(line) / 2}
            yield Example(
                f"{fn} {label}", inputs, functools.partial(call, fn=fn, shape=shape), ("w",)
            )


_OP = Op("act_stats", _examples)


def act_stats(
    z: Tensor,  # [N, C], [N, ..., C] or [N, C, ...]
    fn: str = "gelu",
    *,
    dim: int = -1,
    per: str = "channel",
    weights: Tensor | None = None,  # [N] for per="channel", [C] for per="sample"
    scale: float | None = None,
    impl: str = "auto",
    **params: float,
) -> tuple[Tensor, Tensor]:
    """``φ(z)`` and, computed in the same pass, ``scale Σ w φ'(z)²`` per channel or per sample.

    Args:
        z: the pre-activation, with samples in dimension 0; float32, float64, bfloat16 or float16.
            It is copied if it is neither contiguous nor channels_last.
        fn: the activation, a key of `fastjac.activations.TABLE`.
        dim: the dimension of the channels: the last one (after a Linear) or 1 (after a
            convolution).
        per: "channel" sums over samples and positions, "sample" sums over channels and positions.
        weights: the factors of the terms: one for each sample if per is "channel", one for each
            channel if per is "sample"; None means 1. float32 (float64 for a float64 z).
        scale: the factor of the sum; None divides by the number of terms, which gives the mean.
        impl: as in `fastjac.act`.
        **params: the parameters of the activation.

    Returns:
        ``φ(z)`` of the shape, dtype and memory format of z, and the statistic, ``[C]`` or ``[N]``,
        float32 (float64 for a float64 z) and accumulated in at least that. The result is
        deterministic: the order of every sum depends only on shape, memory layout and alignment.
        Two runs give the same bits, on a CPU for any number of threads.

    Gradients: with respect to z and weights, reverse and forward mode, ``torch.func``. The
    statistic is differentiable twice (it contains φ', and each differentiation needs one more
    order); differentiating a third time raises RuntimeError.

    Raises:
        TypeError: z is not a floating-point tensor, weights is not a tensor or has the wrong dtype,
            or a parameter is unknown.
        ValueError: fn, impl, per or dim is unknown, a shape does not fit, or devices differ.
        RuntimeError: the impl cannot run the call, or a derivative of order 4 is needed.

    Example:

        >>> z = torch.randn(4, 3)
        >>> a, s = fastjac.act_stats(z, "relu")
        >>> torch.allclose(s, (z > 0).float().mean(0))  # φ'² of each channel
        True
    """
    row = get(fn)
    dim = _check(z, dim, per, weights)
    values = row.param_values(params)
    if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat, type(None))):
        raise TypeError(f"scale is {type(scale).__name__}: it must be a number, or None")
    if isinstance(scale, int) and abs(scale) > sys.float_info.max:
        raise ValueError("scale is an integer too large for a float")
    chosen = _OP.select(impl, z.device, z.dtype)
    per_sample = per == "sample"
    if scale is None:
        kept = z.shape[0] if per_sample else z.shape[dim]
        scale = kept / z.numel() if z.numel() else 0.0
    if chosen == "reference":
        return composed(z, weights, dim, per_sample, scale, fn, params, "reference")
    # The factor of a mean over a symbolic batch would be a constant as an argument of an op.
    symbolic = isinstance(scale, (torch.SymInt, torch.SymFloat))
    args = (dim, per_sample, 1.0 if symbolic else float(scale), IDS[fn], values)
    a, s = _in_graph(z, weights, *args, suffix_of(chosen))
    return a, s * scale if symbolic else s


def _check(z: Tensor, dim: int, per: str, weights: Tensor | None) -> int:
    check_z(z)
    if z.dim() < 2:
        raise ValueError(
            f"z has shape {tuple(z.shape)}: it must have samples and channels: [N, ..., C]"
        )
    if not isinstance(dim, int):
        raise TypeError(f"dim is {type(dim).__name__}: it must be 1 or the last dimension, -1")
    wanted, dim = dim, dim % z.dim() if -z.dim() <= dim < z.dim() else 0
    if dim not in (1, z.dim() - 1):
        raise ValueError(f"dim is {wanted}: it must be 1 or the last dimension, -1")
    if per not in ("channel", "sample"):
        raise ValueError(f"per is {per!r}: it must be 'channel' or 'sample'")
    if weights is None:
        return dim
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights is {type(weights).__name__}: it must be a torch.Tensor or None")
    size = z.shape[0] if per == "channel" else z.shape[dim]
    if weights.shape != (size,):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}: with per={per!r} it must have one number"
            f" for each {'sample' if per == 'channel' else 'channel'}: [{size}]"
        )
    if weights.dtype != accumulate_dtype(z.dtype):
        raise TypeError(
            f"weights has dtype {weights.dtype} and z has {z.dtype}; pass"
            f" weights.to({accumulate_dtype(z.dtype)})"
        )
    if weights.device != z.device:
        raise ValueError(
            f"weights is on {weights.device} and z is on {z.device}: pass weights.to(z.device)"
        )
    return dim


def spread(w: Tensor, z: Tensor, dim: int) -> Tensor:
    """Reshape weights of samples (``dim=0``) or channels so that they broadcast against z."""
    return w.reshape([-1 if d == dim else 1 for d in range(z.dim())])


def composed(z, w, dim, per_sample, scale, fn, params, impl):
    """The definition of ``act_stats``, written with `act`, and differentiable as `act` is."""
    s = composed_statistic(z, w, dim, per_sample, scale, fn, params, impl)
    return act(z, fn=fn, impl=impl, **params), s


def composed_statistic(z, w, dim, per_sample, scale, fn, params, impl):
    """The statistic alone."""
    slope = act(z.to(accumulate_dtype(z.dtype)), None, 1, fn, impl=impl, **params)
    squares = slope.square()
    if w is not None:
        squares = squares * spread(w, z, dim if per_sample else 0)
    kept = 0 if per_sample else dim
    return scale * squares.sum([d for d in range(z.dim()) if d != kept])


def composed_grad_z(z, g, weight, scale, fn, params, impl):
    """``φ'(z) g + 2 scale weight φ'(z) φ''(z)``, written with `act`; g or weight may be None."""
    grad = None if g is None else act(z, g, 1, fn, impl=impl, **params)
    if weight is not None:
        wide = z.to(accumulate_dtype(z.dtype))
        slope = act(wide, None, 1, fn, impl=impl, **params)
        term = act(wide, 2 * scale * weight * slope, 2, fn, impl=impl, **params).to(z.dtype)
        grad = term if grad is None else grad + term
    return grad


def named(fn: int, values: Sequence[float]) -> tuple[str, dict[str, float]]:
    """The name and the parameters of an activation, given the arguments of the raw ops."""
    row = ROWS[fn]
    return row.name, dict(zip(row.params, values, strict=True))


class _ActStats(Function):
    @staticmethod
    def forward(z, weights, dim, per_sample, scale, fn, values, suffix):
        with below_autograd():
            return raw("act_stats" + suffix)(z, weights, dim, per_sample, scale, fn, values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, w, *ctx.constants = inputs
        ctx.save_for_backward(z, w)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g, q):
        z, w = ctx.saved_tensors
        dim, per_sample, scale, fn, values, suffix = ctx.constants
        impl = impl_of(suffix, z.device.type)
        needs_z, needs_w = ctx.needs_input_grad[:2]
        nothing = [None] * 6
        if q is None:
            name, params = named(fn, values)
            grad = act(z, g, 1, name, impl=impl, **params) if needs_z and g is not None else None
            return grad, None, *nothing
        w_sample, w_channel = (q, w) if per_sample else (w, q)
        if not recorded(g, q):
            statistic = (CHANNEL if per_sample else SAMPLE) if needs_w else NONE
            grad_z, grad_w = raw("act_stats_backward" + suffix)(
                z, g, w_sample, w_channel, dim, statistic, scale, fn, values
            )
            return grad_z if needs_z else None, grad_w if needs_w else None, *nothing
        name, params = named(fn, values)
        grad_z = grad_w = None
        if needs_z:
            parts = [spread(v, z, d) for v, d in ((w_sample, 0), (w_channel, dim)) if v is not None]
            weight = parts[0] if len(parts) == 1 else parts[0] * parts[1]
            grad_z = composed_grad_z(z, g, weight, scale, name, params, impl)
        if needs_w:  # the other statistic, weighted by the cotangent
            grad_w = composed_statistic(z, q, dim, not per_sample, scale, name, params, impl)
        return grad_z, grad_w, *nothing


@torch.compiler.allow_in_graph
def _in_graph(z, w, dim, per_sample, scale, fn, values, suffix):
    if transformed():
        name, params = named(fn, values)
        impl = impl_of(suffix, z.device.type)
        return composed(z, w, dim, per_sample, scale, name, params, impl)
    return _ActStats.apply(z, w, dim, per_sample, scale, fn, values, suffix)


# ---- the raw ops


def result_like(z: Tensor, dim: int) -> Tensor:
    """An empty result of the kernels. It has the strides of z if the kernels support them."""
    out, per_sample = torch.empty_like(z), math.prod(z.shape[1:])
    if z.numel() == 0:
        return out
    if z.shape[0] > 1 and out.stride(0) != per_sample:
        return z.new_empty(z.shape)
    positions = per_sample // z.shape[dim]
    if positions > 1 and z.shape[dim] > 1 and out.stride(dim) not in (1, positions):
        return z.new_empty(z.shape)
    return out


def check_channels(z: Tensor, dim: int) -> None:
    """Raises if the dim of a raw op is negative or the dimension of the samples."""
    if not 1 <= dim < z.dim():
        raise RuntimeError(f"fastjac: dim must be 1 to {z.dim() - 1}, got {dim}")


def _fake(z, w, dim, per_sample, *rest):
    check_channels(z, dim)
    size = z.shape[0] if per_sample else z.shape[dim]
    return result_like(z, dim), z.new_empty(size, dtype=accumulate_dtype(z.dtype))


def _fake_backward(z, g, w_sample, w_channel, dim, statistic, *rest):
    check_channels(z, dim)
    check_like(g, z, "g")
    size = {NONE: 0, SAMPLE: z.shape[0]}.get(statistic, z.shape[dim])
    return result_like(z, dim), z.new_empty(size, dtype=accumulate_dtype(z.dtype))


register(
    "act_stats(Tensor z, Tensor? w, int dim, bool per_sample, float scale, int fn,"
    " float[] params) -> (Tensor, Tensor)",
    derivative=_ActStats.apply,
    fake=_fake,
    triton="act_stats",
    any_order=True,
)
register(
    "act_stats_backward(Tensor z, Tensor? g, Tensor? w_sample, Tensor? w_channel, int dim,"
    " int statistic, float scale, int fn, float[] params) -> (Tensor, Tensor)",
    derivative="call fastjac.act_stats",
    fake=_fake_backward,
    triton="act_stats",
    any_order=True,
)
