"""``act_stats``: an activation and a statistic of its derivative, in the pass that reads ``z``.

    a = φ(z)
    per channel:  s_c = scale Σ_{n,p} w_n φ'(z_ncp)²      [C]
    per sample:   s_n = scale Σ_{c,p} w_c φ'(z_ncp)²      [N]

With cotangents ``g`` of ``a`` and ``q`` of ``s`` one pass over ``z, g`` writes

    ∂z = φ'(z) g + 2 scale w q φ'(z) φ''(z)

and, where ``w`` needs its gradient, sums the other statistic: ``∂w_n = scale Σ_{c,p} q_c φ'²`` of
the first, ``∂w_c = scale Σ_{n,p} q_n φ'²`` of the second. So both are one bilinear form in the
weights of samples and channels, and one kernel pair serves them.

The fused pass is for reverse mode that nobody differentiates again. A backward that is being
recorded (``create_graph=True``), forward mode and the transforms of ``torch.func`` take the same
formulas written in :func:`fastjac.act`, which differentiates itself; past φ''' that raises.
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
from fastjac.ops.autograd import Function
from fastjac.ops.dispatch import Example, Op, accumulate_dtype
from fastjac.ops.registration import check_like, impl_of, raw, register, suffix_of
from fastjac.torch_private import (
    below_autograd,
    forward_mode_active,
    is_legacy_batched,
    transforms_active,
)

# What the backward sums beside ∂z (csrc/common/stats.h).
NONE, CHANNEL, SAMPLE, BIAS = range(4)


def _examples() -> Iterator[Example]:
    """Every activation, both statistics, in each layout, with the gradients of z and w."""
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
    """``φ(z)`` and, from the same pass, ``scale Σ w φ'(z)²`` per channel or per sample.

    Args:
        z: pre-activation, samples in dimension 0; float32, float64, bfloat16 or float16. Memory
            orders other than contiguous and channels_last are copied.
        fn: the activation, a key of `fastjac.activations.TABLE`.
        dim: the channels: the last dimension (after a Linear) or 1 (after a convolution).
        per: "channel" sums over samples and positions, "sample" over channels and positions.
        weights: factor of each term: per sample for the statistic per channel, per channel for
            the one per sample; None means 1. float32 (float64 for a float64 z).
        scale: factor of the sum; None divides by the number of terms: the mean.
        impl: as in `fastjac.act`.
        **params: the activation's parameters.

    Returns:
        ``φ(z)`` of z's shape, dtype and memory format, and the statistic, ``[C]`` or ``[N]``,
        float32 (float64 for a float64 z), accumulated in at least that. The result is
        deterministic: the order of every sum follows from shape, memory layout and alignment alone,
        so two runs give the same bits, and on a CPU so does any number of threads.

    Gradients: in z and weights, reverse and forward mode, ``torch.func``: twice (the statistic
    uses up φ' and each differentiation one order more, to φ'''); then RuntimeError.

    Raises:
        TypeError: z is not a floating-point tensor, weights no tensor or of the wrong dtype, or an
            unknown parameter.
        ValueError: unknown fn, impl or per, a dim or a shape that does not fit, or devices differ.
        RuntimeError: a named impl cannot run the call, or a derivative past φ''' is asked for.

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
        raise TypeError(f"scale is {type(scale).__name__}; it must be a number, or None")
    if isinstance(scale, int) and abs(scale) > sys.float_info.max:
        raise ValueError("scale is an integer too large for a float")
    chosen = _OP.select(impl, z.device, z.dtype)
    per_sample = per == "sample"
    if scale is None:
        kept = z.shape[0] if per_sample else z.shape[dim]
        scale = kept / z.numel() if z.numel() else 0.0
    if chosen == "reference":
        return composed(z, weights, dim, per_sample, scale, fn, params, "reference")
    args = (dim, per_sample, float(scale), IDS[fn], values)
    return _in_graph(z, weights, *args, suffix_of(chosen))


def _check(z: Tensor, dim: int, per: str, weights: Tensor | None) -> int:
    check_z(z)
    if z.dim() < 2:
        raise ValueError(
            f"z has shape {tuple(z.shape)}; it needs samples and channels: [N, ..., C]"
        )
    if not isinstance(dim, int):
        raise TypeError(f"dim is {type(dim).__name__}; it must be 1 or the last dimension, -1")
    wanted, dim = dim, dim % z.dim() if -z.dim() <= dim < z.dim() else 0
    if dim not in (1, z.dim() - 1):
        raise ValueError(f"dim={wanted}; the channels are dimension 1 or the last of {z.dim()}")
    if per not in ("channel", "sample"):
        raise ValueError(f"per={per!r}; choose 'channel' or 'sample'")
    if weights is None:
        return dim
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor or None, got {type(weights).__name__}")
    size = z.shape[0] if per == "channel" else z.shape[dim]
    if weights.shape != (size,):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; per={per!r} takes one number a"
            f" {'sample' if per == 'channel' else 'channel'}: [{size}]"
        )
    if weights.dtype != accumulate_dtype(z.dtype):
        raise TypeError(
            f"weights has dtype {weights.dtype}; with z of {z.dtype} it must be"
            f" {accumulate_dtype(z.dtype)}"
        )
    if weights.device != z.device:
        raise ValueError(f"weights is on {weights.device}, z on {z.device}; move one of them")
    return dim


def spread(w: Tensor, z: Tensor, dim: int) -> Tensor:
    """A weight per sample (``dim=0``) or channel, in a shape that broadcasts against z."""
    return w.reshape([-1 if d == dim else 1 for d in range(z.dim())])


def composed(z, w, dim, per_sample, scale, fn, params, impl):
    """The definition in calls of `act`, differentiable in every way that `act` is."""
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
    """``φ'(z) g + 2 scale weight φ'(z) φ''(z)`` in calls of `act`; g or weight may be None."""
    grad = None if g is None else act(z, g, 1, fn, impl=impl, **params)
    if weight is not None:
        wide = z.to(accumulate_dtype(z.dtype))
        slope = act(wide, None, 1, fn, impl=impl, **params)
        term = act(wide, 2 * scale * weight * slope, 2, fn, impl=impl, **params).to(z.dtype)
        grad = term if grad is None else grad + term
    return grad


def recorded(*cotangents: Tensor | None) -> bool:
    """In a backward: whether it may be differentiated again, or runs under torch's older vmap."""
    return torch.is_grad_enabled() or any(
        c is not None and is_legacy_batched(c) for c in cotangents
    )


def transformed() -> bool:
    """Whether forward mode or a ``torch.func`` transform is active."""
    return transforms_active() or forward_mode_active()


def named(fn: int, values: Sequence[float]) -> tuple[str, dict[str, float]]:
    """Name and parameters of an activation from what the raw ops take."""
    row = ROWS[fn]
    return row.name, dict(zip(row.params, values, strict=True))


class _ActStats(Function):
    @staticmethod
    def forward(z, w, dim, per_sample, scale, fn, values, suffix):
        with below_autograd():
            return raw("act_stats" + suffix)(z, w, dim, per_sample, scale, fn, values)

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


def _result_like(z: Tensor, dim: int) -> Tensor:
    """The strides of the kernels' results: z's own, or contiguous where those are no layout."""
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
    """That the raw ops' dim is one: not negative, and not that of the samples."""
    if not 1 <= dim < z.dim():
        raise RuntimeError(f"fastjac: dim must be 1 to {z.dim() - 1}, got {dim}")


def _fake(z, w, dim, per_sample, *rest):
    check_channels(z, dim)
    size = z.shape[0] if per_sample else z.shape[dim]
    return _result_like(z, dim), z.new_empty(size, dtype=accumulate_dtype(z.dtype))


def _fake_backward(z, g, w_sample, w_channel, dim, statistic, *rest):
    check_channels(z, dim)
    check_like(g, z, "g")
    size = {NONE: 0, SAMPLE: z.shape[0]}.get(statistic, z.shape[dim])
    return _result_like(z, dim), z.new_empty(size, dtype=accumulate_dtype(z.dtype))


register(
    "act_stats(Tensor z, Tensor? w, int dim, bool per_sample, float scale, int fn,"
    " float[] params) -> (Tensor, Tensor)",
    derivative=_ActStats.apply,
    fake=_fake,
    triton="act_stats",
)
register(
    "act_stats_backward(Tensor z, Tensor? g, Tensor? w_sample, Tensor? w_channel, int dim,"
    " int statistic, float scale, int fn, float[] params) -> (Tensor, Tensor)",
    derivative="call fastjac.act_stats",
    fake=_fake_backward,
    triton="act_stats",
)
