"""The signature of a run: all that a sweep over its autograd graph depends on, but the numbers.

Two runs with equal signatures have graphs with the same operations, options, shapes, strides and
dtypes, connected in the same way, and share memory between the same tensors. A sweep therefore
makes the same calls of torch in both, and what was traced in one can be run with the tensors of the
other (`program`). Everything is read from the graph of the run itself, by csrc/python/record.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import torch_private
from fastjac.ops.autograd import Function

_PLAIN = (Tensor, nn.Parameter)


def number_bytes(t: Tensor) -> bytes:
    """The memory of a number on the CPU. Under a mode, ``item()`` of one of Python's raises."""
    return ctypes.string_at(t.data_ptr(), t.element_size())


class Unreadable(RuntimeError):
    """A graph whose operations do not show all that they hold."""


# How the nodes of one type are read: whether they are leaves, or of fastjac; the names of what they
# have saved, as it is and as tensors, and of their options; whether their shapes are read, and
# whether more than one constant among the operands, whose sizes they do not show, is refused.
Kind = tuple[bool, bool, tuple[str, ...], tuple[str, ...], tuple[str, ...], bool, bool]


def _kind_of(node: Any) -> Kind:
    forward, name = getattr(node, "_forward_cls", None), type(node).__name__
    leaf = name == "AccumulateGrad"
    own = forward is not None and issubclass(forward, Function)
    if not (leaf or own or name[-1:].isdigit()):
        # Torch generates the nodes with a numbered name, and shows what they save, but the sizes of
        # the operands of cat and block_diag.
        raise Unreadable(f"{name} does not show all that it holds")
    if name == "BlockDiagBackward0":
        raise Unreadable("torch.block_diag does not show the shapes of its operands")
    if leaf or own:
        return leaf, own, (), (), (), False, False
    raw = torch_private.saved_names(node)
    tensors = [saved.removeprefix("_raw") for saved in raw]
    options = [saved for saved in dir(node) if saved.startswith("_saved_") and saved not in tensors]
    # Shapes follow from those of the tensors, unless an operation has saved none (a view).
    shapes = not tensors and name != "TBackward0"
    names = tuple(raw), tuple(tensors), tuple(map(sys.intern, options))
    return leaf, own, *names, shapes, name == "CatBackward0"


_kinds: dict[type, Kind] = {}


class Signature:
    """The signature of the graph from ``x`` to ``output``, and the tensors of the run.

    Attributes:
        key: hashable; equal for runs with equal signatures.
        tensors: x and the saved tensors, in the order of ``key``.
        leaves: the leaves that require grad, but x.
        leaf_nodes: their nodes, where the gradients arrive.
        source: the node of x and the number of its output.
        private: whether nobody else can see the tensors between x and the output, as far as the
            graph shows it. If a part of the graph existed before the run (the number of its nodes
            is less than ``start``), or the model has kept a hidden tensor, its gradient may be
            asked for. Nor if a leaf has hooks, which each backward through the graph would run.
    """

    def __init__(self, x: Tensor, output: Tensor, start: int) -> None:
        run = x, x.grad_fn, x.output_nr, output.grad_fn, output.output_nr, start
        while True:
            try:
                found = read(*run, _kinds, _PLAIN, _alone())
            except RuntimeError as error:  # of torch: a tensor that was freed, or is not dense
                raise Unreadable(str(error)) from error
            if found[0] is not None:
                break
            if isinstance(found[1], str):
                raise Unreadable(found[1])
            _kinds[type(found[1])] = _kind_of(found[1])
        self.key, self.tensors, self.leaves, self.leaf_nodes, node, self.private = found
        self.source = node, x.output_nr


