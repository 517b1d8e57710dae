"""Triton kernel of `fastjac.ops.softmax_residual` and its backward: one program for each row."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjac.kernels.act import aligned, compute_dtype

MOST_COLUMNS = 4096  # the largest number of columns that are read at once


@triton.jit(do_not_specialize=["columns"])
def softmax_kernel(
    logits_ptr, other_ptr, out_ptr, columns, BACKWARD: tl.constexpr,
    ALIGNED: tl.constexpr, COMPUTE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    columns = aligned(columns, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    offset = row * columns
    place = tl.arange(0, COLS)
    most = tl.full([COLS], float("-inf"), COMPUTE)
    for start in range(0, columns, COLS):
        inside = start + place < columns
        z = tl.load(logits_ptr + offset + start + place, inside, other=float("-inf")).to(COMPUTE)
        most = tl.where(z > most, z, most)
    highest = tl.max(most, 0)
    totals = tl.zeros([COLS], COMPUTE)
    dots = tl.zeros([COLS], COMPUTE)
    for start in range(0, columns, COLS):
        inside = start + place < columns
        z = tl.load(logits_ptr + offset + start + place, inside, other=float("-inf")).to(COMPUTE)
        e = tl.where(inside, tl.exp(z - highest), 0.0)
        totals += e
        if BACKWARD:
            v = tl.load(other_ptr + offset + start + place, inside, other=0.0).to(COMPUTE)
            dots += e * v
    total = tl.sum(totals, 0)
    if BACKWARD:
        dot = tl.sum(dots, 0) / total
    else:
        label = tl.load(other_ptr + row)
        wrong = (label < 0) | (label >= columns)
    for start in range(0, columns, COLS):
        inside = start + place < columns
        z = tl.load(logits_ptr + offset + start + place, inside, other=float("-inf")).to(COMPUTE)
        p = tl.exp(z - highest) / total
        if BACKWARD:
            v = tl.load(other_ptr + offset + start + place, inside, other=0.0).to(COMPUTE)
            p = p * (v - dot)
        else:
            p = tl.where(start + place == label, p - 1.0, p)
            p = tl.where(wrong, float("nan"), p)
        tl.store(out_ptr + offset + start + place, p.to(out_ptr.dtype.element_ty), inside)


@functools.lru_cache(maxsize=256)
def _tile(columns: int, size: int) -> tuple[int, int]:
    """The columns that are read at once, and the number of warps."""
    cols = min(triton.next_power_of_2(columns), MOST_COLUMNS)
    # At most 16 columns per thread: with 32, the backward in float32 spills 12 bytes on sm_80. At
    # most 8 in float64: with 16, the backward spills 8 bytes on sm_90 (Triton 3.6).
    return cols, 1 if cols <= 256 else max(4, cols // (256 if size == 8 else 512))


def _launch(logits: Tensor, other: Tensor, backward: bool) -> Tensor:
    z = logits.contiguous()
    out = torch.empty_like(z)
    rows, columns = z.shape
    if rows == 0:
        return out
    cols, num_warps = _tile(columns, z.element_size())
    softmax_kernel[(rows,)](
        z, other.contiguous(), out, columns,
        BACKWARD=backward, ALIGNED=columns % 16 == 0, COMPUTE=compute_dtype(z.dtype), COLS=cols,
        num_warps=num_warps,
    )  # fmt: skip
    return out


def _check(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise RuntimeError("fastjac: logits must be [N, m] with m at least 1")


def softmax_residual(logits: Tensor, target: Tensor) -> Tensor:
    _check(logits)
    wanted = (logits.shape[:1], torch.int64, logits.device)
    if (target.shape, target.dtype, target.device) != wanted:
        raise RuntimeError("fastjac: target must be int64 [N] on the device of logits")
    return _launch(logits, target, False)


def softmax_residual_backward(logits: Tensor, v: Tensor) -> Tensor:
    _check(logits)
    if (v.shape, v.dtype, v.device) != (logits.shape, logits.dtype, logits.device):
        raise RuntimeError("fastjac: v must have the shape, dtype and device of logits")
    return _launch(logits, v, True)
