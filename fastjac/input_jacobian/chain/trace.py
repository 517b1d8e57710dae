"""A sweep as straight-line code: the calls of torch that it made, as one generated function.

A sweep over a graph makes the same calls in every run with the same `signature`. `trace` runs it
once, under a mode that sees each call below autograd, vmap and autocast, and generates a Python
function that makes these calls alone. What is saved is everything between two calls: walking the
graph, reading nodes, choosing rules, autograd, vmap.

The function is Python, not a program for an interpreter in C++. On one core of an AMD EPYC, a
product of two 4×4 matrices takes 1.2 µs when called from generated code and 0.9 µs when called from
C++ through the stable ABI of torch; and that ABI cannot pass a ``Scalar``, which ``add``,
``addmm``, ``threshold_backward`` and many others take.
"""

from __future__ import annotations

import linecache
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import IDS
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import raw
from fastjac.torch_private import TorchDispatchMode

Outputs = list[Any]  # tensors and None


class Untraceable(RuntimeError):
    """A sweep that cannot be repeated from the tensors of another run alone."""


# The functions of torch that call an operation with the least overhead.
_HOMES = (torch, torch._C._nn, torch.Tensor)

# These depend on numbers, or on the strides of the memory of one run.
_REFUSED = ("aten::_local_scalar_dense", "aten::nonzero", "aten::as_strided")


class _Tracer(TorchDispatchMode):
    """Records the calls. Values are numbered; the inputs come first."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[int]]] = []
        self.failure = ""
        self.number: dict[int, int] = {}  # by the id of the tensor
        self.by_memory: dict[Any, int] = {}
        self.kept: list[Tensor] = []  # so that no id is used twice
        self.inputs = len(inputs)
        for i, t in enumerate(inputs):
            self.number.setdefault(id(t), i)
            self.by_memory.setdefault(_memory(t), i)
            self.kept.append(t)

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
        if name in _REFUSED:
            raise Untraceable(f"it calls {name}")
        args = tuple(self._argument(a) for a in args)
        kwargs = {key: self._argument(a) for key, a in kwargs.items()}
        if isinstance(found, Tensor) and (func.is_view or name == "aten::lift_fresh"):
            # A view of the same numbers in the same order is that tensor, ``t`` of ``t`` for one.
            known = self.by_memory.get(_memory(found))
            if known is not None:
                self.number[id(found)] = known
                self.kept.append(found)
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
        self.calls.append((func, args, kwargs, [self._result(t) for t in results]))

    def _result(self, t: Any) -> int:
        if not isinstance(t, Tensor):
            return -1
        number = self.number.setdefault(id(t), self.inputs + len(self.kept))
        self.by_memory.setdefault(_memory(t), number)
        self.kept.append(t)
        return number

    def _argument(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return Value(self.of(a))
        if isinstance(a, tuple | list):
            return [self._argument(part) for part in a]
        return a

    def of(self, t: Tensor) -> int:
        """The number of a tensor. Autograd may have wrapped the memory of an input anew."""
        number = self.number.get(id(t))
        if number is None:
            number = self.by_memory.get(_memory(t))
        if number is None:
            raise Untraceable(f"it uses a tensor of shape {tuple(t.shape)} of unknown origin")
        return number


class Value:
    """A tensor among the arguments of a call."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"v{self.number}"


def _gelu_backward(func: Any, args: Any, kwargs: Any) -> Any:
    """The call, or one of our kernel in its place.

    On a CPU, that of torch starts oneDNN, which takes 14 µs for any tensor; ours takes 3 µs.
    """
    g, z = args[:2]
    alike = z.stride() == g.stride() and z.dtype == g.dtype
    if not z.is_cpu or not alike or OPS["act"].select("auto", z.device, z.dtype) != "cpu":
        return func, args, kwargs
    fn = "gelu_tanh" if kwargs.get("approximate") == "tanh" else "gelu"
    return raw("act"), (z, g, 1, IDS[fn], []), {}


def _memory(t: Tensor) -> Any:
    return t.data_ptr(), t.shape, t.stride(), t.dtype


def trace(
    name: str,
    tensors: Sequence[Tensor],
    given: Sequence[Tensor | None],
    sweep: Callable[..., Outputs],
) -> tuple[Outputs, Callable[..., Outputs]]:
    """Runs ``sweep(*given)``; returns the outputs, and the function that repeats it.

    Args:
        name: of the function.
        tensors: the other tensors that the sweep uses.
        given: its arguments.
        sweep: returns tensors and None.

    Returns:
        The outputs, and a function ``(tensors, given)`` that returns outputs. It empties the two
        lists, and drops each tensor after its last use.

    Raises:
        Untraceable: with the outputs as ``error.args[1]``.
    """
    tracer = _Tracer([t for t in (*tensors, *given) if t is not None])
    with tracer:
        outputs = sweep(*given)
    try:
        if tracer.failure:
            raise Untraceable(tracer.failure)
        numbers = [None if t is None else tracer.of(t) for t in outputs]
        return outputs, _generate(name, (tensors, given), tracer.calls, numbers)
    except Untraceable as error:
        raise Untraceable(str(error), outputs) from error


