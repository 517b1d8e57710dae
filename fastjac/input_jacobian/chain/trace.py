"""A sweep as straight-line code: the calls of torch that it made, as one generated function.

A sweep over a graph makes the same calls in every run with the same `signature`. `trace` runs it
once, under a mode that sees each call below autograd, vmap and autocast, and generates a Python
function that makes these calls alone (`generate`). What is saved is everything between two calls:
walking the graph, reading nodes, choosing rules, autograd, vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from fastjac.activations import IDS
from fastjac.input_jacobian.chain.activations import suffix_for
from fastjac.input_jacobian.chain.calls import Call, Calls, Memory, Value, root_of
from fastjac.input_jacobian.chain.generate import generate
from fastjac.ops.registration import raw
from fastjac.torch_private import TorchDispatchMode, tree_leaves

aten = torch.ops.aten

Outputs = list[Any]  # tensors and None


class Untraceable(RuntimeError):
    """A sweep that cannot be repeated from the tensors of another run alone."""


# These depend on numbers.
_REFUSED = ("aten::_local_scalar_dense", "aten::nonzero")


class _Tracer(TorchDispatchMode):
    """Records the calls. Values are numbered; the inputs come first.

    Where a kernel of ours takes the place of torch's, the traced sweep runs it too, so that a
    program can be compared with its sweep bit for bit.

    Of the results it keeps none alive but the argument of a cosine, so that a traced sweep needs no
    more memory than one that is not.
    """

    def __init__(self, tensors: Sequence[Tensor], given: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.failure = ""
        self.numbers: Any = WeakIdKeyDictionary()  # by tensor
        self.cosines: Any = WeakIdKeyDictionary()  # z by cos z
        self.memory: list[Memory | None] = []  # by number
        self.known: dict[Memory, TensorWeakRef] = {}
        # Of the tensors of the run, those that begin at one address share memory in each run: the
        # signature says so.
        for t in tensors:
            self._add(t, t.data_ptr())
        for i, one in enumerate(given):
            self._add(one, -1 - i)
        self.inputs = len(self.memory)
        self.roots = {m.root for m in self.memory if m is not None}

    def _add(self, t: Any, root: Any) -> int:
        number = len(self.memory)
        if not isinstance(t, Tensor):
            self.memory.append(None)
            return number
        memory = _memory(t, root)
        self.memory.append(memory)
        self.numbers.setdefault(t, number)
        if self._at(memory) is None:
            self.known[memory] = TensorWeakRef(t)
        return number

    def _at(self, memory: Memory) -> Any:
        """The tensor that is known to be there, if it is alive."""
        known = self.known.get(memory)
        return None if known is None else known()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.gelu_backward.default:
            func, args, kwargs = _gelu_backward(func, args, kwargs)
        elif func is aten.mul.Tensor:
            func, args = self._sine_backward(func, args)
        found = func(*args, **kwargs)
        if func is aten.cos.default:
            self.cosines[found] = args[0]
        elif func._schema.is_mutable:
            self.cosines.clear()  # one of them, or what it is of, may be another number now
        if not self.failure:
            try:
                self._record(func, args, kwargs, found)
            except Untraceable as error:
                self.failure = str(error)
        return found

    def _sine_backward(self, func: Any, args: Any) -> Any:
        """The call, or, if a factor is a cosine, one kernel of ours in the place of both.

        On a CPU, it takes 160 in place of 366 µs for 1024x256 numbers in float32 (AMD EPYC,
        ``python -m benchmarks.host_costs``). In float64 torch's cosine is the faster one.
        """
        for g, cosine in (args, args[::-1]):
            z = self.cosines.get(cosine) if isinstance(cosine, Tensor) else None
            if z is None or not z.is_cpu or z.dtype == torch.float64:
                continue
            if (op := _act(z, g)) is not None:
                return op, (z, g, 1, IDS["sine"], [1.0])
        return func, args

    def _record(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        name = func._schema.name
        if name in _REFUSED or (name == "aten::as_strided" and not self._made_here(args)):
            raise Untraceable(f"it calls {name}")
        tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        args = tuple(self._argument(a) for a in args)
        kwargs = {key: self._argument(a) for key, a in kwargs.items()}
        if func.is_view or name == "aten::lift_fresh":
            # A view of the same numbers in the same order is that tensor, ``t`` of ``t`` for one.
            root = self._root(tensors[0])
            same = self._at(_memory(found, root)) if isinstance(found, Tensor) else None
            if same is not None:
                self.numbers[found] = self.numbers[same]
                return
        call = Call(func, args, kwargs, [])
        if any([root_of(self.memory, n) in self.roots for n in call.written()]):
            raise Untraceable(f"it calls {name} on a tensor that was saved")
        # Some operations that are no views share an operand's memory, ``_unsafe_view`` for one.
        shared = {_storage(t): self._root(t) for t in tensors}
        results = found if isinstance(found, tuple | list) else (found,)
        self.calls.append(call._replace(results=[self._result(t, shared) for t in results]))

    def _root(self, t: Tensor) -> Any:
        memory = self.memory[self.of(t)]
        assert memory is not None
        return memory.root

    def _made_here(self, args: Any) -> bool:
        """Whether ``as_strided`` is of new flat memory, which is the same in each run."""
        t, number = args[0], self.numbers.get(args[0], 0)
        flat = t.dim() == 1 and t.is_contiguous() and t.storage_offset() == 0
        return number >= self.inputs and flat and len(args) == 4 and args[3] == 0

    def _result(self, t: Any, shared: dict[int, Any]) -> int:
        known = self.numbers.get(t) if isinstance(t, Tensor) else None
        if known is not None:
            return known
        new = ("result", len(self.memory))
        return self._add(t, shared.get(_storage(t), new) if isinstance(t, Tensor) else new)

    def _argument(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return Value(self.of(a))
        if isinstance(a, tuple | list):
            return [self._argument(part) for part in a]
        return a

    def of(self, t: Tensor) -> int:
        """The number of a tensor. Autograd may have wrapped the memory of an input anew."""
        number = self.numbers.get(t)
        if number is None:
            # That memory begins at the address of the tensor of the run.
            same = None if t.is_sparse else self._at(_memory(t, t.data_ptr()))
            if same is None:
                raise Untraceable(f"it uses a tensor of shape {tuple(t.shape)} of unknown origin")
            number = self.numbers[same]
        return number


def _gelu_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The call, or one of our kernel in its place.

    On a CPU, that of torch starts oneDNN, which takes 13 µs for a tensor of a few elements; ours
    takes 4 µs (AMD EPYC, ``python -m benchmarks.host_costs``).
    """
    g, z = args[:2]
    op = _act(z, g) if z.is_cpu else None
    if op is None:
        return func, args, kwargs
    fn = "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"
    return op, (z, g, 1, IDS[fn], []), {}


