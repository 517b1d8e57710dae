"""Triton kernel of `fastjac.ops.norm`: one program for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjac.kernels.act import aligned, compute_dtype
from fastjac.ops.dispatch import accumulate_dtype

MOST_COLUMNS = 2048  # the largest number of columns that are read at once


@triton.jit(do_not_specialize=["width", "rows", "parts"])
def norm_push_kernel(
    t_ptr, delta_ptr, a_ptr, mean_ptr, iota_ptr, weight_ptr, out_ptr, extra_ptr, product_ptr,
    width, rows, parts, WANTED: tl.constexpr, WEIGHTED: tl.constexpr, TRAINED: tl.constexpr,
    ALIGNED: tl.constexpr, COMPUTE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    width = aligned(width, ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, COLS)
    mean = tl.load(mean_ptr + row).to(COMPUTE)
    iota = tl.load(iota_ptr + row).to(COMPUTE)
    at = row * width
    for part in range(0, parts):
        of_part = (tl.full([], part, tl.int64) * rows + row) * width
        t_sum = tl.zeros([COLS], COMPUTE)
        d_sum = tl.zeros([COLS], COMPUTE)
        hat_t = tl.zeros([COLS], COMPUTE)
        hat_d = tl.zeros([COLS], COMPUTE)
        both = tl.zeros([COLS], COMPUTE)
        for start in range(0, width, COLS):
            inside = start + place < width
            t = tl.load(t_ptr + of_part + start + place, inside, other=0.0).to(COMPUTE)
            d = tl.load(delta_ptr + of_part + start + place, inside, other=0.0).to(COMPUTE)
            a = tl.load(a_ptr + at + start + place, inside, other=0.0).to(COMPUTE)
            if WEIGHTED:
                d *= tl.load(weight_ptr + start + place, inside, other=0.0).to(COMPUTE)
            hat = (a - mean) * iota
            t_sum += t
            d_sum += d
            hat_t += hat * t
            hat_d += hat * d
            both += d * t
        t_mean = tl.sum(t_sum, 0) / width
        d_mean = tl.sum(d_sum, 0) / width
        p = tl.sum(hat_t, 0) / width
        q = tl.sum(hat_d, 0) / width
        b = tl.sum(both, 0) / width - d_mean * t_mean - 3.0 * p * q  # B − 2 p q
        for start in range(0, width, COLS):
            inside = start + place < width
            t = tl.load(t_ptr + of_part + start + place, inside, other=0.0).to(COMPUTE)
            delta = tl.load(delta_ptr + of_part + start + place, inside, other=0.0).to(COMPUTE)
            a = tl.load(a_ptr + at + start + place, inside, other=0.0).to(COMPUTE)
            d = delta
            hat = (a - mean) * iota
            pushed = iota * (t - t_mean - hat * p)
            out = pushed
            if WEIGHTED:
                weight = tl.load(weight_ptr + start + place, inside, other=0.0).to(COMPUTE)
                d = delta * weight
                out = pushed * weight
            if TRAINED:
                product = delta * pushed
                if part > 0:
                    product += tl.load(product_ptr + at + start + place, inside, other=0.0)
                tl.store(product_ptr + at + start + place, product, inside)
            extra = -iota * iota * (p * (d - d_mean) + q * (t - t_mean) + b * hat)
            if part > 0:
                extra += tl.load(extra_ptr + at + start + place, inside, other=0.0)
            tl.store(extra_ptr + at + start + place, extra, inside)
            if WANTED:
                out = out.to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + of_part + start + place, out, inside)
        # The next part adds to what this one has stored, and with 16-bit operands other threads
        # load an element than those that have stored it.
        tl.debug_barrier()


def _check(t: Tensor, a: Tensor, numel: int, dtype: torch.dtype, name: str) -> None:
    if (t.numel(), t.dtype, t.device) != (numel, dtype, a.device):
        raise RuntimeError(
            f"fastjac: norm_push: {name} must have {numel} elements, {dtype}, on the device of a"
        )


def norm_push(
    t: Tensor,
    delta: Tensor,
    a: Tensor,
    mean: Tensor,
    iota: Tensor,
    weight: Tensor | None,
    width: int,
    wanted: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if width < 1 or a.numel() == 0 or a.numel() % width:
        raise RuntimeError(f"fastjac: norm_push: a must have one row of {width} elements or more")
    rows, parts = a.numel() // width, t.numel() // a.numel()
    if parts == 0:
        raise RuntimeError("fastjac: norm_push: t must have at least the elements of a")
    wide = accumulate_dtype(a.dtype)
    for operand, numel, dtype, name in (
        (t, parts * a.numel(), a.dtype, "t"),
        (delta, parts * a.numel(), a.dtype, "delta"),
        (mean, rows, wide, "mean"),
        (iota, rows, wide, "iota"),
    ):
        _check(operand, a, numel, dtype, name)
    if weight is not None:
        _check(weight, a, width, weight.dtype, "weight")
    elif trained:
        raise RuntimeError("fastjac: norm_push: weight is None and trained is true")
    t, delta, a = t.contiguous(), delta.contiguous(), a.contiguous()
    out = torch.empty_like(t) if wanted else t.new_empty(0)
    extra = torch.empty_like(a, dtype=wide)
    product = torch.empty_like(extra) if trained else extra.new_empty(0)
    cols = min(triton.next_power_of_2(width), MOST_COLUMNS)
    norm_push_kernel[(rows,)](
        t, delta, a, mean.contiguous(), iota.contiguous(),
        a if weight is None else weight.contiguous(), out, extra, product, width, rows, parts,
        WANTED=wanted, WEIGHTED=weight is not None, TRAINED=trained, ALIGNED=width % 16 == 0,
        COMPUTE=compute_dtype(a.dtype), COLS=cols, num_warps=1 if cols <= 256 else cols // 256,
    )  # fmt: skip
    return out, extra, product
