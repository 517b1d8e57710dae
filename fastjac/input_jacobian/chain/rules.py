"""Which functions of torch have a link of their own; `tape.Tape.other` takes the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.activations import TABLE, get
from fastjac.input_jacobian.chain.links import (
    Activation,
    Add,
    Convolution,
    Linear,
    Pool,
    Shape,
    Unsupported,
)
from fastjac.input_jacobian.chain.norms import BatchNorm, LayerNorm
from fastjac.input_jacobian.chain.tape import RULES, Tape, Tracked
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import suffix_of


def rule(*functions: Any) -> Callable[[Any], Any]:
    def register(record: Any) -> Any:
        for function in functions:
            RULES[function] = record
        return record

    return register


def constant(name: str, *weights: Any) -> bool:
    """Whether all are plain tensors or None; raises where one depends on x."""
    if any(type(t) is Tracked for t in weights):
        raise Unsupported(f"{name}: the weight depends on x")
    return all(t is None or isinstance(t, Tensor) for t in weights)


@rule(F.linear)
def linear(tape: Tape, input: Any, weight: Any, bias: Any = None) -> Any:
    if not constant("linear", weight, bias):  # so it is the input that brought the call here
        return NotImplemented
    if input.plain.dim() < 2 or weight.dim() != 2:
        return NotImplemented
    tape.watch(weight, bias)
    link = Linear(input.plain, weight, bias)
    return tape.append(link, [input], link.forward())


def _convolution(n: int) -> Any:
    def record(
        tape: Tape,
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if not constant("convolution", weight, bias):
            return NotImplemented
        if input.plain.dim() != n + 2 or isinstance(padding, str):
            return NotImplemented

        def tuple_of(v: Any) -> tuple[int, ...]:
            v = (v,) if isinstance(v, int) else tuple(v)
            return v * n if len(v) == 1 else v

        tape.watch(weight, bias)
        options = (tuple_of(stride), tuple_of(padding), tuple_of(dilation), False, (0,) * n, groups)
        link = Convolution(input.plain, weight, bias, options)
        return tape.append(link, [input], link.forward())

    return record


for _n, _function in enumerate((torch.conv1d, torch.conv2d, torch.conv3d), 1):
    rule(_function)(_convolution(_n))


def activation(tape: Tape, z: Any, fn: str, impl: str, params: dict[str, Any]) -> Any:
    chosen = OPS["act"].select(impl, z.plain.device, z.plain.dtype)
    if chosen == "reference":
        function = get(fn).torch_function_object()
        kwargs = {**get(fn).torch_kwargs, **get(fn).params, **params}
        return tape.other(function, fn, (z,), kwargs)
    link = Activation(z.plain, fn, params, suffix_of(chosen))
    return tape.append(link, [z], link.forward())


RULES["activation"] = activation


def _names(function: Any, params: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except ValueError:  # a builtin
        return ("input", *params)


def _activation(function: Any, rows: list[str]) -> Any:
    names = _names(function, tuple(get(rows[0]).params))

    def record(tape: Tape, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        z, in_place = given.pop("input", None), given.pop("inplace", False)
        if type(z) is not Tracked:
            return NotImplemented
        for fn in rows:
            row = get(fn)
            wanted = {
                k: given.get(k, "none" if k == "approximate" else None) for k in row.torch_kwargs
            }
            if wanted != dict(row.torch_kwargs):
                continue
            params = {k: v for k, v in given.items() if k not in row.torch_kwargs}
            if not all(k in row.params and isinstance(v, int | float) for k, v in params.items()):
                return NotImplemented
            out = activation(tape, z, fn, "auto", params)
            return tape.rebind(z, out, function.__name__) if in_place else out
        return NotImplemented

    return record


def _register_activations() -> None:
    rows: dict[Any, list[str]] = {}
    for row in TABLE.values():
        for function in (
            row.torch_function_object(),
            getattr(F, row.name, None),
            getattr(torch, row.name, None),
            getattr(Tensor, row.name, None),
        ):
            if function is not None and row.name not in rows.setdefault(function, []):
                rows[function].append(row.name)
    for function, names in rows.items():
        rule(function)(_activation(function, names))


_register_activations()


@rule(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def add(tape: Tape, a: Any, b: Any, **options: Any) -> Any:
    if options or type(a) is not Tracked or type(b) is not Tracked:
        return NotImplemented
    if a.plain.shape != b.plain.shape or a.plain.dtype != b.plain.dtype:
        return NotImplemented
    return tape.append(Add(), [a, b], a.plain + b.plain)


def _shape(function: Any) -> Any:
    def record(tape: Tape, a: Any, *args: Any, **kwargs: Any) -> Any:
        if type(a) is not Tracked:
            return NotImplemented
        out = function(a.plain, *args, **kwargs)
        if out.dim() == 0 or a.plain.dim() == 0 or len(out) != len(a.plain):
            return NotImplemented
        return tape.append(Shape(a.plain, out), [a], out)

    return record


for _name in ("flatten", "reshape", "squeeze", "unsqueeze", "view", "view_as"):
    for _place in (torch, Tensor):
        if hasattr(_place, _name):
            rule(getattr(_place, _name))(_shape(getattr(_place, _name)))


def _pool(tape: Tape, a: Any, kind: str, *options: Any) -> Any:
    if type(a) is not Tracked or a.plain.dim() != 4:
        return NotImplemented
    link = Pool(a.plain, kind, options)
    return tape.append(link, [a], link.forward())


def _pair(v: Any) -> list[int]:
    return [v, v] if isinstance(v, int) else list(v)


@rule(F.avg_pool2d)
def avg_pool2d(
    tape: Tape,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Any:
    size = _pair(kernel_size)
    step = _pair(stride) if stride else size
    rest = (ceil_mode, count_include_pad, divisor_override)
    return _pool(tape, input, "avg", size, step, _pair(padding), *rest)


@rule(F.max_pool2d, torch.max_pool2d)
def max_pool2d(
    tape: Tape,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices:
        return NotImplemented
    size = _pair(kernel_size)
    step = _pair(stride) if stride else size
    return _pool(tape, input, "max", size, step, _pair(padding), _pair(dilation), ceil_mode)


@rule(F.adaptive_avg_pool2d)
def adaptive_avg_pool2d(tape: Tape, input: Any, output_size: Any) -> Any:
    size = _pair(output_size)
    return NotImplemented if None in size else _pool(tape, input, "adaptive avg", size)


def _norm_takes(name: str, a: Tensor, weight: Any, bias: Any) -> bool:
    """Whether the link of a norm has the precision of torch's.

    Of 16-bit tensors torch keeps the statistics in float32 or not, by the dtype of the parameters,
    the device and its version.
    """
    if not constant(name, weight, bias):
        return False
    dtypes = {t.dtype for t in (a, weight, bias) if t is not None}
    return dtypes in ({torch.float32}, {torch.float64})


@rule(F.batch_norm)
def batch_norm(
    tape: Tape,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if type(input) is not Tracked or not training or input.plain.device.type != "cpu":
        return NotImplemented
    if not _norm_takes("batch_norm", input.plain, weight, bias):
        return NotImplemented
    if input.plain.numel() <= input.plain.shape[1]:  # torch raises
        return NotImplemented
    tape.watch(weight, bias)
    link = BatchNorm(input.plain, weight, bias, eps)
    return tape.append(link, [input], link.forward((running_mean, running_var), momentum))


@rule(F.layer_norm)
def layer_norm(
    tape: Tape,
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    if type(input) is not Tracked:
        return NotImplemented
    a = input.plain
    if not _norm_takes("layer_norm", a, weight, bias) or len(normalized_shape) >= a.dim():
        return NotImplemented
    tape.watch(weight, bias)
    link = LayerNorm(a.contiguous(), list(normalized_shape), weight, bias, eps)
    return tape.append(link, [input], link.forward())
