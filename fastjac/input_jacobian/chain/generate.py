"""From traced calls of torch to one generated Python function.

The function is Python, not a program for an interpreter in C++: most of the time is that of the
operations themselves, and the stable ABI of torch cannot pass a ``Scalar``, which ``add``,
``addmm``, ``threshold_backward`` and many others take.

Two things are changed on the way. A product that is only added to something becomes one operation
with the sum (`add_products`), which saves a pass over the memory. An operation writes to an operand
that nobody needs any more (`_Owners`), which saves new memory and its page faults.
`benchmarks/NOTES.md` has the gains.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

aten = torch.ops.aten


class Value:
    """A tensor among the arguments of a call, by its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"v{self.number}"


class Memory(NamedTuple):
    """Where the numbers of a value are.

    The root stands for the memory that an input or the result of an operation begins: an address
    or a negative number for inputs, ``("result", n)`` for results. What is no input shares memory
    only with values of its own root, so the memory is free when all of them are.
    """

    root: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def like(self, other: Memory | None) -> bool:
        return other is not None and self[2:] == other[2:]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def transposed(self) -> Memory:
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])


class Call(NamedTuple):
    func: Any  # the overload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int]

    def uses(self) -> list[int]:
        return _values((self.args, *self.kwargs.values()))

    @property
    def writes(self) -> bool:
        return self.func._schema.is_mutable


class Calls(NamedTuple):
    """What was traced. The first ``inputs`` values are those that the function is given."""

    calls: list[Call]
    memory: list[Memory | None]  # by number; None for None among the inputs
    inputs: int


def generate(
    name: str, groups: list[list[bool]], traced: Calls, outputs: list[Any]
) -> Callable[..., list[Any]]:
    """The function of the calls whose results are used.

    Args:
        name: of the function.
        groups: for each list that the function is given, which of its parts are tensors.
        traced: the calls.
        outputs: the numbers that it returns, or None.
    """
    traced = add_products(traced, outputs)
    calls = _used(traced.calls, outputs)
    last = _last_uses(calls, outputs)
    owners = _Owners(traced, last)
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
        in_place = owners.in_place(call, i)
        called, args, kwargs = in_place or (_function(call), call.args, call.kwargs)
        given = [_written(names, a) for a in args]
        given += [f"{key}={_written(names, a)}" for key, a in kwargs.items()]
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
        if call.writes or needed.intersection(call.results):
            needed.update(call.uses())
            found.append(call)
    return found[::-1]


def _last_uses(calls: list[Call], outputs: list[Any]) -> dict[int, int]:
    """By value: the call that uses it last; the number of calls if it is an output."""
    last = {number: i for i, call in enumerate(calls) for number in call.uses()}
    return last | {number: len(calls) for number in outputs if number is not None}


# ---- products that are added


def add_products(traced: Calls, outputs: list[Any]) -> Calls:
    """The calls, with one in the place of a product and the sum that alone reads it.

    ``x + a @ b`` becomes ``addmm``, ``x + a * b`` ``addcmul``, and ``x + c a`` with a number c
    ``add`` with ``alpha``. The gradient of each weight is a sum of the first kind: one term comes
    from the push, and one from the pass down the graph.
    """
    calls = _used(traced.calls, outputs)
    memory: list[Any] = list(traced.memory)
    products = _Products(calls, memory, outputs)
    known = {m: n for n, m in enumerate(memory[: traced.inputs])}
    found: list[Call] = []

    def transposed(value: Value) -> Value:
        turned = memory[value.number].transposed()
        if turned not in known:
            known[turned] = len(memory)
            memory.append(turned)
            found.append(Call(aten.t.default, (value,), {}, [known[turned]]))
        return Value(known[turned])

    for i, call in enumerate(calls):
        term, product, turned = products.added_by(i)
        if product is not None:
            func, (a, b) = product.func, product.args
            if func is aten.mm.default and turned:  # the transpose, in the memory order of `addmm`
                total = len(memory)
                memory.append(memory[call.results[0]].transposed())
                found.append(Call(aten.addmm.default, (transposed(term), a, b), {}, [total]))
                call = Call(aten.t.default, (Value(total),), {}, call.results)
            elif func is aten.mm.default:
                call = Call(aten.addmm.default, (term, a, b), {}, call.results)
            elif isinstance(b, Value):
                call = Call(aten.addcmul.default, (term, a, b), {}, call.results)
            else:
                call = Call(aten.add.Tensor, (term, a), {"alpha": b}, call.results)
        for n in call.results:
            known.setdefault(memory[n], n)
        found.append(call)
    return Calls(found, memory, traced.inputs)


