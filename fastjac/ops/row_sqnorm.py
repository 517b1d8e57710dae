"""``row_sqnorm``: ``r_i = ‖W[i, …]‖²`` of the rows of many weights, in one launch.

The gradient for a cotangent ``c`` is ``∂W[i, …] = 2 c_i W[i, …]``. The raw op of the backward
writes it or adds it to existing gradients (`add_to`), again in one launch for all weights.

There is no Triton kernel: a Triton launch takes no list of tensors, and a table of addresses in
device memory would have to be copied again for each tensor that a step allocates anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fastjac.ops.act_stats import spread
from fastjac.ops.autograd import Function, recorded, transformed
from fastjac.ops.dispatch import Example, Op, accumulate_dtype
from fastjac.ops.registration import impl_of, raw, register
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


_OP = Op("row_sqnorm", _examples, ("cuda", "cpu", "reference"))


def row_sqnorm(weights: Sequence[Tensor], *, impl: str = "auto") -> list[Tensor]:
    """The squared norm of each row, ``r_i = Σ W[i, …]²``, of every weight.

    Args:
        weights: tensors ``[C, …]`` of the same dtype and device: float32, float64, bfloat16 or
            float16. A weight is copied if it is neither contiguous nor channels_last.
        impl: as in `fastjac.act`, without "triton".

    Returns:
        A list of tensors ``[C]``, float32 (float64 for float64 weights) and accumulated in at least
        that.

    Gradients: reverse and forward mode, ``torch.func``, any number of times.

    Raises:
        TypeError: weights is not a list of floating-point tensors, or dtypes differ.
        ValueError: weights is empty, a weight is a scalar, or devices differ.
        RuntimeError: the impl cannot run the call.

    Example:

        >>> w = torch.randn(8, 3)
        >>> (r,) = fastjac.row_sqnorm([w])
        >>> torch.allclose(r, w.square().sum(1))
        True
    """
    if isinstance(weights, Tensor) or not isinstance(weights, Iterable):
        raise TypeError(f"weights is {type(weights).__name__}: it must be a list of tensors")
    weights = list(weights)
    _check(weights)
    chosen = _OP.select(impl, weights[0].device, weights[0].dtype)
    if chosen == "reference":
        return [composed_rows(w) for w in weights]
    dense = [w if rows_in_memory(w) else w.contiguous() for w in weights]
    flat = _in_graph(chosen, False, *dense)
    return list(flat.split([w.shape[0] for w in weights]))


def or_auto(impl: str) -> str:
    """``impl`` if this op has it, else "auto".

    For a layer-wise penalty, whose ``impl`` is that of the activations ("triton", for example).
    """
    return impl if impl in _OP.implementations else "auto"


def tapped(weights: Sequence[Tensor], impl: str) -> tuple[list[Tensor], list[Tensor]]:
    """The squared norms of the rows of each weight, and an alias of each weight.

    The layers must use the aliases in place of the weights. When the gradients of all aliases are
    there, one launch adds ``2 c W`` to them in place. Nothing else may hold these gradients, so
    use an alias only in `fastjac.layerwise.layer_act.layer_act`, whose backward allocates them.
    """
    out = _in_graph(impl, True, *weights)
    return list(out[: len(weights)]), list(out[len(weights) :])


def _check(weights: list[Tensor]) -> None:
    if not weights:
        raise ValueError("weights is empty: it must have at least one tensor")
    first = weights[0]
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor) or not w.is_floating_point():
            what = w.dtype if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(f"weights[{i}] is {what}: it must be a floating-point tensor")
        if w.dim() == 0:
            raise ValueError(f"weights[{i}] is a scalar: it must have rows in dimension 0")
        if w.dtype != first.dtype:
            raise TypeError(
                f"weights[{i}] has dtype {w.dtype} and weights[0] has {first.dtype}: all must have "
                "one dtype"
            )
        if w.device != first.device:
            raise ValueError(
                f"weights[{i}] is on {w.device} and weights[0] is on {first.device}: all must "
                "be on one device"
            )


def rows_in_memory(w: Tensor) -> bool:
    """Whether each row is one block of memory, and the rows are adjacent."""
    if w.is_contiguous():
        return True
    orders = ((4, torch.channels_last), (5, torch.channels_last_3d))
    return any(w.dim() == dim and w.is_contiguous(memory_format=order) for dim, order in orders)


def composed_rows(w: Tensor) -> Tensor:
    squares = w.to(accumulate_dtype(w.dtype)).square()
    return squares.flatten(1).sum(1) if w.dim() > 1 else squares


def rows_of(weights: Sequence[Tensor], impl: str) -> Tensor:
    """The row norms of all weights one after the other, in one launch; not differentiable."""
    if impl == "reference":
        return torch.cat([composed_rows(w) for w in weights])
    return raw("row_sqnorm")(weights)


def add_to(grads: list[Tensor], weights: list[Tensor], c: Tensor, impl: str, add: bool) -> None:
    """``grads += 2 c W`` in place (or ``=``, if not ``add``), in one launch; not differentiable.

    A gradient must have the strides of its weight, which must satisfy `rows_in_memory`.
    """
    if impl != "reference":
        raw("row_sqnorm_backward")(grads, weights, c, add)
        return
    parts = c.split([w.shape[0] for w in weights])
    for grad, w, part in zip(grads, weights, parts, strict=True):
        term = 2 * spread(part, w, 0) * w  # in the dtype of c, and rounded once
        grad.add_(term) if add else grad.copy_(term)


class _RowSqnorm(Function):
    @staticmethod
    def forward(impl, tap, *weights):
        with below_autograd():
            flat = rows_of(weights, impl)
        if not tap:
            return flat
        return (*flat.split([w.shape[0] for w in weights]), *(w.detach() for w in weights))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.impl, ctx.tap, *weights = inputs
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
        # Existing gradients are added to in place, others are written to new memory.
        out = list(grads)
        added: list[int] = []
        written: list[int] = []
        for i, (part, grad, w) in enumerate(zip(parts, grads, weights, strict=True)):
            if part is None:
                continue
            if grad is None:
                out[i] = torch.empty_like(w)
                written.append(i)
            elif alike(grad, w):
                added.append(i)
            else:
                out[i] = plus_rows(grad, part, w)
        for which, add in ((added, True), (written, False)):
            if which:
                c = torch.cat([parts[i] for i in which])
                chosen = [out[i] for i in which], [weights[i] for i in which]
                add_to(*chosen, c, ctx.impl, add=add)
        return None, None, *out


def rows_of_one(v: Tensor) -> Tensor:
    """``‖v_n‖²`` of a contiguous tensor; not differentiable."""
    chosen = _OP.select("auto", v.device, v.dtype)
    if chosen == "reference":
        return composed_rows(v)
    with below_autograd():
        return rows_of([v], chosen)


def gradient_of_one(v: Tensor, c: Tensor) -> Tensor:
    """``2 c_n v_n`` of a contiguous tensor, c in the accumulation dtype; not differentiable."""
    chosen = _OP.select("auto", v.device, v.dtype)
    if chosen == "reference":
        return (2 * spread(c, v, 0) * v).to(v.dtype)
    out = torch.empty_like(v)
    with below_autograd():
        add_to([out], [v], c.contiguous(), chosen, add=False)
    return out


def plus_rows(grad: Tensor | None, c: Tensor | None, weight: Tensor) -> Tensor | None:
    """``grad + 2 c W``, differentiable; a term that is None is left out."""
    if c is None:
        return grad
    term = (2 * spread(c, weight, 0) * weight).to(weight.dtype)
    return term if grad is None else grad + term


def alike(grad: Tensor, weight: Tensor) -> bool:
    """Whether `add_to` can add to the gradient."""
    return grad.dtype == weight.dtype and grad.stride() == weight.stride()


@torch.compiler.allow_in_graph
def _in_graph(impl, tap, *weights):
    if transformed():
        rows = [composed_rows(w) for w in weights]
        return (*rows, *weights) if tap else torch.cat(rows)
    return _RowSqnorm.apply(impl, tap, *weights)


# ---- the raw ops


def _fake(weights):
    if any(w.dim() == 0 for w in weights):
        raise RuntimeError("fastjac: a weight must have at least 1 dimension")
    rows = sum(w.shape[0] for w in weights)
    return weights[0].new_empty(rows, dtype=accumulate_dtype(weights[0].dtype))


register(
    "row_sqnorm(Tensor[] weights) -> Tensor",
    derivative=lambda weights, suffix: _RowSqnorm.apply(
        impl_of(suffix, weights[0].device.type), False, *weights
    ),
    fake=_fake,
)
register(
    "row_sqnorm_backward(Tensor(a!)[] grads, Tensor[] weights, Tensor c, bool add) -> ()",
    derivative="call fastjac.row_sqnorm",
    fake=lambda grads, weights, c, add: None,
)
