"""A sweep as straight-line code: the calls of torch that it made, as one generated function.

A sweep over a graph makes the same calls in every run with the same `signature`. `trace` runs it
once, under a mode that sees each call below autograd, vmap and autocast, and generates a Python
function that makes these calls alone. What is saved is everything between two calls: walking the
graph, reading nodes, choosing rules, autograd, vmap.

The function is Python, not a program for an interpreter in C++: most of the time is that of the
operations themselves, and the stable ABI of torch cannot pass a ``Scalar``, which ``add``,
``addmm``, ``threshold_backward`` and many others take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from fastjac.activations import IDS
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import raw
from fastjac.torch_private import TorchDispatchMode

Outputs = list[Any]  # tensors and None


class Untraceable(RuntimeError):
    """A sweep that cannot be repeated from the tensors of another run alone."""


# The functions of torch that call an operation with the least overhead.
_HOMES = (torch, torch.Tensor)

# These depend on numbers.
_REFUSED = ("aten::_local_scalar_dense", "aten::nonzero")


class _Tracer(TorchDispatchMode):
    """Records the calls. Values are numbered; the inputs come first.

    It keeps no tensor alive, so that a traced sweep needs as much memory as one that is not.
    """

    def __init__(self, tensors: Sequence[Tensor], given: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.failure = ""
        self.numbers: Any = WeakIdKeyDictionary()  # by tensor
        self.memory: list[Any] = []  # by number: the storage, and what `_memory` returns
        self.known: dict[Any, TensorWeakRef] = {}  # by root and what `_memory` returns
        # Two values are views of the same numbers in each run if they have one root. Of the tensors
        # of the run, those that begin at one address have: the signature says so.
        self.roots: list[Any] = []
        for t in tensors:
            self._add(t, t.data_ptr())
        for i, one in enumerate(given):
            self._add(one, -1 - i)
        self.inputs = len(self.memory)

    def _add(self, t: Any, root: Any) -> int:
        number = len(self.memory)
        self.roots.append(root)
        if not isinstance(t, Tensor):
            self.memory.append(None)
            return number
        memory = _memory(t)
        self.memory.append((_storage(t), memory))
        self.numbers.setdefault(t, number)
        if self._at(root, memory) is None:
            self.known[root, memory] = TensorWeakRef(t)
        return number

    def _at(self, root: Any, memory: Any) -> Any:
        """The tensor that is known to have this root and memory, if it is alive."""
        known = self.known.get((root, memory))
        return None if known is None else known()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.gelu_backward.default:
            func, args, kwargs = _gelu_backward(func, args, kwargs)
        found = func(*args, **kwargs)
        if not self.failure:
            try:
                self._record(func, args, kwargs, found)
            except Untraceable as error:
                self.failure = str(error)
        return found

    def _record(self, func: Any, args: Any, kwargs: Any, found: Any) -> None:
        name = func._schema.name
        if name in _REFUSED or (name == "aten::as_strided" and not self._made_here(args)):
            raise Untraceable(f"it calls {name}")
        args = tuple(self._argument(a) for a in args)
        kwargs = {key: self._argument(a) for key, a in kwargs.items()}
        root = None
        if func.is_view or name == "aten::lift_fresh":
            root = self.roots[args[0].number]
            # A view of the same numbers in the same order is that tensor, ``t`` of ``t`` for one.
            same = self._at(root, _memory(found)) if isinstance(found, Tensor) else None
            if same is not None:
                self.numbers[found] = self.numbers[same]
                return
        if func._schema.is_mutable:
            written = [
                value
                for value, argument in zip(args, func._schema.arguments, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            if any(isinstance(v, Value) and v.number < self.inputs for v in written):
                raise Untraceable(f"it calls {name} on a tensor that was saved")
        results = found if isinstance(found, tuple | list) else (found,)
        self.calls.append(Call(func, args, kwargs, [self._result(t, root) for t in results]))

    def _made_here(self, args: Any) -> bool:
        """Whether ``as_strided`` is of new flat memory, which is the same in each run."""
        t, number = args[0], self.numbers.get(args[0], 0)
        flat = t.dim() == 1 and t.is_contiguous() and t.storage_offset() == 0
        return number >= self.inputs and flat and len(args) == 4 and args[3] == 0

    def _result(self, t: Any, root: Any) -> int:
        known = self.numbers.get(t) if isinstance(t, Tensor) else None
        if known is not None:
            return known
        return self._add(t, ("result", len(self.memory)) if root is None else root)

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
            same = None if t.is_sparse else self._at(t.data_ptr(), _memory(t))
            if same is None:
                raise Untraceable(f"it uses a tensor of shape {tuple(t.shape)} of unknown origin")
            number = self.numbers[same]
        return number


class Call(NamedTuple):
    func: Any  # the overload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int]

    def uses(self) -> list[int]:
        return _values((self.args, *self.kwargs.values()))


class Value:
    """A tensor among the arguments of a call."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"v{self.number}"


