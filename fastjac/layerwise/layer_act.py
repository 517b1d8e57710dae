"""``layer_act``: everything that a layer-wise penalty computes at a layer, in one autograd node.

For ``z = W x + b`` (a Linear or convolution that torch has computed) it returns

    a = φ(z)      v = Σ_c s_c r_c      s_c = scale Σ_{n,p} φ'(z_ncp)²,  r_c = ‖W_c‖²

as functions of ``x, W, b``. It returns ``a`` and ``s`` if one launch computes the ``r`` of all
layers (`fastjac.ops.row_sqnorm.tapped`, on a GPU, where the number of launches matters). The
backward makes one pass over ``z`` for ``∂z`` and ``∂b``, leaves the two GEMMs to torch, and adds
``2 ∂v s_c W_c`` to ``∂W`` in place, while both are in the cache. If autograd accumulated them, the
penalty would allocate a second ``∂W`` (784-4×512-10, batch 128, 2 cores: +4.8 MB on 5). The ops
`act_stats` and `row_sqnorm` are used for both directions. On a CPU, where a call from Python takes
as long as a small layer, one op computes all of a direction, and v is added to the total of the
layers before, so that the value of the penalty needs no nodes of its own.

A backward that is being recorded computes ``z`` again and consists of differentiable operations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.ops.act_stats import (
    BIAS,
    NONE,
    check_channels,
    composed_grad_z,
    composed_statistic,
    named,
    recorded,
    result_like,
    spread,
)
from fastjac.ops.autograd import Function
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.ops.registration import check_like, raw, register
from fastjac.ops.row_sqnorm import add_to, alike, composed_rows, plus_rows, rows_of
from fastjac.torch_private import below_autograd

# Of a convolution: stride, padding, dilation, transposed, output_padding, groups.
ConvOptions = tuple[Any, ...]


class LayerActOptions(NamedTuple):
    """The options of `layer_act`, the same for all calls of a layer."""

    conv: ConvOptions | None  # None for a Linear
    scale: float
    fn: int
    params: tuple[float, ...]
    suffix: str
    impl: str
    rows: str  # the implementation that computes r; empty: return s instead of v
    traced: bool = False  # whether the call is a part of a graph of torch.compile


@torch.compiler.allow_in_graph
def layer_act(
    x: Tensor,
    weight: Tensor,  # [C, C_in] or [C, C_in / groups, *taps], rows in memory
    bias: Tensor | None,
    z: Tensor,  # linear(x) or convolution(x), [N, ..., C] or [N, C, ...], detached
    layer: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """``(a, v)`` or ``(a, s)`` in one node of autograd, whose inputs are ``x, weight, bias``.

    ``layer`` is a `LayerActOptions`. Raises under forward mode and ``torch.func``.
    """
    return apply_layer_act(x, weight, bias, z, None, layer, None)


class _LayerAct(Function):
    # The gradients come in a list, so that ∂a can be freed before ∂W is allocated (torch ≥ 2.13;
    # older versions pass them separately). Since z is freed too, the peak memory is that of the
    # plain step.
    boxed_grads_call = True

    @staticmethod
    def forward(ctx, x, weight, bias, z, total, layer, kept):
        conv, scale, fn, params, suffix, impl, rows, _ = layer
        dim = z.dim() - 1 if conv is None else 1
        ctx.layer = layer
        ctx.set_materialize_grads(False)
        if impl == rows == "cpu":
            with below_autograd():
                a, table, total = raw("layer_act")(z, weight, dim, scale, fn, params, total)
            ctx.save_for_backward(x, weight, bias, z, table, None)
            if kept is not None:
                kept.append(table)
            return a, total
        with below_autograd():
            r = rows_of([weight], rows) if rows else None
            a, s = raw("act_stats" + suffix)(z, None, dim, False, scale, fn, params)
        ctx.save_for_backward(x, weight, bias, z, s if rows else None, r)
        if r is None:
            return a, s
        # Under autocast a dot product may round to half precision.
        return a, (s * r).sum() if torch.is_autocast_enabled(s.device.type) else s.dot(r)

    @staticmethod
    def backward(ctx, *grads):
        boxed = grads[0] if isinstance(grads[0], list) else list(grads)
        g, v = boxed
        if g is None and v is None:  # both are undefined, and the raw ops take None for 1
            return (None,) * 7
        x, weight, bias, z, s, r = ctx.saved_tensors
        needs_x, needs_w, needs_b, _, needs_total, *_ = ctx.needs_input_grad
        needs = needs_x, needs_w, needs_b
        rest = None, v if needs_total else None, None, None
        if recorded(g, v):
            return *_recorded_backward(g, v, x, weight, bias, z, needs, ctx.layer), *rest
        conv, scale, fn, params, suffix, impl, rows, traced = ctx.layer
        if v is None:
            grad_z = raw("act" + suffix)(z, g, 1, fn, params)
            return *_layer_backward(grad_z, x, weight, bias, conv, needs), *rest
        at_once = impl == rows == "cpu"
        with below_autograd():
            if at_once and needs_w and conv is None and _in_one_op(x, weight, z, traced):
                grad_x, grad_w, grad_b = raw("linear_act_backward")(
                    x, weight, z, g, v, s, needs_x, needs_b, scale, fn, params
                )
                ctx.maybe_clear_saved_tensors()
                return grad_x if needs_x else None, grad_w, grad_b if needs_b else None, *rest
            dim = z.dim() - 1 if conv is None else 1
            if at_once:
                grad_z, grad_b, c = raw("layer_act_backward")(
                    z, g, v, s, dim, needs_b, scale, fn, params
                )
            else:
                q, statistic = r * v if rows else v, BIAS if needs_b else NONE
                grad_z, grad_b = raw("act_stats_backward" + suffix)(
                    z, g, None, q, dim, statistic, scale, fn, params
                )
                c = s * v if rows and needs_w else None
        ctx.maybe_clear_saved_tensors()  # not if the graph is retained
        boxed.clear()
        del grads, g, z
        if not needs_b:
            grad_b = None
        elif grad_b.dtype != bias.dtype:
            grad_b = grad_b.to(bias.dtype)
        if c is None or not needs_w or conv is not None or weight.dtype != grad_z.dtype:
            grad_x, grad_w, _ = _layer_backward(grad_z, x, weight, bias, conv, (*needs[:2], False))
            return grad_x, _add_rows(grad_w, weight, c, rows), grad_b, *rest
        # The GEMM adds its product to 2 c W while that is in the cache. This costs half of a pass
        # over ∂W after the GEMM (784-4×512-10, batch 128: +0.09 ms a step against +0.21).
        grad_w = torch.empty_like(weight)
        add_to([grad_w], [weight], c, rows, add=False)
        grad_w.addmm_(_flat(grad_z).t(), _flat(x))
        del x
        return grad_z.matmul(weight) if needs_x else None, grad_w, grad_b, *rest


# Elements of z up to which the number of calls counts; beyond, when memory is freed does.
SMALL = 1 << 15


def _in_one_op(x: Tensor, weight: Tensor, z: Tensor, traced: bool) -> bool:
    """Whether ``linear_act_backward`` computes the gradients of a Linear.

    In a graph of torch.compile it does so at any size: inductor would put the products off to the
    end of the backward, and keep what they need until then (784-4×512-10, batch 128, 2 cores: 8.5
    MB in place of 5.1 MB).
    """
    dtype = z.dtype
    return (
        (traced or z.numel() <= SMALL)
        and (dtype is torch.float32 or dtype is torch.float64)
        and x.dtype is dtype
        and weight.dtype is dtype
        and x.is_contiguous()
        and weight.is_contiguous()
        and z.is_contiguous()
    )


def _add_rows(grad: Tensor | None, weight: Tensor, c: Tensor | None, impl: str) -> Tensor | None:
    """``grad + 2 c W``, computed in place where the memory layouts agree."""
    if grad is None or c is None:
        return grad
    if not alike(grad, weight):
        return plus_rows(grad, c, weight)
    add_to([grad], [weight], c, impl, add=True)
    return grad


# `layer_act` without the wrapper that torch.compile needs. Calls the C++ base directly, since
# forward mode and torch.func are not supported.
apply_layer_act = super(torch.autograd.Function, _LayerAct).apply


def _recorded_backward(g, v, x, weight, bias, z, needs, layer):
    """The same gradients, in operations that torch can differentiate."""
    conv, scale, fn, values, _, impl, rows, _ = layer
    dim = z.dim() - 1 if conv is None else 1
    name, params = named(fn, values)
    dtype = z.dtype  # under autocast the dtype of the GEMM, not of x and the weight
    z = _layer(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), conv)
    w = s = None
    if v is not None and not rows:
        w = spread(v, z, dim)
    elif v is not None:
        w = spread(v * composed_rows(weight), z, dim)
        s = composed_statistic(z, None, dim, False, scale, name, params, impl)
    grad_z = composed_grad_z(z, g, w, scale, name, params, impl)
    grad_x, grad_w, grad_b = _layer_backward(grad_z, x, weight, bias, conv, needs)
    if needs[1] and s is not None:
        grad_w = plus_rows(grad_w, v * s, weight)
    return grad_x, grad_w, grad_b


def _layer(x: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvOptions | None) -> Tensor:
    if conv is None:
        return F.linear(x, weight, bias)
    return torch.convolution(x, weight, bias, *conv)


def _layer_backward(
    grad_z: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: ConvOptions | None,
    needs: tuple[bool, ...],
) -> tuple[Any, ...]:
    """The gradients of x, weight and bias, in operations that torch can differentiate.

    Under autocast they are computed in the dtype of z, the lower precision of the layer.
    """
    dtype = grad_z.dtype
    low_x, low_weight = x.to(dtype), weight.to(dtype)
    if conv is not None:
        sizes = [weight.shape[0]] if needs[2] else None
        grads = torch.ops.aten.convolution_backward(
            grad_z, low_x, low_weight, sizes, *conv, list(needs)
        )
    else:
        flat_z = _flat(grad_z)
        grads = (
            grad_z.matmul(low_weight) if needs[0] else None,
            flat_z.t().mm(_flat(low_x)) if needs[1] else None,
            flat_z.sum(0) if needs[2] else None,
        )
    return tuple(
        grad.to(like.dtype) if needed and like is not None else None
        for grad, like, needed in zip(grads, (x, weight, bias), needs, strict=True)
    )


def _flat(t: Tensor) -> Tensor:
    """``[N·P, C]``, by reshape, since flatten has no batching rule."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


