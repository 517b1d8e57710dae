"""Which torch functions and which modules are rows of the activation table.

A function is recognised as the object that is called: ``F.silu``, ``torch.relu_`` and
``Tensor.sigmoid`` are functions of PyTorch with the name of a row. A module that is not of PyTorch
is recognised by what it computes, whatever its class is called: it is run once on numbers that tell
the rows apart.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.activations import TABLE

# ---- functions


class Function(NamedTuple):
    """A torch function ``f(z, *names)`` that is an activation."""

    rows: tuple[str, ...]  # the rows that it may be; none if torch has to differentiate it
    names: tuple[str, ...]  # the arguments after z, as they are passed by position
    writes: bool  # whether it always writes to z


class Called(NamedTuple):
    """What a call of such a function computes."""

    fn: str | None  # the row, or None
    params: dict[str, Any]
    writes: bool  # whether this call writes to z


# Elementwise functions that are no rows, whose second derivative torch takes.
OTHERS: dict[str, tuple[str, ...]] = {
    "hardshrink": ("lambd",),
    "logsigmoid": (),
    "prelu": ("weight",),
    "softshrink": ("lambd",),
    "tanhshrink": (),
    "threshold": ("threshold", "value"),
}


def _functions() -> dict[Any, Function]:
    found: dict[Any, Function] = {}

    def add(name: str, row: str | None, names: tuple[str, ...]) -> None:
        for place in (F, torch, Tensor, torch.special):
            for written in ("", "_"):
                function = getattr(place, name + written, None)
                if function is not None:
                    rows = found[function].rows if function in found else ()
                    rows += () if row is None else (row,)
                    found[function] = Function(rows, (*names, "inplace"), bool(written))

    for name, row in TABLE.items():
        where, _, function = row.torch.rpartition(".")
        if where != "fastjac.activations" and name != "identity":
            add(function, name, tuple(row.params))
    add("hardsigmoid", "hardsigmoid", ())
    add("sin", "sine", ())
    add("expit", "sigmoid", ())  # torch.special.expit
    for name, names in OTHERS.items():
        add(name, None, names)
    return found


FUNCTIONS: dict[Any, Function] = _functions()
"""The functions of torch that are activations, in every form: F.relu, torch.relu_, Tensor.relu."""


def called(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Called | None:
    """What ``function(z, *args, **kwargs)`` computes; None if an argument is not understood."""
    entry = FUNCTIONS[function]
    if len(args) > len(entry.names):
        return None
    given = {**dict(zip(entry.names, args, strict=False)), **kwargs}
    writes = given.pop("inplace", False) or entry.writes
    if not entry.rows:
        return None if given.keys() - set(entry.names) else Called(None, given, writes)
    for name in entry.rows:
        row = TABLE[name]
        params = {key: value for key, value in given.items() if key not in row.torch_kwargs}
        if any(given.get(key, "none") != value for key, value in row.torch_kwargs.items()):
            continue
        numbers = all(type(value) in (int, float) for value in params.values())
        if numbers and params.keys() <= row.params.keys():
            return Called(name, params, writes)
    return None


# ---- modules


class Recognised(NamedTuple):
    """The row that a module computes."""

    fn: str
    writes: bool  # whether it writes to its input
    state: list[tuple[str, Any]]  # the attributes that it was recognised with


_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], Recognised | None]] = (
    weakref.WeakKeyDictionary()
)
_PLAIN: tuple[Any, ...] = (bool, int, float, str, type(None), functools.partial, types.FunctionType)
_PLAIN += (types.BuiltinFunctionType, types.MethodType, torch.dtype)


def recognise(module: nn.Module) -> Recognised | None:
    """The row of the table that a module of a class that is not torch's computes, or None.

    This is for modules without parameters, buffers and submodules, whose other attributes are
    numbers, strings and functions, and whose ``forward`` takes one tensor. A copy of the module
    runs on float64 tensors of two to four dimensions, in training and in eval mode, with and
    without autograd. It is a row if all results, and the gradients that it passes on, agree with
    those of the row to 1e-7, from −1e6 to 1e6. So a module that is random, that has a state or a
    gradient of its own (a straight-through estimator), or whose result is not elementwise, is none.
    """
    if module._parameters or module._buffers or module._modules:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return None
    if type(module).forward.__module__.startswith(("torch.", "fastjac.")):
        return None  # known by its class
    state = attributes(module)
    if state is None or not _takes_one_tensor(module):
        return None
    before = _KNOWN.get(module)
    if before is None or before[0] != state:
        before = state, _probe(module, state)
        _KNOWN[module] = before
    return before[1]


_OF_MODULES = {*vars(nn.Module()), "forward"}
"""The attributes that every module has."""


def attributes(module: nn.Module) -> list[tuple[str, Any]] | None:
    """The attributes of a module that may decide what it computes; None if some are not plain."""
    found = []
    for name, value in vars(module).items():
        if name in _OF_MODULES:
            continue
        if not isinstance(value, _PLAIN):
            return None
        found.append((name, value))
    return found


def _takes_one_tensor(module: nn.Module) -> bool:
    try:
        parameters = [*inspect.signature(type(module).forward).parameters.values()][1:]
    except (TypeError, ValueError):
        return False
    fixed = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    needed = [p for p in parameters if p.default is p.empty]
    return len(needed) == 1 and needed[0].kind in fixed and needed[0] is parameters[0]


@functools.cache
def _points() -> tuple[Tensor, ...]:
    """The same numbers in three shapes. No kink is among them."""
    near = torch.linspace(-8.05, 8.07, 113, dtype=torch.float64, device="cpu")
    far = torch.tensor([10.3, 19.7, 31.0, 107.0, 3e3, 1e6, 0.0], dtype=torch.float64, device="cpu")
    line = torch.cat([near, far, -far[:-1]])  # 126 = 2·7·9
    return line.view(14, 9), line.view(2, 7, 9), line.view(2, 7, 3, 3)


@functools.cache
def _values() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """φ and φ' of each row at the points; at 0 φ' may be any of a kink."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with torch.enable_grad():
        for row in TABLE.values():
            if row.name not in ("identity", "sine"):
                function = row.torch_function()
                found[row.name] = [_with_slope(function, z.clone())[:2] for z in _points()]
    return found


