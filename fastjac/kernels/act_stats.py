"""Triton kernels of `fastjac.act_stats` and its backward; see `fastjac.ops.act_stats`.

A call is one launch; if strips are split (`Strips.run`), a second one sets counters to zero before
it. The memory of the tensor is treated as a matrix. Each program processes a
strip of tiles [ROWS, COLS] and sums along one axis of the matrix:

    statistic     channels inner [N, P, C]     channels outer [N, C, P]
    per channel   columns of [N·P, C]          rows of [C, P], for each of N
    per sample    rows of [N, P·C]             rows of [N, C·P]

One of the weights therefore belongs to the sum (of a row, for example) and is constant along a
strip; the other one belongs to the terms. If a whole sample [C, P] fits into one tile, the
statistic per channel sums the columns of [N, C·P] and adds these sums by channel at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjac.kernels._phi import phi
from fastjac.kernels.act import (
    ZEROS,
    aligned,
    check_activation,
    compute_dtype,
    padded,
    times,
    with_strides_of,
)
from fastjac.kernels.strips import GROUP, layout_of, strips
from fastjac.ops.act_stats import BIAS, CHANNEL, NONE, SAMPLE, check_channels
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.ops.registration import check_like

# Elements of a tile (half as many for float64) and warps. These are 8 elements per thread; with
# twice as many, some activations need up to 230 registers and spill.
TILE, WARPS = 1024, 4
# The number of programs that strips are split into: two waves of 132 processors with 8 each.
PROGRAMS = 2048
# The integers of the kernel. One variant serves all of them, so that a batch of another size does
# not compile.
SIZES = [
    "outs", "rows", "columns", "row_stride", "plane_stride", "period", "run", "steps", "splits",
]  # fmt: skip


@triton.jit
def arrives_last(counter, count):
    # The barrier orders the stores of all threads before the atomic of one thread.
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == count - 1


@triton.jit
def sum_partials(partial_ptr, first, count, outs, out, inside, OUT: tl.constexpr):
    STEP: tl.constexpr = min(GROUP, 4096 // OUT)
    total = tl.zeros([OUT], tl.float64)
    for i in range(0, count, STEP):
        j = i + tl.arange(0, STEP)
        at = (first + j)[:, None] * outs + out[None, :]
        # Read past the first-level cache, which does not have the stores of other programs.
        terms = tl.load(
            partial_ptr + at, (j < count)[:, None] & inside[None, :], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        total += tl.sum(terms, 0).to(tl.float64)
    return total


@triton.jit
def finish(
    sums, out, inside, sums_ptr, partial_ptr, counters_ptr, outs, tile, split, splits, scale,
    OUT: tl.constexpr, SPLIT: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    scale = tl.full([OUT], scale, sums_ptr.dtype.element_ty)
    if not SPLIT:
        tl.store(sums_ptr + out, sums * scale, inside)
    else:
        # The partial sums are [splits + groups, outs]. There is one counter for each group, and
        # then one for the groups.
        split = split.to(INDEX)
        tl.store(partial_ptr + split * outs + out, sums, inside)
        groups = (splits + GROUP - 1) // GROUP
        group = split // GROUP
        counters_ptr += tile * (groups + 1)
        first = group * GROUP
        count = tl.minimum(GROUP, splits - first)
        if arrives_last(counters_ptr + group, count):
            total = sum_partials(partial_ptr, first, count, outs, out, inside, OUT)
            if groups == 1:
                tl.store(sums_ptr + out, (total * scale).to(scale.dtype), inside)
            else:
                first = tl.zeros([], INDEX) + splits
                at = (first + group) * outs + out
                tl.store(partial_ptr + at, total.to(scale.dtype), inside)
                if arrives_last(counters_ptr + groups, groups):
                    total = sum_partials(partial_ptr, first, groups, outs, out, inside, OUT)
                    tl.store(sums_ptr + out, (total * scale).to(scale.dtype), inside)


@triton.jit(do_not_specialize=SIZES)
def act_stats_kernel(
    z_ptr, g_ptr, out_ptr, kept_ptr, summed_ptr, sums_ptr, partial_ptr, counters_ptr,
    outs, rows, columns, row_stride, plane_stride, period, run, steps, splits,
    factor: tl.float64, scale: tl.float64,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64,
    FN: tl.constexpr, BACKWARD: tl.constexpr,
    ZEROS: tl.constexpr, ZEROS_NEXT: tl.constexpr, HAS_G: tl.constexpr,
    HAS_KEPT: tl.constexpr, HAS_SUMMED: tl.constexpr,
    ALONG: tl.constexpr, TERM: tl.constexpr, WEIGHT: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr, INDEX: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row_stride, plane_stride = aligned(row_stride, ALIGNED), aligned(plane_stride, ALIGNED)
    if ALONG == "columns":
        outs = aligned(outs, ALIGNED)
    else:
        columns = aligned(columns, ALIGNED)
    OUT: tl.constexpr = COLS if ALONG == "columns" else ROWS
    KEPT_AXIS: tl.constexpr = 0 if ALONG == "columns" else 1
    tiles = tl.cdiv(outs, OUT)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles
    out = tile.to(INDEX) * OUT + tl.arange(0, OUT)
    inside_out = out < outs
    weight = tl.full([1, 1], factor, COMPUTE)
    if HAS_KEPT:
        kept_at = out // period if CHANNELS > 0 else out
        kept = tl.load(kept_ptr + kept_at, inside_out, other=0.0)
        weight = weight * tl.expand_dims(kept, KEPT_AXIS)
    total = tl.zeros([ROWS, COLS], COMPUTE)
    for i in range(split * run, tl.minimum((split + 1) * run, steps)):
        step = tl.full([], i, INDEX)
        if ALONG == "columns":
            row = step * ROWS + tl.arange(0, ROWS)
            summed_at = (row // period if WEIGHT == "divide" else row)[:, None]
            inside_summed = (row < rows)[:, None]
            inside_weight = inside_summed
            at = row[:, None] * row_stride + out[None, :]
        else:
            strips = tl.cdiv(columns, COLS)
            plane = step // strips
            column = (step % strips) * COLS + tl.arange(0, COLS)
            inside_summed = (column < columns)[None, :]
            inside_weight = inside_summed
            if WEIGHT == "plane":
                summed_at = plane + tl.zeros([1, 1], INDEX)
                inside_weight = summed_at >= 0
            elif WEIGHT == "column":
                summed_at = column[None, :]
            elif WEIGHT == "modulo":
                summed_at = (column % period)[None, :]
            else:
                summed_at = (column // period)[None, :]
            at = plane * plane_stride + out[:, None] * row_stride + column[None, :]
        inside = inside_summed & tl.expand_dims(inside_out, KEPT_AXIS)
        z = tl.load(z_ptr + at, inside, other=0.0).to(COMPUTE)
        slope = tl.zeros([ROWS, COLS], COMPUTE) + phi(z, p0, p1, p2, p3, FN, 1)
        if HAS_SUMMED:
            summed = tl.load(summed_ptr + summed_at, inside_weight, other=0.0)
        if BACKWARD:
            strength = weight * summed if HAS_SUMMED else weight
            result = times(phi(z, p0, p1, p2, p3, FN, 2), strength * slope, ZEROS_NEXT)
            if HAS_G:
                g = tl.load(g_ptr + at, inside, other=0.0).to(COMPUTE)
                result += times(slope, g, ZEROS)
        else:
            result = tl.zeros([ROWS, COLS], COMPUTE) + phi(z, p0, p1, p2, p3, FN, 0)
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), inside)
        if TERM != "none":
            term = result if TERM == "results" else slope * slope
            if TERM == "squares" and HAS_SUMMED:
                term *= summed
            total += tl.where(inside, term, 0.0)
    if TERM != "none":
        sums = tl.sum(total, KEPT_AXIS)
        if CHANNELS > 0:
            channel = tl.arange(0, CHANNELS)
            same = (out // period)[None, :] == channel[:, None]
            sums = tl.sum(tl.where(same, sums[None, :], 0.0), 1)
            finish(
                sums, channel, channel < outs // period, sums_ptr, partial_ptr, counters_ptr,
                outs // period, tile, split, splits, scale, CHANNELS, SPLIT, INDEX,
            )  # fmt: skip
        else:
            finish(
                sums, out, inside_out, sums_ptr, partial_ptr, counters_ptr,
                outs, tile, split, splits, scale, OUT, SPLIT, INDEX,
            )  # fmt: skip


TERMS = {NONE: "none", CHANNEL: "squares", SAMPLE: "squares", BIAS: "results"}


def _check(w: Tensor | None, size: int, z: Tensor) -> Tensor | None:
    if w is None:
        return None
    wanted = (size,), accumulate_dtype(z.dtype), z.device
    if (w.shape, w.dtype, w.device) != wanted:
        raise RuntimeError(
            f"fastjac: a weight must have the shape, dtype and device {wanted}, got"
            f" {(tuple(w.shape), w.dtype, w.device)}"
        )
    return w.contiguous()


def _launch(z, g, w_sample, w_channel, dim, statistic, scale, fn, params, backward):
    if statistic not in TERMS:
        raise RuntimeError(f"fastjac: statistic must be 0 to 3, got {statistic}")
    check_activation(fn, params, 0, 0)
    check_channels(z, dim)
    check_like(g, z, "g")
    result = torch.empty_like(z)
    layout = layout_of(result, dim)
    if layout is None:
        result = torch.empty(z.shape, dtype=z.dtype, device=z.device)
        layout = layout_of(result, dim)
        if layout is None:
            raise RuntimeError("fastjac: dim must be 1 or the last dimension")
    n, c, p, inner = layout
    w_sample, w_channel = _check(w_sample, n, z), _check(w_channel, c, z)
    size = {NONE: 0, SAMPLE: n}.get(statistic, c)
    options = {"dtype": accumulate_dtype(z.dtype), "device": z.device}
    if z.numel() == 0:
        return result, torch.zeros(size, **options)
    z = with_strides_of(z, result)
    g_dense = z if g is None else with_strides_of(g, result)

    per_sample = statistic == SAMPLE
    tile = TILE if z.element_size() < 8 else TILE // 2
    at = strips(n, c, p, inner, per_sample, w_channel is not None, tile, PROGRAMS)
    sums = torch.empty(size, **options)
    partial = counters = sums
    split = statistic != NONE and at.splits > 1
    if split:
        partial = torch.empty((at.splits + at.groups) * size, **options)
        # Not kept for the next launch: a CUDA graph, another stream or a memory pool of somebody
        # else may own the memory then, and one counter that is not zero makes the sums wrong.
        counters = torch.zeros(at.tiles * (at.groups + 1), dtype=torch.int32, device=z.device)
    kept, summed = (w_sample, w_channel) if per_sample else (w_channel, w_sample)
    act_stats_kernel[(at.tiles * at.splits,)](
        z, g_dense, result, sums if kept is None else kept, sums if summed is None else summed,
        sums, partial, counters, *at.sizes, 2 * scale, 1.0 if statistic == BIAS else scale,
        *padded(params), fn, backward,
        ZEROS=ZEROS[fn][1], ZEROS_NEXT=ZEROS[fn][2], HAS_G=g is not None,
        HAS_KEPT=kept is not None, HAS_SUMMED=summed is not None, TERM=TERMS[statistic],
        SPLIT=split, COMPUTE=compute_dtype(z.dtype),
        num_warps=WARPS, **at.constants,
    )  # fmt: skip
    return result, sums


def act_stats(
    z: Tensor, w: Tensor | None, dim: int, per_sample: bool, scale: float, fn: int,
    params: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    w_sample, w_channel = (None, w) if per_sample else (w, None)
    statistic = SAMPLE if per_sample else CHANNEL
    return _launch(z, None, w_sample, w_channel, dim, statistic, scale, fn, params, False)


def act_stats_backward(
    z: Tensor, g: Tensor | None, w_sample: Tensor | None, w_channel: Tensor | None, dim: int,
    statistic: int, scale: float, fn: int, params: list[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _launch(z, g, w_sample, w_channel, dim, statistic, scale, fn, params, True)
