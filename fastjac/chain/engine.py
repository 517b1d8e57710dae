"""The chain engine: one autograd Function for the model and its input-Jacobian penalty.

The model runs once and is recorded (`tape`). A penalty's values ``R_n = R(g, v)``, ``v = Jᵀ w(g)``
are computed from the output ``g`` and the VJPs ``v`` as leaves, so any penalty in torch operations
on them will do. The backward takes ``∂R/∂v`` up through the chain (the JVP), goes through w to the
output if w depends on it, and down once with the gradients of loss and penalty joined.

Not differentiable a third time: raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastjac.chain.links import Link, Unsupported
from fastjac.chain.tape import record, why_not


class Chain:
    """A recorded run of a model on x."""

    def __init__(self, model: Callable[..., Any], x: Tensor) -> None:
        reason = why_not(model, x)
        if reason is not None:
            raise Unsupported(reason)
        self.x = x
        self.tape, output = record(model, x)
        self.end = output.place
        self.output = output.plain.detach().requires_grad_()  # a leaf, for R and w
        self.ancestors = self._ancestors()
        self.pieces: list[tuple[Tensor, Tensor]] = []  # (w, v), leaves v

    def _ancestors(self) -> list[Link]:
        """The links that the output depends on, in their order."""
        wanted, found = {self.end}, []
        for link in reversed(self.tape.links):
            if link.output in wanted:
                wanted.update(link.inputs)
                found.append(link)
        if 0 not in wanted:
            raise Unsupported("the output of the model does not depend on x")
        return found[::-1]

    # ---- what penalties call

    def vjp(self, w: Tensor, chunk_size: int | None) -> Iterator[Tensor]:
        """``v = Jᵀ w_k``, ``[k, *x.shape]``, in pieces, as leaves of a graph of their own."""
        for piece in w.split(chunk_size or len(w)):
            v = self._pull(piece.detach())
            v = v.view(len(piece), *self.x.shape).requires_grad_()
            self.pieces.append((piece, v))
            yield v

    def values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``(output, R)`` in the graph of x and the parameters."""
        leaves = {id(self.output), *(id(v) for _, v in self.pieces)}
        for t in (values, *(w for w, _ in self.pieces)):
            check_leaves(t, leaves)
        return _Chain.apply(self, values, self.x, *self.tape.parameters)

    # ---- the sweeps

    def _pull(self, w: Tensor) -> Tensor:
        deltas: dict[int, Tensor] = {self.end: w.reshape(-1, *w.shape[2:])}
        for link in reversed(self.ancestors):
            delta = deltas.pop(link.output, None)
            if delta is None:
                link.idle = True
                continue
            link.idle = False
            for i, d in zip(link.inputs, link.vjp(delta), strict=True):
                if d is not None:
                    deltas[i] = d if i not in deltas else deltas[i] + d
        if 0 not in deltas:
            raise Unsupported("the output of the model does not depend on x")
        return deltas[0]

    def _push(self, u: Tensor, keep: bool, wanted: bool) -> Tensor | None:
        tangents: dict[int, Tensor | None] = {0: u}
        for link in self.ancestors:
            incoming = [tangents.get(i) for i in link.inputs]
            if link.idle or all(t is None for t in incoming):
                continue
            tangents[link.output] = link.jvp(incoming, keep, wanted or link.output != self.end)
        return tangents.get(self.end)

    def backward(self, grad: Tensor | None, grad_values: Tensor | None, values: Any, keep: bool):
        self.tape.check_versions()
        if grad_values is not None and self.pieces:
            grad = self._penalty(grad, grad_values, values, keep)
        return self._down(grad, keep)

    def _penalty(self, grad: Tensor | None, grad_values: Tensor, values: Any, keep: bool):
        leaves = [v for _, v in self.pieces]
        *cotangents, direct = torch.autograd.grad(
            values, [*leaves, self.output], grad_values, retain_graph=True, allow_unused=True
        )
        grad = _sum(grad, direct)
        for (w, _), u in zip(self.pieces, cotangents, strict=True):
            if u is None:
                continue
            if len(self.pieces) > 1:  # the links hold the state of one piece
                self._pull(w.detach())
            t = self._push(u.reshape(-1, *u.shape[2:]), keep, w.requires_grad)
            if w.requires_grad and t is not None:
                (through,) = torch.autograd.grad(
                    w, self.output, t.view(w.shape), retain_graph=True, allow_unused=True
                )
                grad = _sum(grad, through)
        return grad

    def _down(self, grad: Tensor | None, keep: bool) -> list[Tensor | None]:
        tape = self.tape
        grads: dict[int, Tensor] = {} if grad is None else {self.end: grad}
        found: list[Tensor | None] = [None] * (1 + len(tape.parameters))
        for link in reversed(self.ancestors):
            wanted = tuple(tape.differentiable[i] for i in link.inputs)
            into, of_parameters = link.backward(grads.pop(link.output, None), wanted, keep)
            for i, g, want in zip(link.inputs, into, wanted, strict=True):
                if want and g is not None:
                    grads[i] = g if i not in grads else grads[i] + g
            for p, g in zip(link.parameters, of_parameters, strict=True):
                place = 1 + tape.numbers[id(p)]
                found[place] = _sum(found[place], g)
        found[0] = grads.get(0)
        return found


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def check_leaves(t: Tensor, known: set[int]) -> None:
    """Raise if t depends on any other leaf, whose gradient would be lost."""
    seen, left = set(), [t.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise Unsupported(
                f"the penalty depends on a tensor of shape {tuple(leaf.shape)} that requires grad, "
                "beside the output of the model"
            )
        left += [following for following, _ in node.next_functions]


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
