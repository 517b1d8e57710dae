"""The table of operations that have a link of their own; `tape.Tape.other` takes the rest.

An operation is one line: its overload in aten, whose kind it names, and what the kind does not know
of it. Which overload a call means follows from the types of its arguments (`binding`).
"""

from __future__ import annotations

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
    Linear,
    Link,
    Product,
    Sum,
    Unsupported,
    copies,
    plus,
)
from fastjac.input_jacobian.chain.norms import BatchNorm, LayerNorm
from fastjac.input_jacobian.chain.tape import RULES, Tape, Tracked
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import suffix_of

aten = torch.ops.aten


class Row(NamedTuple):
    """An operation: its arguments, and how a call of it is recorded."""

    name: str
    arguments: tuple[Argument, ...]
    record: Callable[..., Any]  # (tape, call, *arguments): a value, or NotImplemented


class Rule:
    """What the calls of one function of torch are recorded as."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.rows: list[Row] = []
        self.bound: dict[Any, list[tuple[Row, Binding]]] = {}  # by the types of the arguments

    def bind(self, types: tuple[type, ...], names: tuple[str, ...]) -> list[tuple[Row, Binding]]:
        own = arguments_of(self.function) if hasattr(self.function, "__code__") else None
        tried = [
            (row, bind(own or row.arguments, row.arguments, types, names)) for row in self.rows
        ]
        return [(row, binding) for row, binding in tried if binding is not None]

    def __call__(self, tape: Tape, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values()) if kwargs else args
        types = tuple(map(type, given))
        pattern = (*types, *kwargs) if kwargs else types
        found = self.bound.get(pattern)
        if found is None:
            found = self.bound[pattern] = self.bind(types, tuple(kwargs))
        for row, binding in found:
            arguments = binding(given)
            if arguments is None:
                continue
            out = row.record(tape, (self.function, args, kwargs), *arguments)
            if out is NotImplemented:
                continue
            in_place = binding.in_place is not None and given[binding.in_place]
            return tape.rebind(args[0], out, row.name) if in_place else out
        return NotImplemented


def add(row: Row, *functions: Any) -> None:
    for function in functions:
        rule = RULES.setdefault(function, Rule(function))
        if row not in rule.rows:
            rule.rows.append(row)


def add_overloads(names: str, record_by: Callable[[str, Any], Any]) -> None:
    """Rows of overloads (``"squeeze squeeze.dim"``), for the functions that have their name."""
    for full_name in names.split():
        name, _, overload = full_name.partition(".")
        arguments = arguments_of(getattr(getattr(aten, name), overload or "default"))
        found = [
            getattr(place, spelling)
            for place in (torch, F, Tensor)
            for spelling in (name, f"__{name}__")
            if hasattr(place, spelling)
        ]
        add(Row(name, arguments, record_by(name, arguments)), *found)


def append(tape: Tape, name: str, link: Link, inputs: list[Tracked], out: Tensor) -> Tracked:
    link.name = name
    return tape.append(link, inputs, out)


# ---- linear in the input


class LinearRow(NamedTuple):
    transpose: Callable[..., Tensor]  # (d, shape of the result, *arguments)
    apply: Callable[..., Tensor] | None  # (u, shape of the result, *arguments), or the call itself
    forward: Callable[..., Any] | None  # (a, *arguments): the result, what stands for arguments
    when: Callable[..., bool]  # (a, *arguments): whether it is linear and of samples by themselves


def off_batch(arguments: tuple[Argument, ...]) -> Callable[..., bool]:
    """Whether the arguments that are dimensions are given and are not that of the samples."""
    places = [i - 1 for i, a in enumerate(arguments) if a.name in ("dim", "dims", "dim0", "dim1")]

    def when(a: Tensor, *arguments: Any) -> bool:
        for i in places:
            dims = [arguments[i]] if isinstance(arguments[i], int) else arguments[i]
            if not dims or any(d % a.dim() == 0 for d in dims):
                return False
        return True

    return when


def record_linear(row: LinearRow, name: str, tape: Tape, call: Any, a: Any, *arguments: Any) -> Any:
    function, given, options = call
    if type(a) is not Tracked or not given or given[0] is not a:
        return NotImplemented
    plain, rest = a.plain, given[1:]
    if plain.dim() == 0 or not row.when(plain, *arguments):
        return NotImplemented
    if row.forward is None:
        out = function(plain, *rest, **options)
    else:
        out, arguments = row.forward(plain, *arguments)
    if out.dim() == 0 or len(out) != len(plain) or out.dtype != plain.dtype:
        return NotImplemented
    link = Linear(row, lambda u: function(u, *rest, **options), plain, out, arguments)
    return append(tape, name, link, [a], out)


def linear(
    names: str, transpose: Any, apply: Any = None, *, forward: Any = None, when: Any = None
) -> None:
    add_overloads(
        names,
        lambda name, arguments: partial(
            record_linear,
            LinearRow(transpose, apply, forward, when or off_batch(arguments)),
            name,
        ),
    )


def anything(*arguments: Any) -> bool:
    return True


def reshape(t: Tensor, shape: Any, *arguments: Any) -> Tensor:
    return t.reshape(shape)


def same(t: Tensor, *arguments: Any) -> Tensor:
    return t


def like(d: Tensor, shape: Any) -> Tensor:
    """A tensor of which only the shape is looked at."""
    return d.new_empty(1).expand(shape)


def spread(d: Tensor, shape: Any, dims: Any, keepdim: bool) -> Tensor:
    """The transpose of a sum."""
    if not keepdim:
        for dim in sorted(dim % len(shape) for dim in dims):
            d = d.unsqueeze(dim)
    return d.expand(shape)


def inverse(dims: Any) -> list[int]:
    return sorted(range(len(dims)), key=lambda i: dims[i] % len(dims))


def max_pool2d(a: Tensor, *options: Any) -> Any:
    out, index = aten.max_pool2d_with_indices(a, *options)
    return out, (index, *options)


linear(
    "view reshape flatten.using_ints unflatten.int squeeze squeeze.dim squeeze.dims unsqueeze",
    reshape,
    reshape,
    when=anything,
)
linear("transpose.int swapaxes", lambda d, s, i, j: d.transpose(i, j))
linear(
    "permute",
    lambda d, s, dims: d.permute(inverse(dims)),
    when=lambda a, dims: dims[0] % a.dim() == 0,
)
linear("flip", lambda d, s, dims: d.flip(dims))
linear("narrow", lambda d, s, dim, start, n: aten.slice_backward(d, s, dim, start, start + n, 1))
linear("select.int", lambda d, s, dim, index: aten.select_backward(d, s, dim, index))
linear("contiguous clone", same)
linear("neg", lambda d, s: -d)
linear("add.Scalar sub.Scalar", same, same)
linear("rsub.Scalar", lambda d, s, c, alpha: -alpha * d, lambda u, s, c, alpha: -alpha * u)
linear("mul.Scalar", lambda d, s, c: d * c)
linear("div.Scalar", lambda d, s, c: d / c)
linear("sum.dim_IntList", lambda d, s, dims, keepdim, _: spread(d, s, dims, keepdim))
linear(
    "mean.dim",
    lambda d, s, dims, keepdim, _: spread(d, s, dims, keepdim) / math.prod(s[i] for i in dims),
)
linear("avg_pool2d", lambda d, s, *o: aten.avg_pool2d_backward(d, like(d, s), *o))
linear("avg_pool3d", lambda d, s, *o: aten.avg_pool3d_backward(d, like(d, s), *o))
linear(
    "adaptive_avg_pool2d",
    lambda d, s, size: aten._adaptive_avg_pool2d_backward(d, like(d, s)),
    when=lambda a, size: None not in size,
)
linear("pixel_shuffle", lambda d, s, r: F.pixel_unshuffle(d, r))
linear("roll", lambda d, s, shifts, dims: d.roll([-shift for shift in shifts], dims))
linear(
    "expand",
    lambda d, s, *_: d.sum_to_size(s),
    lambda u, s, *_: u.expand(s),
    when=lambda a, size, _: len(size) == a.dim(),
)
linear(
    "pad",
    lambda d, s, pad, *_: F.pad(d, [-p for p in pad]),
    when=lambda a, pad, mode, value: mode == "constant" and not value and len(pad) < 2 * a.dim(),
)
linear(
    "max_pool2d",
    lambda d, s, index, *o: aten.max_pool2d_with_indices_backward(
        d, like(d, s), *o, copies(index, d)
    ),
    lambda u, s, index, *_: u.flatten(2).gather(2, copies(index, u).flatten(2)).view(s),
    forward=max_pool2d,
    when=lambda a, *_: a.dim() == 4,
)


# ---- linear in several operands: together, or in each of two


class SumRow(NamedTuple):
    forward: Callable[..., Tensor]  # (operands, *arguments)
    into: Callable[..., Tensor]  # (i, d, shape of the result, shapes of the operands, *arguments)
    apply: Callable[..., Tensor]  # (tangents or None, shape of the result, shapes, *arguments)
    listed: bool  # the operands are the first argument, not the first two
    when: Callable[..., bool]  # (an operand, *arguments)


class ProductRow(NamedTuple):
    apply: Callable[..., Tensor]  # (a, b, *arguments), or (a, b, bias, *arguments)
    # The transposes in a and b: (d, the other operand, one of the shape of the result, *arguments);
    # of the bias: (d, bias). None where the operation is not linear.
    into: tuple[Callable[..., Tensor] | None, ...]
    core: tuple[float, float] = (0, 0)  # how many dimensions of a and b are not of the samples
    add_into: Callable[..., Tensor] | None = None  # (total, d, a): into b, in the memory of total
    arrange: Callable[..., Any] | None = None  # the arguments for these functions

    @property
    def no_bias(self) -> tuple[None, ...]:
        return (None,) * (len(self.into) - 2)

    def has_samples(self, i: int, t: Tensor, out: Tensor) -> bool:
        """Whether a constant has numbers for each sample."""
        return t.dim() == out.dim() and t.dim() > self.core[i] and len(t) != 1


class Operands:
    """Which are values of the chain, which parameters, and the numbers of all."""

    def __init__(self, given: Any) -> None:
        self.given, self.plain = given, []
        self.inside, self.trained = [], []
        for i, t in enumerate(given):
            if type(t) is Tracked:
                self.inside.append(i)
            elif t is not None and t.requires_grad:
                self.trained.append(i)
            self.plain.append(t.plain if type(t) is Tracked else t if t is None else t.detach())

    def fit(self, out: Tensor, core: Any) -> bool:
        """Whether the first dimension is that of the samples, and the dtype the same."""
        return all(self.plain[i].dtype == out.dtype for i in (*self.inside, *self.trained)) and all(
            self.plain[i].dim() == out.dim() > core[i] and len(self.plain[i]) == len(out)
            for i in self.inside
        )

    def append(self, tape: Tape, name: str, kind: Any, row: Any, out: Tensor, args: Any) -> Tracked:
        link = kind(row, self.plain, self.inside, self.trained, args, out)
        link.parameters = tuple([self.given[i] for i in self.trained])
        return append(tape, name, link, [self.given[i] for i in self.inside], out)


def record_sum(row: SumRow, name: str, tape: Tape, call: Any, *arguments: Any) -> Any:
    given, *rest = arguments if row.listed else (arguments[:2], *arguments[2:])
    operands = Operands(given)
    if not operands.inside or not row.when(operands.plain[operands.inside[0]], *rest):
        return NotImplemented
    out = row.forward(operands.plain, *rest)
    if not operands.fit(out, [0] * len(given)):
        return NotImplemented
    tape.watch(*[given[i] for i in operands.trained])
    return operands.append(tape, name, Sum, row, out, rest)


def record_product(row: ProductRow, name: str, tape: Tape, call: Any, *arguments: Any) -> Any:
    count = len(row.into)
    operands = Operands(arguments[:count])
    inside, plain = operands.inside, operands.plain
    if row.core[1] == math.inf and inside != [0]:  # a layer, not only a product
        raise Unsupported(f"{name}: the weight depends on x")
    if any(row.into[i] is None for i in (*inside, *operands.trained)):
        return NotImplemented
    tape.watch(*[t for t in operands.given if type(t) is not Tracked])
    rest = arguments[count:] if row.arrange is None else row.arrange(*arguments[count:])
    out = row.apply(*plain, *rest)
    if not operands.fit(out, row.core):
        return NotImplemented
    if any(i < 2 and row.has_samples(i, plain[i], out) for i in operands.trained):
        return NotImplemented  # a parameter for each sample
    return operands.append(tape, name, Product, row, out, rest)


def sums(names: str, forward: Any, into: Any, apply: Any, listed: bool = False) -> None:
    add_overloads(
        names,
        lambda name, arguments: partial(
            record_sum, SumRow(forward, into, apply, listed, off_batch(arguments)), name
        ),
    )


def product(names: str, *columns: Any, **more: Any) -> None:
    row = ProductRow(*columns, **more)
    add_overloads(names, lambda name, arguments: partial(record_product, row, name))


def scaled(factors: Callable[[float], tuple[float, float]]) -> Any:
    """Of ``factors[0] a + factors[1] b``."""

    def into(i: int, d: Tensor, shape: Any, shapes: Any, alpha: float) -> Tensor:
        c = factors(alpha)[i]
        return (d if c == 1 else d * c).sum_to_size(shape)

    def apply(us: Any, shape: Any, shapes: Any, alpha: float) -> Tensor:
        total = None
        for u, c in zip(us, factors(alpha), strict=True):
            if u is not None:
                total = plus(total, u if c == 1 else u * c)
        return total.expand(shape)

    return into, apply


def cat_into(i: int, d: Tensor, shape: Any, shapes: Any, dim: int) -> Tensor:
    return d.narrow(dim, sum(s[dim] for s in shapes[:i]), shapes[i][dim])


def cat(us: Any, shape: Any, shapes: Any, dim: int) -> Tensor:
    some = next(u for u in us if u is not None)
    zeros = [some.new_zeros(len(some), *s[1:]) if u is None else u for u, s in zip(us, shapes)]
    return torch.cat(zeros, dim)


def flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


def times(d: Tensor, other: Tensor, of: Tensor) -> Tensor:
    return (d * other).sum_to_size(of.shape)


def matmul_right(d: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if b.dim() == 2:
        return flat(a).t().mm(flat(d))
    return a.mT.matmul(d).sum_to_size(b.shape)


def conv_left(d: Tensor, weight: Tensor, a: Tensor, *options: Any) -> Tensor:
    """The gradient with respect to the input, on a CPU as a convolution with the flipped taps.

    Where oneDNN's own has slow code: for other numbers of output channels than multiples of 16.
    1 → 6 channels, 5×5 taps, [50, 6, 28, 28], 2 cores: 1.56 against 0.55 ms.
    """
    stride, padding, dilation, transposed, _, groups = options
    taps = weight.shape[2:]
    if (
        d.device.type != "cpu"
        or transposed
        or len(weight) % 16 == 0
        or not groups == max(stride) == max(dilation) == 1
        or any(p >= k for p, k in zip(padding, taps, strict=True))
    ):
        mask = [True, False, False]
        return aten.convolution_backward(d, a, weight, None, *options, mask)[0]
    padding = [k - 1 - p for p, k in zip(padding, taps, strict=True)]
    flipped = weight.flip(list(range(2, 2 + len(taps)))).transpose(0, 1)
    return torch.convolution(d, flipped, None, stride, padding, dilation, False, [0] * len(taps), 1)


def conv_right(d: Tensor, a: Tensor, weight: Tensor, *options: Any) -> Tensor:
    return aten.convolution_backward(d, a, weight, None, *options, [False, True, False])[1]


def conv_bias(d: Tensor, bias: Tensor) -> Tensor:
    return d.sum([0, *range(2, d.dim())])


sums("add.Tensor", lambda ts, alpha: torch.add(*ts, alpha=alpha), *scaled(lambda c: (1, c)))
sums("sub.Tensor", lambda ts, alpha: torch.sub(*ts, alpha=alpha), *scaled(lambda c: (1, -c)))
sums("rsub.Tensor", lambda ts, alpha: torch.rsub(*ts, alpha=alpha), *scaled(lambda c: (-c, 1)))
sums("cat concat concatenate", torch.cat, cat_into, cat, listed=True)
product("mul.Tensor", torch.mul, (times, times))
product("div.Tensor", torch.div, (lambda d, b, a: (d / b).sum_to_size(a.shape), None))
product(
    "matmul bmm",
    torch.matmul,
    (lambda d, b, a: d.matmul(b.mT).sum_to_size(a.shape), matmul_right),
    (1, 2),
)
product(
    "linear",
    F.linear,
    (
        lambda d, w, a: d.matmul(w),
        lambda d, a, w: flat(d).t().mm(flat(a)),
        lambda d, bias: flat(d).sum(0),
    ),
    (1, math.inf),
    lambda total, d, a: total.addmm_(flat(d).t(), flat(a)),
)
for n in (1, 2, 3):
    convolution = torch.convolution, (conv_left, conv_right, conv_bias), (n + 1, math.inf), None
    product(f"conv{n}d", *convolution, lambda s, p, d, g: (s, p, d, False, [0] * len(s), g))
    name = f"conv_transpose{n}d" + ".input" * (n > 1)
    product(name, *convolution, lambda s, p, o, g, d: (s, p, d, True, o, g))


# ---- elementwise: the activation table


def activation(tape: Tape, z: Any, fn: str, impl: str, params: dict[str, Any]) -> Any:
    chosen = OPS["act"].select(impl, z.plain.device, z.plain.dtype)
    if chosen == "reference":
        function = get(fn).torch_function_object()
        kwargs = {**get(fn).torch_kwargs, **get(fn).params, **params}
        return tape.other(function, fn, (z,), kwargs)
    link = Elementwise(z.plain, fn, params, suffix_of(chosen))
    return append(tape, fn, link, [z], link.forward())


RULES["activation"] = activation


def add_activation(fn: str) -> None:
    row = get(fn)

    def record(tape: Tape, call: Any, z: Any, *arguments: Any) -> Any:
        count = len(row.params)
        if type(z) is not Tracked or arguments[count:] != tuple(row.torch_kwargs.values()):
            return NotImplemented
        return activation(tape, z, fn, "auto", dict(zip(row.params, arguments)))

    for function in (
        row.torch_function_object(),
        *(getattr(p, fn, None) for p in (F, torch, Tensor)),
    ):
        if function is None:
            continue
        own = (
            function if hasattr(function, "__code__") else getattr(aten, function.__name__).default
        )
        known = {a.name: a for a in arguments_of(own)}
        wanted = (
            Argument("self", (Tensor,)),
            *(Argument(name, (int, float), value) for name, value in row.params.items()),
            *(known[name] for name in row.torch_kwargs),
        )
        add(Row(fn, wanted, record), function)


for fn in TABLE:
    add_activation(fn)


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
    if a.device.type != "cpu" or a.numel() <= a.shape[1]:  # of one number torch raises
        return NotImplemented
    tape.watch(weight, bias)
    link = BatchNorm(a, weight, bias, eps)
    out = link.forward((running_mean, running_var), momentum)
    return append(tape, "batch_norm", link, [input], out)


def layer_norm(
    tape: Tape, call: Any, input: Any, shape: Any, weight: Any, bias: Any, eps: float, *unused: Any
) -> Any:
    if not norm_takes("layer_norm", input, weight, bias) or len(shape) >= input.plain.dim():
        return NotImplemented
    tape.watch(weight, bias)
    link = LayerNorm(input.plain.contiguous(), list(shape), weight, bias, eps)
    return append(tape, "layer_norm", link, [input], link.forward())


add(Row("batch_norm", arguments_of(F.batch_norm), batch_norm), F.batch_norm)
add_overloads("layer_norm", lambda name, arguments: layer_norm)