def _with_slope(function: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor, bool]:
    """φ and φ' of a function, and whether it wrote to its argument."""
    leaf = z.detach().requires_grad_()
    given = leaf.clone()
    a = function(given)
    writes = not torch.equal(given, leaf)
    (slope,) = torch.autograd.grad(a, leaf, torch.ones_like(a))
    return a.detach(), torch.where(z == 0, 0, slope), writes


def _probe(module: nn.Module, state: list[Any]) -> Recognised | None:
    forward = vars(module).get("forward")
    writes = False
    # The generator is set back, since a random module would otherwise change the run.
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            if forward is not None:  # of a watch, or of the user: the class's is looked at
                module = copy.copy(module)
                del vars(module)["forward"]
            module = copy.deepcopy(module)
            function = functools.partial(type(module).forward, module)
            names = list(_values())
            for training in (True, False):
                module.training = training
                for k, z in enumerate(_points()):
                    with torch.no_grad():
                        quiet = function(z.clone())
                    if type(quiet) is not Tensor or quiet.shape != z.shape:
                        return None
                    with torch.inference_mode(False), torch.enable_grad():
                        a, slope, written = _with_slope(function, z)
                    if a.dtype != z.dtype or not torch.equal(a, quiet):
                        return None
                    names = [n for n in names if _agree((a, slope), _values()[n][k])]
                    writes = writes or written
        except Exception:
            return None  # whatever a foreign forward raises: it is no row
    return Recognised(names[0], writes, state) if names else None  # ELU is CELU with its defaults


def _agree(found: tuple[Tensor, Tensor], row: tuple[Tensor, Tensor]) -> bool:
    return _close(found[0], row[0]) and _close(found[1], row[1])


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-7, atol=1e-7)
