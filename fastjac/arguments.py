"""Checks of options and arguments.

An error message names the argument and its value, and says what the value must be.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.torch_private import assert_async, numbers_hidden


def choice(argument: str, value: Any, allowed: Sequence[str]) -> str:
    """Check that a value is one of a few names."""
    if value not in allowed:
        options = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{argument} is {value!r}: it must be one of {options}")
    return str(value)


def flag(argument: str, value: Any) -> bool:
    """Check that a value is True or False; other values with a truth value are refused."""
    if not isinstance(value, bool):
        raise TypeError(f"{argument} is {value!r}: it must be True or False")
    return value


def number(argument: str, value: Any) -> float:
    """Check that a value is a finite real number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument} is {value!r}: it must be a Python number")
    if not abs(value) <= sys.float_info.max:  # NaN, infinity or an integer too large for a float
        raise ValueError(f"{argument} is {value!r}: it must be finite")
    return float(value)


def factor(argument: str, value: Any) -> float:
    """Check that a value is a finite real number that is not negative."""
    found = number(argument, value)
    if found < 0:
        raise ValueError(
            f"{argument} is {value!r}: it must be at least 0, since the loss would otherwise be "
            "smaller the larger the penalty is"
        )
    return found


def weight(argument: str, value: Any) -> float | Tensor:
    """Check that a value is a number of at least 0, or a floating-point tensor without dimensions.

    The number in a tensor is not looked at, since that would wait for a GPU.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(
                f"{argument} is {value!r}: it must be a Python number, or a tensor without "
                "dimensions such as torch.tensor(0.1)"
            )
        return factor(argument, value)
    if isinstance(value, torch.nn.Parameter):
        raise TypeError(
            f"{argument} is an nn.Parameter, which would not be among the parameters of the "
            f"penalty: pass a plain tensor, such as {argument}.view(())"
        )
    if value.dim() != 0:
        raise ValueError(
            f"{argument} has shape {tuple(value.shape)}: it must be one number, a tensor without "
            "dimensions such as torch.tensor(0.1)"
        )
    if not value.is_floating_point():
        raise TypeError(f"{argument} has dtype {value.dtype}: it must be floating point")
    return value


def factors(argument: str, values: Any) -> tuple[float, ...] | None:
    """Check that a value is a sequence of numbers of at least 0, or None."""
    if values is None:
        return None
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{argument} is {values!r}: it must be a sequence of numbers, or None")
    return tuple(factor(f"{argument}[{i}]", value) for i, value in enumerate(values))


def count(argument: str, value: Any, *, least: int = 1, exact: bool = False) -> int:
    """Check that a value is an integer of at least ``least``; with ``exact``, -1 is accepted."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} is {value!r}: it must be an integer")
    if value < least and not (exact and value == -1):
        also = ", or -1 for the exact value" if exact else ""
        raise ValueError(f"{argument} is {value}: it must be at least {least}{also}")
    if value >= 2**63:
        raise ValueError(f"{argument} is {value}: it must be less than 2**63")
    return value


def chunk_size(value: Any) -> int | None:
    """Check that a value is an integer >= 1, or None, which means all cotangents in one batch."""
    return None if value is None else count("chunk_size", value)


