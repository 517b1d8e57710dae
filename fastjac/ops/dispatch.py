"""Choice of implementation: ``impl="auto" | "reference" | "cpu" | "triton" | "cuda"``.

The implementations are tried best first. ``auto`` takes the first that can run the call; a named
one runs or raises its reason, and never falls back. `explain` shows the same list.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjac.ops.native import backend, triton_interpreted

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed and summed in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


@dataclass(frozen=True)
class Choice:
    """One implementation's answer to a call: `why_not` is None if it can run it."""

    op: str
    impl: str
    why_not: str | None
    chosen: bool = False


@dataclass(frozen=True)
class Example:
    """A call of an op for ``fastjac check`` and the tests: float64 inputs and what to compute.

    ``call(inputs, impl)`` returns named outputs, the derivatives among them. The ``wide`` inputs
    are float32 where the others are of 16 bits.
    """

    label: str
    inputs: dict[str, Tensor]
    call: Callable[[dict[str, Tensor], str], dict[str, Tensor]]
    wide: tuple[str, ...] = ()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs on a device, in a dtype."""
        wide = accumulate_dtype(dtype)
        return {
            name: t.to(device, wide if name in self.wide else dtype)
            for name, t in self.inputs.items()
        }


class Op:
    """A fused op's name, its examples, and its implementations, best first; listed in `OPS`."""

    def __init__(
        self,
        name: str,
        examples: Callable[[], Iterator[Example]],
        implementations: Sequence[str] = ("cuda", "triton", "cpu", "reference"),
    ) -> None:
        self.name = name
        self.examples = examples
        self.implementations = tuple(implementations)
        OPS[name] = self

    def __repr__(self) -> str:
        return f"Op({self.name!r}, {self.implementations})"

    def select(self, impl: str, device: torch.device, dtype: torch.dtype) -> str:
        """The implementation that runs: raises ValueError (unknown) or RuntimeError (cannot)."""
        return _select(self.name, impl, device.type, dtype)

    def choices(self, device: torch.device, dtype: torch.dtype) -> list[Choice]:
        """Every implementation with its verdict, in order of preference."""
        chosen = self.select("auto", device, dtype)
        return [
            Choice(self.name, impl, why_not(impl, device.type, dtype), impl == chosen)
            for impl in self.implementations
        ]


OPS: dict[str, Op] = {}
"""Every fused op by name: what tests, ``fastjac check`` and the README's table iterate over."""


@functools.cache
def why_not(impl: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why an implementation can't run tensors of this device and dtype; None if it can."""
    if impl == "reference":
        return None
    if dtype not in FLOAT_DTYPES:
        return f"the kernels take float32, float64, bfloat16 and float16, not {dtype}"
    needs = "cpu" if impl == "cpu" or (impl == "triton" and triton_interpreted()) else "cuda"
    if device_type != needs:
        return f"{impl} runs {needs} tensors, these are on {device_type}"
    return backend(impl).why_not


@torch.compiler.assume_constant_result  # dynamo would trace into the loading of libraries
def _select(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str:
    if not isinstance(impl, str):
        raise ValueError(f"impl={impl!r} is no name of an implementation")
    return _select_cached(op, impl, device_type, dtype)


@functools.cache
def _select_cached(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str:
    implementations = OPS[op].implementations
    if impl == "auto":
        # The interpreter is for tests: it would be picked only where nothing else is compiled.
        able = (i for i in implementations if why_not(i, device_type, dtype) is None)
        return next(i for i in able if not (i == "triton" and triton_interpreted()))
    if impl not in implementations:
        known = ", ".join(("auto", *implementations))
        raise ValueError(f"impl={impl!r} is not an implementation of {op}; choose from {known}")
    reason = why_not(impl, device_type, dtype)
    if reason is not None:
        raise RuntimeError(
            f"impl={impl!r} cannot run {op} on this call: {reason}; impl='auto' picks one that can"
        )
    return impl


def explain(op: str = "act", z: Tensor | None = None) -> str:
    """Which implementation of an op would run a tensor like ``z``, and why the others would not.

    Args:
        op: name of a fused op, a key of `OPS`.
        z: tensor whose device and dtype count; default an empty float32 tensor on the CPU.

    Returns:
        Text to print, one line an implementation, best first, an arrow at the one ``auto`` takes.

    Raises:
        ValueError: no such op.
    """
    if op not in OPS:
        raise ValueError(f"op={op!r} is not a fused op; known: {', '.join(OPS)}")
    z = torch.empty(0) if z is None else z
    lines = [f"{op} on {z.device.type}, {str(z.dtype).removeprefix('torch.')}:"]
    for choice in OPS[op].choices(z.device, z.dtype):
        mark = "->" if choice.chosen else "  "
        lines.append(f"  {mark} {choice.impl:<10} {choice.why_not or 'can run'}")
    return "\n".join(lines)
