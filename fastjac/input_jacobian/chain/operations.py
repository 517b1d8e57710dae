"""The table of operations that have a link of their own; `tape.Tape.other` takes the rest.

An operation is one line: its overload in aten, and what its kind (`rules.linear`, `rules.product`)
does not know of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.activations import TABLE, get
from fastjac.input_jacobian.chain.binding import Argument
from fastjac.input_jacobian.chain.links import Elementwise, LinearRow, Unsupported, copies, of_shape
from fastjac.input_jacobian.chain.norms import BatchNorm, LayerNorm
from fastjac.input_jacobian.chain.rules import (
    Row,
    add,
    add_overloads,
    anything,
    linear,
    product,
    record_add,
    record_map,
)
from fastjac.input_jacobian.chain.tape import RULES, Tape, Tracked
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import suffix_of

aten = torch.ops.aten


# ---- linear in all operands together


def reshape(t: Tensor, shape: Any, *arguments: Any) -> Tensor:
    return t.reshape(shape)


def same(t: Tensor, *arguments: Any) -> Tensor:
    return t


def like(d: Tensor, shape: Any) -> Tensor:
    """A tensor of which only the shape is looked at."""
    return d.new_empty(1).expand(shape)


def spread(d: Tensor, shape: Any, dims: Any, keepdim: bool, dtype: None) -> Tensor:
    for dim in sorted(dim % len(shape) for dim in dims) if not keepdim else ():
        d = d.unsqueeze(dim)
    return d.expand(shape)


def spread_mean(d: Tensor, shape: Any, dims: Any, *rest: Any) -> Tensor:
    return spread(d / math.prod(shape[i] for i in dims), shape, dims, *rest)


def narrow_back(d: Tensor, shape: Any, dim: int, start: int, length: int) -> Tensor:
    start %= shape[dim]  # it may count from the end
    return aten.slice_backward(d, shape, dim, start, start + length, 1)


def permute_back(d: Tensor, shape: Any, dims: Any) -> Tensor:
    return d.permute(sorted(range(len(dims)), key=lambda i: dims[i] % len(dims)))


def is_zero_pad(a: Tensor, pad: Any, mode: str, value: Any) -> bool:
    return mode == "constant" and not value and len(pad) < 2 * a.dim()


SLICING = (int, slice, type(None), type(...))


def put_at(d: Tensor, shape: Any, index: Any) -> Tensor:
    zeros = d.new_zeros(shape)
    zeros[index] = d
    return zeros


def is_slicing(a: Tensor, index: Any) -> bool:
    """Whether it has all samples and, of the other dimensions, no index twice."""
    if type(index) is not tuple or any(type(i) not in SLICING for i in index):
        return False
    if index[:1] not in ((...,), (slice(None),)):
        return False
    return sum(i is not None for i in index[1:]) < a.dim()


def max_pool2d(a: Tensor, *options: Any) -> Any:
    out, index = aten.max_pool2d_with_indices(a, *options)
    return out, (index, *options)


def pick(u: Tensor, shape: Any, index: Tensor, *options: Any) -> Tensor:
    return u.flatten(2).gather(2, copies(index, u).flatten(2)).view(shape)


def unpick(d: Tensor, shape: Any, index: Tensor, *options: Any) -> Tensor:
    places = copies(index, d)
    return aten.max_pool2d_with_indices_backward(d, like(d, shape), *options, places)


def scaled(factors: Callable[[float], tuple[float, float]]) -> Any:
    """The transpose and the map of each operand of ``factors[0] a + factors[1] b``."""

    def times(t: Tensor, i: int, alpha: float) -> Tensor:
        factor = factors(alpha)[i]
        return t if factor == 1 else t * factor

    return (
        lambda d, s, i, shapes, alpha: times(d, i, alpha).sum_to_size(s),
        lambda u, s, i, shapes, alpha: times(u, i, alpha).expand(s),
    )


def cut(d: Tensor, shape: Any, i: int, shapes: Any, dim: int) -> Tensor:
    return d.narrow(dim, sum(s[dim] for s in shapes[:i]), shapes[i][dim])


def put(u: Tensor, shape: Any, i: int, shapes: Any, dim: int) -> Tensor:
    start = sum(s[dim] for s in shapes[:i])
    return aten.slice_backward(u, shape, dim, start, start + shapes[i][dim], 1)


# fmt: off
linear("view reshape flatten.using_ints unflatten.int squeeze squeeze.dim squeeze.dims unsqueeze",
       reshape, reshape, when=anything)
linear("contiguous clone", same)
linear("add.Scalar sub.Scalar", same, same)
linear("neg", lambda d, s: -d)
linear("rsub.Scalar", lambda d, s, c, alpha: -alpha * d, lambda u, s, c, alpha: -alpha * u)
linear("mul.Scalar", lambda d, s, c: d * c)
linear("div.Scalar", lambda d, s, c: d / c)
linear("transpose.int swapaxes", lambda d, s, i, j: d.transpose(i, j))
linear("permute", permute_back, when=lambda a, dims: dims[0] % a.dim() == 0)
linear("flip", lambda d, s, dims: d.flip(dims))
linear("roll", lambda d, s, shifts, dims: d.roll([-shift for shift in shifts], dims))
linear("expand", lambda d, s, *_: d.sum_to_size(s), lambda u, s, *_: u.expand(s),
       when=lambda a, size, _: len(size) == a.dim())
linear("narrow", narrow_back)
linear("select.int", lambda d, s, dim, index: aten.select_backward(d, s, dim, index))
linear("pad", lambda d, s, pad, *_: F.pad(d, [-p for p in pad]), when=is_zero_pad)
linear("pixel_shuffle", lambda d, s, r: F.pixel_unshuffle(d, r))
linear("sum.dim_IntList", spread)
linear("mean.dim", spread_mean)
linear("avg_pool2d", lambda d, s, *o: aten.avg_pool2d_backward(d, like(d, s), *o))
linear("avg_pool3d", lambda d, s, *o: aten.avg_pool3d_backward(d, like(d, s), *o))
linear("adaptive_avg_pool2d", lambda d, s, _: aten._adaptive_avg_pool2d_backward(d, like(d, s)),
       when=lambda a, size: None not in size)
linear("max_pool2d", unpick, pick, forward=max_pool2d, when=lambda a, *options: a.dim() == 4)
add_overloads("add.Tensor", lambda arguments: record_add)
linear("add.Tensor", *scaled(lambda alpha: (1, alpha)), arity=2)
linear("sub.Tensor", *scaled(lambda alpha: (1, -alpha)), arity=2)
linear("rsub.Tensor", *scaled(lambda alpha: (-alpha, 1)), arity=2)
linear("cat concat concatenate", cut, put, arity=0)
# fmt: on

_row = LinearRow(put_at, None, is_slicing, None, 1)  # aten knows no indexing
_record = partial(record_map, _row, "__getitem__")
_arguments = [Argument("input", (Tensor,)), Argument("index", (object,))]
add(Row("__getitem__", _arguments, _record), Tensor.__getitem__)


# ---- products


def flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def times_into(d: Tensor, other: Tensor, of: Tensor) -> Tensor:
    return (d * other).sum_to_size(of.shape)


def matmul_into_right(d: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return flat(a).t().mm(flat(d)) if b.dim() == 2 else a.mT.matmul(d).sum_to_size(b.shape)


def convolution_into_input(d: Tensor, weight: Tensor, a: Tensor, *options: Any) -> Tensor:
    """On a CPU as a convolution with the flipped taps, where oneDNN's own code is slow.

    That is for other numbers of output channels than multiples of 16: 1 → 6 channels, 5×5 taps,
    [50, 6, 28, 28], 2 cores: 1.56 against 0.55 ms.
    """
    stride, padding, dilation, transposed, _, groups = options
    taps = weight.shape[2:]
    flips = d.device.type == "cpu" and len(weight) % 16 and not transposed
    if not (
        flips
        and groups == max(stride) == max(dilation) == 1
        and all(p < k for p, k in zip(padding, taps, strict=True))
    ):
        like = of_shape(a, d)
        return aten.convolution_backward(d, like, weight, None, *options, [True, False, False])[0]
    padding = [k - 1 - p for p, k in zip(padding, taps, strict=True)]
    flipped = weight.flip(list(range(2, 2 + len(taps)))).transpose(0, 1)
    return torch.convolution(d, flipped, None, stride, padding, dilation, False, padding, 1)


def convolution_into_weight(d: Tensor, a: Tensor, weight: Tensor, *options: Any) -> Tensor:
    return aten.convolution_backward(d, a, weight, None, *options, [False, True, False])[1]


MATMUL = (lambda d, b, a: d.matmul(b.mT).sum_to_size(a.shape), matmul_into_right)
CONVOLUTION = (
    convolution_into_input,
    convolution_into_weight,
    lambda d: d.sum([0, *range(2, d.dim())]),
)
# fmt: off
product("mul.Tensor", lambda a, b, _: a * b, (times_into, times_into))
product("div.Tensor", lambda a, b, _: a / b, (lambda d, b, a: (d / b).sum_to_size(a.shape), None))
product("matmul", lambda a, b, _: a.matmul(b), MATMUL, (1, 2))
product("bmm", lambda a, b, _: a.bmm(b), MATMUL, (1, 2))
product("linear", F.linear,
        (lambda d, w, a: d.matmul(w), lambda d, a, w: flat(d).t().mm(flat(a)),
         lambda d: flat(d).sum(0)),
        (1, 2), lambda total, d, a: total.addmm_(flat(d).t(), flat(a)))
for _n, _overload in ((1, ""), (2, ".input"), (3, ".input")):
    product(f"conv{_n}d", torch.convolution, CONVOLUTION, (_n + 1, _n + 2), None,
            lambda s, p, d, groups: (s, p, d, False, [0] * len(s), groups))
    product(f"conv_transpose{_n}d{_overload}", torch.convolution, CONVOLUTION, (_n + 1, _n + 2),
            None, lambda s, p, out_padding, groups, d: (s, p, d, True, out_padding, groups))
# fmt: on


# ---- elementwise: the activation table


def activation(tape: Tape, z: Any, fn: str, impl: str, params: dict[str, Any]) -> Any:
    chosen = OPS["act"].select(impl, z.plain.device, z.plain.dtype)
    if chosen == "reference":
        function = get(fn).torch_function_object()
        kwargs = {**get(fn).torch_kwargs, **get(fn).params, **params}
        return tape.other(function, fn, (z,), kwargs)
    link = Elementwise(z.plain, fn, params, suffix_of(chosen))
    link.name = fn
    return tape.append(link, [z], link.forward())


RULES["activation"] = activation


def add_activation(fn: str) -> None:
    row, count = get(fn), len(get(fn).params)

    def record(tape: Tape, call: Any, z: Any, *values: Any) -> Any:
        if type(z) is not Tracked or values[count:] != tuple(row.torch_kwargs.values()):
            return NotImplemented
        return activation(tape, z, fn, "auto", dict(zip(row.params, values, strict=False)))

    arguments = [
        Argument("input", (Tensor,)),
        *[Argument(name, (int, float), default) for name, default in row.params.items()],
        *[Argument(name, (str,), "none", keyword=True) for name in row.torch_kwargs],
    ]
    functions = row.torch_function_object(), *(getattr(p, fn, None) for p in (F, torch, Tensor))
    add(Row(fn, arguments, record), *[f for f in functions if f is not None])


for _fn in TABLE:
    add_activation(_fn)


# ---- norms


def norm_takes(name: str, a: Any, weight: Any, bias: Any) -> bool:
    """Whether the link of a norm has the precision of torch's.

    Of 16-bit tensors torch keeps the statistics in float32 or not, by the dtype of the parameters,
    the device and its version.
    """
    if type(weight) is Tracked or type(bias) is Tracked:
        raise Unsupported(f"{name}: the weight depends on x")
    dtypes = {t.dtype for t in (a, weight, bias) if t is not None}
    return type(a) is Tracked and dtypes in ({torch.float32}, {torch.float64})


def batch_norm(
    tape: Tape, call: Any, input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any,
    training: bool, momentum: float, eps: float,
) -> Any:  # fmt: skip
    if not norm_takes("batch_norm", input, weight, bias) or not training:
        return NotImplemented
    a = input.plain
    if a.device.type != "cpu" or a.numel() <= a.shape[1]:  # torch raises for one number a channel
        return NotImplemented
    tape.watch(weight, bias)
    link = BatchNorm(a, weight, bias, eps)
    return tape.append(link, [input], link.forward((running_mean, running_var), momentum))


def layer_norm(
    name: str, tape: Tape, call: Any, input: Any, shape: Any, weight: Any,
    bias: Any, eps: float, cudnn: bool,
) -> Any:  # fmt: skip
    if not norm_takes(name, input, weight, bias) or len(shape) >= input.plain.dim():
        return NotImplemented
    tape.watch(weight, bias)
    link = LayerNorm(input.plain.contiguous(), list(shape), weight, bias, eps)
    return tape.append(link, [input], link.forward())


_parameters = inspect.signature(F.batch_norm).parameters.values()
_arguments = [Argument(p.name, (object,), p.default) for p in _parameters]
add(Row("batch_norm", _arguments, batch_norm), F.batch_norm)
add_overloads("layer_norm", lambda arguments: layer_norm)
