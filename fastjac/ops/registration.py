"""The torch library ``fastjac`` and `register`, which adds a raw op to it.

A raw op is an entry of ``torch.ops.fastjac``. Its kernels are defined elsewhere: ``_cpu.so`` and
``_cuda.so`` register theirs when they are loaded, and the Triton kernels are in
``fastjac.kernels``. `register` provides the schema, the fake kernel, the derivative and the
batching rule.
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
    any_order: bool = False,
) -> None:
    """Define a raw op and register its Python parts.

    Args:
        schema: ``"name(Tensor z, ...) -> Tensor"``.
        derivative: the ``apply`` of a Function, called as ``derivative(*args, suffix)`` in place of
            the kernel if autograd is on. A raw op that is called directly (by an exported program,
            for example) is therefore differentiable too. For an op that is not differentiable: a
            string that says what to call instead.
        fake: the kernel for tensors without memory. It takes the op's arguments and returns empty
            tensors. It is not called if a tensor is None or if devices differ: this raises.
        vmap: the batching rule, called as ``vmap(op, info, in_dims, *args)``.
        triton: the module of ``fastjac.kernels`` that has a function of the op's name, if the op
            has a Triton kernel. A second op of the same schema, whose name has the suffix
            ``_triton``, calls that function on the device of the tensors.
        any_order: whether the kernels and the fake kernel take tensors in any memory order.
    """
    stem, parenthesis, arguments = schema.partition("(")
    for suffix in ("",) if triton is None else ("", "_triton"):
        name = stem + suffix
        SCHEMAS[name] = name + parenthesis + arguments
        # Of others, inductor copies operands to the memory order of eager mode.
        layout = (torch.Tag.flexible_layout,) if any_order else ()
        LIBRARY.define(SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag, *layout))
        if fake is not None:
            torch.library.register_fake(f"fastjac::{name}", _checked(name, fake), lib=LIBRARY)
        if vmap is not None:
            rule = functools.partial(vmap, raw(name))
            torch.library.register_vmap(f"fastjac::{name}", rule, lib=LIBRARY)
        if suffix:
            LIBRARY.impl(name, _launcher(triton, stem), "CompositeExplicitAutograd")
        if isinstance(derivative, str):
            LIBRARY.impl(name, _not_differentiable(name, derivative), "Autograd")
        else:
            LIBRARY.impl(name, _differentiable(name, derivative, suffix), "Autograd")


def _checked(name: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake kernel, after checks.

    A single meta tensor selects the fake kernel for the whole call. If the other tensors are on
    another device, the results would never be computed: this raises.
    """

    def checked(*args):
        refuse_none(name, args)
        check_one_device(name, args)
        return fake(*args)

    return checked


def _launcher(module: str | None, stem: str) -> Callable[..., Any]:
    def launch(*args):
        refuse_none(f"{stem}_triton", args)
        # Imported here because Triton may not be installed.
        kernels = importlib.import_module(f"fastjac.kernels.{module}")
        # Triton launches on the current device, which need not be that of the tensors. This is the
        # only way to the kernels, so none is launched without it.
        with torch.cuda.device_of(next(tensors_of(args))):
            return getattr(kernels, stem)(*args)

    return launch


def _differentiable(name: str, function: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    def autograd(*args):
        if transforms_active():
            raise RuntimeError(
                f"torch.ops.fastjac.{name}, which an exported program calls, for example, cannot be"
                " transformed by torch.func: call the function of fastjac, or use torch.autograd"
            )
        return function(*args, suffix)

    return autograd


def _not_differentiable(name: str, instead: str) -> Callable[..., Any]:
    def autograd(*args):
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(args)):
            raise RuntimeError(f"torch.ops.fastjac.{name} is not differentiable: {instead}")
        with below_autograd():
            return raw(name)(*args)

    return autograd


@functools.cache
def raw(name: str) -> Any:
    """The overload of an op. The lookup by attribute takes a microsecond, hence the cache."""
    return getattr(torch.ops.fastjac, name).default


def suffix_of(impl: str) -> str:
    """The suffix of the raw ops that belong to an implementation."""
    return "_triton" if impl == "triton" else ""


def impl_of(suffix: str, device_type: str) -> str:
    """The implementation of a raw op with this suffix."""
    return "triton" if suffix else device_type


def tensors_of(args: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among the arguments of a raw op, including those in lists."""
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
    """Raises if an operand is neither None nor of the shape, dtype and device of z."""
    if t is not None and (t.shape, t.dtype, t.device) != (z.shape, z.dtype, z.device):
        raise RuntimeError(f"fastjac: {name} must have the shape, dtype and device of z")


@functools.cache
def _tensors(name: str) -> tuple[int, ...]:
    """The positions of the tensor arguments of a raw op that are not optional."""
    arguments = raw(name)._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.type.kind() == "TensorType")


def refuse_none(name: str, args: Sequence[Any]) -> None:
    """Raises if a tensor argument is None, which the dispatcher accepts."""
    for i in _tensors(name):
        if args[i] is None:
            argument = raw(name)._schema.arguments[i].name
            raise RuntimeError(f"fastjac: {argument} of {name} is None: it must be a tensor")
