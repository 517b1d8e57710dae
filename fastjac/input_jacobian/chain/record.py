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
from fastjac.input_jacobian.guards import (
    COMPILED,
    COMPILED_ADVICE,
    GRADIENT_IN_MODEL,
    MISSING,
    WRONG_AGAIN,
)
from fastjac.ops.autograd import Function
from fastjac.torch_private import dtype_of_node, saved_names, saved_under_hooks

Edge = tuple[Any, int]  # a node and the number of its output: a value of the run


class Step(NamedTuple):
    node: Any
    rule: Rule
    sources: tuple[Edge | None, ...]  # of each input, or None if it does not depend on x
    targets: tuple[int, ...]  # places in `Record.targets`, or -1
    deltas: tuple[int, ...]  # the places of its cotangents among the captured ones


class Kind:
    """What is known of all nodes of one type."""

    def __init__(self, node: Any) -> None:
        self.name = type(node).__name__
        own = getattr(node, "_forward_cls", None)
        self.rule = RULES.get(self.name if own is None else own)
        self.asks = self.rule is not None and type(self.rule).takes is not Rule.takes
        self.bends = self.rule is None or type(self.rule).targets is not Rule.targets
        self.saved = saved_names(node)
        self.why_not: tuple[str, ...] = ()  # no rule can be made: of `Unsupported`
        if self.name in WRONG_AGAIN:
            self.why_not = GRADIENT_IN_MODEL.format(WRONG_AGAIN[self.name]), ""
        elif own is not None and own.__name__ == "CompiledFunction":
            self.why_not = COMPILED, f": {COMPILED_ADVICE}"
        elif own is not None and not issubclass(own, Function):
            self.why_not = (f"the model calls {own.__name__}, a torch.autograd.Function",)
        elif self.name == "CopySlices":
            pass  # `ByAutograd.check` looks into it
        elif own is None and self.rule is None and not self.name[-1:].isdigit():
            # Torch generates the nodes with a numbered name, and shows all that they save.
            self.why_not = (
                f"{self.name}: {HIDDEN.get(self.name, 'torch does not show its data')}",
            )


_kinds: dict[type, Kind] = {}


def kind_of(node: Any) -> Kind:
    kind = _kinds.get(type(node))
    if kind is None:
        kind = Kind(node)
        if not kind.why_not:  # or the class of a user, of which each call may have a new one
            _kinds[type(node)] = kind
    return kind