class _Reader:
    """What `read` does, in Python."""

    def __init__(self, x: Tensor, source: Any, start: int, plain: Any, alone: int) -> None:
        self.x, self.source, self.start, self.plain, self.alone = x, source, start, plain, alone
        self.key: list[Any] = []
        self.tensors: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.leaf_nodes: list[Any] = []
        self.private = True
        self.memory: dict[int, int] = {}  # by address: the place of the first tensor there

    def walk(self, end: Any, kinds: dict[type, Kind]) -> Any:
        """Reads the graph; returns a node of an unknown type."""
        key = self.key
        nodes, numbers = [end], {end: 0}
        for node in nodes:  # which grows
            kind = kinds.get(type(node))
            if kind is None:
                return node
            key.append(type(node))
            if kind[0]:
                self.leaf(node)
                continue
            if kind[6] and sum([edge[0] is None for edge in node.next_functions]) > 1:
                raise Unreadable("torch.cat has several operands that do not require grad")
            for edge in node.next_functions:
                following = edge[0]
                if following is None:
                    key.append(-1)
                elif edge == self.source:
                    key.append(-2)
                else:
                    number = numbers.setdefault(following, len(nodes))
                    if number == len(nodes):
                        nodes.append(following)
                    key.append(number)
                    if edge[1]:
                        key.append(edge[1:])
            self.inner(node, kind)
        return None

    def leaf(self, node: Any) -> None:
        leaf = node.variable
        if leaf is self.x:
            self.source = self.source[0] or node, self.source[1]
            self.key.append(-2)
            return
        if type(leaf) not in self.plain:
            raise Unreadable("a leaf of the graph is of a subclass of Tensor")
        if leaf._backward_hooks is not None:
            self.private = False
        self.leaves.append(leaf)
        self.leaf_nodes.append(node)
        self.key += leaf.shape, leaf.dtype, leaf.device

    def inner(self, node: Any, kind: Kind) -> None:
        _, own, raw, tensors, options, shapes, _ = kind
        key = self.key
        if node._sequence_nr() < self.start:
            self.private = False
        for name in raw:
            saved = getattr(node, name)
            for one in saved if type(saved) is tuple else (saved,):
                if one.unpack_hook is not None:
                    raise Unreadable("tensors are saved under hooks (a checkpoint)")
        for name in tensors:
            self.saved(getattr(node, name))
        key += [getattr(node, name) for name in options]
        if own:
            self.saved(node.saved_tensors)
            key.append(tuple(vars(node).items()))
        if shapes:
            for output in node._input_metadata:
                key += output.dtype, tuple(output.shape)

    def saved(self, found: Any) -> None:
        """A tensor, None or a tuple of such."""
        if found is None:
            self.key.append(None)
        elif type(found) is tuple:
            for part in found:
                self.saved(part)
        else:
            self.tensor(found)

    def tensor(self, t: Tensor) -> None:
        if type(t) not in self.plain:
            raise Unreadable("a tensor of the graph is of a subclass of Tensor")
        # The arguments of `saved`, of this method and of `getrefcount` are three references.
        if self.private and t is not self.x and getrefcount(t) > self.alone + 3:
            again = sum([t is other for other in self.tensors])  # several operations may save it
            if t.grad_fn is not None and getrefcount(t) > self.alone + 3 + again:
                self.private = False
        key, place = self.key, len(self.tensors)
        key += self.memory.setdefault(t.data_ptr(), place), t.shape, t.stride(), t.dtype
        self.tensors.append(t)
        if not t.shape and t.is_cpu and not t.requires_grad:
            key.append(number_bytes(t))  # a number of Python is a constant of a trace


def read_in_python(*run: Any) -> Any:
    """`read`, if the extension module was not built."""
    x, node, nr, end, end_nr, start, kinds, plain, alone = run
    reader = _Reader(x, (node, nr), start, plain, alone)
    reader.key.append(end_nr)
    try:
        reader.tensor(x)
        unknown = reader.walk(end, kinds)
    except Unreadable as error:
        return None, str(error)
    if unknown is not None:
        return None, unknown
    found = tuple(reader.key), reader.tensors, reader.leaves, reader.leaf_nodes
    return *found, reader.source[0], reader.private


def references_in_python(node: Any, name: str) -> int:
    """The references to an attribute of a node, while the caller holds one."""
    found = getattr(node, name)
    return getrefcount(found) - 1


def keeps_in_python(model: nn.Module, kind: Any) -> bool:
    """Whether an attribute in the model holds a computed tensor, or a forward hook may do so."""
    for module in model.modules():
        if module._forward_hooks:
            return True
        if any([_holds(value, kind) for value in vars(module).values()]):
            return True
    return False


def _holds(value: Any, kind: Any) -> bool:
    """Whether a value, or one in it if it is a list, a tuple or a dictionary, was computed."""
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple):
        parts = [value]
    return any(type(part) is kind and part.grad_fn is not None for part in parts)


try:
    from fastjac._record import (  # type: ignore[import-not-found]
        keeps,
        read,
        references,
    )
except ImportError:
    read, keeps, references = read_in_python, keeps_in_python, references_in_python


def keeps_hidden(model: Any) -> bool:
    """Whether a model has kept a hidden tensor, whose gradient may then be asked for.

    Of a function, what it closes over is looked at, and not the global variables.
    """
    if isinstance(model, nn.Module):
        return keeps(model, Tensor)
    closed = [cell.cell_contents for cell in getattr(model, "__closure__", None) or ()]
    for value in [*closed, getattr(model, "__self__", None)]:
        if (keeps if isinstance(value, nn.Module) else _holds)(value, Tensor):
            return True
    return False


@functools.cache
def _alone() -> int:
    """The references to a saved tensor if only the graph, and who has just read it, hold it."""
    with torch.inference_mode(False), torch.enable_grad():
        node = torch.ones(1, device="cpu", requires_grad=True).exp().sin().grad_fn
    return references(node, "_saved_self")
