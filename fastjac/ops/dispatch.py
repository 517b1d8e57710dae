"""Choice of implementation: ``impl="auto" | "reference" | "cpu" | "triton" | "cuda"``.

The implementations are tried in order of preference. ``auto`` takes the first one that can run the
call. An implementation that is asked for by name runs or raises an error that gives the reason; it
never falls back to another one. `explain_op` shows the same list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjac.ops.native import backend, triton_interpreted

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computations and sums: float32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclass(frozen=True)
class Example:
    """A call of an op for ``fastjac check`` and the tests.

    Attributes:
        label: the name of the example.
        inputs: float64 tensors by name.
        call: ``call(inputs, impl)`` returns outputs and derivatives by name.
        wide: the inputs that are float32 if the other ones have 16 bits.
    """

    label: str
    inputs: dict[str, Tensor]
    call: Callable[[dict[str, Tensor], str], dict[str, Tensor]]
    wide: tuple[str, ...] = ()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs on a device and in a dtype."""
        wide = accumulate_dtype(dtype)
        return {
            name: t.to(device, wide if name in self.wide else dtype)
            for name, t in self.inputs.items()
        }


class Op:
    """A fused op: its name, its examples and its implementations in order of preference."""

    def __init__(
        self,
        name: str,
        examples: Callable[[], Iterator[Example]],
        implementations: tuple[str, ...] = ("cuda", "triton", "cpu", "reference"),
    ) -> None:
        self.name = name
        self.examples = examples
        self.implementations = implementations
        OPS[name] = self

    def select(self, impl: str, device: torch.device, dtype: torch.dtype) -> str:
        """The implementation that runs.

        Raises ValueError if ``impl`` is unknown and RuntimeError if it cannot run the call.
        """
        return _select(self.name, impl, device.type, dtype)


OPS: dict[str, Op] = {}
"""Every fused op by name, for the tests, ``fastjac check`` and the table of the README."""


@functools.cache
def why_not(impl: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why an implementation cannot run tensors of this device and dtype; None if it can."""
    if impl == "reference":
        return None
    if dtype not in FLOAT_DTYPES:
        return f"the kernels take float32, float64, bfloat16 and float16, not {dtype}"
    needs = "cpu" if impl == "cpu" or (impl == "triton" and triton_interpreted()) else "cuda"
    if device_type != needs:
        return f"{impl} runs tensors on {needs}, and these are on {device_type}"
    return backend(impl).why_not


@torch.compiler.assume_constant_result  # dynamo would trace into the loading of libraries
def _select(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str:
    if not isinstance(impl, str):
        raise ValueError(f"impl={impl!r} is not the name of an implementation")
    return _select_cached(op, impl, device_type, dtype)


@functools.cache
def _select_cached(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str:
    implementations = OPS[op].implementations
    if impl == "auto":
        # Triton's interpreter is for tests only.
        able = (i for i in implementations if why_not(i, device_type, dtype) is None)
        return next(i for i in able if not (i == "triton" and triton_interpreted()))
    if impl not in implementations:
        known = ", ".join(("auto", *implementations))
        raise ValueError(f"impl={impl!r} is not an implementation of {op}; choose from {known}")
    reason = why_not(impl, device_type, dtype)
    if reason is not None:
        raise RuntimeError(
            f"impl={impl!r} cannot run {op} on this call: {reason}. Use impl='auto' to select an"
            " implementation that can"
        )
    return impl


def explain_op(op: str, z: Tensor | None = None) -> str:
    """Say which implementation of an op runs a tensor like ``z``, and why others cannot.

    Args:
        op: the name of a fused op, which is a key of `OPS`.
        z: a tensor of the device and dtype in question; default: a float32 tensor on the CPU.

    Returns:
        A text with one line for each implementation, in order of preference. An arrow marks the
        one that ``auto`` takes.
    """
    z = torch.empty(0) if z is None else z
    lines = [f"{op} on {z.device.type}, {str(z.dtype).removeprefix('torch.')}:"]
    chosen = OPS[op].select("auto", z.device, z.dtype)
    for impl in OPS[op].implementations:
        mark = "->" if impl == chosen else "  "
        reason = why_not(impl, z.device.type, z.dtype)
        lines.append(f"  {mark} {impl:<10} {reason or 'can run'}")
    return "\n".join(lines)
