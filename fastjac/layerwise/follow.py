"""Through which functions of torch the output of a layer is followed to its activation.

These are views that keep samples and units apart, copies, factors that are numbers, and sums with
a constant. Of any other function that takes an output the name is noted, as the reason for which
the layer is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name

from fastjac.layerwise.layers import LayerCall
from fastjac.layerwise.passes import Pass
from fastjac.layerwise.products import version_of


def note(seen: Pass, func: Any, args: Any, y: Any) -> None:
    """Notes in the calls of layers whose output is among the arguments which function took it."""
    several = not isinstance(y, Tensor) and len(y) > 0 and isinstance(y[0], Tensor)
    if func in NOT_TAKING or not (several or isinstance(y, Tensor)):
        return
    for arg in args:
        for z in arg if isinstance(arg, tuple | list) else (arg,):
            call = seen.pending.get(id(z))
            if call is None or call.z is not z:
                continue
            while call is not None:
                call.taken = call.taken or name_of(func)
                call = call.parent


def name_of(func: Any) -> str:
    """As in a program: F.softmax, torch.Tensor.view."""
    name = resolve_name(func) or getattr(func, "__name__", repr(func))
    if name.startswith("fastjac."):  # layers and their activations as one op
        return "another layer"
    return name.replace("torch.nn.functional.", "F.").removesuffix(".__get__")


def first(args: Any, kwargs: Any) -> Any:
    """The argument that torch's functions call input."""
    return args[0] if args else kwargs.get("input")


def methods(*names: str) -> list[Any]:
    """The methods of tensors and functions of torch with these names."""
    found = [getattr(place, name, None) for name in names for place in (Tensor, torch)]
    return [function for function in found if function is not None]


_DIVIDE = methods("div", "divide", "true_divide", "__truediv__")
_SWAPS = methods("transpose", "swapaxes", "swapdims")
NOT_TAKING = methods("detach")


def derived(
    seen: Pass,
    call: LayerCall,
    y: Tensor,
    factor: float,
    moved: int | None = None,
    folded: bool | None = None,
) -> None:
    """y is the z of the call times a factor, perhaps with its units in another dimension."""
    version = version_of(y) if seen.compiling else y._version
    after = replace(call, version=version, used=False, parent=call, ref=None)
    after.z, after.before_norm = y, call.before_norm
    after.factor, after.function = call.factor * factor, True
    after.moved = call.moved if moved is None else moved
    after.folded = call.folded if folded is None else folded
    seen.calls.append(after)
    seen.follows = True
    if not seen.compiling:
        seen.pending[id(y)] = after


def multiple(seen: Pass, func: Any, args: Any, kwargs: Any) -> Any:
    """``c z`` and ``z / c`` with a number c."""
    if kwargs or len(args) != 2:
        return None
    z, c = args
    if not isinstance(z, Tensor) and func not in _DIVIDE:
        z, c = c, z
    if type(c) not in (int, float):
        return None
    call = seen.find(z, True)
    if call is None:
        return None
    y = func(*args)
    derived(seen, call, y, (1 / c if c else 0.0) if func in _DIVIDE else c)
    return y


def shifted(seen: Pass, func: Any, args: Any, kwargs: Any) -> Any:
    """``z + b`` with a number, or with a parameter that has a number for each unit."""
    if kwargs or len(args) != 2:
        return None
    z, b = args
    if not isinstance(z, Tensor) or isinstance(z, nn.Parameter):
        z, b = b, z
    call = seen.find(z)
    if call is None:
        return None
    if type(b) not in (int, float):
        last = call.dim % len(call.shape) == len(call.shape) - 1
        if not isinstance(b, nn.Parameter) or not last or b.shape != z.shape[-1:]:
            return None
    y = func(*args)
    derived(seen, call, y, 1.0)
    return y


def reshaped(seen: Pass, func: Any, args: Any, kwargs: Any) -> Any:
    """A function that keeps the elements in their order."""
    call = seen.find(first(args, kwargs), True)
    if call is None:
        return None
    y = func(*args, **kwargs)
    before, after = call.z.shape, y.shape
    moved = follow(before, after, call.dim)
    if moved is not None:
        folded = (call.folded and before[0] == after[0]) or before[0] < after[0]
        derived(seen, call, y, 1.0, moved, folded)
    elif not seen.compiling:
        note(seen, func, (call.z,), y)
    return y


def follow(before: Any, after: Any, dim: int) -> int | None:
    """The dimension with the units after a reshape; None if they or the samples are mixed."""
    dim %= len(before)
    units, inner = before[dim], 1
    for size in before[dim + 1 :]:
        inner *= size
    place, below = len(after) - 1, 1
    while place > 0 and not (below == inner and after[place] == units):
        below *= after[place]
        place -= 1
    if place <= 0:
        return None
    larger, smaller = max(before[0], after[0]), min(before[0], after[0])
    if smaller and larger % smaller:
        return None
    return -1 if place == len(after) - 1 else place


def permuted(seen: Pass, func: Any, args: Any, kwargs: Any) -> Any:
    """A function that reorders dimensions. The others must keep their order, samples first."""
    call = seen.find(first(args, kwargs))
    if call is None or kwargs:
        return None
    dims = len(call.shape)
    order = list(range(dims))
    rest = args[1:]
    if func in _SWAPS:
        one, other = rest[0] % dims, rest[1] % dims
        order[one], order[other] = other, one
    else:
        if len(rest) == 1 and not isinstance(rest[0], int):
            rest = rest[0]
        order = [d % dims for d in rest]
    y = func(*args)
    units = call.dim % dims
    others = [d for d in order if d != units]
    if others == sorted(others) and order[0] == 0:
        place = order.index(units)
        derived(seen, call, y, 1.0, -1 if place == dims - 1 else place)
    elif not seen.compiling:
        note(seen, func, (call.z,), y)
    return y


def copied(seen: Pass, func: Any, args: Any, kwargs: Any) -> Any:
    """A copy, perhaps of another floating-point dtype."""
    call = seen.find(first(args, kwargs), True)
    if call is None:
        return None
    y = func(*args, **kwargs)
    if y is not call.z and y.is_floating_point():
        derived(seen, call, y, 1.0)
    return y


FOLLOWED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((*methods("mul", "multiply", "__mul__", "__rmul__"), *_DIVIDE), multiple),
    **dict.fromkeys(methods("add", "__add__", "__radd__", "sub", "subtract", "__sub__"), shifted),
    **dict.fromkeys(
        methods("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze"),
        reshaped,
    ),
    **dict.fromkeys(methods("view_as", "reshape_as"), reshaped),
    **dict.fromkeys((*_SWAPS, *methods("permute")), permuted),
    **dict.fromkeys(
        methods("contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type_as"),
        copied,
    ),
}
"""The handlers of these functions, as `calls` has them for the others."""
