"""How the calls of a torch function become links, by the kind of the operation (`links`).

`operations` has the table. Which overload a call means follows from the types of its arguments
(`binding`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.input_jacobian.chain.binding import Argument, Binding, arguments_of, bind
from fastjac.input_jacobian.chain.links import (
    Add,
    Layer,
    Linear,
    LinearRow,
    Map,
    Operands,
    Product,
    ProductRow,
    Unsupported,
)
from fastjac.input_jacobian.chain.tape import RULES, Tape, Tracked

aten = torch.ops.aten


class Row(NamedTuple):
    """An operation: its arguments, and how a call of it is recorded."""

    name: str
    arguments: list[Argument]
    record: Callable[..., Any]  # (tape, call, *arguments): a value, or NotImplemented


ROWS: list[Row] = []


class Rule:
    """What the calls of one function of torch are recorded as."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.rows: list[Row] = []
        self.bound: dict[Any, list[tuple[Row, Binding]]] = {}  # by the types of the arguments

    def __call__(self, tape: Tape, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values()) if kwargs else args
        types = tuple(map(type, given))
        pattern: Any = (*types, *kwargs) if kwargs else types
        found = self.bound.get(pattern)
        if found is None:
            tried = [(r, bind(self.function, r.arguments, types, tuple(kwargs))) for r in self.rows]
            found = self.bound[pattern] = [(r, b) for r, b in tried if b is not None]
        for row, binding in found:
            rest = binding.rest
            arguments = binding(given) if rest is None else (*given, *rest) if rest else given
            if arguments is None:
                continue
            out = row.record(tape, (self.function, args, kwargs), *arguments)
            if out is NotImplemented:
                continue
            in_place = binding.in_place is not None and given[binding.in_place]
            return tape.rebind(args[0], out, row.name) if in_place else out
        return NotImplemented


def add(row: Row, *functions: Any) -> None:
    ROWS.append(row)
    for function in dict.fromkeys(functions):
        rule: Any = RULES.setdefault(function, Rule(function))
        rule.rows.append(row)


def add_overloads(names: str, make: Callable[[list[Argument]], Any]) -> None:
    """Rows for overloads (``"squeeze squeeze.dim"``), of the functions that have their name."""
    for full_name in names.split():
        name, _, overload = full_name.partition(".")
        places = [(place, s) for place in (torch, F, Tensor) for s in (name, f"__{name}__")]
        functions = [getattr(place, s) for place, s in places if hasattr(place, s)]
        arguments = arguments_of(getattr(getattr(aten, name), overload or "default"))
        add(Row(full_name, arguments, partial(make(arguments), name)), *functions)


def sort_out(operands: Any) -> tuple[list[Any], list[int], list[int]]:
    """The numbers of the operands; which of them are values of the chain, and which parameters."""
    plain: list[Any] = []
    inside, trained = [], []
    for i, t in enumerate(operands):
        if type(t) is Tracked:
            inside.append(i)
            plain.append(t.plain)
        else:
            if t.requires_grad:
                trained.append(i)
            plain.append(t.detach())
    return plain, inside, trained


def append(tape: Tape, name: str, link: Operands, operands: Any, out: Tensor) -> Tracked:
    link.name = name
    link.parameters = tuple([operands[i] for i in link.trained])
    return tape.append(link, [operands[i] for i in link.inside], out)


# ---- linear in all operands together


def off_batch(arguments: list[Argument]) -> Callable[..., bool]:
    """Whether the arguments that are dimensions are given and are not that of the samples."""
    places = [i for i, a in enumerate(arguments) if a.name.startswith(("dim", "axis"))]

    def when(a: Tensor, *args: Any) -> bool:
        for i in places:
            dims = [args[i]] if isinstance(args[i], int) else args[i]
            if not dims or any([d % a.dim() == 0 for d in dims]):
                return False
        return True

    return when if places else anything


def record_map(row: LinearRow, name: str, tape: Tape, call: Any, a: Any, *args: Any) -> Any:
    function, given, options = call
    if type(a) is not Tracked or not given:  # or given by keyword
        return NotImplemented
    plain, rest = a.plain, given[1:]
    if not row.when(plain, *args):
        return NotImplemented
    if row.forward is not None:
        out, args = row.forward(plain, *args)
    else:
        out = function(plain, *rest, **options)
    if not (out.dim() and plain.dim()) or len(out) != len(plain) or out.dtype != plain.dtype:
        return NotImplemented
    link = Map(row, plain, args, out)
    link.name = name
    if row.apply is None:
        link.call = lambda u: function(u, *rest, **options)
    return tape.append(link, [a], out)


