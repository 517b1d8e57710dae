"""Checks of options and arguments: the message names the argument, the fault and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.torch_private import assert_async


def choice(argument: str, value: Any, allowed: Sequence[str]) -> str:
    """One of a few names."""
    if value not in allowed:
        options = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{argument} is {value!r}: it must be one of {options}")
    return str(value)


def flag(argument: str, value: Any) -> bool:
    """True or False and nothing that is merely truthy."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} is {value!r}: it must be True or False")
    return value


def number(argument: str, value: Any) -> float:
    """A finite real number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} is {value!r}: it must be a Python number")
    if not abs(value) <= sys.float_info.max:  # NaN, or an integer that is no float
        raise ValueError(f"{argument} is {value!r}: it must be finite")
    return float(value)


def numbers(argument: str, values: Any) -> tuple[float, ...] | None:
    """Finite real numbers in a sequence, or None."""
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{argument} is {values!r}: it must be a sequence of numbers, or None")
    return tuple(number(argument, value) for value in values)


def count(argument: str, value: Any, *, least: int = 1, exact: bool = False) -> int:
    """An integer >= ``least``; with ``exact`` also -1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} is {value!r}: it must be an integer")
    if value < least and not (exact and value == -1):
        also = ", or -1 for the exact value" if exact else ""
        raise ValueError(f"{argument} is {value}: it must be at least {least}{also}")
    if value >= 2**63:
        raise ValueError(f"{argument} is {value}: it must be less than 2**63")
    return value


def chunk_size(value: Any) -> int | None:
    """An integer >= 1, or None for one batch of all cotangents."""
    return None if value is None else count("chunk_size", value)


def generator(value: Any) -> torch.Generator | None:
    """A generator, or None for torch's global one."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator is {type(value).__name__}: it must be a torch.Generator")
    return value


def generator_device(value: torch.Generator | None, device: torch.device) -> None:
    """A generator of the kind of device that the numbers are drawn on."""
    if value is not None and value.device.type != device.type:
        raise ValueError(
            f"generator is on {value.device} and the numbers are drawn on {device}: create it with "
            f"torch.Generator({device.type!r})"
        )


def tensor(argument: str, value: Any) -> Tensor:
    """A tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} is {type(value).__name__}: it must be a torch.Tensor")
    if value.is_nested:
        raise TypeError(f"{argument} is a nested tensor: pass a dense one, padded")
    if value.dim() == 0:
        raise ValueError(f"{argument} has no dimensions: dimension 0 must be the batch")
    return value


def floating(argument: str, value: Any) -> Tensor:
    """A tensor one can differentiate with respect to."""
    value = tensor(argument, value)
    if not value.is_floating_point():
        raise TypeError(
            f"{argument} has dtype {value.dtype}, which has no gradient: for token or class inputs "
            "penalise the embeddings (pass the embedded tensor, or in the model form "
            "at='<name of the embedding module>')"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{argument} is a {value.layout} tensor: pass {argument}.to_dense()")
    return value


def batch(argument: str, value: Any, other: str, size: int) -> Tensor:
    """A tensor whose dimension 0 is the batch of another argument."""
    value = tensor(argument, value)
    if value.shape[0] != size:
        raise ValueError(
            f"{argument} has batch size {value.shape[0]} and {other} has {size}: dimension 0 of "
            "both must be the same samples"
        )
    return value


def like(argument: str, value: Tensor, other: str, model: Tensor) -> None:
    """The dtype and the device of another tensor."""
    if value.dtype != model.dtype:
        raise TypeError(
            f"{argument} has dtype {value.dtype} and {other} has {model.dtype}: "
            f"pass {argument}.to({model.dtype})"
        )
    same_device(argument, value, other, model)


def same_device(argument: str, value: Tensor, other: str, model: Tensor) -> None:
    if value.device != model.device:
        raise ValueError(
            f"{argument} is on {value.device} and {other} on {model.device}: "
            f"pass {argument}.to({str(model.device)!r})"
        )


def class_rows(target: Any, logits: Tensor) -> Tensor:
    """Class indices or probabilities as rows ``y`` ``[N, m]`` in the dtype of ``logits``."""
    y = class_target(target, logits)
    if y.is_floating_point():
        return y
    return torch.zeros_like(logits).scatter_(1, y[:, None], 1)


def class_target(target: Any, logits: Tensor) -> Tensor:
    """Class indices ``[N]``, or probabilities ``[N, m]`` in the dtype of ``logits``."""
    n, m = logits.shape
    target = batch("target", target, "output", n)
    same_device("target", target, "output", logits)
    if target.is_floating_point():
        if target.numel() != logits.numel():
            raise ValueError(
                f"target has shape {tuple(target.shape)}: probabilities must be [{n}, {m}] like "
                "the flattened output"
            )
        return target.reshape(n, m).to(logits.dtype)
    if target.dtype != torch.int64:
        raise TypeError(
            f"target has dtype {target.dtype}: pass class indices as torch.int64 (target.long()) "
            "or probabilities as floating point"
        )
    if target.shape != (n,):
        raise ValueError(
            f"target has shape {tuple(target.shape)}: class indices must be [{n}], one per sample"
        )
    if torch.compiler.is_compiling():
        # Compiled code makes an index that is out of range a row of zeros, and says nothing.
        inside = (target >= 0) & (target < m)
        assert_async(inside.all(), f"target has class indices outside of [0, {m})")
    # On a GPU a look at the values would wait for the device; scatter_ checks the range there, and
    # softmax_residual makes a wrong row NaN.
    elif target.device.type == "cpu" and n > 0 and (target.min() < 0 or target.max() >= m):
        raise ValueError(
            f"target has class indices from {target.min()} to {target.max()}: they must lie in "
            f"[0, {m}); leave samples to be ignored out of the batch"
        )
    return target


def classes(penalty: str, logits: Tensor) -> None:
    """A softmax needs two classes: over one it is the constant 1, and so is the penalty 0."""
    if logits.shape[1] < 2:
        raise ValueError(
            f"output has {logits.shape[1]} column(s) and {penalty} takes its softmax, which is "
            "constant: pass logits of at least two classes (for one binary logit use IGPen with "
            "binary_cross_entropy_with_logits)"
        )