def _gelu_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The call, or one of our kernel in its place.

    On a CPU, that of torch starts oneDNN, which takes 13 µs for a tensor of a few elements; ours
    takes 4 µs (AMD EPYC, ``python -m benchmarks.host_costs``).
    """
    g, z = args[:2]
    alike = z.stride() == g.stride() and z.dtype == g.dtype
    if not z.is_cpu or not alike or OPS["act"].select("auto", z.device, z.dtype) != "cpu":
        return func, args, kwargs
    fn = "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"
    return raw("act"), (z, g, 1, IDS[fn], []), {}


def _memory(t: Tensor) -> Any:
    return _storage(t), t.storage_offset(), t.shape, t.stride(), t.dtype


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
) -> tuple[Outputs, Callable[..., Outputs]]:
    """Runs ``sweep(given)``; returns the outputs, and the function that repeats it.

    Args:
        name: of the function.
        tensors: the other tensors that the sweep uses.
        given: its arguments, a list that it may empty.
        sweep: returns tensors and None.

    Returns:
        The outputs, and a function ``(tensors, given)`` that returns outputs. It empties the two
        lists, and drops each tensor after its last use.

    Raises:
        Untraceable: with the outputs as ``error.args[1]``.
    """
    groups = [[t is not None for t in group] for group in (tensors, given)]
    # As other objects, since one may be a tensor of the run too, in this run alone.
    given[:] = [None if t is None else t.detach() for t in given]
    tracer = _Tracer(tensors, given)
    with tracer:
        outputs = sweep(given)
    try:
        if tracer.failure:
            raise Untraceable(tracer.failure)
        numbers = [None if t is None else tracer.of(t) for t in outputs]
        return outputs, _generate(name, groups, tracer, numbers)
    except Untraceable as error:
        raise Untraceable(str(error), outputs) from error


def _generate(
    name: str, groups: list[list[bool]], tracer: _Tracer, outputs: list[Any]
) -> Callable[..., Outputs]:
    """The function of the calls whose results are used."""
    calls = _used(tracer.calls, outputs)
    last = _last_uses(calls, outputs)
    owners = _Owners(tracer.memory, last, tracer.inputs)
    names: dict[str, Any] = {}
    lines = []
    first = 0
    for i, group in enumerate(groups):
        numbers = range(first, first + len(group))
        places = [f"v{n}" if n in last else "_" for n in numbers]
        if places:
            lines.append(f"[{', '.join(places)}] = g{i}; g{i}.clear()")
        first += len(group)
    lines.append("_ = None")
    for i, call in enumerate(calls):
        called, args = owners.in_place(call, i) or (_function(call), call.args)
        given = [_written(names, a) for a in args]
        given += [f"{key}={_written(names, a)}" for key, a in call.kwargs.items()]
        targets = [f"v{r}" if r in last else "_" for r in call.results]
        assigned = (", ".join(targets) + ",") if _several(call.func) else targets[0]
        lines.append(f"{assigned} = {_constant(names, 'f', called)}({', '.join(given)})")
        ended = sorted({n for n in call.uses() if last[n] == i} - {*call.results})
        if ended:
            lines.append("del " + ", ".join(f"v{n}" for n in ended))
    lines.append(f"return [{', '.join('None' if n is None else f'v{n}' for n in outputs)}]")
    source = f"def {name}(g0, g1):\n" + "".join(f"    {line}\n" for line in lines)
    exec(compile(source, f"<fastjac {name}>", "exec"), names)
    function: Any = names[name]
    function.source = source
    return function


def _used(calls: list[Call], outputs: list[Any]) -> list[Call]:
    """Without the calls whose results nothing uses."""
    needed = {*outputs}
    found = []
    for call in reversed(calls):
        if call.func._schema.is_mutable or needed.intersection(call.results):
            needed.update(call.uses())
            found.append(call)
    return found[::-1]


def _last_uses(calls: list[Call], outputs: list[Any]) -> dict[int, int]:
    """By value: the call that uses it last; the number of calls if it is an output."""
    last = {number: i for i, call in enumerate(calls) for number in call.uses()}
    return last | {number: len(calls) for number in outputs if number is not None}


class _Owners:
    """Which values may be overwritten, since nobody needs their memory any more. No input may."""

    def __init__(self, memory: list[Any], last: dict[int, int], inputs: int) -> None:
        self.memory = memory
        self.last: dict[Any, float] = {}  # by storage
        for number, found in enumerate(memory):
            if found is not None:
                use = math.inf if number < inputs else last.get(number, -1)
                self.last[found[0]] = max(use, self.last.get(found[0], -1))

    def in_place(self, call: Call, i: int) -> Any:
        """``add_`` and its arguments, if the call is a sum that can be written to a term."""
        if call.func is not torch.ops.aten.add.Tensor or call.kwargs:
            return None
        result = self.memory[call.results[0]]
        for term, other in (call.args, call.args[::-1]):
            if not (isinstance(term, Value) and isinstance(other, Value)):
                return None
            storage, memory = self.memory[term.number]
            alike = memory[2:] == result[1][2:]
            if alike and self.last[storage] == i and self.memory[other.number][0] != storage:
                return torch.Tensor.add_, (term, other)
        return None


def _values(arguments: Any) -> list[int]:
    if isinstance(arguments, Value):
        return [arguments.number]
    if isinstance(arguments, tuple | list):
        return [n for a in arguments for n in _values(a)]
    return []


def _several(func: Any) -> bool:
    returns = func._schema.returns
    return len(returns) > 1 or (len(returns) == 1 and returns[0].type.kind() == "ListType")


_BUILTIN = ("builtin_function_or_method", "method_descriptor")


def _function(call: Call) -> Callable[..., Any]:
    """What calls an overload. The functions of torch have the least overhead."""
    namespace, name = call.func._schema.name.split("::")
    optional = any(isinstance(a, list) and None in a for a in call.args)  # which they do not take
    if namespace == "aten" and not optional:
        for home in _HOMES:
            found = getattr(home, name, None)
            if found is not None and type(found).__name__ in _BUILTIN:
                return found
    return call.func._op


def _constant(names: dict[str, Any], prefix: str, value: Any) -> str:
    """The name of a value in the generated code."""
    for name, known in names.items():
        if known is value and name.startswith(prefix):
            return name
    name = f"{prefix}{len(names)}"
    names[name] = value
    return name


def _written(names: dict[str, Any], a: Any) -> str:
    """An argument as source."""
    if isinstance(a, list):
        return f"[{', '.join(_written(names, part) for part in a)}]"
    simple = a is None or isinstance(a, bool | int | str | Value)
    if simple or (isinstance(a, float) and math.isfinite(a)):
        return repr(a)
    return _constant(names, "c", a)
