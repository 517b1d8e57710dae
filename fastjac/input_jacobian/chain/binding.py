"""From a call of a torch function to the arguments of an operation, in the order of its schema."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MISSING = inspect.Parameter.empty
KINDS: dict[str, tuple[type, ...]] = {
    "TensorType": (Tensor,),
    "NumberType": (int, float),
    "FloatType": (int, float),
    "IntType": (int,),
    "SymIntType": (int,),
    "BoolType": (bool,),
    "StringType": (str,),
    "ListType": (list, tuple),
}


class Argument(NamedTuple):
    name: str  # the first tensor is "self", whatever its function calls it
    kinds: tuple[type, ...]  # of the objects that it may be
    default: Any = MISSING
    keyword: bool = False  # by keyword only
    length: int | None = None  # of a list that may be given as one number


def _kinds(t: Any) -> tuple[type, ...]:
    if t.kind() == "OptionalType":
        return (*_kinds(t.getElementType()), type(None))
    return KINDS.get(t.kind(), ())


@functools.cache
def arguments_of(function: Any) -> tuple[Argument, ...]:
    """Of an overload of aten from its schema, of a Python function from its signature."""
    if isinstance(function, torch._ops.OpOverload):
        found = [
            Argument(
                a.name,
                () if str(a.real_type) == "ScalarType" else _kinds(a.type),
                a.default_value if a.has_default_value() else MISSING,
                a.kwarg_only,
                a.N,
            )
            for a in function._schema.arguments
        ]
    else:
        parameters = inspect.signature(function).parameters
        if "args" in parameters:  # F.max_pool2d takes anything and calls F._max_pool2d
            parameters = inspect.signature(getattr(F, f"_{function.__name__}")).parameters
        found = [
            Argument(p.name, (object,), p.default, p.kind is p.KEYWORD_ONLY)
            for p in parameters.values()
        ]
    return tuple([found[0]._replace(name="self"), *found[1:]])


class Binding(NamedTuple):
    """Where the arguments are in a call of one pattern of types."""

    slots: list[tuple[int | None, Any]]  # a place in the call, or None and the default
    lists: list[tuple[int, int]]  # arguments that are lists of this length
    merged: int | None  # from which place on the call has a list number by number
    fixed: list[tuple[int, Any]]  # places that must have these values: no such argument
    in_place: int | None  # the place of ``inplace``

    def __call__(self, given: tuple[Any, ...]) -> list[Any] | None:
        """The arguments; None where the operation does not have what the call asks for."""
        if self.merged is not None:
            given = (*given[: self.merged], given[self.merged :])
        for i, value in self.fixed:
            if given[i] != value:
                return None
        found = [default if i is None else given[i] for i, default in self.slots]
        for i, n in self.lists:
            value = found[i] if isinstance(found[i], list | tuple) else [found[i]]
            found[i] = list(value) * n if len(value) == 1 else list(value)
        return found


def bind(
    own: tuple[Argument, ...],
    wanted: tuple[Argument, ...],
    types: tuple[type, ...],
    names: tuple[str, ...],
) -> Binding | None:
    """Of a call of a function with arguments ``own``, the last of them given by ``names``."""
    n = len(types) - len(names)
    positional = [a for a in own if not a.keyword]
    last, merged = len(positional) - 1, None
    if n > last > 0 and not names and list in positional[last].kinds:
        if positional[last].length is None and set(types[last:]) == {int}:  # h.view(3, 5)
            types, n, merged = (*types[:last], tuple), last + 1, last
    if n > len(positional):
        return None
    known = {a.name: a for a in own}
    keywords = ["self" if name == "input" else name for name in names]
    places = {name: i for i, name in enumerate([*(a.name for a in positional[:n]), *keywords])}
    if len(places) < len(types) or not places.keys() <= known.keys():
        return None
    slots, lists = [], []
    for a in wanted:
        i = places.pop(a.name, None)
        if i is not None and types[i] is type(None) and a.default is not MISSING:
            i = i if type(None) in a.kinds else None
        if i is not None and not issubclass(types[i], a.kinds):
            if a.length is None or types[i] is not int:
                return None
        if i is None and a.default is MISSING:
            return None
        if i is not None and a.length is not None and types[i] is not type(None):
            lists.append((len(slots), a.length))
        slots.append((i, a.default))
    in_place = places.pop("inplace", None)
    fixed = [(i, known[name].default) for name, i in places.items()]
    return Binding(slots, lists, merged, fixed, in_place)
