"""The chain engine: one autograd Function for the model and its input-Jacobian penalty.

The model runs once and is recorded (`tape`). A penalty's values ``R_n = R(g, v)``, ``v = Jᵀ w(g)``
are computed from the output ``g`` and the VJPs ``v`` as leaves, so any penalty in torch operations
on them will do. The backward takes ``∂R/∂v`` up through the chain (the JVP), goes through w to the
output if w depends on it, and down once with the gradients of loss and penalty joined.

Not differentiable a third time: raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjac import torch_private
from fastjac.input_jacobian.by_autograd import Composed
from fastjac.input_jacobian.chain.links import Link, Unsupported, check_leaves, plus
from fastjac.input_jacobian.chain.mlp import Mlp
from fastjac.input_jacobian.chain.tape import record
from fastjac.input_jacobian.pullback import Pullback
from fastjac.ops.row_sqnorm import gradient_of_one, rows_of_one


class Recorded:
    """The sweeps of a recorded run, link by link."""

    one_product = False  # `pull` can be called again

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

    def jvp(self, u: Tensor) -> Tensor:
        """``J u`` for u ``[K N, ...]``."""
        tangents: dict[int, Tensor | None] = {0: u}
        for link in self.links:
            incoming = [tangents.get(i) for i in link.inputs]
            if any(t is not None for t in incoming):
                tangents[link.output] = link.jvp(incoming)
        t = tangents.get(self.end)
        return self.output.new_zeros(len(u), *self.output.shape[1:]) if t is None else t

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
            tangents[link.output] = link.push(incoming, keep, wanted or link.output != self.end)
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


class Product(NamedTuple):
    """A product with the Jacobian that a penalty asked for."""

    kind: str  # "vjp", "norms" (of VJPs) or "jvp"
    of: Tensor  # the cotangents or tangents, [k, N, ...]
    v: Tensor | None  # Jᵀ w as [k N, ...], for norms
    leaf: Tensor  # the result, a leaf of the graph of R


class Chain(Pullback):
    """A recorded run of a model. Raises `Unsupported` where the model is no chain."""

    def __init__(self, model: Callable[..., Any], x: Tensor) -> None:
        self.model, self.given = model, x
        self.run: Any = Mlp.of(model, x) or Recorded(model, x)
        # Leaves, for R and for what a penalty makes its cotangents of.
        self.x = x.detach().requires_grad_(x.requires_grad)
        self.output = self.run.output.detach().requires_grad_()
        self.products: list[Product] = []

    # ---- what penalties call

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        found = []
        for part in self._parts(w, chunk_size):
            v = self.run.pull(_rows(part)).view(len(part), *self.x.shape)
            found.append(self._leaf("vjp", part, None, v))
        return found[0] if len(found) == 1 else torch.cat(found)

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        found = []
        for part in self._parts(w, chunk_size):
            v, norms = self.run.norms(_rows(part))
            if len(part) > 1:
                norms = norms.view(len(part), -1).sum(0)
            found.append(self._leaf("norms", part, v, norms))
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        found = []
        for part in self._parts(u, chunk_size):
            with torch.no_grad():
                t = self.run.jvp(_rows(part)).view(len(part), *self.output.shape)
            found.append(self._leaf("jvp", part, None, t))
        return found[0] if len(found) == 1 else torch.cat(found)

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        return Composed(self, f)

    def _parts(self, t: Tensor, chunk_size: int | None) -> tuple[Tensor, ...]:
        parts = (t,) if chunk_size is None or chunk_size >= len(t) else t.split(chunk_size)
        if self.run.one_product and len(parts) + len(self.products) > 1:
            self.run = Recorded(
                self.model, self.given
            )  # an MLP: nothing acts twice by a second run
        return parts

    def _leaf(self, kind: str, of: Tensor, v: Tensor | None, result: Tensor) -> Tensor:
        leaf = result.requires_grad_()
        self.products.append(Product(kind, of, v, leaf))
        return leaf

    def values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``(output, R)`` in the graph of x and the parameters."""
        leaves = {id(self.output), id(self.x), *(id(product.leaf) for product in self.products)}
        for t in (values, *(product.of for product in self.products)):
            if t.requires_grad and id(t) not in leaves:
                check_leaves(t, leaves, "the penalty depends, beside the output of the model, on")
        return _Chain.apply(self, values, self.given, *self.run.parameters)

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
        grad_x: Tensor | None = None
        if grad_values is not None and values.requires_grad:
            grad, grad_x = self._penalty(grad, grad_values, values, keep)
        found = self.run.down(grad, keep)
        found[0] = plus(found[0], grad_x)
        return found

    def _penalty(
        self, grad: Tensor | None, grad_values: Tensor, values: Tensor, keep: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Up through the chain; the gradient of the output with the penalty's part, and of x.

        Of x only what R and its cotangents or tangents use beside the chain.
        """
        leaves = [product.leaf for product in self.products]
        grad_x: Tensor | None = None

        def through(t: Tensor, cotangent: Tensor, *more: Tensor) -> list[Any]:
            """Gradients of ``more``; those of the output and of x are added up."""
            nonlocal grad, grad_x
            ends = [self.output, self.x] if self.x.requires_grad else [self.output]
            *found, of_output = torch.autograd.grad(
                t, [*more, *ends], cotangent, retain_graph=True, allow_unused=True
            )
            if len(ends) == 2:
                of_x, of_output = of_output, found.pop()
                grad_x = plus(grad_x, of_x)
            grad = plus(grad, of_output)
            return found

        if len(leaves) == 1 and values is leaves[0]:
            cotangents: list[Tensor | None] = [grad_values]
        else:
            cotangents = through(values, grad_values, *leaves)
        for i in reversed(range(len(leaves))):  # a product may be of the results of earlier ones
            c, (kind, of, v, _) = cotangents[i], self.products[i]
            if c is None:
                continue
            if kind == "jvp":
                # The gradients of ⟨c, J u⟩ are those of ⟨Jᵀc, u⟩: the VJP of c, then up with u.
                into: Tensor | None = self.run.pull(_rows(c))
                self.run.push(_rows(of), keep, False)
            else:
                if len(leaves) > 1:  # the run holds the state of one product
                    self.run.pull(_rows(of))
                factor = None if v is None else c if len(of) == 1 else c.repeat(len(of))
                u = _rows(c) if v is None else v
                into = self.run.push(u, keep, of.requires_grad, factor)
            if into is not None and of.requires_grad:
                of_earlier = through(of, into.view(of.shape), *leaves[:i])
                cotangents[:i] = map(plus, cotangents[:i], of_earlier)
        return grad, grad_x


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
        keep = torch_private.backward_retains_graph()
        chain = ctx.chain
        found = chain.backward(grad, grad_values, ctx.values, keep)
        if not keep:
            ctx.chain = ctx.values = None
        return None, None, *found