class _Products:
    """Finds the sums of which one term is a product that nothing else reads."""

    def __init__(self, calls: list[Call], memory: Any, outputs: list[Any]) -> None:
        self.calls, self.memory = calls, memory
        self.made: dict[Any, int] = {}  # by root: the call that makes the memory
        self.users: dict[Any, list[int]] = {}  # by root: the calls, with an output as one more
        self.spans: dict[Any, int] = {}  # by root: its bytes
        self.writing = [i for i, call in enumerate(calls) if call.writes]
        for i, call in enumerate(calls):
            for root in {_root(memory, n) for n in call.uses()}:
                self.users.setdefault(root, []).append(i)
            for n in call.results:
                self.made.setdefault(_root(memory, n), i)
        for n in outputs:
            self.users.setdefault(_root(memory, n), []).append(len(calls))
        for found in memory:
            if found is not None:
                self.spans[found.root] = max(found.size, self.spans.get(found.root, 0))

    def added_by(self, i: int) -> tuple[Any, Call | None, bool]:
        """The other term of a sum, the product, and whether its transpose is added.

        If both terms are products, one of matrices is preferred, and else the second term, which
        was computed last.
        """
        total = self.calls[i]
        found: tuple[Any, Call | None, bool] = None, None, False
        if total.func is not aten.add.Tensor or total.kwargs:
            return found
        result = self.memory[total.results[0]]
        for term, other in (total.args, total.args[::-1]):
            if not (isinstance(term, Value) and isinstance(other, Value)):
                break
            # Both in the strides of the sum: so ``p + p.t()`` does not take p for its own term.
            if term.number == other.number or not self.memory[term.number].like(result):
                continue
            product, turned = self._product(i, other)
            if product is None or (found[1] is not None and found[1].func is product.func):
                continue
            if found[1] is None or product.func is aten.mm.default:
                found = term, product, turned
        return found

    def _product(self, i: int, value: Value) -> tuple[Call | None, bool]:
        """The product that call i alone reads as this value, and whether it is transposed."""
        part = self.memory[value.number]
        start = self.made.get(part.root)
        if start is None or not part.like(self.memory[self.calls[i].results[0]]):
            return None, False
        call = self.calls[start]
        of_matrices = call.func is aten.mm.default
        if not of_matrices and (call.func is not aten.mul.Tensor or not _adds(call, part.dtype)):
            return None, False
        whole = self.memory[call.results[0]]
        if of_matrices and whole.strides != (whole.shape[1], 1):
            return None, False
        turned = of_matrices and part != whole and part == whole.transposed()
        if part != whole and not turned:
            return None, False
        # A factor without dimensions may be on another device.
        factors = [self.memory[n] for n in call.uses()]
        if any(factor.dtype != part.dtype or not factor.shape for factor in factors):
            return None, False
        *views, last = self.users[part.root]
        if last != i or any(not self.calls[j].func.is_view for j in views):
            return None, False
        # The product is computed later, and so from factors that nothing may have written to, and
        # that need no more memory than the product.
        written = bisect_left(self.writing, start) < bisect_left(self.writing, i)
        if written or self._kept(factors, i) > whole.size:
            return None, False
        return call, turned

    def _kept(self, factors: list[Memory], i: int) -> int:
        """The bytes of factors that live longer if the product is computed at call i.

        Calls of views between their last use and call i do not count: they need no memory.
        """
        return sum(
            self.spans[root]
            for root in {factor.root for factor in factors}
            if any(not call.func.is_view for call in self.calls[self.users[root][-1] + 1 : i])
        )


def _adds(product: Call, dtype: torch.dtype) -> bool:
    """Whether ``addcmul``, or ``add`` with ``alpha``, takes the factors of a product."""
    factor = product.args[1]
    if not dtype.is_floating_point:
        return False
    if isinstance(factor, Value):
        return True
    # ``alpha`` may be no bool, and no number that overflows in the dtype.
    return type(factor) in (int, float) and abs(factor) <= torch.finfo(dtype).max


def _root(memory: list[Memory | None], number: int | None) -> Any:
    found = None if number is None else memory[number]
    return None if found is None else found.root


# ---- operations in place

_SYMMETRIC = (aten.add.Tensor, aten.mul.Tensor)

_IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: Tensor.add_,
    aten.mul.Tensor: Tensor.mul_,
    aten.sub.Tensor: Tensor.sub_,
    aten.div.Tensor: Tensor.div_,
    aten.neg.default: Tensor.neg_,
    aten.addcmul.default: Tensor.addcmul_,
    aten.addmm.default: Tensor.addmm_,
}
"""What writes to the first operand."""

_OUT: dict[Any, Any] = {
    overload.default: overload.grad_input._op
    for overload in (
        *(aten.silu_backward, aten.sigmoid_backward, aten.tanh_backward),
        aten.threshold_backward,
    )
}
"""What takes ``grad_input``, which may be the first operand."""


class _Owners:
    """Which values may be overwritten, since nobody needs their memory any more. No input may."""

    def __init__(self, traced: Calls, last: dict[int, int]) -> None:
        self.memory = traced.memory
        self.last: dict[Any, float] = {}  # by root
        for number, found in enumerate(self.memory):
            if found is not None:
                use = math.inf if number < traced.inputs else last.get(number, -1)
                self.last[found.root] = max(use, self.last.get(found.root, -1))

    def in_place(self, call: Call, i: int) -> Any:
        """The function in place, its arguments and keywords, if a call can be one."""
        func, args, kwargs = call.func, call.args, call.kwargs
        if not (func in _IN_PLACE or func in _OUT) or len(call.results) != 1:
            return None
        orders = [args, (args[1], args[0])] if func in _SYMMETRIC and not kwargs else [args]
        for term, *others in orders:
            if isinstance(term, Value) and self._is_free(term, others, call, i):
                if func in _OUT:
                    return _OUT[func], args, {**kwargs, "grad_input": term}
                return _IN_PLACE[func], (term, *others), kwargs
        return None

    def _is_free(self, term: Value, others: list[Any], call: Call, i: int) -> bool:
        memory: Any = self.memory[term.number]
        if self.last[memory.root] != i or not memory.like(self.memory[call.results[0]]):
            return False
        return memory.root not in [_root(self.memory, n) for n in _values(others)]


def _values(arguments: Any) -> list[int]:
    if isinstance(arguments, Value):
        return [arguments.number]
    if isinstance(arguments, tuple | list):
        return [n for a in arguments for n in _values(a)]
    return []


def _several(func: Any) -> bool:
    returns = func._schema.returns
    return len(returns) > 1 or (len(returns) == 1 and returns[0].type.kind() == "ListType")


# The functions of torch that call an operation with the least overhead.
_HOMES = (torch, torch.Tensor)
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