def record_linear(row: LinearRow, name: str, tape: Tape, call: Any, *values: Any) -> Any:
    count = row.arity or 1
    operands, args = values[:count], values[count:]
    function, given, options = call
    if len(given) < count:  # an operand by keyword
        return NotImplemented
    if row.arity == 0:
        operands = operands[0]
    plain, inside, trained = sort_out(operands)
    if not inside or not row.when(plain[inside[0]], *args):
        return NotImplemented
    out = function(*(plain if row.arity else (plain,)), *given[count:], **options)
    shape, dtype = out.shape, out.dtype
    for i in inside:
        t = plain[i]
        if not shape or t.dim() != len(shape) or t.shape[0] != shape[0] or t.dtype != dtype:
            return NotImplemented
    if row.arity == 0 and any([t.dim() != len(shape) for t in plain]):
        return NotImplemented  # torch.cat leaves out an empty tensor of one dimension
    for i in trained:
        if plain[i].dtype != dtype:
            return NotImplemented
        tape.watch(operands[i])
    return append(tape, name, Linear(plain, inside, trained, row, args, out), operands, out)


def record_add(name: str, tape: Tape, call: Any, a: Any, b: Any, alpha: Any) -> Any:
    """Of two values of one shape; `record_linear` takes the other sums."""
    if type(a) is not Tracked or type(b) is not Tracked or alpha != 1:
        return NotImplemented
    if a.plain.shape != b.plain.shape or a.plain.dtype != b.plain.dtype or not a.plain.dim():
        return NotImplemented
    link = Add()
    link.name = name
    return tape.append(link, [a, b], a.plain + b.plain)


def linear(
    names: str,
    transpose: Any,
    apply: Any = None,
    *,
    when: Any = None,
    forward: Any = None,
    arity: int = 1,
) -> None:
    """Adds rows for operations that are linear in their operand, sample by sample.

    Args:
        names: the overloads of aten.
        transpose: ``(d, shape, *arguments)``, which returns a tensor of this shape.
        apply: the operation without its constant part, ``(u, shape, *arguments)``; by default the
            call itself is repeated.
        when: ``(a, *arguments)``, whether the rule holds; by default, whether no argument names the
            dimension of the samples.
        forward: ``(a, *arguments)``, which returns the result, and what ``transpose`` and ``apply``
            get instead of the arguments; by default the call itself is repeated.
        arity: the number of operands, 0 for a list of them. If it is not 1, ``transpose`` and
            ``apply`` are those of operand i: ``(d, shape, i, shapes, *arguments)``.
    """

    def make(arguments: list[Argument]) -> Any:
        whether = when or off_batch(arguments[arity or 1 :])
        row = LinearRow(transpose, apply, whether, forward, arity)
        return partial(record_map if arity == 1 else record_linear, row)

    add_overloads(names, make)


def anything(*arguments: Any) -> bool:
    return True


# ---- products


def record_product(row: ProductRow, name: str, tape: Tape, call: Any, *operands: Any) -> Any:
    plain, inside, trained = sort_out(operands)
    if not inside or (None in row.into and (inside, trained) != ([0], [])):
        return NotImplemented
    tape.watch(*[t for t in operands if type(t) is not Tracked])
    out = row.apply(*plain, None)
    if out.is_complex():  # the transposes would need the conjugate
        return NotImplemented
    shape, samples = out.shape, [False, False]
    for i, t in enumerate(plain):
        of_samples = len(shape) == t.dim() > row.core[i]
        if i in inside:
            samples[i] = True
            if not of_samples or t.shape[0] != shape[0] or t.dtype != out.dtype:
                return NotImplemented
        else:  # a constant may have numbers for each sample, a parameter may not
            samples[i] = of_samples and len(t) != 1
            if i in trained and (samples[i] or t.dtype != out.dtype):
                return NotImplemented
    return append(tape, name, Product(plain, inside, trained, row, samples, ()), operands, out)


def record_layer(
    row: ProductRow, name: str, tape: Tape, call: Any, a: Any, weight: Any, bias: Any, *args: Any
) -> Any:
    if type(a) is not Tracked or type(weight) is Tracked or type(bias) is Tracked:
        raise Unsupported(f"{name}: the weight depends on x")
    if weight.is_complex() or (bias is not None and bias.dim() != 1):
        return NotImplemented
    tape.watch(weight, bias)
    operands = [a.plain, weight.detach(), None if bias is None else bias.detach()]
    trained = [i for i, t in ((1, weight), (2, bias)) if t is not None and t.requires_grad]
    if row.arrange is not None:
        args = row.arrange(*args)
    out = row.apply(*operands, *args)
    if not out.dim() == a.plain.dim() > row.core[0] or out.dtype != a.plain.dtype:
        return NotImplemented
    link = Layer(operands, [0], trained, row, (True, False), args)
    return append(tape, name, link, (a, weight, bias), out)


def product(names: str, *columns: Any) -> None:
    row = ProductRow(*columns)
    record = record_product if len(row.into) == 2 else record_layer
    add_overloads(names, lambda arguments: partial(record, row))
