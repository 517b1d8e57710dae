"""Maps a call of a torch function to the arguments of an aten operation, in schema order."""

from __future__ import annotations

import functools
import inspect
from inspect import Parameter, Signature
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

MISSING = Parameter.empty
_KINDS: dict[str, Any] = {
    "TensorType": (Tensor,), "NumberType": (int, float), "FloatType": (int, float),
    "IntType": (int,), "BoolType": (bool,), "StringType": (str,), "ListType": (list, tuple),
}  # fmt: skip


class Argument(NamedTuple):
    name: str  # the first one is called "input", as in calls by keyword
    kinds: tuple[type, ...]  # the types that it may have
    default: Any = MISSING
    length: int | None = None  # the length of a list that may be given as one number
    keyword: bool = False  # whether it is keyword only

    @classmethod
    def of_schema(cls, a: Any) -> Argument:
        optional = a.type.kind() == "OptionalType"
        kinds = _KINDS.get((a.type.getElementType() if optional else a.type).kind(), ())
        if "ScalarType" in str(a.real_type):  # a dtype, which the schema calls an int
            kinds = ()
        default = a.default_value if a.has_default_value() else MISSING
        kinds = (*kinds, type(None)) if optional else kinds
        return cls(a.name, kinds, default, a.N, a.kwarg_only)


@functools.cache
def arguments_of(overload: Any) -> list[Argument]:
    """The arguments of an aten overload."""
    first, *others = map(Argument.of_schema, overload._schema.arguments)
    return [first._replace(name="input"), *others]


def signature_of(function: Any, arguments: list[Argument]) -> Signature:
    """The signature of a Python function, or of a C++ function with these arguments."""
    if not hasattr(function, "__code__"):
        kinds = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
        return Signature([Parameter(a.name, kinds[a.keyword]) for a in arguments])
    found = inspect.signature(function)
    if "args" in found.parameters:  # F.max_pool2d(*args, **kwargs) calls F._max_pool2d
        found = inspect.signature(getattr(F, f"_{function.__name__}"))
    first, *others = found.parameters.values()
    return found.replace(parameters=[first.replace(name="input"), *others])


class Binding(NamedTuple):
    """Where the arguments stand in the calls with one sequence of argument types."""

    slots: list[tuple[int | None, Any]]  # per argument: its place in the call or None, its default
    lists: list[tuple[int, int]]  # which arguments are lists, and of what length
    merged: int | None  # the place of the first number of a list given as h.view(3, 5)
    fixed: list[tuple[int, Any]]  # places that the operation has no argument for: must be equal
    in_place: int | None  # the place of ``inplace``
    rest: tuple[Any, ...] | None  # the missing arguments, if the call has the first ones in order

    def __call__(self, given: tuple[Any, ...]) -> list[Any] | None:
        """The arguments, or None if the operation cannot express the call."""
        if self.merged is not None:
            given = (*given[: self.merged], given[self.merged :])
        for i, value in self.fixed:
            if given[i] != value:
                return None
        found = [default if i is None else given[i] for i, default in self.slots]
        for i, n in self.lists:
            value = [found[i]] if isinstance(found[i], int) else list(found[i])
            found[i] = value * n if len(value) == 1 else value
        return found


def bind(
    function: Any, arguments: list[Argument], types: tuple[type, ...], names: tuple[str, ...]
) -> Binding | None:
    """The binding of a call with arguments of these types, the last of them given by keyword.

    Returns None if the operation does not take such a call.
    """
    n, merged = len(types) - len(names), None
    last = sum(not a.keyword for a in arguments) - 1
    is_list = arguments[last].length is None and list in arguments[last].kinds
    if is_list and n > last > 0 and not names and set(types[last:]) == {int}:  # h.view(3, 5)
        types, n, merged = (*types[:last], tuple), last + 1, last
    own = signature_of(function, arguments)
    try:
        places = own.bind_partial(*range(n), **dict(zip(names, range(n, len(types)), strict=True)))
    except TypeError:
        return None
    extra = dict(places.arguments)
    slots: list[tuple[int | None, Any]] = []
    lists = []
    for a in arguments:
        i = extra.pop(a.name, None)
        if i is not None and types[i] is type(None) and type(None) not in a.kinds:
            i = None
        if i is None:
            if a.default is MISSING:
                return None
        elif not issubclass(types[i], a.kinds) and (a.length is None or types[i] is not int):
            return None
        elif a.length is not None and types[i] is not type(None):
            lists.append((len(slots), a.length))
        slots.append((i, a.default))
    in_place = extra.pop("inplace", None)
    fixed = [(i, own.parameters[name].default) for name, i in extra.items()]
    total = len(types)
    simple = [i for i, _ in slots[:total]] == [*range(total)] and not (lists or fixed)
    rest = tuple([value for _, value in slots[total:]]) if simple and merged is None else None
    return Binding(slots, lists, merged, fixed, in_place, rest)
