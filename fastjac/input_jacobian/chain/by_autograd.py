"""The rule of an operation that the table (`nodes`) does not have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastjac.input_jacobian.chain.rules import Rule, Unsupported
from fastjac.ops.autograd import nodes_from
from fastjac.torch_private import shape_of_node

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

    def __init__(self, output: int) -> None:
        self.output = output  # the one that is used

    def check(self, node: Any) -> None:
        """Raises if one of the inputs is computed from another.

        Autograd cannot separate the two: the gradient of the first would include the way through
        the other.
        """
        name = type(node).__name__
        inputs = [edge for edge in node.next_functions if edge[0] is not None]
        for i, (f, _) in enumerate(inputs):
            others = {other for j, (other, _) in enumerate(inputs) if j != i}
            if others and any(n in others for n in nodes_from(f)):
                raise Unsupported(
                    f"{name} has no rule, and one of its inputs is computed from another one"
                )

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

    def _pull(self, node: Any, us: Any, delta: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """``f_aᵀ δ`` for the inputs with a tangent, and the tangents."""
        edges = [
            (GradientEdge(f, i), u)
            for (f, i), u in zip(node.next_functions, us, strict=True)
            if u is not None
        ]
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                [GradientEdge(node, self.output)],
                [edge for edge, _ in edges],
                [delta],
                create_graph=True,
                allow_unused=True,
                is_grads_batched=delta.dim() > len(shape_of_node(node, self.output)),
            )
        pairs = [(p, u) for p, (_, u) in zip(pulled, edges, strict=True) if p is not None]
        pairs = [(p, u) for p, u in pairs if p.requires_grad]
        return [p for p, _ in pairs], [u for _, u in pairs]

    def jvp(self, node, lead, us):
        shape = shape_of_node(node, self.output)
        like = next(u for u in us if u is not None)
        delta = like.new_zeros((*lead, *shape)).requires_grad_()
        return self._apply(node, us, delta, ())[0]

    def push(self, node, lead, us, delta, wanted):
        delta = delta.detach().requires_grad_()
        out, *extras = self._apply(node, us, delta, self.targets(node, ()))
        return out, tuple(extras)

    def _apply(self, node: Any, us: Any, delta: Tensor, targets: tuple[Tensor, ...]) -> Any:
        pulled, tangents = self._pull(node, us, delta)
        if not pulled:
            return torch.zeros_like(delta), *[None] * len(targets)
        out, *extras = torch.autograd.grad(
            pulled, [delta, *targets], tangents, retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(delta) if out is None else out.detach(), *extras
