"""``row_sqnorm``: ``r_i = ‖W[i, …]‖²`` of the rows of many weights, in one launch.

The gradient is ``∂W[i, …] = 2 c_i W[i, …]`` for a cotangent ``c``. The raw op of the backward
writes it, or adds it to gradients that are there already (`add_to`), again in one launch for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastjac.ops.act_stats import recorded, spread, transformed
from fastjac.ops.autograd import Function
from fastjac.ops.dispatch import Example, Op, accumulate_dtype
from fastjac.ops.registration import raw, register, suffix_of
from fastjac.torch_private import below_autograd


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


_OP = Op("row_sqnorm", _examples)


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
        TypeError: a tensor in place of a list, no floating-point tensors, or different dtypes.
        ValueError: no weight, a scalar, or different devices.
        RuntimeError: a named impl cannot run the call.

    Example:

        >>> w = torch.randn(8, 3)
        >>> (r,) = fastjac.row_sqnorm([w])
        >>> torch.allclose(r, w.square().sum(1))
        True
    """
    if isinstance(weights, Tensor):  # a list of it would be its rows
        raise TypeError("weights is a tensor; pass a list of weights, [weight] for one")
    if not isinstance(weights, Iterable):
        raise TypeError(f"weights is {type(weights).__name__}; pass a list of weights")
    weights = list(weights)
    _check(weights)
    chosen = _OP.select(impl, weights[0].device, weights[0].dtype)
    if chosen == "reference":
        return [composed_rows(w) for w in weights]
    flat = _in_graph(suffix_of(chosen), False, *[with_rows_in_memory(w) for w in weights])
    return list(flat.split([w.shape[0] for w in weights]))


def tapped(weights: Sequence[Tensor], suffix: str) -> tuple[list[Tensor], list[Tensor]]:
    """The norms of the rows of each weight, and an alias of it to compute with in its place.

    The gradient of an alias arrives when its layer is done, and one launch at the end adds
    ``2 c W`` to all of them in place. So an alias's gradient must belong to nobody else: use it in
    `fastjac.layerwise.layer_act.layer_act` alone, whose backward makes it.
    """
    out = _in_graph(suffix, True, *weights)
    return list(out[: len(weights)]), list(out[len(weights) :])


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


def composed_rows(w: Tensor) -> Tensor:
    squares = w.to(accumulate_dtype(w.dtype)).square()
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
        if not tap:
            return flat
        return (*flat.split([w.shape[0] for w in weights]), *(w.detach() for w in weights))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.suffix, ctx.tap, *weights = inputs
        ctx.save_for_backward(*weights)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        weights = ctx.saved_tensors
        n = len(weights)
        if ctx.tap:
            parts, grads = list(cotangents[:n]), list(cotangents[n:])
        else:
            flat, grads = cotangents[0], [None] * n
            sizes = [w.shape[0] for w in weights]
            parts = [None] * n if flat is None else list(flat.split(sizes))
        if recorded(*parts, *grads):
            return None, None, *map(plus_rows, grads, parts, weights)
        # In place where a layer's backward has just made the gradient; else into new memory.
        out = list(grads)
        for add in (True, False):
            which = [i for i in range(n) if parts[i] is not None and (grads[i] is not None) is add]
            odd = [i for i in which if add and not alike(grads[i], weights[i])]
            which = [i for i in which if i not in odd]
            if which:
                for i in which:
                    out[i] = grads[i] if add else torch.empty_like(weights[i])
                c = torch.cat([parts[i] for i in which])
                chosen = [out[i] for i in which], [weights[i] for i in which]
                add_to(*chosen, c, ctx.suffix, add=add)
            for i in odd:
                out[i] = plus_rows(grads[i], parts[i], weights[i])
        return None, None, *out


def rows_of_one(v: Tensor) -> Tensor:
    """``‖v_n‖²`` of a contiguous tensor, outside any graph."""
    chosen = _OP.select("auto", v.device, v.dtype)
    if chosen == "reference":
        return composed_rows(v)
    with below_autograd():
        return raw("row_sqnorm" + suffix_of(chosen))([v])


def gradient_of_one(v: Tensor, c: Tensor) -> Tensor:
    """``2 c_n v_n`` of a contiguous tensor, outside any graph; c in the accumulation dtype."""
    chosen = _OP.select("auto", v.device, v.dtype)
    if chosen == "reference":
        return (2 * spread(c, v, 0) * v).to(v.dtype)
    out = torch.empty_like(v)
    with below_autograd():
        add_to([out], [v], c.contiguous(), suffix_of(chosen), add=False)
    return out


def plus_rows(grad: Tensor | None, c: Tensor | None, weight: Tensor) -> Tensor | None:
    """``grad + 2 c W`` in differentiable operations."""
    if c is None:
        return grad
    term = (2 * spread(c, weight, 0) * weight).to(weight.dtype)
    return term if grad is None else grad + term


def alike(grad: Tensor, weight: Tensor) -> bool:
    return grad.dtype == weight.dtype and grad.stride() == weight.stride()


@torch.compiler.allow_in_graph
def _in_graph(suffix, tap, *weights):
    if transformed():
        rows = [composed_rows(w) for w in weights]
        return (*rows, *weights) if tap else torch.cat(rows)
    return _RowSqnorm.apply(suffix, tap, *weights)


# ---- the raw ops


def _fake(weights):
    rows = sum(w.shape[0] for w in weights)
    return weights[0].new_empty(rows, dtype=accumulate_dtype(weights[0].dtype))


register(
    "row_sqnorm(Tensor[] weights) -> Tensor",
    derivative=lambda weights, suffix: _RowSqnorm.apply(suffix, False, *weights),
    fake=_fake,
    triton="row_sqnorm",
)
register(
    "row_sqnorm_backward(Tensor(a!)[] grads, Tensor[] weights, Tensor c, bool add) -> ()",
    derivative="call fastjac.row_sqnorm",
    fake=lambda grads, weights, c, add: None,
    triton="row_sqnorm",
)
