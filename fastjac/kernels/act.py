"""Triton kernels of `fastjac.act` and its backward; see `fastjac.ops.act`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjac.activations import KERNEL_ROWS, MAX_ORDER
from fastjac.codegen import TRITON_PARAMS
from fastjac.kernels._phi import phi
from fastjac.ops.dispatch import FLOAT_DTYPES
from fastjac.ops.registration import check_like

# The kernels are bound by memory. With 8 elements per thread, a thread makes one or two 16-byte
# accesses to each operand (four for float64), and there are registers for enough threads. With 16
# elements per thread, the double backward of mish in float64 spilled 280 bytes. num_stages has its
# default, because the compiler fuses other multiplications with additions if it is two (mish,
# float32, sm_90: 40 instead of 48 FMAs).
BLOCK, WARPS = 1024, 4

# Whether a product with φ^(order) needs `times` to handle zeros, by row and order.
ZEROS = [[row.has_zeros(k) for k in range(MAX_ORDER + 1)] for row in KERNEL_ROWS]


@triton.jit
def times(slope, g, ZEROS: tl.constexpr):
    # The product is zero where the derivative is zero, even if g is inf or NaN.
    product = slope * g
    if ZEROS:
        product = tl.where(slope == 0, slope, product)
    return product


@triton.jit
def aligned(count, ALIGNED: tl.constexpr):
    # Triton would compile a kernel for counts of 1, one for multiples of 16 and one for others, and
    # that for each count. The kernels here get one flag instead. With it the compiler sees that a
    # mask is the same for 16 neighbours, which 16-byte accesses need.
    return count // 16 * 16 if ALIGNED else count


@triton.jit(do_not_specialize=["numel"])
def act_kernel(
    z_ptr, g_ptr, out_ptr, numel,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64,
    FN: tl.constexpr, K: tl.constexpr, ZEROS: tl.constexpr, HAS_G: tl.constexpr,
    ALIGNED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    numel = aligned(numel, ALIGNED)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    z = tl.load(z_ptr + offsets, inside, other=0.0).to(COMPUTE)
    out = tl.zeros([BLOCK], COMPUTE) + phi(z, p0, p1, p2, p3, FN, K)
    if HAS_G:
        g = tl.load(g_ptr + offsets, inside, other=0.0).to(COMPUTE)
        out = times(out, g, ZEROS)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["numel"])
def act_backward_kernel(
    z_ptr, g_ptr, v_ptr, grad_z_ptr, grad_g_ptr, numel,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, p3: tl.float64,
    FN: tl.constexpr, K: tl.constexpr, ZEROS: tl.constexpr, ZEROS_NEXT: tl.constexpr,
    ALIGNED: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    numel = aligned(numel, ALIGNED)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    z = tl.load(z_ptr + offsets, inside, other=0.0).to(COMPUTE)
    g = tl.load(g_ptr + offsets, inside, other=0.0).to(COMPUTE)
    v = tl.load(v_ptr + offsets, inside, other=0.0).to(COMPUTE)
    grad_z = times(phi(z, p0, p1, p2, p3, FN, K + 1), g * v, ZEROS_NEXT)
    grad_g = times(phi(z, p0, p1, p2, p3, FN, K), v, ZEROS)
    tl.store(grad_z_ptr + offsets, grad_z.to(grad_z_ptr.dtype.element_ty), inside)
    tl.store(grad_g_ptr + offsets, grad_g.to(grad_g_ptr.dtype.element_ty), inside)


def compute_dtype(dtype: torch.dtype) -> tl.dtype:
    if dtype not in FLOAT_DTYPES:
        raise RuntimeError(
            f"fastjac: tensors must be float32, float64, bfloat16 or float16, not {dtype}"
        )
    return tl.float64 if dtype == torch.float64 else tl.float32


def with_strides_of(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the strides of the dense tensor ``like``, so both have the same flat index."""
    return t if t.stride() == like.stride() else torch.empty_like(like).copy_(t)


def check_activation(fn: int, params: Sequence[float], order: int, most: int) -> None:
    if not 0 <= fn < len(KERNEL_ROWS):
        raise RuntimeError(f"fastjac: no activation with id {fn}")
    count = len(KERNEL_ROWS[fn].params)
    if len(params) != count:
        raise RuntimeError(
            f"fastjac: the activation with id {fn} has {count} parameters, got {len(params)}"
        )
    if not 0 <= order <= most:
        raise RuntimeError(f"fastjac: order must be 0 to {most}, got {order}")


def padded(params: Sequence[float]) -> tuple[float, ...]:
    """The arguments ``p0, p1, …`` of a kernel."""
    return (*params, *(0.0,) * (TRITON_PARAMS - len(params)))


def act(z: Tensor, g: Tensor | None, order: int, fn: int, params: list[float]) -> Tensor:
    check_activation(fn, params, order, MAX_ORDER)
    check_like(g, z, "g")
    out = torch.empty_like(z)
    if out.numel() == 0:
        return out
    z_dense = with_strides_of(z, out)
    g_dense = z_dense if g is None else with_strides_of(g, out)
    numel = z.numel()
    act_kernel[(-(-numel // BLOCK),)](
        z_dense, g_dense, out, numel, *padded(params), fn, order,
        ZEROS=ZEROS[fn][order], HAS_G=g is not None, ALIGNED=numel % 16 == 0,
        COMPUTE=compute_dtype(z.dtype), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out


def act_backward(
    z: Tensor, g: Tensor, v: Tensor, order: int, fn: int, params: list[float]
) -> tuple[Tensor, Tensor]:
    check_activation(fn, params, order, MAX_ORDER - 1)
    check_like(g, z, "g")
    check_like(v, z, "v")
    grad_z, grad_g = torch.empty_like(z), torch.empty_like(z)
    if grad_z.numel() == 0:
        return grad_z, grad_g
    dense = [with_strides_of(t, grad_z) for t in (z, g, v)]
    numel = z.numel()
    act_backward_kernel[(-(-numel // BLOCK),)](
        *dense, grad_z, grad_g, numel, *padded(params), fn, order,
        ZEROS=ZEROS[fn][order], ZEROS_NEXT=ZEROS[fn][order + 1], ALIGNED=numel % 16 == 0,
        COMPUTE=compute_dtype(z.dtype), BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return grad_z, grad_g
