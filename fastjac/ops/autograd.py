"""What every op's ``autograd.Function`` shares: two places where torch's ``apply`` falls short.

And the walk over the graph that calls leave behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastjac.torch_private import (
    add_batch_dim,
    enter_legacy_vmap,
    is_legacy_batched,
    leave_legacy_vmap,
    remove_batch_dim,
    transforms_active,
    unwrap_if_dead,
)


class Function(torch.autograd.Function):
    """``torch.autograd.Function`` that is cheap to call and exact under batched cotangents.

    Cost: a Function with ``setup_context`` has its signature re-inspected by torch at every call,
    26 µs in all against 8. Our Functions take positional arguments only, so that binding does
    nothing; with no ``torch.func`` transform active, `apply` goes straight to the C++ base, as
    torch's own does after the binding.

    Exactness: ``autograd.grad(..., is_grads_batched=True, create_graph=True)`` and
    ``autograd.functional.jacobian(vectorize=True)`` run backward under torch's older vmap, which
    hands a Function wrapped tensors and then drops the graph that it records: the second-order
    term is lost with no error (seen on torch 2.13). `apply` unwraps them and maps over the batch
    with ``torch.func.vmap`` instead.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if transforms_active():
            return super().apply(*args)
        live = []
        for a in args:
            if isinstance(a, Tensor):
                if is_legacy_batched(a):
                    return cls._apply_batched(*args)
                a = unwrap_if_dead(a)  # left over from a torch.func transform that has ended
            live.append(a)
        return super(torch.autograd.Function, cls).apply(*live)  # type: ignore[misc]

    @classmethod
    def _apply_batched(cls, *args: Any) -> Any:
        level = enter_legacy_vmap() - 1
        leave_legacy_vmap()
        batched = [isinstance(a, Tensor) and is_legacy_batched(a) for a in args]
        values = [
            remove_batch_dim(a, level, 0, 0) if b else a for a, b in zip(args, batched, strict=True)
        ]
        mapped = [value for value, b in zip(values, batched, strict=True) if b]

        def call(*slices: Tensor) -> Any:
            left = iter(slices)
            return cls.apply(
                *(next(left) if b else v for v, b in zip(values, batched, strict=True))
            )

        out = torch.func.vmap(call)(*mapped)
        if isinstance(out, tuple):
            return tuple(add_batch_dim(o, 0, level) for o in out)
        return add_batch_dim(out, 0, level)


def graph_nodes(t: Tensor, *without: Any) -> Iterator[Any]:
    """All nodes of the autograd graph of ``t``, each once; lazily, so callers may stop early.

    Nothing of, and beyond, the nodes ``without``.
    """
    seen, left = set(without), [t.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        left += [following for following, _ in node.next_functions]


class Multiply(Function):
    """a · b for ``jvp`` rules. Torch runs such a rule with forward mode off for plain operations,
    which then lose the tangent of an outer ``jvp`` with no error; Functions keep it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, v):
        a, b = ctx.saved_tensors
        return v * b, v * a

    @staticmethod
    def jvp(ctx, a_t, b_t):
        a, b = ctx.saved_tensors
        terms = []
        if a_t is not None:
            terms.append(Multiply.apply(a_t, b))
        if b_t is not None:
            terms.append(Multiply.apply(a, b_t))
        return terms[0] if len(terms) == 1 else Add.apply(*terms)


class Add(Function):
    """a + b for ``jvp`` rules, as `Multiply`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a + b

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, v):
        return v, v

    @staticmethod
    def jvp(ctx, a_t, b_t):
        if a_t is None or b_t is None:
            (only,) = (t for t in (a_t, b_t) if t is not None)
            return Multiply.apply(only, torch.ones_like(only))
        return Add.apply(a_t, b_t)
