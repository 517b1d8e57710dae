"""The link of any operation that has none of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastjac.input_jacobian.chain.links import Link, Unsupported, check_leaves, plus


class ByAutograd(Link):
    """Any other differentiable operation of torch, by autograd."""

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
                raise Unsupported(f"{name} returns a number for the whole batch")
            self.result = None
            check_leaves(self.out, {id(t) for t in self.leaves}, f"{name} depends on")
        self.extras: list[Tensor | None] = [None] * len(self.leaves)
        self.delta: Any = None
        self.pulled: list[Tensor | None] = []

    def with_output(self, out: Any) -> Any:
        """What the function returns, with ``out`` in the place of the output."""
        self.others[self.output_place] = out
        result = tree_unflatten(self.others, self.spec)
        self.others = []
        return result

    def vjp(self, delta):
        self.k = len(delta) // len(self.out)
        batched = self.k > 1
        self.delta = delta.view(self.k, *self.out.shape) if batched else delta
        self.delta = self.delta.detach().requires_grad_()
        with torch.enable_grad():
            self.pulled = list(
                torch.autograd.grad(
                    self.out,
                    self.leaves[: self.count],
                    self.delta,
                    create_graph=True,
                    allow_unused=True,
                    is_grads_batched=batched,
                )
            )
        return tuple(
            None if p is None else p.detach().reshape(-1, *leaf.shape[1:])
            for p, leaf in zip(self.pulled, self.leaves, strict=False)
        )

    def push(self, tangents, keep, out):
        pairs = [
            (p, u.reshape(p.shape))
            for p, u in zip(self.pulled, tangents, strict=True)
            if p is not None and u is not None and p.requires_grad
        ]
        if not pairs:
            return None
        *extras, tangent = torch.autograd.grad(
            [p for p, _ in pairs],
            [*self.leaves, self.delta],
            [u for _, u in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        self.extras = [plus(a, b) for a, b in zip(self.extras, extras, strict=True)]
        if not keep:
            self.pulled, self.delta = [], None
        return None if tangent is None else tangent.reshape(-1, *self.out.shape[1:])

    def jvp(self, tangents):
        k = next(len(t) for t in tangents if t is not None) // len(self.out)
        batched = k > 1
        shape = (k, *self.out.shape) if batched else self.out.shape
        delta = torch.zeros(shape, dtype=self.out.dtype, device=self.out.device, requires_grad=True)
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                self.out,
                self.leaves[: self.count],
                delta,
                create_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        pairs = [
            (p, u.reshape(p.shape))
            for p, u in zip(pulled, tangents, strict=True)
            if p is not None and u is not None and p.requires_grad
        ]
        if not pairs:
            return None
        (tangent,) = torch.autograd.grad(
            [p for p, _ in pairs], delta, [u for _, u in pairs], allow_unused=True
        )
        return None if tangent is None else tangent.reshape(-1, *self.out.shape[1:])

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
