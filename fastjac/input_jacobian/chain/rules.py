"""The table of operations that have a link of their own; `tape.Tape.other` takes the rest.

An operation is one line: its overload in aten, and what its kind (`links`) does not know of it.
Which overload a call means follows from the types of its arguments (`binding`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.activations import TABLE, get
from fastjac.input_jacobian.chain.binding import Argument, Binding, arguments_of, bind
from fastjac.input_jacobian.chain.links import (
    Elementwise,
    Layer,
    Linear,
    LinearRow,
    Operands,
    Product,
    ProductRow,
    Unsupported,
    copies,
    of_shape,
)
from fastjac.input_jacobian.chain.norms import BatchNorm, LayerNorm
from fastjac.input_jacobian.chain.tape import RULES, Tape, Tracked
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import suffix_of

aten = torch.ops.aten


class Row(NamedTuple):
    """An operation: its arguments, and how a call of it is recorded."""

    name: str
    arguments: list[Argument]
    record: Callable[..., Any]  # (tape, call, *arguments): a value, or NotImplemented


ROWS: list[Row] = []


class Rule:
    """What the calls of one function of torch are recorded as."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.rows: list[Row] = []
        self.bound: dict[Any, list[tuple[Row, Binding]]] = {}  # by the types of the arguments

    def __call__(self, tape: Tape, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values()) if kwargs else args
        types = tuple(map(type, given))
        pattern: Any = (*types, *kwargs) if kwargs else types
        found = self.bound.get(pattern)
        if found is None:
            tried = [(r, bind(self.function, r.arguments, types, tuple(kwargs))) for r in self.rows]
            found = self.bound[pattern] = [(r, b) for r, b in tried if b is not None]
        for row, binding in found:
            rest = binding.rest
            arguments = binding(given) if rest is None else (*given, *rest) if rest else given
            if arguments is None:
                continue
            out = row.record(tape, (self.function, args, kwargs), *arguments)
            if out is NotImplemented:
                continue
            in_place = binding.in_place is not None and given[binding.in_place]
            return tape.rebind(args[0], out, row.name) if in_place else out
        return NotImplemented


def add(row: Row, *functions: Any) -> None:
    ROWS.append(row)
    for function in dict.fromkeys(functions):
        rule: Any = RULES.setdefault(function, Rule(function))
        rule.rows.append(row)


def add_overloads(names: str, make: Callable[[list[Argument]], Any]) -> None:
    """Rows for overloads (``"squeeze squeeze.dim"``), of the functions that have their name."""
    for full_name in names.split():
        name, _, overload = full_name.partition(".")
        places = [(place, s) for place in (torch, F, Tensor) for s in (name, f"__{name}__")]
        functions = [getattr(place, s) for place, s in places if hasattr(place, s)]
        arguments = arguments_of(getattr(getattr(aten, name), overload or "default"))
        add(Row(full_name, arguments, partial(make(arguments), name)), *functions)


def sort_out(operands: Any) -> tuple[list[Any], list[int], list[int]]:
    """The numbers of the operands; which of them are values of the chain, and which parameters."""
    plain: list[Any] = []
    inside, trained = [], []
    for i, t in enumerate(operands):
        if type(t) is Tracked:
            inside.append(i)
            plain.append(t.plain)
        elif t is None:
            plain.append(None)
        else:
            if t.requires_grad:
                trained.append(i)
            plain.append(t.detach())
    return plain, inside, trained


def append(tape: Tape, name: str, link: Operands, operands: Any, out: Tensor) -> Tracked:
    link.name = name
    link.parameters = tuple([operands[i] for i in link.trained])
    return tape.append(link, [operands[i] for i in link.inside], out)


# ---- linear in all operands together


def off_batch(arguments: list[Argument]) -> Callable[..., bool]:
    """Whether the arguments that are dimensions are given and are not that of the samples."""
    places = [i for i, a in enumerate(arguments) if a.name in ("dim", "dims", "dim0", "dim1")]

    def when(a: Tensor, *args: Any) -> bool:
        for i in places:
            dims = [args[i]] if isinstance(args[i], int) else args[i]
            if not dims or any([d % a.dim() == 0 for d in dims]):
                return False
        return True

    return when if places else anything


def record_linear(row: LinearRow, name: str, tape: Tape, call: Any, *values: Any) -> Any:
    function, given, options = call
    count = row.arity or 1
    operands, args, rest = values[:count], values[count:], given[count:]
    if len(given) < count:  # an operand by keyword
        return NotImplemented
    if row.arity == 0:
        operands = operands[0]
    plain, inside, trained = sort_out(operands)
    if not inside or not row.when(plain[inside[0]], *args):
        return NotImplemented
    if row.forward is not None:
        out, args = row.forward(*plain, *args)
    else:
        out = function(*(plain if row.arity else (plain,)), *rest, **options)
    shape, dtype = out.shape, out.dtype
    for i in inside:
        t = plain[i]
        if not shape or t.shape[0] != shape[0] or t.dtype != dtype:
            return NotImplemented
        if row.arity != 1 and t.dim() != len(shape):
            return NotImplemented
    for i in trained:
        if plain[i].dtype != dtype:
            return NotImplemented
        tape.watch(operands[i])
    link = Linear(plain, inside, trained, row, args, out)
    if row.apply is None:
        link.call = lambda u: function(u, *rest, **options)
    return append(tape, name, link, operands, out)


