"""The torch library ``fastjac`` and `register`, the one way in which a raw op gets into it.

A raw op is an entry of ``torch.ops.fastjac``. Its kernels are elsewhere: ``_cpu.so`` and
``_cuda.so`` register theirs under its name when they are loaded, and the Triton kernels stand in
``fastjac.kernels``. What torch wants to know beside (schema, shapes of the results, derivative,
batching rule) is what a call of `register` says.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from fastjac.torch_private import below_autograd, transforms_active

LIBRARY = Library("fastjac", "FRAGMENT")

SCHEMAS: dict[str, str] = {}
"""The schema of every raw op, by its name."""


def register(
    schema: str,
    *,
    derivative: Callable[..., Any] | str,
    fake: Callable[..., Any] | None = None,
    vmap: Callable[..., Any] | None = None,
    triton: str | None = None,
) -> None:
    """Defines a raw op and registers all of it that is Python.

    Args:
        schema: ``"name(Tensor z, ...) -> Tensor"``.
        derivative: what runs in place of the kernel where autograd is on, called as
            ``derivative(*args, suffix)``: the ``apply`` of a Function. So a raw op that is called
            directly, by an exported program say, loses no derivative. For an op that is itself a
            gradient and has no derivative: a string, what to call instead.
        fake: the kernel of tensors without memory: takes the op's arguments and returns empty
            tensors. Arguments on different devices, and None for a tensor, are refused before.
        vmap: the batching rule, called as ``vmap(op, info, in_dims, *args)``.
        triton: a module of ``fastjac.kernels`` with a function of the op's name. A second op of the
            same schema, its name with the suffix ``_triton``, calls it.
    """
    stem, parenthesis, arguments = schema.partition("(")
    for suffix in ("",) if triton is None else ("", "_triton"):
        name = stem + suffix
        SCHEMAS[name] = name + parenthesis + arguments
        LIBRARY.define(SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        if fake is not None:
            torch.library.register_fake(f"fastjac::{name}", _checked(name, fake), lib=LIBRARY)
        if vmap is not None:
            rule = functools.partial(vmap, raw(name))
            torch.library.register_vmap(f"fastjac::{name}", rule, lib=LIBRARY)
        if suffix:
            LIBRARY.impl(name, _launcher(triton, stem), "CompositeExplicitAutograd")
        if isinstance(derivative, str):
            LIBRARY.impl(name, _refusal(name, derivative), "Autograd")
        else:
            LIBRARY.impl(name, _through(name, derivative, suffix), "Autograd")


def _checked(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """One tensor on meta brings the whole call to the fake kernel: others on the CPU would be given
    results that nobody has computed, so that raises."""

    def checked(*args):
        refuse_none(name, args)
        check_one_device(name, args)
        return fake(*args)

    return checked


def _launcher(module: str | None, stem: str) -> Callable[..., Any]:
    def launch(*args):
        refuse_none(f"{stem}_triton", args)
        # Imported late: it needs Triton, which may not be installed.
        kernels = importlib.import_module(f"fastjac.kernels.{module}")
        return getattr(kernels, stem)(*args)

    return launch


def _through(name: str, function: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    def autograd(*args):
        if transforms_active():
            raise RuntimeError(
                f"torch.ops.fastjac.{name} (from an exported program, say) cannot be transformed"
                " by torch.func: call the function of fastjac, or use torch.autograd"
            )
        return function(*args, suffix)

    return autograd


def _refusal(name: str, instead: str) -> Callable[..., Any]:
    def autograd(*args):
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(args)):
            raise RuntimeError(f"torch.ops.fastjac.{name} has no derivative of its own: {instead}")
        with below_autograd():
            return raw(name)(*args)

    return autograd


@functools.cache
def raw(name: str) -> Any:
    """The overload itself: a lookup by attribute costs a microsecond a call."""
    return getattr(torch.ops.fastjac, name).default


def suffix_of(impl: str) -> str:
    return "_triton" if impl == "triton" else ""


def impl_of(suffix: str, device_type: str) -> str:
    """The implementation that a raw op is."""
    return "triton" if suffix else device_type


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of a raw op, those in lists too."""
    for a in args:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from tensors_of(a)


def check_one_device(name: str, args: Iterable[Any]) -> None:
    devices = {t.device for t in tensors_of(args)}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"fastjac: the tensors of {name} are on {found}; move them to one device"
        )


def check_like(t: Tensor | None, z: Tensor, name: str) -> None:
    """Refuses an operand that is read beside z and differs from it; None is accepted."""
    if t is not None and (t.shape, t.dtype, t.device) != (z.shape, z.dtype, z.device):
        raise RuntimeError(f"fastjac: {name} must have the shape, dtype and device of z")


@functools.cache
def _tensors(name: str) -> tuple[int, ...]:
    """The positions of a raw op's tensors that are not optional."""
    arguments = raw(name)._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.type.kind() == "TensorType")


def refuse_none(name: str, args: Sequence[Any]) -> None:
    """The dispatcher lets None through in the place of a tensor."""
    for i in _tensors(name):
        if args[i] is None:
            argument = raw(name)._schema.arguments[i].name
            raise RuntimeError(f"fastjac: {argument} of {name} is None")
