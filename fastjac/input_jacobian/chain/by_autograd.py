"""The rule of an operation that the table (`nodes`) does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastjac.input_jacobian.chain.rules import Rule, Unsupported
from fastjac.ops.autograd import graph_nodes, nodes_from
from fastjac.torch_private import (
    current_backward,
    dtype_of_node,
    set_vmap_warnings,
    shape_of_node,
    zeros_of_node,
)

_saved_names: dict[type, list[str]] = {}


def saved_tensors(node: Any) -> list[Tensor]:
    """The tensors that torch saved for the backward of an operation."""
    names = _saved_names.get(type(node))
    if names is None:
        names = [name for name in dir(node) if name.startswith("_saved_")]
        names = [name for name in names if not name.endswith(("_sym_sizes", "_sym_strides"))]
        _saved_names[type(node)] = names
    found: list[Tensor] = []
    for name in names if names else ["saved_tensors"] if hasattr(node, "saved_tensors") else []:
        value = getattr(node, name)
        for t in value if isinstance(value, tuple | list) else [value]:
            if isinstance(t, Tensor):
                found.append(t)
    return found


class _InOwnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf, call, results):
        ctx.call, ctx.results = call, results
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            ctx.results.append(ctx.call())
        return None, None, None


def is_function(node: Any) -> bool:
    return hasattr(node, "_forward_cls")


def mapped(call: Callable[..., Any], arguments: list[Tensor]) -> Any:
    """``torch.vmap(call)(*arguments)``, without a warning if an operation has no rule."""
    set_vmap_warnings(False)
    try:
        return torch.vmap(call)(*arguments)
    finally:
        set_vmap_warnings(True)


def in_own_backward(call: Callable[[], Any]) -> Any:
    """``call()`` with autograd on, in a backward of its own if one is running.

    A node that is called computes only the gradients that the backward that is running has asked
    for, and returns None for the others.
    """
    if current_backward() == -1:
        with torch.enable_grad():
            return call()
    results: list[Any] = []
    with torch.enable_grad():
        leaf = torch.zeros((), device="cpu", requires_grad=True)
        _InOwnBackward.apply(leaf, call, results).backward()
    return results[0]


class ByAutograd(Rule):
    """Any operation that torch can differentiate twice, by its own double backward.

    ``p = f_aᵀ δ`` is computed once more, in a graph. The gradients of ``⟨p, u⟩`` with respect to δ
    and the saved tensors are the JVP and the second-order terms.
    """

    def __init__(self, outputs: list[int]) -> None:
        self.outputs = sorted(set(outputs))  # those that are used
        self.output, self.several = self.outputs[0], len(self.outputs) > 1

    def check(self, node: Any) -> None:
        """Raises if autograd cannot tell the second-order terms apart, or hides them."""
        ends = {get_gradient_edge(t).node for t in self.targets(node, ())}
        if is_function(node):  # whose node cannot be called alone
            ends = {f for f, _ in node.next_functions if f is not None}
        if len(ends) > 1 and any(n in ends - {end} for end in ends for n in nodes_from(end)):
            raise Unsupported(
                f"{type(node).__name__} has no rule, and one of its inputs is computed from "
                "another one"
            )
        if type(node).__name__ == "CopySlices" and not self._linear(node):
            raise Unsupported(
                "CopySlices: an operation that is not linear writes to a part of a tensor in place"
            )

    def _linear(self, node: Any) -> bool:
        """Whether ``f_aᵀ δ`` depends on δ alone, so that there is no second-order term."""
        deltas = self._zeros(node, ())
        pulled = self._pull(node, [True] * len(node.next_functions), deltas, ())[0]
        leaves = [getattr(n, "variable", None) for p in pulled for n in graph_nodes(p)]
        return all(leaf is None or any(leaf is d for d in deltas) for leaf in leaves)

    def targets(self, node, inside):
        inputs: list[Tensor] = []
        results: list[Tensor] = []
        seen = set()
        for t in saved_tensors(node):
            if t.requires_grad and (edge := get_gradient_edge(t)) not in seen:
                seen.add(edge)
                (results if t.grad_fn is node else inputs).append(t)
        if not inputs or not results:
            return tuple(inputs or results)
        # A gradient for an input includes what goes through the result. So the inputs alone are
        # targets, if all of them are saved.
        edges = {(t.grad_fn, t.output_nr) if t.grad_fn else id(t) for t in inputs}
        for f, i in node.next_functions:
            leaf = getattr(f, "variable", None)
            if f is not None and (f, i) not in edges and id(leaf) not in edges:
                raise Unsupported(f"{type(node).__name__} has no rule")
        return tuple(inputs)

    def _zeros(self, node: Any, lead: tuple[int, ...]) -> list[Tensor]:
        """A cotangent of each output that is used, as a leaf."""
        return [zeros_of_node(node, i, lead).requires_grad_() for i in self.outputs]

    def _pull(self, node: Any, us: Any, deltas: list[Tensor], lead: Any) -> Any:
        """``f_aᵀ δ`` for the inputs with a tangent, and the tangents.

        The node is called alone: the engine of autograd would go on to the operations before it,
        and add what comes through them if one input is computed from another.
        """
        places = [i for i, u in enumerate(us) if u is not None]
        given: list[Any] = [None] * len(node._input_metadata)

        def engine(*deltas: Tensor) -> tuple[Tensor, ...]:
            nonlocal places
            starts = [GradientEdge(node, i) for i in self.outputs]
            ends = [GradientEdge(*node.next_functions[i]) for i in places]
            found = torch.autograd.grad(starts, ends, deltas, create_graph=True, allow_unused=True)
            places = [i for i, p in zip(places, found, strict=True) if p is not None]
            return tuple(p for p in found if p is not None)

        def call(*deltas: Tensor) -> tuple[Tensor, ...]:
            nonlocal places
            if is_function(node):
                return engine(*deltas)
            for i, d in zip(self.outputs, deltas, strict=True):
                given[i] = d
            found = node(*given)
            found = found if isinstance(found, tuple) else (found,)
            places = [i for i in places if found[i] is not None]
            # What the engine does with the result of a node: operands may have been broadcast.
            edges = [node.next_functions[i] for i in places]
            return tuple(
                found[i].sum_to_size(shape_of_node(*edge)).to(dtype_of_node(*edge))
                for i, edge in zip(places, edges, strict=True)
            )

        pulled = in_own_backward(lambda: mapped(call, deltas) if lead else call(*deltas))
        pairs = [(p, us[i]) for p, i in zip(pulled, places, strict=True) if p.requires_grad]
        return [p for p, _ in pairs], [u for _, u in pairs]

    def jvp(self, node, lead, us):
        return self._apply(node, lead, us, self._zeros(node, lead), ())[0]

    def push(self, node, lead, us, delta, wanted):
        given = delta if self.several else (delta,)
        deltas = [
            (zeros_of_node(node, i, lead) if d is None else d.detach()).requires_grad_()
            for i, d in zip(self.outputs, given, strict=True)
        ]
        return self._apply(node, lead, us, deltas, self.targets(node, ()))

    def _apply(self, node: Any, lead: Any, us: Any, deltas: list[Tensor], targets: Any) -> Any:
        pulled, tangents = self._pull(node, us, deltas, lead)
        found: Any = [None] * (len(deltas) + len(targets))
        if pulled:
            found = torch.autograd.grad(
                pulled, [*deltas, *targets], tangents, retain_graph=True, allow_unused=True
            )
        outs = [
            torch.zeros_like(d) if out is None else out.detach()
            for d, out in zip(deltas, found, strict=False)
        ]
        extras = tuple(found[len(deltas) :])
        if not self.several:
            return outs[0], extras
        all_outputs: list[Any] = [None] * (self.outputs[-1] + 1)
        for i, out in zip(self.outputs, outs, strict=True):
            all_outputs[i] = out
        return all_outputs, extras