def linear(
    names: str,
    transpose: Any,
    apply: Any = None,
    *,
    when: Any = None,
    forward: Any = None,
    arity: int = 1,
) -> None:
    """Rows of what is linear in its operand, sample by sample, ``when(a, *arguments)``.

    ``transpose(d, shape, *arguments)`` and ``apply(u, shape, *arguments)`` return this shape.
    Without ``apply`` it is the call itself, without ``when`` no dimension may be the samples'.
    ``forward(a, *arguments)``, for which the call stands too, returns the result and what the two
    others have in the place of the arguments. With ``arity`` operands, or 0 for a list, the two
    are of operand i: ``(d, shape, i, shapes of all, *arguments)``.
    """

    def make(arguments: list[Argument]) -> Any:
        whether = when or off_batch(arguments[arity or 1 :])
        return partial(record_linear, LinearRow(transpose, apply, whether, forward, arity))

    add_overloads(names, make)


def anything(*arguments: Any) -> bool:
    return True


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
linear("narrow", lambda d, s, dim, start, n: aten.slice_backward(d, s, dim, start, start + n, 1))
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
linear("add.Tensor", *scaled(lambda alpha: (1, alpha)), arity=2)
linear("sub.Tensor", *scaled(lambda alpha: (1, -alpha)), arity=2)
linear("rsub.Tensor", *scaled(lambda alpha: (-alpha, 1)), arity=2)
linear("cat concat concatenate", cut, put, arity=0)
# fmt: on

_row = LinearRow(put_at, None, is_slicing, None, 1)  # aten knows no indexing
_record = partial(record_linear, _row, "__getitem__")
_arguments = [Argument("input", (Tensor,)), Argument("index", (object,))]
add(Row("__getitem__", _arguments, _record), Tensor.__getitem__)


# ---- products


def record_product(row: ProductRow, name: str, tape: Tape, call: Any, *operands: Any) -> Any:
    plain, inside, trained = sort_out(operands)
    if not inside or (None in row.into and (inside, trained) != ([0], [])):
        return NotImplemented
    tape.watch(*[t for t in operands if type(t) is not Tracked])
    out = row.apply(*plain, None)
    shape, samples = out.shape, [False, False]
    for i, t in enumerate(plain):
        of_samples = len(shape) == t.dim() > row.core[i]
        if i in inside:
            samples[i] = True
            if not of_samples or t.shape[0] != shape[0] or t.dtype != out.dtype:
                return NotImplemented
        else:  # a constant may have numbers for each sample, a parameter may not
            samples[i] = of_samples and len(t) != 1
            if i in trained and (samples[i] or t.dtype != out.dtype):
                return NotImplemented
    return append(tape, name, Product(plain, inside, trained, row, samples, ()), operands, out)


def record_layer(
    row: ProductRow, name: str, tape: Tape, call: Any, a: Any, weight: Any, bias: Any, *args: Any
) -> Any:
    if type(a) is not Tracked or type(weight) is Tracked or type(bias) is Tracked:
        raise Unsupported(f"{name}: the weight depends on x")
    tape.watch(weight, bias)
    operands = [a.plain, weight.detach(), None if bias is None else bias.detach()]
    trained = [i for i, t in ((1, weight), (2, bias)) if t is not None and t.requires_grad]
    if row.arrange is not None:
        args = row.arrange(*args)
    out = row.apply(*operands, *args)
    if not out.dim() == a.plain.dim() > row.core[0] or out.dtype != a.plain.dtype:
        return NotImplemented
    link = Layer(operands, [0], trained, row, (True, False), args)
    return append(tape, name, link, (a, weight, bias), out)


def product(names: str, *columns: Any) -> None:
    row = ProductRow(*columns)
    record = record_product if len(row.into) == 2 else record_layer
    add_overloads(names, lambda arguments: partial(record, row))


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


CONVOLUTION = (
    convolution_into_input,
    convolution_into_weight,
    lambda d: d.sum([0, *range(2, d.dim())]),
)
# fmt: off
product("mul.Tensor", lambda a, b, _: a * b, (times_into, times_into))
product("div.Tensor", lambda a, b, _: a / b, (lambda d, b, a: (d / b).sum_to_size(a.shape), None))
product("matmul bmm", lambda a, b, _: a.matmul(b),
        (lambda d, b, a: d.matmul(b.mT).sum_to_size(a.shape), matmul_into_right), (1, 2))
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
