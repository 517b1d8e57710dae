"""The rule of an operation that the table (`nodes`) does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastjac.input_jacobian.chain.rules import Rule, Unsupported
from fastjac.ops.autograd import graph_nodes, nodes_from
from fastjac.torch_private import zeros_of_node

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


class ByAutograd(Rule):
    """Any operation that torch can differentiate twice, by its own double backward.

    ``p = f_aᵀ δ`` is computed once more, in a graph. The gradients of ``⟨p, u⟩`` with respect to δ
    and the saved tensors are the JVP and the second-order terms.
    """

    def __init__(self, outputs: list[int]) -> None:
        self.outputs = sorted(set(outputs))  # those that are used
        self.output, self.several = self.outputs[0], len(self.outputs) > 1

    def check(self, node: Any) -> None:
        """Raises if one of the inputs is computed from another, or a second-order term is hidden.

        Autograd cannot separate two such inputs: the gradient of the first would include the way
        through the other.
        """
        name = type(node).__name__
        inputs = [edge for edge in node.next_functions if edge[0] is not None]
        for i, (f, _) in enumerate(inputs):
            others = {other for j, (other, _) in enumerate(inputs) if j != i}
            if others and any(n in others for n in nodes_from(f)):
                raise Unsupported(
                    f"{name} has no rule, and one of its inputs is computed from another one"
                )
        if name == "CopySlices" and not self._linear(node):
            raise Unsupported(
                "CopySlices: an operation that is not linear writes to a part of a tensor in place"
            )

    def _linear(self, node: Any) -> bool:
        """Whether ``f_aᵀ δ`` depends on δ alone, so that there is no second-order term."""
        deltas = self._zeros(node, ())
        everything = [node.next_functions[i] for i in range(len(node.next_functions))]
        edges = [GradientEdge(f, i) for f, i in everything if f is not None]
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                [GradientEdge(node, i) for i in self.outputs],
                edges,
                deltas,
                create_graph=True,
                allow_unused=True,
            )
        leaves = [
            leaf
            for p in pulled
            if p is not None
            for n in graph_nodes(p)
            if (leaf := getattr(n, "variable", None)) is not None
        ]
        return all(any(leaf is delta for delta in deltas) for leaf in leaves)

    def targets(self, node, inside):
        inputs: list[Tensor] = []
        results: list[Tensor] = []
        for t in saved_tensors(node):
            if t.requires_grad:
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
        """``f_aᵀ δ`` for the inputs with a tangent, and the tangents."""
        edges = [
            (GradientEdge(f, i), u)
            for (f, i), u in zip(node.next_functions, us, strict=True)
            if u is not None
        ]
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                [GradientEdge(node, i) for i in self.outputs],
                [edge for edge, _ in edges],
                deltas,
                create_graph=True,
                allow_unused=True,
                is_grads_batched=bool(lead),
            )
        pairs = [(p, u) for p, (_, u) in zip(pulled, edges, strict=True) if p is not None]
        pairs = [(p, u) for p, u in pairs if p.requires_grad]
        return [p for p, _ in pairs], [u for _, u in pairs]

    def jvp(self, node, lead, us):
        return self._apply(node, lead, us, self._zeros(node, lead), ())[0]

    def push(self, node, lead, us, delta, wanted):
        given = delta if self.several else (delta,)
        deltas = self._zeros(node, lead)
        deltas = [
            zero if d is None else d.detach().requires_grad_()
            for d, zero in zip(given, deltas, strict=True)
        ]
        out, extras = self._apply(node, lead, us, deltas, self.targets(node, ()))
        return out, extras

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