# ---- the raw ops, for CPU tensors


def _fake(z, weight, dim, *rest):
    check_channels(z, dim)
    table = z.new_empty(2 * z.shape[dim], dtype=accumulate_dtype(z.dtype))
    return result_like(z, dim), table, table.new_empty(())


def _fake_backward(z, g, v, table, dim, bias, *rest):
    check_channels(z, dim)
    check_like(g, z, "g")
    channels = z.shape[dim]
    return (
        result_like(z, dim),
        table.new_empty(channels if bias else 0),
        table.new_empty(channels),
    )


def _fake_linear(x, weight, z, g, v, table, needs_x, bias, *rest):
    check_like(g, z, "g")
    grad_x = torch.empty_like(x) if needs_x else x.new_empty(0)
    return grad_x, torch.empty_like(weight), x.new_empty(weight.shape[0] if bias else 0)


# Returns φ(z), the table [s, r] (flat), and total + Σ_c s_c r_c.
register(
    "layer_act(Tensor z, Tensor weight, int dim, float scale, int fn, float[] params,"
    " Tensor? total) -> (Tensor, Tensor, Tensor)",
    derivative="use act_stats and row_sqnorm",
    fake=_fake,
)
# Returns ∂z, ∂b (empty if not `bias`) and c = v s, for the gradient v of the total.
register(
    "layer_act_backward(Tensor z, Tensor? g, Tensor v, Tensor table, int dim, bool bias,"
    " float scale, int fn, float[] params) -> (Tensor, Tensor, Tensor)",
    derivative="use act_stats and row_sqnorm",
    fake=_fake_backward,
)
# Returns ∂x (empty if not `needs_x`), ∂W with 2 c W, and ∂b of a Linear; float32 or float64.
register(
    "linear_act_backward(Tensor x, Tensor weight, Tensor z, Tensor? g, Tensor v, Tensor table,"
    " bool needs_x, bool bias, float scale, int fn, float[] params) -> (Tensor, Tensor, Tensor)",
    derivative="use linear, act_stats and row_sqnorm",
    fake=_fake_linear,
)
