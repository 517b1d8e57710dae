"""The torch library ``fastjac``: how every op's schemas and Triton kernels are registered."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch.library import Library

LIBRARY = Library("fastjac", "FRAGMENT")

# An op `x` has C++ kernels for CPU and CUDA tensors, `x_triton` the Triton ones; same schema.
SUFFIXES = ("", "_triton")


def define(schema: str) -> None:
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


# What the CUDA kernels launch with (csrc/cuda/launch_config.h); `fastjac.launch` calls it.
define("set_launch(int kernel, int device, int dtype, int[] values) -> ()")


def _load_chosen() -> None:
    importlib.import_module("fastjac.launch_cache").load_all()


# When torch starts CUDA, so before there is a tensor to launch on or a capture to be in.
torch.cuda._lazy_call(_load_chosen)


@functools.cache
def raw(name: str) -> Any:
    """The overload itself: a lookup by attribute costs a microsecond a call."""
    return getattr(torch.ops.fastjac, name).default


def suffix_of(impl: str) -> str:
    return "_triton" if impl == "triton" else ""


def impl_of(suffix: str, device_type: str) -> str:
    """The implementation that a raw op is."""
    return "triton" if suffix else device_type


def register_triton(module: str, *names: str) -> None:
    """``name_triton`` runs the function ``name`` of ``fastjac.kernels.<module>``."""

    def launcher(name: str) -> Any:
        def launch(*args):
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
        flat = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,))]
        if torch.is_grad_enabled() and any(
            isinstance(t, torch.Tensor) and t.requires_grad for t in flat
        ):
            raise RuntimeError(f"torch.ops.fastjac.{name} has no derivative of its own: {instead}")
        with torch._C._AutoDispatchBelowAutograd():
            return raw(name)(*args)

    LIBRARY.impl(name, autograd, "Autograd")