def _act(z: Tensor, g: Any) -> Any:
    """The op ``act`` of z with the factor g, or None if there is no kernel for them."""
    if not isinstance(g, Tensor) or _memory(z, None)[2:] != _memory(g, None)[2:]:
        return None
    suffix = suffix_for(z.device.type, z.dtype)
    return None if suffix is None else raw("act" + suffix)


def _memory(t: Tensor, root: Any) -> Memory:
    return Memory(root, int(t.storage_offset()), t.shape, t.stride(), t.dtype)


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr()
    except RuntimeError:  # one of torch's zeros without memory
        return -id(t)


def trace(
    name: str,
    tensors: Sequence[Tensor],
    given: list[Tensor | None],
    sweep: Callable[[list[Any]], Outputs],
) -> Callable[..., Outputs]:
    """The function that repeats ``sweep(given)``, up to the rounding of sums (`add_products`).

    The sweep runs once, and its results are dropped.

    Args:
        name: of the function.
        tensors: the other tensors that the sweep uses.
        given: its arguments.
        sweep: returns tensors and None. It may empty the list that it is given.

    Returns:
        A function ``(tensors, given)`` that returns outputs. It empties the two lists, and drops
        each tensor after its last use.

    Raises:
        Untraceable: with the outputs of the sweep as ``error.args[1]``.
    """
    groups = [[t is not None for t in group] for group in (tensors, given)]
    # As other objects, since one may be a tensor of the run too, in this run alone.
    given = [None if t is None else t.detach() for t in given]
    tracer = _Tracer(tensors, given)
    with tracer:
        outputs = sweep(given)
    try:
        if tracer.failure:
            raise Untraceable(tracer.failure)
        numbers = [None if t is None else tracer.of(t) for t in outputs]
        traced = Calls(tracer.calls, tracer.memory, tracer.inputs)
        return generate(name, groups, traced, numbers)
    except Untraceable as error:
        raise Untraceable(str(error), outputs) from error