def generator(value: Any) -> torch.Generator | None:
    """Check that a value is a generator, or None, which means the global generator of torch."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"generator is {type(value).__name__}: it must be a torch.Generator, or None; for a "
            "seed pass torch.Generator(device).manual_seed(seed)"
        )
    return value


def generator_device(value: torch.Generator | None, device: torch.device) -> None:
    """Check that a generator is on the type of device on which the numbers are drawn."""
    if value is not None and value.device.type != device.type:
        raise ValueError(
            f"generator is on {value.device} and the numbers are drawn on {device}: create it with "
            f"torch.Generator({device.type!r})"
        )


def tensor(argument: str, value: Any) -> Tensor:
    """Check that a value is a tensor with a batch dimension."""
    if not isinstance(value, Tensor):
        made = f", torch.as_tensor({argument})" if argument != "output" else ""
        raise TypeError(f"{argument} is {type(value).__name__}: it must be a torch.Tensor{made}")
    if value.is_nested:
        raise TypeError(
            f"{argument} is a nested tensor: pass a dense one (nested.to_padded_tensor(0.0))"
        )
    if value.dim() == 0:
        loss = ". Pass what the model returns, and not a loss" if argument == "output" else ""
        raise ValueError(f"{argument} has no dimensions: dimension 0 must be the samples{loss}")
    return value


def floating(argument: str, value: Any) -> Tensor:
    """Check that a value is a dense floating-point tensor, so that it can have a gradient."""
    value = tensor(argument, value)
    if value.dtype == torch.uint8:
        raise TypeError(
            f"{argument} has dtype torch.uint8, which cannot have a gradient: pass images as "
            f"floating point, {argument}.float() / 255"
        )
    if not value.is_floating_point():
        raise TypeError(
            f"{argument} has dtype {value.dtype}, which cannot have a gradient: for token or class "
            "indices penalise the embeddings (pass the embedded tensor, or in the model form "
            "at='<name of the embedding module>')"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{argument} is a {value.layout} tensor: pass {argument}.to_dense()")
    return value


def batch(argument: str, value: Any, other: str, size: int) -> Tensor:
    """Check that a value is a tensor with the batch size of another argument."""
    value = tensor(argument, value)
    if value.shape[0] != size:
        raise ValueError(
            f"{argument} has batch size {value.shape[0]} and {other} has {size}: dimension 0 of "
            "both must be the same samples (a single sample is a batch of one, x[None])"
        )
    return value


def like(argument: str, value: Tensor, other: str, model: Tensor) -> None:
    """Check that a tensor has the dtype and the device of another one."""
    if value.dtype != model.dtype:
        raise TypeError(
            f"{argument} has dtype {value.dtype} and {other} has {model.dtype}: "
            f"pass {argument}.to({model.dtype})"
        )
    same_device(argument, value, other, model)


def same_device(argument: str, value: Tensor, other: str, model: Tensor) -> None:
    """Check that a tensor is on the device of another one."""
    if value.device != model.device:
        raise ValueError(
            f"{argument} is on {value.device} and {other} is on {model.device}: "
            f"pass {argument}.to({str(model.device)!r})"
        )


def class_rows(target: Any, logits: Tensor) -> Tensor:
    """Class indices or probabilities as rows ``y`` ``[N, m]`` of the dtype of ``logits``."""
    y = class_target(target, logits)
    if y.is_floating_point():
        return y
    return torch.zeros_like(logits).scatter_(1, y[:, None], 1)


def class_target(target: Any, logits: Tensor) -> Tensor:
    """Check class indices ``[N]``, or probabilities, returned as ``[N, m]``."""
    n, m = logits.shape
    target = batch("target", target, "output", n)
    same_device("target", target, "output", logits)
    if target.is_floating_point():
        if target.numel() != logits.numel():
            if target.shape == (n,):
                raise TypeError(
                    f"target has dtype {target.dtype} and shape ({n},): pass class indices as "
                    "torch.int64, target.long()"
                )
            raise ValueError(
                f"target has shape {tuple(target.shape)}: probabilities must have the shape of the "
                f"flattened output, [{n}, {m}]"
            )
        return target.reshape(n, m).to(logits.dtype)
    if target.dtype != torch.int64:
        raise TypeError(
            f"target has dtype {target.dtype}: pass class indices as torch.int64 (target.long()) "
            "or probabilities as floating point"
        )
    if target.shape != (n,):
        advice = ""
        if target.numel() == n:
            advice = ": pass target.flatten()"
        elif target.numel() == n * m:
            advice = ": pass one-hot labels as probabilities, target.float()"
        raise ValueError(
            f"target has shape {tuple(target.shape)}, and class indices must have shape [{n}], one "
            f"for each sample{advice}"
        )
    if numbers_hidden(target):
        # Without this check, compiled code would make a row of zeros if an index is out of range.
        inside = (target >= 0) & (target < m)
        assert_async(inside.all(), f"target has class indices outside of [0, {m})")
    # On a GPU this check would have to wait for the device. There, scatter_ checks the range, and
    # softmax_residual returns NaN for a row whose index is out of range.
    elif target.device.type == "cpu" and n > 0 and (target.min() < 0 or target.max() >= m):
        raise ValueError(
            f"target has class indices from {target.min()} to {target.max()}: they must be in "
            f"[0, {m}); remove samples that are to be ignored from the batch"
        )
    return target


def classes(penalty: str, logits: Tensor) -> None:
    """Check that there are two or more classes. The softmax of one is 1, and the penalty is 0."""
    if logits.shape[1] < 2:
        raise ValueError(
            f"output has {logits.shape[1]} column(s), and {penalty} takes its softmax, which is "
            "then constant: pass logits of at least two classes (for a single binary logit use "
            "IGPen with binary_cross_entropy_with_logits)"
        )
