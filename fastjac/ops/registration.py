"""The torch library ``fastjac``: how every op's schemas and Triton kernels are registered."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.library import register_fake as torch_register_fake

LIBRARY = Library("fastjac", "FRAGMENT")

# An op `x` has C++ kernels for CPU and CUDA tensors, `x_triton` the Triton ones; same schema.
SUFFIXES = ("", "_triton")


def define(schema: str) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


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
    """Of an operand that is read beside z; None is none."""
    if t is not None and (t.shape, t.dtype, t.device) != (z.shape, z.dtype, z.device):
        raise RuntimeError(f"fastjac: {name} must have the shape, dtype and device of z")


@functools.cache
def _tensors(name: str) -> tuple[int, ...]:
    """Where a raw op has a tensor that is not optional."""
    arguments = raw(name)._schema.arguments
    return tuple(i for i, a in enumerate(arguments) if a.type.kind() == "TensorType")


def refuse_none(name: str, args: Sequence[Any]) -> None:
    """The dispatcher lets None through in the place of a tensor."""
    for i in _tensors(name):
        if args[i] is None:
            argument = raw(name)._schema.arguments[i].name
            raise RuntimeError(f"fastjac: {argument} of {name} is None")


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """The fake kernel of a raw op.

    One tensor on meta brings the whole call here: others on the CPU would be given results that
    nobody has computed, so that raises.
    """

    def checked(*args):
        refuse_none(name, args)
        check_one_device(name, args)
        return fake(*args)

    torch_register_fake(f"fastjac::{name}", checked, lib=LIBRARY)


def register_triton(module: str, *names: str) -> None:
    """``name_triton`` runs the function ``name`` of ``fastjac.kernels.<module>``."""

    def launcher(name: str) -> Any:
        def launch(*args):
            refuse_none(f"{name}_triton", args)
            # Needs Triton, which may not be installed.
            kernels = importlib.import_module(f"fastjac.kernels.{module}")
            return getattr(kernels, name)(*args)

        return launch

    for name in names:
        LIBRARY.impl(f"{name}_triton", launcher(name), "CompositeExplicitAutograd")


def refuse_transforms(name: str) -> None:
    """For the autograd key of a raw op, which ``torch.func`` cannot see through."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"torch.ops.fastjac.{name} (from an exported program, say) cannot be transformed by"
            " torch.func: call the function of fastjac, or use torch.autograd"
        )


def register_not_differentiable(name: str, instead: str) -> None:
    """A raw op that is a gradient already: raises where autograd would be asked to go on."""

    def autograd(*args):
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(args)):
            raise RuntimeError(f"torch.ops.fastjac.{name} has no derivative of its own: {instead}")
        with torch._C._AutoDispatchBelowAutograd():
            return raw(name)(*args)

    LIBRARY.impl(name, autograd, "Autograd")
