"""``row_sqnorm``: ``r_i = ‖W[i, …]‖²`` of the rows of many weights, in one launch.

The gradient is ``∂W[i, …] = 2 c_i W[i, …]`` for a cotangent ``c``. The raw op of the backward
writes it, or adds it to gradients that are there already (`add_to`), again in one launch for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.library import register_fake

from fastjac.dispatch import Example, Op
from fastjac.ops._autograd import Function, below_autograd
from fastjac.ops._library import (
    LIBRARY,
    SUFFIXES,
    define,
    raw,
    refuse_transforms,
    register_not_differentiable,
    register_triton,
    suffix_of,
)
from fastjac.ops.act_stats import recorded, spread, statistic_dtype, transformed

for _suffix in SUFFIXES:
    define(f"row_sqnorm{_suffix}(Tensor[] weights) -> Tensor")
    define(
        f"row_sqnorm_backward{_suffix}(Tensor(a!)[] grads, Tensor[] weights, Tensor c, bool add)"
        " -> ()"
    )


def _examples() -> Iterator[Example]:
    """Weights of Linear and convolution layers together, with their gradients."""
    shapes = ((5, 7), (3, 4, 3, 2), (1, 600), (33, 1))

    def call(inputs: dict[str, Tensor], impl: str) -> dict[str, Tensor]:
        flat, weights = inputs["w"], []
        for shape in shapes:
            size = torch.Size(shape).numel()
            weights.append(flat[:size].reshape(shape).detach().requires_grad_())
            flat = flat[size:]
        rows = torch.cat(row_sqnorm(weights, impl=impl))
        c = torch.cos(torch.arange(len(rows), device=rows.device)).to(rows)
        grads = torch.autograd.grad(rows, weights, c)
        return {"r": rows.detach()} | {f"grad {s}": g for s, g in zip(shapes, grads, strict=True)}

    w = torch.sin(torch.arange(35 + 72 + 600 + 33, dtype=torch.float64))
    yield Example("four weights", {"w": w}, call)


_OP = Op("row_sqnorm", ("cuda", "triton", "cpu", "reference"), _examples)


def row_sqnorm(weights: Sequence[Tensor], *, impl: str = "auto") -> list[Tensor]:
    """Squared norm of each row, ``r_i = Σ W[i, …]²``, of every weight.

    Args:
        weights: tensors ``[C, …]`` of one dtype and device: float32, float64, bfloat16 or float16.
            Rows that are no blocks of memory are copied (contiguous and channels_last are).
        impl: as in `fastjac.act`.

    Returns:
        A list of ``[C]``, float32 (float64 for float64 weights), accumulated in at least that.

    Gradients: reverse and forward mode, ``torch.func``, any number of times.

    Raises:
        TypeError: no floating-point tensors, or different dtypes.
        ValueError: no weight, a scalar, or different devices.
        RuntimeError: a named impl cannot run the call.
    """
    weights = list(weights)
    _check(weights)
    chosen = _OP.select(impl, weights[0].device, weights[0].dtype)
    if chosen == "reference":
        return [_composed(w) for w in weights]
    flat = _in_graph(suffix_of(chosen), False, *[with_rows_in_memory(w) for w in weights])
    return list(flat.split([w.shape[0] for w in weights]))


def tapped(weights: Sequence[Tensor], suffix: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The norms of all rows, ``[Σ C]``, and a view of each weight to compute with instead of it.

    The gradient of a view arrives when its layer is done, and one launch at the end adds ``2 c W``
    to all of them in place. So a view's gradient must belong to nobody else: use a view in
    `fastjac.ops.layer_act.layer_act` alone, whose backward makes it.
    """
    flat, *views = _in_graph(suffix, True, *weights)
    return flat, tuple(views)


def _check(weights: list[Tensor]) -> None:
    if not weights:
        raise ValueError("weights is empty; row_sqnorm needs at least one")
    first = weights[0]
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor) or not w.is_floating_point():
            what = w.dtype if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(f"weights[{i}] is {what}; it must be a floating-point tensor")
        if w.dim() == 0:
            raise ValueError(f"weights[{i}] is a scalar; it needs rows in dimension 0")
        if w.dtype != first.dtype:
            raise TypeError(f"weights[{i}] has dtype {w.dtype}, weights[0] {first.dtype}")
        if w.device != first.device:
            raise ValueError(f"weights[{i}] is on {w.device}, weights[0] on {first.device}")


