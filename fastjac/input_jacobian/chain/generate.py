"""From traced calls of torch to one generated Python function.

The function is Python, not a program for an interpreter in C++: most of the time is that of the
operations themselves, and the stable ABI of torch cannot pass a ``Scalar``, which ``add``,
``addmm``, ``threshold_backward`` and many others take.

Several calls become one where that computes the same (`rewrite`), and an operation writes to an
operand that nobody needs any more (`_Owners`), which saves new memory and its page faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.input_jacobian.chain.calls import Call, Calls, Value, root_of, used, values_in
from fastjac.input_jacobian.chain.rewrite import add_products, join_clamps

aten = torch.ops.aten


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
    traced = add_products(join_clamps(traced), outputs)
    calls = used(traced, outputs)
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


def _last_uses(calls: list[Call], outputs: list[Any]) -> dict[int, int]:
    """By value: the call that uses it last; the number of calls if it is an output."""
    last = {number: i for i, call in enumerate(calls) for number in call.uses()}
    return last | {number: len(calls) for number in outputs if number is not None}


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
        *(aten.threshold_backward, aten.hardtanh_backward),
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
        return memory.root not in [root_of(self.memory, n) for n in values_in(others)]


# ---- source


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