class Record:
    """The steps from ``x`` to ``output`` in the order of the forward."""

    def __init__(self, x: Tensor, output: Tensor) -> None:
        self.x = x
        edge = get_gradient_edge(x)
        self.source: Edge = edge.node, edge.output_nr
        self.end: Edge = output.grad_fn, output.output_nr
        self.steps: list[Step] = []
        self.targets: list[Tensor] = []
        self.captured: list[GradientEdge] = []
        self._places: dict[Any, int] = {}  # of targets
        self._last: list[list[Edge]] = []  # by step: the values that no later step takes
        if self.end == self.source:
            raise Unsupported("the output of the model is x")
        try:
            for node, sources, used in _walk(self.end, self.source):
                self._add(node, sources, used)
        except Unsupported:
            raise
        except RuntimeError as error:  # of torch, if a tensor was modified after it was saved
            raise Unsupported(str(error), "") from error

    def _add(self, node: Any, sources: tuple[Edge | None, ...], used: list[int]) -> None:
        kind = kind_of(node)
        if kind.why_not:
            raise Unsupported(*kind.why_not)
        if dtype_of_node(node, used[0]).is_complex:  # ⟨δ, f_a u⟩ is no product of real numbers
            raise Unsupported(f"{kind.name} computes with complex numbers")
        rule: Any = kind.rule
        targets: tuple[int, ...] = ()
        deltas: tuple[int, ...] = ()
        inside = tuple(map(bool, sources))
        if rule is not None:
            others = used != _FIRST and not rule.several and set(used) != {rule.output}
            if others or (kind.asks and not rule.takes(node, inside)):
                rule = None
        if rule is None:
            if kind.name in MISSING:
                name, advice = kind.name.removesuffix("Backward0"), MISSING[kind.name]
                raise Unsupported(
                    f"torch does not have the second derivative of {name}", f": {advice}"
                )
            rule = ByAutograd(used)
            rule.check(node)
        if kind.saved and saved_under_hooks(node, kind.saved):
            raise Unsupported(CHECKPOINT)
        if kind.bends:
            targets = tuple([self._target(t) for t in rule.targets(node, inside)])
            if targets and max(targets) >= 0:
                outputs = rule.outputs if isinstance(rule, ByAutograd) else used[:1]
                first = len(self.captured)
                deltas = tuple(range(first, first + len(outputs)))
                self.captured += [GradientEdge(node, i) for i in outputs]
        self.steps.append(Step(node, rule, sources, targets, deltas))

    def _target(self, t: Any) -> int:
        if not isinstance(t, Tensor) or not t.requires_grad:
            return -1
        # Each call of F.linear transposes the weight anew: those of one weight are one target.
        fn: Any = t.grad_fn
        key = fn.next_functions[0] if type(fn).__name__ == "TBackward0" else id(t)
        place = self._places.setdefault(key, len(self.targets))
        if place == len(self.targets):
            self.targets.append(t)
        return place

    # ---- sweeps

    def pull(self, w: Tensor, lead: tuple[int, ...]) -> tuple[Tensor, list[Tensor | None]]:
        """``Jᵀ w`` for ``w`` ``[*lead, *output.shape]``, and the cotangents of the steps."""
        try:
            v, *deltas = self._pull(w, bool(lead))
        except RuntimeError:
            if not lead:
                raise
            # An operation that vmap cannot map: GroupNorm in channels_last, for example.
            found = zip(*[self._pull(part, False) for part in w], strict=True)
            v, *deltas = [None if d[0] is None else torch.stack(d) for d in found]
        return self.x.new_zeros((*lead, *self.x.shape)) if v is None else v, deltas

    def _pull(self, w: Tensor, batched: bool) -> Any:
        # By edges, since the user may modify the output in place before the backward.
        return torch.autograd.grad(
            [GradientEdge(*self.end)],
            [GradientEdge(*self.source), *self.captured],
            [w],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
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

        Without ``deltas`` there are no such terms. The list is emptied on the way: each cotangent
        and each tangent is freed after its last use.
        """
        tangents: dict[Edge, Tensor] = {self.source: u}
        last = self.steps[-1].node
        for (node, rule, sources, targets, places), ended in zip(
            self.steps, self._last or self._last_uses(), strict=True
        ):
            us = tuple([None if s is None else tangents.get(s) for s in sources])
            for edge in ended:
                tangents.pop(edge, None)
            if all([t is None for t in us]):
                continue
            d: Any = None
            if deltas is not None and places:
                d = tuple([deltas[place] for place in places])
                for place in places:
                    deltas[place] = None
                if len(d) == 1:
                    d = d[0]
                elif all([one is None for one in d]):
                    d = None
            if d is None and node is last and not wanted:
                break
            try:
                found: tuple[Any, ...] = ()
                if d is None:
                    out = rule.jvp(node, lead, us)
                else:
                    out, found = rule.push(node, lead, us, d, wanted or node is not last)
            except RuntimeError as error:
                raise _explained(error, node, rule) from error
            for place, extra in zip(targets, found, strict=False):
                if place >= 0 and extra is not None:
                    before = extras[place]
                    extras[place] = extra if before is None else before + extra
            if rule.several:
                for i, t in enumerate(out):
                    tangents[node, i] = t
            elif out is not None:
                # Under autocast, an operation in place may have a result of lower precision.
                tangents[node, rule.output] = out.to(dtype_of_node(node, rule.output))
        return tangents.get(self.end)

    def _last_uses(self) -> list[list[Edge]]:
        seen: set[Any] = {None}
        for step in reversed(self.steps):
            self._last.append([e for e in step.sources if e not in seen])
            seen.update(step.sources)
        self._last.reverse()
        return self._last

    def describe(self) -> list[str]:
        names = []
        for node, rule, *_ in self.steps:
            name = _name(node)
            names.append(f"by autograd: {name}" if isinstance(rule, ByAutograd) else name)
        return names


def _name(node: Any) -> str:
    return type(node).__name__.rstrip("0123456789").removesuffix("Backward").lstrip("_")


def _explained(error: RuntimeError, node: Any, rule: Rule) -> RuntimeError:
    """An error inside a rule, which may speak of shapes that the user did not write."""
    text = str(error)
    if "inplace operation" in text or "second time" in text:  # torch explains these two
        return error
    if isinstance(rule, ByAutograd):
        return RuntimeError(
            f"the second derivative of {_name(node)} is needed, an operation of the model, and "
            f"torch cannot compute it: {text}"
        )
    return RuntimeError(
        f"the chain engine failed in its rule for {_name(node)}, an operation of the model: use "
        f"engine='autograd', and please report the fault. The error is: {text}"
    )


_FIRST = [0]
CHECKPOINT = "tensors are saved under hooks (a checkpoint)"

HIDDEN = {"CppFunction": "TorchScript or an extension has its own derivatives"}


def _walk(end: Edge, source: Edge) -> list[tuple[Any, tuple[Edge | None, ...], list[int]]]:
    """The nodes that depend on the source, in the order of the forward.

    Each with its inputs that depend on the source, and the numbers of its outputs that are used.
    """
    found: dict[Any, Any] = {None: None}  # by node: its entry, or None
    left = [end[0]]
    while left:
        node = left[-1]
        inputs = node.next_functions
        ready = True
        for e in inputs:
            if e[0] not in found and e != source:
                left.append(e[0])
                ready = False
        if not ready:
            continue
        left.pop()
        if node in found:
            continue
        step: Any = None
        for e in inputs:
            if e == source or found[e[0]]:
                sources = tuple([e if e == source or found[e[0]] else None for e in inputs])
                step = node, sources, []
                break
        found[node] = step
        if step is not None:
            for e in sources:
                if e is not None and e != source:
                    found[e[0]][2].append(e[1])
    if found.get(end[0]) is None:
        raise Unsupported("the output of the model does not depend on x")
    found[end[0]][2].append(end[1])
    return [step for step in found.values() if step is not None]
