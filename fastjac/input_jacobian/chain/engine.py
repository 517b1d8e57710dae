"""The chain engine: one autograd Function for the input-Jacobian penalty of a model.

The model runs once, in the ordinary way. The values of a penalty, ``R_n = R(g, v)`` with
``v = Jᵀ w(g)``, are computed from the output ``g`` and the VJPs ``v`` as leaves, so R may be any
differentiable function of them. Autograd computes v and the cotangents δ of the operations, without
``create_graph``. The backward pushes ``∂R/∂v`` up through the recorded operations (a JVP), which
gives the second-order terms, and goes through w to the output if w depends on it. The second-order
terms are gradients of the tensors that torch saved for its own backward. Autograd adds them to the
gradient of the loss and goes down once, for both.

These sweeps are those of a `GraphRun`. From the second run with the same operations and shapes on,
a program repeats them (`program`), and goes down too. Networks of Linear layers and activations on
a CPU are swept in C++ (`network`), and a Sequential of them runs there as a whole (`mlp`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjac import torch_private
from fastjac.input_jacobian.by_autograd import AutogradPullback, Composed
from fastjac.input_jacobian.chain.graph_run import plus
from fastjac.input_jacobian.pullback import Pullback
from fastjac.ops.autograd import graph_nodes


class JacobianProduct(NamedTuple):
    """A product with the Jacobian that a penalty asked for."""

    kind: str  # "vjp", "norms" (of VJPs) or "jvp"
    of: Tensor  # the cotangents or tangents, [k, N, ...]
    v: Tensor | None  # for "norms": Jᵀ w as [k N, ...]
    leaf: Tensor  # the result, a leaf of the graph of R
    deltas: Any  # the cotangents of the steps, for a `GraphRun`


class Chain(Pullback):
    """The pullback of a run of a model. Raises `Unsupported` if its graph cannot be recorded."""

    def __init__(self, x: Tensor, run: Any) -> None:
        self.given, self.run = x, run
        self.output = run.output.detach().requires_grad_()  # a leaf of the graphs of R and w
        self.products: list[JacobianProduct] = []
        self.others: list[Tensor] = []  # leaves that R depends on beside the output and x
        self.given_to: list[Tensor] = []  # the cotangents and tangents that R asked products with
        self.definition: Callable[[Pullback], Tensor] | None = None  # R

    @functools.cached_property
    def x(self) -> Tensor:  # type: ignore[override]
        """x as a leaf of the graphs of R and of the cotangents, if one of them uses it."""
        return self.given.detach().requires_grad_(self.given.requires_grad)

    # ---- products with the Jacobian

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        self.given_to.append(w)
        found = []
        for part in self._parts(w, chunk_size):
            found.append(self._leaf("vjp", part, None, self.run.pull(detached(part))))
        return found[0] if len(found) == 1 else torch.cat(found)

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        self.given_to.append(w)
        found = []
        for part in self._parts(w, chunk_size):
            v, norms = self.run.norms(detached(part))
            found.append(self._leaf("norms", part, v, norms))
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        self.given_to.append(u)
        found = []
        for part in self._parts(u, chunk_size):
            found.append(self._leaf("jvp", part, None, self.run.jvp(detached(part))))
        return found[0] if len(found) == 1 else torch.cat(found)

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        """By autograd alone, if f depends on x beside the output (``loss(output, target=x)``)."""
        composed = Composed(self, f)
        x, direct = self.given, False
        for node in graph_nodes(composed.output):
            leaf = getattr(node, "variable", None)
            direct |= leaf is not None and (leaf is x or leaf is vars(self).get("x"))
            direct |= x.grad_fn is not None and node is x.grad_fn
        if not direct:
            return composed
        if self.run.own_output:
            self.run = self.run.as_graph()
            self.products = [product._replace(deltas=None) for product in self.products]
        return AutogradPullback(x, f(self.run.output))

    def _parts(self, t: Tensor, chunk_size: int | None) -> tuple[Tensor, ...]:
        return (t,) if chunk_size is None or chunk_size >= len(t) else t.split(chunk_size)

    def _leaf(self, kind: str, of: Tensor, v: Tensor | None, result: Tensor) -> Tensor:
        leaf = result.requires_grad_()
        deltas = None if kind == "jvp" else self.run.deltas
        self.products.append(JacobianProduct(kind, of, v, leaf, deltas))
        return leaf

    def values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``(output, R)`` in the graph of x, the parameters and what else R depends on."""
        known = {id(self.output), id(vars(self).get("x"))}
        known.update([id(product.leaf) for product in self.products])
        for t in (values, *[product.of for product in self.products]):
            if t.requires_grad and id(t) not in known:
                self._note_leaves(t, known)
        inputs = self.given, *self.run.parameters, *self.others
        # No torch.func transform is active, for which Function.apply has more to do.
        found = super(torch.autograd.Function, _Chain).apply(self, values, *inputs)
        return found if self.run.own_output else (self.run.output, found)

    def _note_leaves(self, t: Tensor, known: set[int]) -> None:
        """Note other leaves that t depends on, or is: a target, a parameter of a loss."""
        found = [t] if t.grad_fn is None else [getattr(n, "variable", None) for n in graph_nodes(t)]
        for leaf in found:
            if leaf is not None and id(leaf) not in known:
                if leaf._backward_hooks:  # they would run in this backward and in that of the leaf
                    raise RuntimeError(
                        f"the penalty depends on a tensor of shape {tuple(leaf.shape)} that has "
                        "hooks: use engine='autograd'"
                    )
                known.add(id(leaf))
                self.others.append(leaf)

    # ---- the backward

    def differentiable(
        self, grad: Tensor | None, grad_values: Tensor | None
    ) -> list[Tensor | None]:
        """What `backward` returns, with a graph: R is computed once more, by autograd."""
        graph = self.run.as_graph()
        terms = [] if grad is None else [(graph.output, grad)]
        if grad_values is not None and self.definition is not None:
            pull = AutogradPullback(graph.record.x, graph.output)
            terms.append((self.definition(Repeated(pull, self.given_to)), grad_values))
        inputs = [self.given, *self.run.parameters, *self.others]
        found = iter(
            torch.autograd.grad(
                [t for t, _ in terms],
                [t for t in inputs if t.requires_grad],
                [g for _, g in terms],
                create_graph=True,
                allow_unused=True,
            )
        )
        return [next(found) if t.requires_grad else None for t in inputs]

    def backward(
        self, grad: Tensor | None, grad_values: Tensor | None, values: Tensor, keep: bool
    ) -> list[Tensor | None]:
        self.run.begin()
        direct: list[Tensor | None] = [None] * (1 + len(self.others))
        if grad_values is not None and values.requires_grad:
            grad = self._penalty(grad, grad_values, values, keep, direct)
            if not keep:
                self.products = []
        found = self.run.down(grad, keep)
        if direct[0] is not None:
            found[0] = plus(found[0], direct[0])
        return [*found, *direct[1:]]

    def _penalty(
        self,
        grad: Tensor | None,
        grad_values: Tensor,
        values: Tensor,
        keep: bool,
        direct: list[Tensor | None],
    ) -> Tensor | None:
        """Up through the chain; returns ``grad``, of the output, with the penalty's added.

        ``direct`` gets the gradients of x and the other leaves, as R and the cotangents or tangents
        use them themselves.
        """
        leaves = [product.leaf for product in self.products]
        x = vars(self).get("x")
        of_x = x is not None and x.requires_grad
        ends = [self.output, *([self.x] if of_x else []), *self.others]

        def through(t: Tensor, cotangent: Tensor, *more: Tensor) -> list[Any]:
            """The gradients with respect to ``more``; adds those of the ends up."""
            nonlocal grad
            of_ends = torch.autograd.grad(
                t, [*ends, *more], cotangent, retain_graph=True, allow_unused=True
            )
            found = list(of_ends[len(ends) :])
            grad = plus(grad, of_ends[0])
            for i, g in enumerate(of_ends[1 : len(ends)], 1 - int(of_x)):
                direct[i] = plus(direct[i], g)
            return found

        if len(leaves) == 1 and values is leaves[0]:
            cotangents: list[Tensor | None] = [grad_values]
        else:
            cotangents = through(values, grad_values, *leaves)
        for i in reversed(range(len(leaves))):  # a product may use the results of earlier ones
            c, (kind, of, v, _, deltas) = cotangents[i], self.products[i]
            if c is None:
                continue
            if kind == "jvp":
                # ⟨c, J u⟩ = ⟨Jᵀc, u⟩: its gradients are those of the VJP of c, pushed with u.
                into: Tensor | None = self.run.pull(c)
                self.run.push(of.detach(), keep, False)
            else:
                if deltas is not None:
                    self.run.deltas = deltas
                else:  # those of another run, before `then`
                    self.run.pull(of.detach())
                u, factor = (c, None) if v is None else (v, c)
                into = self.run.push(u, keep, of.requires_grad, factor)
            if into is not None and of.requires_grad:
                of_earlier = through(of, into.view(of.shape), *leaves[:i])
                cotangents[:i] = map(plus, cotangents[:i], of_earlier)
        return grad