def rows_in_memory(w: Tensor) -> bool:
    """Whether each row is one block of memory, and the rows follow each other."""
    if w.is_contiguous():
        return True
    orders = ((4, torch.channels_last), (5, torch.channels_last_3d))
    return any(w.dim() == dim and w.is_contiguous(memory_format=order) for dim, order in orders)


def with_rows_in_memory(w: Tensor) -> Tensor:
    return w if rows_in_memory(w) else w.contiguous()


def _composed(w: Tensor) -> Tensor:
    squares = w.to(statistic_dtype(w.dtype)).square()
    return squares.flatten(1).sum(1) if w.dim() > 1 else squares


def add_to(grads: list[Tensor], weights: list[Tensor], c: Tensor, suffix: str, add: bool) -> None:
    """``grads += 2 c W`` in place (``add=False``: ``=``), all in one launch; not differentiable.

    A gradient must have the strides of its weight; `row_sqnorm` describes those.
    """
    raw("row_sqnorm_backward" + suffix)(grads, weights, c, add)


class _RowSqnorm(Function):
    @staticmethod
    def forward(suffix, tap, *weights):
        with below_autograd():
            flat = raw("row_sqnorm" + suffix)(weights)
        return (flat, *(w.view_as(w) for w in weights)) if tap else flat

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.suffix, _, *weights = inputs
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, c, *tapped):
        weights = ctx.saved_tensors
        if c is None:
            return None, None, *(tapped or [None] * len(weights))
        grads = list(tapped) or [None] * len(weights)
        if recorded(c, *grads):
            parts = c.split([w.shape[0] for w in weights])
            terms = [
                (2 * spread(part, w, 0) * w).to(w.dtype)
                for part, w in zip(parts, weights, strict=True)
            ]
            total = [t if g is None else g + t for g, t in zip(grads, terms, strict=True)]
            return None, None, *total
        # In place where a layer's backward has just made the gradient; else into new memory.
        add = all(g is not None and _alike(g, w) for g, w in zip(grads, weights, strict=True))
        out = grads if add else [torch.empty_like(w) for w in weights]
        add_to(out, list(weights), c, ctx.suffix, add=add)
        if not add:
            for o, g in zip(out, grads, strict=True):
                if g is not None:
                    o.add_(g)
        return None, None, *out


def _alike(grad: Tensor, weight: Tensor) -> bool:
    return grad.dtype == weight.dtype and grad.stride() == weight.stride()


@torch.compiler.allow_in_graph
def _in_graph(suffix, tap, *weights):
    if transformed():
        flat = torch.cat([_composed(w) for w in weights])
        return (flat, *weights) if tap else flat
    return _RowSqnorm.apply(suffix, tap, *weights)


# ---- the raw ops: fake kernels, and an autograd key that loses no derivative


def _fake(weights):
    rows = sum(w.shape[0] for w in weights)
    return weights[0].new_empty(rows, dtype=statistic_dtype(weights[0].dtype))


def _fake_backward(grads, weights, c, add):
    return None


def _register(suffix: str) -> None:
    def through_function(weights):
        refuse_transforms("row_sqnorm" + suffix)
        return _RowSqnorm.apply(suffix, False, *weights)

    register_fake(f"fastjac::row_sqnorm{suffix}", _fake, lib=LIBRARY)
    register_fake(f"fastjac::row_sqnorm_backward{suffix}", _fake_backward, lib=LIBRARY)
    LIBRARY.impl("row_sqnorm" + suffix, through_function, "Autograd")
    register_not_differentiable("row_sqnorm_backward" + suffix, "call fastjac.row_sqnorm")


for _suffix in SUFFIXES:
    _register(_suffix)
register_triton("row_sqnorm", "row_sqnorm", "row_sqnorm_backward")
