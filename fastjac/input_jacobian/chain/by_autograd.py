"""The link of an operation that the table (`operations`) does not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.input_jacobian.chain.links import Link, Unsupported, check_leaves, plus
from fastjac.torch_private import tree_flatten, tree_unflatten


class ByAutograd(Link):
    """Any differentiable operation of torch, by autograd."""

    def __init__(
        self, run: Callable[..., Any], inputs: list[Tensor], parameters: Any, name: str
    ) -> None:
        self.parameters, self.name, self.count = tuple(parameters), name, len(inputs)
        self.leaves = [t.detach().requires_grad_() for t in (*inputs, *self.parameters)]
        with torch.enable_grad():
            self.result = run(*self.leaves)
        outputs, self.spec = tree_flatten(self.result)
        found = [i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.requires_grad]
        if len(found) > 1:
            raise Unsupported(f"{name} returns several tensors")
        self.output_place: int = found[0] if found else -1
        if found:
            self.out: Tensor = outputs[found[0]]
            self.others = [None if i == found[0] else t for i, t in enumerate(outputs)]
            if self.out.dim() == 0:
                raise Unsupported(f"{name} returns one number for the whole batch")
            self.result = None
            check_leaves(self.out, {id(t) for t in self.leaves}, f"{name} depends on")
        self.extras: list[Tensor | None] = [None] * len(self.leaves)
        self.delta: Any = None
        self.pulled: list[Tensor | None] = []

    def with_output(self, out: Any) -> Any:
        """The result of the function, with ``out`` in the place of the differentiable output."""
        self.others[self.output_place] = out
        result = tree_unflatten(self.others, self.spec)
        self.others = []
        return result

    def _cotangent(self, rows: Tensor) -> Tensor:
        """``[K N, ...]`` as a leaf ``[K, N, ...]``; ``[N, ...]`` if K is 1, which needs no vmap."""
        k = len(rows) // len(self.out)
        rows = rows.view(k, *self.out.shape) if k > 1 else rows
        return rows.detach().requires_grad_()

    def _pull(self, delta: Tensor) -> list[Tensor | None]:
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                *(self.out, self.leaves[: self.count], delta),
                create_graph=True,
                allow_unused=True,
                is_grads_batched=delta.dim() > self.out.dim(),
            )
        return list(pulled)

    def _push(self, pulled: Any, tangents: Any, ends: list[Tensor]) -> list[Tensor | None]:
        """The gradients of ``⟨pulled, tangents⟩`` with respect to ``ends``."""
        pairs = [
            (p, u.reshape(p.shape))
            for p, u in zip(pulled, tangents, strict=True)
            if p is not None and u is not None and p.requires_grad
        ]
        if not pairs:
            return [None] * len(ends)
        products, us = zip(*pairs, strict=True)
        return list(torch.autograd.grad(products, ends, us, retain_graph=True, allow_unused=True))

    def _rows(self, tangent: Tensor | None) -> Tensor | None:
        return None if tangent is None else tangent.reshape(-1, *self.out.shape[1:])

    def vjp(self, delta):
        self.delta = self._cotangent(delta)
        self.pulled = self._pull(self.delta)
        return tuple(
            None if p is None else p.detach().reshape(-1, *leaf.shape[1:])
            for p, leaf in zip(self.pulled, self.leaves, strict=False)
        )

    def push(self, tangents, keep, out):
        *extras, tangent = self._push(self.pulled, tangents, [*self.leaves, self.delta])
        self.extras = [plus(a, b) for a, b in zip(self.extras, extras, strict=True)]
        if not keep:
            self.pulled, self.delta = [], None
        return self._rows(tangent)

    def jvp(self, tangents):
        pairs = zip(tangents, self.leaves, strict=False)
        k = next(len(t) // len(leaf) for t, leaf in pairs if t is not None)
        # Dimension 0 of the output need not have the size of that of the inputs.
        delta = self._cotangent(self.out.new_zeros(k * len(self.out), *self.out.shape[1:]))
        (tangent,) = self._push(self._pull(delta), tangents, [delta])
        return self._rows(tangent)

    def backward(self, grad, wanted, keep):
        extras, self.extras = self.extras, [None] * len(self.leaves)
        grads: list[Tensor | None] = [None] * len(self.leaves)
        if grad is not None:
            grads = list(
                torch.autograd.grad(
                    self.out, self.leaves, grad, retain_graph=keep, allow_unused=True
                )
            )
        total = [plus(a, b) for a, b in zip(grads, extras, strict=True)]
        if not keep:
            del self.out
        return tuple(total[: self.count]), tuple(total[self.count :])

    def describe(self) -> str:
        return f"by autograd: {self.name}"