class Repeated(Pullback):
    """A pullback for a second evaluation of R, which has drawn other random numbers by now."""

    def __init__(self, pull: Pullback, given_to: list[Tensor]) -> None:
        self.pull, self.x, self.output = pull, pull.x, pull.output
        self._first = iter(given_to)

    def _drawn(self, w: Tensor) -> Tensor:
        """The cotangents of the first evaluation, if they do not depend on the model."""
        first = next(self._first, w)
        return w if w.requires_grad else first

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        return self.pull.vjp(self._drawn(w), chunk_size)

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        return self.pull.squared_norms(self._drawn(w), chunk_size)

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        return self.pull.jvp(self._drawn(u), chunk_size)

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        return Composed(self, f)


def detached(t: Tensor) -> Tensor:
    return t.detach() if t.requires_grad else t


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain, values, x, *parameters):
        ctx.chain, ctx.values = chain, values
        ctx.set_materialize_grads(False)
        values = values.detach()
        return (chain.output.clone(), values) if chain.run.own_output else values

    @staticmethod
    def backward(ctx, *grads):
        chain, values = ctx.chain, ctx.values
        grad, grad_values = grads if chain is None or chain.run.own_output else (None, *grads)
        if torch.is_grad_enabled() and chain is not None:
            if not chain.run.own_output:
                raise RuntimeError(
                    "the gradient of a penalty was computed with create_graph=True, which needs "
                    "third derivatives of the model: the chain engine is differentiable once on "
                    'this model; use engine="autograd"'
                )
            return None, None, *chain.differentiable(grad, grad_values)
        if chain is None:
            raise RuntimeError(
                "backward ran through the penalty a second time, and its tensors have been freed: "
                "call backward() once, of loss + value, or pass retain_graph=True the first time"
            )
        keep = torch_private.backward_retains_graph()
        if not keep:  # before it runs: if it is interrupted, a part of the state is gone
            ctx.chain = ctx.values = None
        found = chain.backward(grad, grad_values, values, keep)
        return None, None, *found