def _generate(
    name: str, inputs: Any, calls: list[Any], outputs: list[int | None]
) -> Callable[..., Outputs]:
    """The function of the calls whose results are used."""
    calls = _used(calls, outputs)
    last: dict[int, int] = {}  # the call that uses a value last
    for i, (_, args, kwargs, _) in enumerate(calls):
        for number in _values((args, *kwargs.values())):
            last[number] = i
    for output in outputs:
        if output is not None:
            last[output] = len(calls)
    names: dict[str, Any] = {}
    groups = [f"g{i}" for i in range(len(inputs))]
    lines = []
    first = 0
    for group, tensors in zip(groups, inputs, strict=True):
        places = []
        for t in tensors:
            places.append("_" if t is None or first not in last else f"v{first}")
            first += t is not None
        if places:
            lines.append(f"[{', '.join(places)}] = {group}; {group}.clear()")
    lines.append("_ = None")
    for i, (func, args, kwargs, results) in enumerate(calls):
        called = f"f{_constant(names, 'f', _function(func, args))}"
        given = [_written(names, a) for a in args]
        given += [f"{key}={_written(names, a)}" for key, a in kwargs.items()]
        call = f"{called}({', '.join(given)})"
        targets = [f"v{r}" if r in last else "_" for r in results]
        assigned = (", ".join(targets) + ",") if _several(func) else targets[0]
        lines.append(f"{assigned} = {call}")
        ended = sorted({n for n in _values((args, *kwargs.values())) if last[n] == i})
        if ended:
            lines.append("del " + ", ".join(f"v{n}" for n in ended))
    lines.append(f"return [{', '.join('None' if n is None else f'v{n}' for n in outputs)}]")
    source = f"def {name}({', '.join(groups)}):\n" + "".join(f"    {line}\n" for line in lines)
    filename = f"<fastjac {name} {id(calls)}>"
    linecache.cache[filename] = len(source), None, source.splitlines(True), filename
    exec(compile(source, filename, "exec"), names)
    function: Any = names[name]
    function.source = source
    return function


def _used(calls: list[Any], outputs: list[int | None]) -> list[Any]:
    """Without the calls whose results nothing uses."""
    needed = {n for n in outputs if n is not None}
    found = []
    for call in reversed(calls):
        func, args, kwargs, results = call
        if func._schema.is_mutable or needed.intersection(results):
            needed.update(_values((args, *kwargs.values())))
            found.append(call)
    return found[::-1]


def _values(arguments: Any) -> list[int]:
    if isinstance(arguments, Value):
        return [arguments.number]
    if isinstance(arguments, tuple | list):
        return [n for a in arguments for n in _values(a)]
    return []


def _several(func: Any) -> bool:
    returns = func._schema.returns
    return len(returns) > 1 or (len(returns) == 1 and returns[0].type.kind() == "ListType")


def _function(func: Any, args: Any) -> Callable[..., Any]:
    """What calls an overload. The functions of torch take a third of a microsecond less."""
    namespace, name = func._schema.name.split("::")
    optional = any(isinstance(a, list) and None in a for a in args)  # which they do not take
    if namespace == "aten" and not optional:
        for home in _HOMES:
            found = getattr(home, name, None)
            if found is not None and type(found).__name__ in _BUILTIN:
                return found
    return func._op


_BUILTIN = ("builtin_function_or_method", "method_descriptor")


def _constant(names: dict[str, Any], prefix: str, value: Any) -> int:
    for i in range(len(names)):
        known = names.get(f"{prefix}{i}", names)
        if known is names:
            names[f"{prefix}{i}"] = value
            return i
        if known is value:
            return i
    names[f"{prefix}{len(names)}"] = value
    return len(names) - 1


def _written(names: dict[str, Any], a: Any) -> str:
    """An argument as source."""
    if isinstance(a, list):
        return f"[{', '.join(_written(names, part) for part in a)}]"
    simple = a is None or isinstance(a, bool | int | str | Value)
    if simple or (isinstance(a, float) and math.isfinite(a)):
        return repr(a)
    return f"c{_constant(names, 'c', a)}"
