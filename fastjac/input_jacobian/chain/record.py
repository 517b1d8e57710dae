"""The record of a run: the nodes of its autograd graph between ``x`` and the output.

The model runs in the ordinary way and torch builds the graph that it always builds. What is in it
is what happened, whatever style the model is written in, and reading it takes nothing from the
model. `Unsupported` is raised, with the reason, for

* a ``torch.autograd.Function`` that is not one of fastjac, compiled models included,
* tensors saved under hooks (a checkpoint), which would be computed again to be read,
* complex numbers and in-place operations on a part of a tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastjac.input_jacobian.chain.by_autograd import ByAutograd
from fastjac.input_jacobian.chain.rules import RULES, Rule, Unsupported
from fastjac.ops.autograd import Function
from fastjac.torch_private import dtype_of_node, has_saved_hooks

Edge = tuple[Any, int]  # a node and the number of its output: a value of the run


class Step(NamedTuple):
    node: Any
    rule: Rule
    sources: tuple[Edge | None, ...]  # of each input, or None if it does not depend on x
    targets: tuple[int, ...]  # places in `Record.targets`, or -1
    delta: int  # the place of its cotangent among the captured ones, or -1


class Record:
    """The steps from ``x`` to ``output`` in the order of the forward."""

    def __init__(self, x: Tensor, output: Tensor) -> None:
        self.x, self.output = x, output
        self.source: Edge = tuple(get_gradient_edge(x))[:2]
        self.end: Edge = output.grad_fn, output.output_nr
        self.steps: list[Step] = []
        self.targets: list[Tensor] = []
        self.captured: list[GradientEdge] = []
        self.one_by_one = False  # whether torch is wrong about several cotangents at once
        self._places: dict[int, int] = {}  # of targets, by id
        if self.end == self.source:
            raise Unsupported("the output of the model is x")
        for node, sources, used in _walk(self.end, self.source):
            self._add(node, sources, used)

    def _add(self, node: Any, sources: tuple[Edge | None, ...], used: set[int]) -> None:
        kind = type(node)
        rule = RULES.get(kind.__name__)
        if rule is None:
            own = getattr(node, "_forward_cls", None)
            if own is not None and not issubclass(own, Function):
                raise Unsupported(f"the model calls {own.__name__}, a torch.autograd.Function")
            rule = RULES.get(own)
        else:
            own = None
        if has_saved_hooks(node):
            raise Unsupported("tensors are saved under hooks (a checkpoint)")
        if rule is None or not rule.takes(node, tuple([s is not None for s in sources])):
            # Torch generates the nodes with a numbered name, and shows all that they save.
            if own is None and not kind.__name__[-1:].isdigit():
                raise Unsupported(f"{kind.__name__} cannot be read: {HIDDEN.get(kind.__name__, 'it is not generated')}")
            if len(used) > 1:
                raise Unsupported(f"{kind.__name__} has several outputs and no rule")
            rule = ByAutograd(*used)
        if dtype_of_node(node, min(used)).is_complex:
            raise Unsupported(f"{kind.__name__} returns complex numbers")
        self.one_by_one |= kind.__name__ in ONE_BY_ONE
        targets = tuple([self._target(t) for t in rule.targets(node)])
        delta = -1
        if any([place >= 0 for place in targets]):
            delta = len(self.captured)
            self.captured.append(GradientEdge(node, min(used)))
        self.steps.append(Step(node, rule, sources, targets, delta))

    def _target(self, t: Tensor | None) -> int:
        if t is None or not t.requires_grad:
            return -1
        place = self._places.setdefault(id(t), len(self.targets))
        if place == len(self.targets):
            self.targets.append(t)
        return place

    # ---- sweeps

    def pull(self, w: Tensor, lead: tuple[int, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """``Jᵀ w`` for ``w`` ``[*lead, *output.shape]``, and the cotangents of the steps."""
        ends = [self.x, *self.captured]
        if lead and self.one_by_one:
            found = [self._pull(part, ends, False) for part in w]
            deltas = [None if d[0] is None else torch.stack(d) for d in zip(*found, strict=True)]
        else:
            deltas = self._pull(w, ends, bool(lead))
        v = deltas.pop(0)
        return self.x.new_zeros(*lead, *self.x.shape) if v is None else v, deltas

    def _pull(self, w: Tensor, ends: list[Any], batched: bool) -> list[Any]:
        return list(
            torch.autograd.grad(
                self.output, ends, w, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
        )

    def push(
        self,
        u: Tensor,
        lead: tuple[int, ...],
        deltas: list[Tensor | None] | None,
        extras: list[Tensor | None],
        wanted: bool,
    ) -> Tensor | None:
        """``J u``, or None if it is not wanted; adds the second-order terms to ``extras``.

        Without ``deltas`` there are no such terms.
        """
        tangents: dict[Edge, Tensor] = {self.source: u}
        last = self.steps[-1].node
        for node, rule, sources, targets, delta in self.steps:
            us = tuple([None if s is None else tangents.get(s) for s in sources])
            if all([t is None for t in us]):
                continue
            d = None if deltas is None or delta < 0 else deltas[delta]
            if d is None:
                if node is last and not wanted:
                    break
                out = rule.jvp(node, lead, us)
            else:
                out, found = rule.push(node, lead, us, d, wanted or node is not last)
                for place, extra in zip(targets, found, strict=True):
                    if place >= 0 and extra is not None:
                        before = extras[place]
                        extras[place] = extra if before is None else before + extra
            if isinstance(out, Tensor):
                tangents[node, rule.output] = out
            elif out is not None:
                for i, t in enumerate(out):
                    tangents[node, i] = t
        return tangents.get(self.end)

    def describe(self) -> list[str]:
        names = []
        for node, rule, *_ in self.steps:
            name = type(node).__name__.rstrip("0123456789").removesuffix("Backward").lstrip("_")
            names.append(f"by autograd: {name}" if isinstance(rule, ByAutograd) else name)
        return names


HIDDEN = {
    "CopySlices": "an operation writes to a part of a tensor in place",
    "CppFunction": "TorchScript or an extension has its own derivatives",
}

ONE_BY_ONE = {"NativeGroupNormBackward0"}
"""Operations whose derivative torch computes wrongly for several cotangents at once."""


def _walk(end: Edge, source: Edge) -> list[tuple[Any, tuple[Edge | None, ...], set[int]]]:
    """The nodes that depend on the source, in the order of the forward.

    Each with its inputs that depend on the source, and the numbers of its outputs that are used.
    """
    found: dict[Any, tuple[Any, tuple[Edge | None, ...], set[int]] | None] = {}
    left = [end[0]]
    while left:
        node = left[-1]
        if node in found:
            left.pop()
            continue
        inputs = node.next_functions
        new = [f for f, i in inputs if f is not None and f not in found and (f, i) != source]
        if new:
            left += new
            continue
        left.pop()
        sources = tuple(
            [e if e == source or (e[0] is not None and found.get(e[0])) else None for e in inputs]
        )
        used: set[int] = set()
        found[node] = (node, sources, used) if any(sources) else None
        for e in sources:
            if e is not None and e != source:
                found[e[0]][2].add(e[1])
    if found.get(end[0]) is None:
        raise Unsupported("the output of the model does not depend on x")
    found[end[0]][2].add(end[1])
    return [step for step in found.values() if step is not None]
