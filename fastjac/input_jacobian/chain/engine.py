"""The chain engine: one autograd Function for the input-Jacobian penalty of a model.

The model runs once, in the ordinary way. The values of a penalty, ``R_n = R(g, v)`` with
``v = Jᵀ w(g)``, are computed from the output ``g`` and the VJPs ``v`` as leaves, so R may be any
differentiable function of them. Autograd computes v and the cotangents δ of the operations, without
``create_graph``. The backward pushes ``∂R/∂v`` up through the recorded operations (a JVP), which
gives the second-order terms, and goes through w to the output if w depends on it. The second-order
terms are gradients of the tensors that torch saved for its own backward. Autograd adds them to the
gradient of the loss and goes down once, for both. A third derivative raises.

A Sequential of Linear and activation modules takes another way (`mlp`): the whole of this in a few
calls of C++, the forward included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjac import torch_private
from fastjac.input_jacobian.by_autograd import AutogradPullback, Composed
from fastjac.input_jacobian.chain.record import Record
from fastjac.input_jacobian.pullback import Pullback
from fastjac.ops.autograd import graph_nodes
from fastjac.ops.row_sqnorm import gradient_of_one, rows_of_one


class GraphRun:
    """The sweeps over a recorded graph. w, u and their products have a first dimension of K."""

    one_product = False  # several products with the Jacobian can be computed
    own_output = False  # the output is in the graph of torch

    def __init__(self, x: Tensor, output: Tensor) -> None:
        self.record = Record(x, output)
        self.output = output
        self.parameters = [output, *self.record.targets]
        self.deltas: list[Tensor | None] = []
        self.extras: list[Tensor | None] = [None] * len(self.record.targets)

    def begin(self) -> None:
        """Start a backward. Torch itself raises if a tensor that it saved was modified."""
        self.extras = [None] * len(self.record.targets)  # an earlier backward may have raised

    def pull(self, w: Tensor) -> Tensor:
        """``Jᵀ w``."""
        lead = tuple(w.shape[:1]) if w.shape[0] > 1 else ()
        v, self.deltas = self.record.pull(w if lead else w[0], lead)
        return v if lead else v.unsqueeze(0)

    def norms(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``v = Jᵀ w`` and ``Σ_k ‖v_k‖²`` of each sample."""
        v = self.pull(w).contiguous()
        norms = rows_of_one(v.flatten(0, 1))
        return v, norms if len(v) == 1 else norms.view(len(v), -1).sum(0)

    def jvp(self, u: Tensor) -> Tensor:
        """``J u``."""
        return self._push(u, None, True)

    def push(
        self, u: Tensor, keep: bool, wanted: bool, factor: Tensor | None = None
    ) -> Tensor | None:
        """``J u``, or None if it is not wanted; keeps the second-order terms.

        If ``factor``, one number per sample, is given, ``2 factor u`` (the gradient of the squared
        norms) takes the place of u.
        """
        if factor is not None:
            u = gradient_of_one(u.flatten(0, 1), factor.repeat(len(u))).view(u.shape)
        out = self._push(u, [*self.deltas] if keep else self.deltas, wanted)
        if not keep:
            self.deltas = []
        return out

    def _push(self, u: Tensor, deltas: Any, wanted: bool) -> Any:
        lead = tuple(u.shape[:1]) if u.shape[0] > 1 else ()
        with torch.no_grad(), torch.autocast(self.output.device.type, enabled=False):
            out = self.record.push(u if lead else u[0], lead, deltas, self.extras, wanted)
        if wanted and out is None:
            out = self.output.new_zeros((*lead, *self.output.shape))
        return out if lead or out is None else out.unsqueeze(0)

    def down(self, grad: Tensor | None, keep: bool) -> list[Tensor | None]:
        """The gradients of x and the parameters."""
        return [None, grad, *self.extras]

    def describe(self) -> list[str]:
        return self.record.describe()


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
        # Leaves of the graphs of R and of the cotangents.
        self.x = x.detach().requires_grad_() if x.requires_grad else x.detach()
        self.output = run.output.detach().requires_grad_()
        self.products: list[JacobianProduct] = []
        self.others: list[Tensor] = []  # leaves that R depends on beside the output and x

    # ---- products with the Jacobian

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        found = []
        for part in self._parts(w, chunk_size):
            found.append(self._leaf("vjp", part, None, self.run.pull(part.detach())))
        return found[0] if len(found) == 1 else torch.cat(found)

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        found = []
        for part in self._parts(w, chunk_size):
            v, norms = self.run.norms(part.detach())
            found.append(self._leaf("norms", part, v, norms))
        return found[0] if len(found) == 1 else torch.stack(found).sum(0)

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        found = []
        for part in self._parts(u, chunk_size):
            found.append(self._leaf("jvp", part, None, self.run.jvp(part.detach())))
        return found[0] if len(found) == 1 else torch.cat(found)

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        """By autograd alone, if f depends on x beside the output (``loss(output, target=x)``)."""
        composed = Composed(self, f)
        x, direct = self.given, False
        for node in graph_nodes(composed.output):
            leaf = getattr(node, "variable", None)
            direct |= leaf is not None and (leaf is x or leaf is self.x)
            direct |= x.grad_fn is not None and node is x.grad_fn
        if not direct:
            return composed
        if self.run.own_output:
            self.run = self.run.as_graph()
        return AutogradPullback(x, f(self.run.output))

    def _parts(self, t: Tensor, chunk_size: int | None) -> tuple[Tensor, ...]:
        parts = (t,) if chunk_size is None or chunk_size >= len(t) else t.split(chunk_size)
        if self.run.one_product and len(parts) + len(self.products) > 1:
            self.run = self.run.as_graph()
        return parts

    def _leaf(self, kind: str, of: Tensor, v: Tensor | None, result: Tensor) -> Tensor:
        leaf = result.requires_grad_()
        deltas = None if self.run.own_output or kind == "jvp" else self.run.deltas
        self.products.append(JacobianProduct(kind, of, v, leaf, deltas))
        return leaf

    def values(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """``(output, R)`` in the graph of x, the parameters and what else R depends on."""
        known = {id(self.output), id(self.x), *(id(product.leaf) for product in self.products)}
        for t in (values, *(product.of for product in self.products)):
            if t.requires_grad and id(t) not in known:
                self._note_leaves(t, known)
        inputs = self.given, *self.run.parameters, *self.others
        found = _Chain.apply(self, values, *inputs)
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

    def backward(
        self, grad: Tensor | None, grad_values: Tensor | None, values: Tensor, keep: bool
    ) -> list[Tensor | None]:
        self.run.begin()
        direct: list[Tensor | None] = [None] * (1 + len(self.others))
        if grad_values is not None and values.requires_grad:
            grad = self._penalty(grad, grad_values, values, keep, direct)
        found = self.run.down(grad, keep)
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
        ends = [self.output, *([self.x] if self.x.requires_grad else []), *self.others]

        def through(t: Tensor, cotangent: Tensor, *more: Tensor) -> list[Any]:
            """The gradients with respect to ``more``; adds those of the ends up."""
            nonlocal grad
            of_ends = torch.autograd.grad(
                t, [*ends, *more], cotangent, retain_graph=True, allow_unused=True
            )
            found = list(of_ends[len(ends) :])
            grad = plus(grad, of_ends[0])
            first = 1 - int(self.x.requires_grad)
            for i, g in enumerate(of_ends[1 : len(ends)], first):
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
                elif not self.run.own_output:  # the product of an MLP, before its `as_graph`
                    self.run.pull(of.detach())
                u, factor = (c, None) if v is None else (v, c)
                into = self.run.push(u, keep, of.requires_grad, factor)
            if into is not None and of.requires_grad:
                of_earlier = through(of, into.view(of.shape), *leaves[:i])
                cotangents[:i] = map(plus, cotangents[:i], of_earlier)
        return grad


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chain, values, x, *parameters):
        ctx.chain, ctx.values = chain, values
        ctx.set_materialize_grads(False)
        values = values.detach()
        return (chain.output.detach().clone(), values) if chain.run.own_output else values

    @staticmethod
    def backward(ctx, *grads):
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
        chain, values = ctx.chain, ctx.values
        if not keep:  # before it runs: if it is interrupted, a part of the state is gone
            ctx.chain = ctx.values = None
        grad, grad_values = grads if chain.run.own_output else (None, *grads)
        found = chain.backward(grad, grad_values, values, keep)
        return None, None, *found
