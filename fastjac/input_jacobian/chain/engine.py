"""The chain engine: one autograd Function for the model and its input-Jacobian penalty.

The model runs once and is recorded (`tape`). A penalty's values ``R_n = R(g, v)``, ``v = Jᵀ w(g)``
are computed from the output ``g`` and the VJPs ``v`` as leaves, so any penalty in torch operations
on them will do. The backward takes ``∂R/∂v`` up through the chain (the JVP), goes through w to the
output if w depends on it, and down once with the gradients of loss and penalty joined.

Not differentiable a third time: raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjac.input_jacobian.chain.links import Link, Unsupported, check_leaves, plus
from fastjac.input_jacobian.chain.mlp import Mlp
from fastjac.input_jacobian.chain.tape import record
from fastjac.ops.row_sqnorm import gradient_of_one, rows_of_one


class Recorded:
    """The sweeps of a recorded run, link by link."""

    def __init__(self, model: Callable[..., Any], x: Tensor) -> None:
        self.tape, output = record(model, x)
        self.end, self.output = output.place, output.plain
        self.parameters, self.versions = self.tape.parameters, self.tape.versions
        wanted, found = {self.end}, []
        for link in reversed(self.tape.links):
            if link.output in wanted:
                wanted.update(link.inputs)
                found.append(link)
        if 0 not in wanted:
            raise Unsupported("the output of the model does not depend on x")
        self.links: list[Link] = found[::-1]  # those that the output depends on
        if self.output.numel() > 0 and any(link.empty for link in self.links):
            raise Unsupported("an operation returns no numbers")
        self.tape.values.clear()  # the links hold what they need of them

    def pull(self, w: Tensor) -> Tensor:
        """``Jᵀ w`` for w ``[K N, ...]``."""
        deltas: dict[int, Tensor] = {self.end: w}
        for link in reversed(self.links):
            delta = deltas.pop(link.output, None)
            link.idle = delta is None
            if delta is None:
                continue
            for i, d in zip(link.inputs, link.vjp(delta), strict=True):
                if d is not None:
                    deltas[i] = d if i not in deltas else deltas[i] + d
        if 0 not in deltas:
            raise Unsupported("the output of the model does not depend on x")
        return deltas[0]

    def norms(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``v = Jᵀ w`` and ``‖v‖²`` of each row."""
        v = self.pull(w).contiguous()
        return v, rows_of_one(v)

    def push(
        self, u: Tensor, keep: bool, wanted: bool, factor: Tensor | None = None
    ) -> Tensor | None:
        """``J u``, if it is wanted; the links keep what `down` needs.

        With ``factor``, one number a row, of ``2 factor u``, the gradient of squared norms.
        """
        if factor is not None:
            u = gradient_of_one(u, factor)
        tangents: dict[int, Tensor | None] = {0: u}
        for link in self.links:
            incoming = [tangents.get(i) for i in link.inputs]
            if link.idle or all(t is None for t in incoming):
                continue
            tangents[link.output] = link.jvp(incoming, keep, wanted or link.output != self.end)
        return tangents.get(self.end)

    def down(self, grad: Tensor | None, keep: bool) -> list[Tensor | None]:
        """Gradients of x and the parameters."""
        tape = self.tape
        grads: dict[int, Tensor] = {} if grad is None else {self.end: grad}
        found: list[Tensor | None] = [None] * (1 + len(tape.parameters))
        for link in reversed(self.links):
            wanted = tuple(tape.differentiable[i] for i in link.inputs)
            into, of_parameters = link.backward(grads.pop(link.output, None), wanted, keep)
            for i, g, want in zip(link.inputs, into, wanted, strict=True):
                if want and g is not None:
                    grads[i] = g if i not in grads else grads[i] + g
            for p, g in zip(link.parameters, of_parameters, strict=True):
                place = 1 + tape.numbers[id(p)]
                found[place] = plus(found[place], g)
        found[0] = grads.get(0)
        return found

    def describe(self) -> list[str]:
        return [link.describe() for link in self.links]


class Piece(NamedTuple):
    """Cotangents that went down together."""

    w: Tensor
    v: Tensor  # Jᵀ w; [K N, ...] with norms
    leaf: Tensor  # of the graph of R: v, or its squared norms
    scale: float = 1.0  # of the norms


