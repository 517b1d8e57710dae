"""The chain engine: one autograd Function for the model and its input-Jacobian penalty.

The model runs once and is recorded (`tape`). The values of a penalty, ``R_n = R(g, v)`` with
``v = Jᵀ w(g)``, are computed from the output ``g`` and the VJPs ``v`` as leaves, so R may be any
differentiable function of them. The backward pushes ``∂R/∂v`` up through the chain (a JVP), goes
through w to the output if w depends on it, and then down once, for the loss and the penalty
together. A third derivative raises.
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


class RecordedRun:
    """A recorded run of any model, and its sweeps, link by link."""

    one_product = False  # several products with the Jacobian can be computed

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
        self.links: list[Link] = found[::-1]  # only those that the output depends on
        if self.output.numel() > 0 and any(link.empty for link in self.links):
            raise Unsupported("an operation returns an empty tensor")
        self.tape.values.clear()  # the links hold the values that they need

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
        """``J u``, or None if it is not wanted; the links keep what `down` needs.

        If ``factor``, one number per row, is given, ``2 factor u`` (the gradient of the squared
        norms) takes the place of u.
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


class JacobianProduct(NamedTuple):
    """A product with the Jacobian that a penalty asked for."""

    kind: str  # "vjp", "norms" (of VJPs) or "jvp"
    of: Tensor  # the cotangents or tangents, [k, N, ...]
    v: Tensor | None  # for "norms": Jᵀ w as [k N, ...]
    leaf: Tensor  # the result, a leaf of the graph of R


class Chain(Pullback):
    """A recorded run of a model. Raises `Unsupported` if the model cannot be recorded."""

    def __init__(self, model: Callable[..., Any], x: Tensor) -> None:
        self.model, self.given = model, x
        self.run: Any = Mlp.of(model, x) or RecordedRun(model, x)
        # Leaves of the graphs of R and of the cotangents.
        self.x = x.detach().requires_grad_() if x.requires_grad else x.detach()
        self.output = self.run.output.detach().requires_grad_()
        self.products: list[JacobianProduct] = []

    # ---- products with the Jacobian

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        found = []
        for part in self._parts(w, chunk_size):
            v = self.run.pull(_rows(part)).view(part.shape[0], *self.x.shape)
            found.append(self._leaf("vjp", part, None, v))
        return found[0] if len(found) == 1 else torch.cat(found)

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        found = []
        for part in self._parts(w, chunk_size):
            v, norms = self.run.norms(_rows(part))
            if part.shape[0] > 1:
                norms = norms.view(part.shape[0], -1).sum(0)
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
            self.run = RecordedRun(
                self.model, self.given
            )  # an MLP: nothing acts twice by a second run
        return parts

    def _leaf(self, kind: str, of: Tensor, v: Tensor | None, result: Tensor) -> Tensor:
        leaf = result.requires_grad_()
        self.products.append(JacobianProduct(kind, of, v, leaf))
        return leaf

    def values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``(output, R)`` in the graph of x and the parameters."""
        leaves = {id(self.output), id(self.x), *(id(product.leaf) for product in self.products)}
        for t in (values, *(product.of for product in self.products)):
            if t.requires_grad and id(t) not in leaves:
                check_leaves(
                    t, leaves, "the penalty depends on more than the output of the model: on"
                )
        return _Chain.apply(self, values, self.given, *self.run.parameters)

    # ---- the backward

    def backward(
        self, grad: Tensor | None, grad_values: Tensor | None, values: Tensor, keep: bool
    ) -> list[Tensor | None]:
        for t, version in self.run.versions:
            if t._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(t.shape)} that the model used was modified in place "
                    "before the backward: call backward() before optimizer.step(), or use the "
                    "out-of-place operation"
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
        """Up through the chain; returns the gradients with respect to the output and to x.

        That of the output includes ``grad``. That of x counts only the direct uses of x by R and
        by the cotangents or tangents.
        """
        leaves = [product.leaf for product in self.products]
        grad_x: Tensor | None = None

        def through(t: Tensor, cotangent: Tensor, *more: Tensor) -> list[Any]:
            """The gradients with respect to ``more``; adds those of the output and of x up."""
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
        for i in reversed(range(len(leaves))):  # a product may use the results of earlier ones
            c, (kind, of, v, _) = cotangents[i], self.products[i]
            if c is None:
                continue
            if kind == "jvp":
                # ⟨c, J u⟩ = ⟨Jᵀc, u⟩: its gradients are those of the VJP of c, pushed with u.
                into: Tensor | None = self.run.pull(_rows(c))
                self.run.push(_rows(of), keep, False)
            else:
                if len(leaves) > 1:  # the run holds the state of the last product only
                    self.run.pull(_rows(of))
                factor = None if v is None else c if of.shape[0] == 1 else c.repeat(of.shape[0])
                u = _rows(c) if v is None else v
                into = self.run.push(u, keep, of.requires_grad, factor)
            if into is not None and of.requires_grad:
                of_earlier = through(of, into.view(of.shape), *leaves[:i])
                cotangents[:i] = map(plus, cotangents[:i], of_earlier)
        return grad, grad_x


def _rows(t: Tensor) -> Tensor:
    """``[K, N, ...]`` as ``[K N, ...]``, detached."""
    t = t.detach()
    return t[0] if t.shape[0] == 1 else t.flatten(0, 1)


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
                "the gradient of a penalty was computed with create_graph=True, which needs third "
                "derivatives of the model: the chain engine is differentiable once; use "
                'engine="autograd"'
            )
        if ctx.chain is None:
            raise RuntimeError(
                "backward ran through the penalty a second time, and its tensors have been freed: "
                "pass retain_graph=True the first time"
            )
        keep = torch_private.backward_retains_graph()
        chain = ctx.chain
        found = chain.backward(grad, grad_values, ctx.values, keep)
        if not keep:
            ctx.chain = ctx.values = None
        return None, None, *found
