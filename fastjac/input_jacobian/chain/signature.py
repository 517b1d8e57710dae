"""The signature of a run: all that a sweep over its autograd graph depends on, but the numbers.

Two runs with equal signatures have graphs with the same operations, options, shapes, strides and
dtypes, connected in the same way, and share memory between the same tensors. A sweep therefore
makes the same calls of torch in both, and what was traced in one can be run with the tensors of the
other (`program`). Everything is read from the graph of the run itself, in about 3 µs an operation.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastjac import torch_private
from fastjac.ops.autograd import Function

_PLAIN = (Tensor, nn.Parameter)


class Unreadable(RuntimeError):
    """A graph whose operations do not show all that they hold."""


class _Kind:
    """How the nodes of one type are read."""

    def __init__(self, node: Any) -> None:
        forward = getattr(node, "_forward_cls", None)
        self.leaf = type(node).__name__ == "AccumulateGrad"
        self.own = forward is not None and issubclass(forward, Function)
        if not (self.leaf or self.own or type(node).__name__[-1:].isdigit()):
            # Torch generates the nodes with a numbered name, and shows all that they save.
            raise Unreadable(f"{type(node).__name__} does not show all that it holds")
        names, raw = [], []
        if not self.own:
            names = [name for name in dir(node) if name.startswith("_saved_")]
            raw = torch_private.saved_names(node)
        tensors = [name.removeprefix("_raw") for name in raw]
        self.hooks, self.tensors = _getter(raw), _getter(tensors)
        self.options = _getter([name for name in names if name not in tensors])
        # Shapes follow from those of the tensors, unless an operation has saved none (a view).
        self.shapes = not (tensors or self.own) and type(node).__name__ != "TBackward0"


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]] | None:
    """A function that returns the attributes with these names; None if there are none."""
    if len(names) == 1:
        one = operator.attrgetter(names[0])
        return lambda node: (one(node),)
    return operator.attrgetter(*names) if names else None


_kinds: dict[type, _Kind] = {}


@functools.cache
def _references_of_graph() -> int:
    """The references to a saved tensor, in `Signature._saved`, if only the graph holds it."""
    with torch.inference_mode(False), torch.enable_grad():
        node: Any = torch.ones(1, device="cpu", requires_grad=True).exp().sin().grad_fn

    def count(found: tuple[Any, ...]) -> int:
        for t in found:
            return getrefcount(t)
        raise AssertionError

    return count(operator.attrgetter("_saved_self", "_saved_self")(node)[:1])


class Signature:
    """The signature of the graph from ``x`` to ``output``, and the tensors of the run.

    Attributes:
        key: hashable; equal for runs with equal signatures.
        tensors: x and the saved tensors, in the order of ``key``.
        leaves: the leaves that require grad, but x.
        leaf_edges: where their gradients arrive.
        private: whether nobody else can see the tensors between x and the output, as far as the
            graph shows it. If a part of the graph existed before the run (the number of its nodes
            is less than ``start``), or the model has kept a hidden tensor, its gradient may be
            asked for.
    """

    def __init__(self, x: Tensor, output: Tensor, start: int) -> None:
        edge = get_gradient_edge(x)
        self.source = edge.node, edge.output_nr
        self.tensors: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.leaf_edges: list[GradientEdge] = []
        self.private = True
        self._x = x
        self._alone = _references_of_graph()
        self._memory: dict[int, int] = {}  # by address: the place of the first tensor there
        self._key: list[Any] = [output.output_nr]
        self._saved((x,))
        self._walk(output.grad_fn, start)
        self.key = tuple(self._key)
        try:
            hash(self.key)
        except TypeError as error:
            raise Unreadable("an operation holds an option that cannot be compared") from error

    def _walk(self, end: Any, start: int) -> None:
        source, key, known = self.source, self._key, _kinds.get
        leaves, edges = self.leaves, self.leaf_edges
        nodes, numbers = [end], {end: 0}
        for node in nodes:  # which grows
            kind = known(type(node))
            if kind is None:
                kind = _kinds[type(node)] = _Kind(node)
            key.append(type(node))
            if kind.leaf:
                leaf = node.variable
                if type(leaf) not in _PLAIN:
                    raise Unreadable(f"a leaf of the graph is {type(leaf).__name__}")
                leaves.append(leaf)
                edges.append(GradientEdge(node, 0))
                key += leaf.shape, leaf.dtype, leaf.device
                continue
            for edge in node.next_functions:
                following = edge[0]
                if following is None:
                    key.append(-1)
                elif edge == source:
                    key.append(-2)
                else:
                    number = numbers.get(following)
                    if number is None:
                        number = numbers[following] = len(nodes)
                        nodes.append(following)
                    key.append(number)
                    if edge[1]:
                        key.append(edge)
            if node._sequence_nr() < start:
                self.private = False
            if kind.hooks is not None and kind.tensors is not None:
                for raw in kind.hooks(node):
                    for one in raw if type(raw) is tuple else (raw,):
                        if one.unpack_hook is not None:
                            raise Unreadable("tensors are saved under hooks (a checkpoint)")
                self._saved(kind.tensors(node))
            if kind.options is not None:
                key.extend(kind.options(node))
            if kind.own:
                self._saved(node.saved_tensors)
                key.extend(vars(node).items())
            if kind.shapes:
                for output in node._input_metadata:
                    key.append(output.dtype)
                    key.extend(output.shape)

    def _saved(self, found: tuple[Any, ...]) -> None:
        key, memory, tensors, alone = self._key, self._memory, self.tensors, self._alone
        for t in found:
            if type(t) not in _PLAIN:
                if t is None:
                    key.append(None)
                elif type(t) is tuple:
                    self._saved(t)
                else:
                    raise Unreadable(f"a tensor of the graph is {type(t).__name__}")
                continue
            if getrefcount(t) > alone and t.grad_fn is not None and t is not self._x:
                # Several operations may have saved it.
                again = sum([t is other for other in (*tensors, *found)]) - 1
                if getrefcount(t) > alone + again:
                    self.private = False
            key += memory.setdefault(t.data_ptr(), len(tensors)), t.shape, t.stride(), t.dtype
            tensors.append(t)
            if not t.shape and t.is_cpu and not t.requires_grad:
                key.append(t.item())  # a number of Python, which a trace takes for a constant
