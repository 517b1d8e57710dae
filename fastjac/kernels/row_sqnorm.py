"""Triton kernels of `fastjac.ops.row_sqnorm` and its backward: one launch for all weights.

A launch cannot take a list of tensors. The kernel reads addresses and sizes from a table in device
memory, where each program searches for its weight.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastjac.kernels.act import compute_dtype
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.ops.row_sqnorm import rows_in_memory

# The bytes of a weight that a program reads at once, and warps: two 16-byte accesses per thread.
# Four accesses needed up to 242 of 255 registers.
TILE_BYTES, WARPS = 4096, 4
# A tile is 64 elements wide for rows of at most 64 elements, and 512 wide for rows of at most 1024.
# It contains one row if rows are longer.
SHORT, MEDIUM, LONGEST_MEDIUM = tl.constexpr(64), tl.constexpr(512), tl.constexpr(1024)
# The largest number of consecutive float32 additions; their sums are added in float64.
LONGEST_RUN = tl.constexpr(64)

_STORAGE = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def pass_over_rows(
    w_address, grad_address, first, rows, columns, per_row_ptr,
    BACKWARD: tl.constexpr, ADD: tl.constexpr, STORAGE: tl.constexpr, COMPUTE: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    w_ptr = w_address.to(tl.pointer_type(STORAGE))
    grad_ptr = grad_address.to(tl.pointer_type(STORAGE))
    if ALIGNED:
        # Without these hints the compiler reads single elements. `multiple_of(columns, 16)` would
        # also apply to the branches that are not aligned.
        w_ptr, grad_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(grad_ptr, 16)
        columns = columns // 16 * 16
    row = first + tl.arange(0, ROWS)
    inside_row = row < rows
    w_ptr += (row * columns)[:, None]
    grad_ptr += (row * columns)[:, None]
    column = tl.arange(0, COLS)[None, :]
    if BACKWARD:
        c = 2 * tl.load(per_row_ptr + row, inside_row, other=0.0)[:, None]
        for start in range(0, columns, COLS):
            inside = inside_row[:, None] & (start + column < columns)
            grad = c * tl.load(w_ptr + start + column, inside, other=0.0).to(COMPUTE)
            if ADD:
                grad += tl.load(grad_ptr + start + column, inside, other=0.0).to(COMPUTE)
            tl.store(grad_ptr + start + column, grad.to(STORAGE), inside)
    else:
        total = tl.zeros([ROWS], tl.float64)
        for run in range(0, columns, LONGEST_RUN * COLS):
            squares = tl.zeros([ROWS, COLS], COMPUTE)
            for start in range(run, tl.minimum(run + LONGEST_RUN * COLS, columns), COLS):
                inside = inside_row[:, None] & (start + column < columns)
                w = tl.load(w_ptr + start + column, inside, other=0.0).to(COMPUTE)
                squares += w * w
            total += tl.sum(squares, 1).to(tl.float64)
        tl.store(per_row_ptr + row, total.to(COMPUTE), inside_row)


@triton.jit
def row_sqnorm_kernel(
    table_ptr, count, per_row_ptr,
    BACKWARD: tl.constexpr, ADD: tl.constexpr, STORAGE: tl.constexpr, COMPUTE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    # Find the last weight whose first program is not after this one.
    program = tl.program_id(0)
    low = tl.zeros([], tl.int32)
    high = low + count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(table_ptr + middle) <= program:
            low = middle
        else:
            high = middle
    entry = table_ptr + low
    block = program - tl.load(entry)
    flat = tl.load(entry + count)
    rows, columns = tl.load(entry + 2 * count), tl.load(entry + 3 * count)
    aligned = tl.load(entry + 4 * count) != 0
    w, grad = tl.load(entry + 5 * count), tl.load(entry + 6 * count)
    if columns <= SHORT:
        pass_over_rows(
            w, grad, block * (TILE // SHORT), rows, columns, per_row_ptr + flat,
            BACKWARD, ADD, STORAGE, COMPUTE, False, TILE // SHORT, SHORT,
        )  # fmt: skip
    elif columns <= LONGEST_MEDIUM:
        if aligned:
            pass_over_rows(
                w, grad, block * (TILE // MEDIUM), rows, columns, per_row_ptr + flat,
                BACKWARD, ADD, STORAGE, COMPUTE, True, TILE // MEDIUM, MEDIUM,
            )  # fmt: skip
        else:
            pass_over_rows(
                w, grad, block * (TILE // MEDIUM), rows, columns, per_row_ptr + flat,
                BACKWARD, ADD, STORAGE, COMPUTE, False, TILE // MEDIUM, MEDIUM,
            )  # fmt: skip
    elif aligned:
        pass_over_rows(
            w, grad, block, rows, columns, per_row_ptr + flat,
            BACKWARD, ADD, STORAGE, COMPUTE, True, 1, TILE,
        )  # fmt: skip
    else:
        pass_over_rows(
            w, grad, block, rows, columns, per_row_ptr + flat,
            BACKWARD, ADD, STORAGE, COMPUTE, False, 1, TILE,
        )  # fmt: skip


def rows_of_a_program(columns: int, tile: int) -> int:
    width = SHORT if columns <= SHORT else MEDIUM if columns <= LONGEST_MEDIUM else tile
    return tile // int(width)


@functools.lru_cache(maxsize=256)
def _copied(values: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    # It is not necessary to wait for the copy, because the launch is on the same stream.
    host = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def _filled(values: tuple[int, ...], device: torch.device) -> Tensor:
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(values))
    return table


def _table(values: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return _copied(values, device, 0)
    if torch.cuda.is_current_stream_capturing():
        # A copy would need host memory that lives as long as the graph, and the cache may drop the
        # table. Here the numbers become arguments of kernels in the graph.
        return _filled(values, device)
    return _copied(values, device, torch.cuda.current_stream(device).cuda_stream)


def _launch(
    grads: list[Tensor] | None, weights: list[Tensor], per_row: Tensor, add: bool = False
) -> None:
    tile = TILE_BYTES // weights[0].element_size()
    entries = []
    programs = flat = 0
    for w, grad in zip(weights, weights if grads is None else grads, strict=True):
        rows, columns = w.shape[0], math.prod(w.shape[1:])
        if rows:
            aligned = (w.data_ptr() | grad.data_ptr() | columns) % 16 == 0
            entries.append(
                (programs, flat, rows, columns, int(aligned), w.data_ptr(), grad.data_ptr())
            )
            programs += triton.cdiv(rows, rows_of_a_program(columns, tile))
            flat += rows
    if not entries:
        return
    with torch.cuda.device_of(per_row):
        values = tuple(itertools.chain.from_iterable(zip(*entries, strict=True)))
        row_sqnorm_kernel[(programs,)](
            _table(values, per_row.device), len(entries), per_row,
            BACKWARD=grads is not None, ADD=add, STORAGE=_STORAGE[weights[0].dtype],
            COMPUTE=compute_dtype(weights[0].dtype), TILE=tile, num_warps=WARPS,
        )  # fmt: skip


def _check(weights: list[Tensor]) -> None:
    if not weights:
        raise RuntimeError("fastjac: row_sqnorm needs at least one weight")
    first = weights[0]
    compute_dtype(first.dtype)  # raises
    for w in weights:
        if w.dim() == 0:
            raise RuntimeError("fastjac: a weight must have at least 1 dimension")
        if w.dtype != first.dtype or w.device != first.device:
            raise RuntimeError("fastjac: all weights must have one dtype and one device")


def row_sqnorm(weights: list[Tensor]) -> Tensor:
    _check(weights)
    dense = [w if rows_in_memory(w) else w.contiguous() for w in weights]
    rows = sum(w.shape[0] for w in weights)
    dtype = accumulate_dtype(weights[0].dtype)
    out = torch.empty(rows, dtype=dtype, device=weights[0].device)
    _launch(None, dense, out)
    return out


def row_sqnorm_backward(grads: list[Tensor], weights: list[Tensor], c: Tensor, add: bool) -> None:
    _check(weights)
    if len(grads) != len(weights):
        raise RuntimeError("fastjac: one gradient per weight is needed")
    wanted = (
        (sum(w.shape[0] for w in weights),),
        accumulate_dtype(weights[0].dtype),
        weights[0].device,
    )
    if (c.shape, c.dtype, c.device) != wanted:
        raise RuntimeError(f"fastjac: c must have the shape, dtype and device {wanted}")
    for i, (grad, w) in enumerate(zip(grads, weights, strict=True)):
        if (grad.shape, grad.dtype, grad.device) != (w.shape, w.dtype, w.device):
            raise RuntimeError(f"fastjac: gradient {i} must have the shape, dtype and device of w")
        differ = any(
            size > 1 and a != b
            for size, a, b in zip(w.shape, w.stride(), grad.stride(), strict=True)
        )
        if w.numel() and (differ or not rows_in_memory(w)):
            raise RuntimeError(
                f"fastjac: weight {i} and its gradient must have rows that are blocks of memory,"
                " and the same strides"
            )
    _launch(grads, weights, c.contiguous(), add)