class Chain:
    """A run of a model on x, and the VJPs that a penalty takes of it.

    Raises `Unsupported` where the model is no chain. ``single``: the penalty takes all its
    cotangents in one pass.
    """

    def __init__(self, model: Callable[..., Any], x: Tensor, single: bool = False) -> None:
        self.x = x
        self.run: Any = (Mlp.of(model, x) if single else None) or Recorded(model, x)
        self.output = self.run.output.detach().requires_grad_()  # a leaf, for R and w
        self.pieces: list[Piece] = []

    # ---- what penalties call

    def vjp(self, w: Tensor, chunk_size: int | None) -> Iterator[Tensor]:
        """``v = Jᵀ w_k``, ``[k, *x.shape]``, in pieces, as leaves of a graph of their own."""
        for w_piece in pieces_of(w, chunk_size):
            v = self.run.pull(_rows(w_piece)).view(len(w_piece), *self.x.shape).requires_grad_()
            self.pieces.append(Piece(w_piece, v, v))
            yield v

    def squared_norms(self, w: Tensor, chunk_size: int | None, scale: float) -> Tensor:
        """``scale Σ_k ‖Jᵀ w_kn‖²``, ``[N]``: as from `vjp`, its derivative written out too."""
        found = []
        for w_piece in pieces_of(w, chunk_size):
            v, norms = self.run.norms(_rows(w_piece))
            if len(w_piece) > 1:
                norms = norms.view(len(w_piece), -1).sum(0)
            norms = (norms if scale == 1 else scale * norms).requires_grad_()
            self.pieces.append(Piece(w_piece, v, norms, scale))
            found.append(norms)
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``(output, R)`` in the graph of x and the parameters."""
        if len(self.pieces) > 1 and type(self.run) is Mlp:
            raise Unsupported("the penalty takes its cotangents in several passes")
        leaves = {id(self.output), *(id(piece.leaf) for piece in self.pieces)}
        for t in (values, *(piece.w for piece in self.pieces)):
            if t.requires_grad and id(t) not in leaves:
                check_leaves(t, leaves, "the penalty depends, beside the output of the model, on")
        return _Chain.apply(self, values, self.x, *self.run.parameters)

    # ---- the backward

    def backward(
        self, grad: Tensor | None, grad_values: Tensor | None, values: Tensor, keep: bool
    ) -> list[Tensor | None]:
        for t, version in self.run.versions:
            if t._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(t.shape)} that the model was computed with was "
                    "modified in place before the backward: call backward() before "
                    "optimizer.step(), or use the out-of-place operation"
                )
        if grad_values is not None and self.pieces:
            grad = self._penalty(grad, grad_values, values, keep)
        return self.run.down(grad, keep)

    def _penalty(
        self, grad: Tensor | None, grad_values: Tensor, values: Tensor, keep: bool
    ) -> Tensor | None:
        """Up through the chain; returns the gradient of the output, the penalty's part joined."""
        leaves = [piece.leaf for piece in self.pieces]
        if len(leaves) == 1 and values is leaves[0]:
            cotangents: Any = [grad_values]
        else:
            *cotangents, direct = torch.autograd.grad(
                values, [*leaves, self.output], grad_values, retain_graph=True, allow_unused=True
            )
            grad = plus(grad, direct)
        for piece, c in zip(self.pieces, cotangents, strict=True):
            if c is None:
                continue
            w, factor = piece.w, None
            if piece.leaf is piece.v:
                u = _rows(c)
            else:  # of the norms
                u, factor = piece.v, c if piece.scale == 1 else piece.scale * c
                factor = factor if len(w) == 1 else factor.repeat(len(w))
            if len(self.pieces) > 1:  # the run holds the state of one piece
                self.run.pull(_rows(w))
            t = self.run.push(u, keep, w.requires_grad, factor)
            if t is not None and w.requires_grad:
                (through,) = torch.autograd.grad(
                    w, self.output, t.view(w.shape), retain_graph=True, allow_unused=True
                )
                grad = plus(grad, through)
        return grad


def pieces_of(w: Tensor, chunk_size: int | None) -> tuple[Tensor, ...]:
    return (w,) if chunk_size is None or chunk_size >= len(w) else w.split(chunk_size)


def _rows(t: Tensor) -> Tensor:
    """``[K N, ...]`` of ``[K, N, ...]``, without its graph."""
    t = t.detach()
    return t[0] if len(t) == 1 else t.flatten(0, 1)


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain, values, x, *parameters):
        ctx.chain, ctx.values = chain, values
        ctx.set_materialize_grads(False)
        return chain.output.detach().clone(), values.detach()

    @staticmethod
    def backward(ctx, grad, grad_values):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chain engine is differentiable once: the gradient of a penalty was asked for "
                'with create_graph=True (a third derivative of the model); use engine="autograd"'
            )
        if ctx.chain is None:
            raise RuntimeError(
                "backward through the penalty a second time: its tensors have been freed; pass "
                "retain_graph=True the first time"
            )
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        chain = ctx.chain
        found = chain.backward(grad, grad_values, ctx.values, keep)
        if not keep:
            ctx.chain = ctx.values = None
        return None, None, *found
