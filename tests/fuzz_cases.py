"""Arguments for fuzzing: drawing them, changing those of right calls, and judging the errors.

All functions draw from a ``random.Random``. For the raw ops it is seeded by (seed, case). For the
public functions it is hypothesis's own, which hypothesis can shrink.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastjac
from fastjac.activations import IDS, MAX_PARAMS
from fastjac.input_jacobian.traced_mlp import TracedMlp
from fastjac.ops import act_stats as _ops_act_stats  # noqa: F401  (registers every op)
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import raw
from fastjac.penalties import PENALTIES

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHERS = (
    torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex32,
    torch.float8_e4m3fn, torch.uint16,
)  # fmt: skip
SIZES = (0, 1, 2, 3, 4, 5, 7, 17, 33)
HUGE = (2**31, 2**40, 2**62, 2**63 - 1)  # more than the memory, and their products overflow
INTS = (*range(-2, 6), 15, 16, 255, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
NUMBERS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 20.0, math.nan, math.inf, -math.inf, 1e-320, 1e-45, 3e38, -1e308,
)  # fmt: skip

# ---- tensors


def numbers(rng: Random, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Normal numbers; in one of four cases some of them are replaced by `NUMBERS`."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    if dtype.is_floating_point or dtype.is_complex:
        t = torch.randn(tuple(shape), dtype=torch.float64, generator=generator)
        if t.numel() and rng.random() < 0.25:
            for _ in range(rng.randint(1, 3)):
                t.view(-1)[rng.randrange(t.numel())] = rng.choice(NUMBERS)
        return t.to(dtype)
    return torch.randint(0, 4, tuple(shape), generator=generator).to(dtype)


def shape_of(rng: Random, most_dims: int = 4) -> list[int]:
    return [rng.choice(SIZES) for _ in range(rng.randint(0, most_dims))]


def strided(rng: Random, t: Tensor) -> Tensor:
    """The same numbers with other strides."""
    kinds: list[Callable[[], Tensor]] = [lambda: sliced(rng, t), lambda: permuted(rng, t)]
    if t.dim():
        kinds.append(lambda: torch.stack([t, t], -1)[..., 0])
        kinds.append(lambda: torch.cat([t, t], 0)[: t.shape[0]])
    if t.dim() in (4, 5):
        order = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
        kinds.append(lambda: t.contiguous(memory_format=order))
    return rng.choice(kinds)()


def sliced(rng: Random, t: Tensor) -> Tensor:
    """A view of a larger tensor, with an offset that is not aligned and gaps between the rows."""
    pad = [rng.randint(0, 3) for _ in range(t.dim())]
    larger = torch.zeros([s + 2 * p for s, p in zip(t.shape, pad, strict=True)], dtype=t.dtype)
    view = larger[tuple(slice(p, p + s) for s, p in zip(t.shape, pad, strict=True))]
    return view.copy_(t)


def permuted(rng: Random, t: Tensor) -> Tensor:
    order = rng.sample(range(t.dim()), t.dim())
    inverse = sorted(range(t.dim()), key=order.__getitem__)
    return t.permute(order).contiguous().permute(inverse)


def overlapping(rng: Random, t: Tensor) -> Tensor:
    """A tensor whose elements share memory: an expanded dimension, or strides of 1."""
    if t.dim() and rng.random() < 0.5:
        return t.new_zeros(sum(t.shape) + 1).as_strided(t.shape, [1] * t.dim())
    return t[:1].expand_as(t) if t.dim() and t.shape[0] else t


def resized(rng: Random, t: Tensor) -> Tensor:
    """Another shape: one dimension more or less, or one of another size, which may be huge."""
    kind = rng.randrange(6)
    shape = list(t.shape)
    if kind == 0 or not shape:
        shape.insert(rng.randint(0, len(shape)), rng.choice(SIZES))
    elif kind == 1:
        shape.pop(rng.randrange(len(shape)))
    elif kind == 2:
        # Without memory: the tensor is expanded, or has no elements.
        shape = [0 if rng.random() < 0.3 else s for s in shape]
        shape[rng.randrange(len(shape))] = rng.choice(HUGE)
        if math.prod(s for s in shape if s) >= 2**63:
            shape = [s if s in HUGE else min(s, 1) for s in shape]
        return t.new_zeros([]).expand(shape)
    else:
        d = rng.randrange(len(shape))
        near = (max(shape[d] - 1, 0), shape[d] + 1)  # for bounds that are off by one
        shape[d] = rng.choice(SIZES if kind == 3 else near)
    return numbers(rng, shape, t.dtype)


EXOTIC: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "mkldnn": lambda t: t.float().contiguous().to_mkldnn(),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "negative view": torch._neg_view,
    "parameter": lambda t: nn.Parameter(t.detach()),
    "none": lambda t: None,
    "number": lambda t: 1.5,
    "string": lambda t: "z",
    "list": lambda t: [t],
}


def exotic(kind: str, t: Tensor) -> Any:
    """A tensor of another kind, or no tensor; `t` where torch cannot make one of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR, quantized and nested tensors warn
        try:
            return EXOTIC[kind](t)
        except (RuntimeError, TypeError, NotImplementedError):
            return t


def mutated(rng: Random, t: Any) -> Any:
    """The tensor with one property changed."""
    if type(t) is not Tensor or t.layout != torch.strided or t.is_nested:
        return t
    t = t.detach()
    if t.device.type == "meta" or t.is_quantized or t.is_neg() or t.is_conj():
        return t
    if t.numel() > 2**20 or max(t.shape, default=0) > 2**20:
        return t
    change = rng.randrange(-1, 12)
    if change < 2:
        return resized(rng, t)
    if change < 4:
        return strided(rng, t)
    if change == 4:
        return overlapping(rng, t)
    if change < 7:
        return t.to(rng.choice(FLOATS if rng.random() < 0.5 else OTHERS))
    if change == 7:
        return t.to("meta")
    if change == 8:
        return exotic(rng.choice(list(EXOTIC)), t)
    if change == 9 and t.is_floating_point():
        return t.requires_grad_()
    if change == 10 and t.numel():
        values = torch.tensor(rng.choice(INTS if t.dtype == torch.int64 else NUMBERS))
        return torch.empty_like(t).fill_(values.to(t.dtype))
    return numbers(rng, t.shape, t.dtype)


# ---- calls of the raw ops


class Recorder(TorchDispatchMode):
    """Keeps copies of the arguments of every call of an op of fastjac."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastjac":
            name = func._schema.name.removeprefix("fastjac::").removesuffix("_triton")
            self.calls[name].append(copied(args))
        return func(*args, **(kwargs or {}))


def copied(value: Any) -> Any:
    """A copy with the same strides of a tensor, or of the tensors of a list or tuple."""
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    if type(value) in (Tensor, nn.Parameter):
        if value.layout != torch.strided or value.device.type == "meta" or value.is_quantized:
            return value
        # The memory ends with the last element, so that a sanitizer sees an access beyond it.
        reach = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        size = 0 if value.numel() == 0 else reach + 1
        memory = value.detach().as_strided([size], [1]).clone()
        return memory.as_strided(value.shape, value.stride())
    return value


def recorded_calls(most: int = 60) -> dict[str, list[tuple[Any, ...]]]:
    """The calls of the raw ops that the examples and the penalties make, by the name of the op."""
    with Recorder() as recorder:
        for op in OPS.values():
            for example, dtype in zip(op.examples(), FLOATS * 8, strict=False):
                example.call(example.to("cpu", dtype), "cpu")
        for spec in PENALTIES.values():
            for dtype in (torch.float32, torch.float64):
                _run_penalty(spec, dtype)
        _run_layers()
    rng = Random(0)
    return {
        name: calls if len(calls) <= most else rng.sample(calls, most)
        for name, calls in sorted(recorder.calls.items())
    }


def _run_penalty(spec: Any, dtype: torch.dtype) -> None:
    for options in spec.cases:
        example = spec.example(dtype, torch.Generator().manual_seed(0))
        x = example.x.clone().requires_grad_()
        options = {**example.options, **options}
        output, value = spec.functional(example.model, x, *example.targets, **options)
        (output.sum() + value).backward()


def _run_layers() -> None:
    """Calls that the examples do not make: a third order, a batch norm, expanded batches, …"""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    z, v = randn(3, 5).requires_grad_(), randn(3, 5).requires_grad_()
    a = fastjac.act(z, fn="gelu", impl="cpu")
    (first,) = torch.autograd.grad(a, z, v, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z, create_graph=True)
    second.sum().backward()
    for norms in ([nn.BatchNorm2d(3)], []):
        conv = nn.Sequential(nn.Conv2d(2, 3, 2), *norms, nn.GELU(), nn.Flatten())
        penalty = fastjac.DREG(conv, reduction="sum")
        for x in (randn(3, 2, 4, 4), randn(1, 2, 2, 2).expand(5, 2, 2, 2)):
            (conv(x).sum() + penalty()).backward()
    mlp = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.SiLU(), nn.Linear(6, 3))
    for options in ({}, {"n_proj": 2}):
        output, value = fastjac.spectreg(mlp, randn(37, 5), **options)
        (output.sum() + value).backward()
    for dtype in (torch.float32, torch.float64):  # penalties call these inside torch.compile
        x, w = randn(37, 5).to(dtype), randn(2, 37, 3).to(dtype).requires_grad_()
        model = mlp.to(dtype)
        pull = TracedMlp.of(model, x)
        assert pull is not None
        (pull.output.square().sum() + pull.vjp(w).square().sum()).backward()
    # Penalties do not call these while a mode records what is called.
    a, stats = randn(2, 3, 5), randn(6)
    for k, weight in ((1, None), (2, randn(5))):
        t = randn(k, 2, 3, 5)
        raw("norm_push")(t, t, a, stats, stats, weight, 5, weight is None, k == 2)
    q, lse, mask = randn(2, 4, 3, 5), randn(2, 4, 3, 1), randn(2, 4, 3, 6)
    k, v = randn(2, 2, 6, 5), randn(2, 2, 6, 3)
    for parts, causal in ((1, False), (2, True)):
        tangents = [randn(parts * 2, *t.shape[1:]) for t in (q, k, v)]
        delta = randn(parts * 2, 4, 3, 3)
        raw("attention_push")(q, k, v, lse, mask, *tangents, delta, causal, 0.5, True)
        raw("attention_push")(q, k, v, lse, None, None, tangents[1], None, None, causal, 0.5, True)
    plan = torch.zeros(2, 2 + MAX_PARAMS, dtype=torch.float64)
    plan[:, 0] = torch.tensor([IDS["tanh"], IDS["silu"]])
    plan[0, 1] = 1  # the first layer has a bias
    for shape in ((3, 5), (2, 3, 5)):
        x, weights = randn(*shape), [randn(7, 5), randn(6, 7)]
        for total, g in ((None, None), (randn(1)[0], randn(*shape[:-1], 6))):
            *_, state, table, v = raw("layers_act")(x, weights, [randn(7)], total, plan, 0.5)
            raw("layers_act_backward")(g, v, x, weights, state, table, g is None, plan, 0.5)


# Arguments by their types in a schema. Most tensors and sizes of a case are drawn from one shape,
# so that some calls pass the first check.


def by_schema(rng: Random, schema: Any) -> list[Any]:
    """Arguments drawn from the types of the schema alone."""
    shape = shape_of(rng)
    dtype = rng.choice(FLOATS)
    return [_of_type(rng, str(a.type), shape, dtype) for a in schema.arguments]


def _of_type(rng: Random, kind: str, shape: list[int], dtype: torch.dtype) -> Any:
    if kind.startswith("Optional["):
        inner = kind.removeprefix("Optional[").removesuffix("]")
        return None if rng.random() < 0.3 else _of_type(rng, inner, shape, dtype)
    if kind.startswith("List["):
        inner = kind.removeprefix("List[").removesuffix("]")
        return [_of_type(rng, inner, shape, dtype) for _ in range(rng.randint(0, 4))]
    if kind == "Tensor":
        own = shape if rng.random() < 0.7 else rng.sample(shape, min(len(shape), 1))
        t = numbers(rng, own, dtype if rng.random() < 0.8 else torch.int64)
        return mutated(rng, t) if rng.random() < 0.3 else t
    if kind in ("int", "SymInt", "number", "Scalar"):
        return rng.choice([*INTS, *shape, *range(5)])
    if kind == "float":
        return rng.choice(NUMBERS)
    if kind == "bool":
        return rng.random() < 0.5
    if kind == "str":
        return rng.choice(["", "gelu", "z" * 1000])
    return None  # no op has such a type, and the dispatcher would refuse it


def broken(rng: Random, value: Any, others: Sequence[Tensor]) -> Any:
    """A changed argument; it may be replaced by one of `others`, the tensors of the call."""
    if isinstance(value, (list, tuple)):
        values = list(value)
        change = rng.randrange(8)
        if change == 0 or not values:
            return [*values, rng.choice(others)] if others and change else []
        if change == 1:
            values.pop()
        elif change == 2:
            values.append(rng.choice(values))
        elif change == 3:
            values.reverse()
        else:
            i = rng.randrange(len(values))
            values[i] = broken(rng, values[i], others)
        return values
    if isinstance(value, Tensor):
        return rng.choice(others) if others and rng.random() < 0.15 else mutated(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([*INTS, value + 1, value - 1])
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    return rng.choice(others) if value is None and others else value


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    return [value] if isinstance(value, Tensor) else []


def draw_call(rng: Random, schema: Any, right_calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Arguments of one call: of a right call with up to three changes, or from the schema alone."""
    if not right_calls or rng.random() < 0.2:
        return by_schema(rng, schema)
    args = list(copied(rng.choice(right_calls)))
    others = tensors_in(args)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        i = rng.randrange(len(args))
        args[i] = broken(rng, args[i], others)
    return args


def described(value: Any) -> str:
    """The text of an argument in a report."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    if not isinstance(value, Tensor):
        return repr(value)
    text = f"{value.dtype}{list(value.shape) if not value.is_nested else '[nested]'}"
    if value.layout != torch.strided:
        return f"{value.layout} {text}"
    strides = "" if value.is_nested or value.is_contiguous() else f" strides {value.stride()}"
    grad = " requires_grad" if value.requires_grad else ""
    return f"{value.device.type} {text}{strides}{grad}".replace("torch.", "")


# ---- errors of a call

# Torch's stable ABI drops the text of errors below it. These calls fail only for lack of memory.
ALLOCATIONS = ('"aten::contiguous"', '"aten::empty_like"', '"aten::new_empty"', '"aten::zero_"')
INTERNAL = (
    "INTERNAL ASSERT", "API call failed", "std::", "vector::", "bad_alloc", "please report",
    "'NoneType' object", "object has no attribute", "unhashable", "aoti_torch_",
)  # fmt: skip


def fault_of(error: BaseException) -> str | None:
    """What is wrong with an error; None if a caller can understand it."""
    if not isinstance(error, (ValueError, TypeError, RuntimeError)):
        return f"an internal error, {type(error).__name__}: {error}"
    if "API call failed" in str(error) and any(name in str(error) for name in ALLOCATIONS):
        return None
    found = [word for word in INTERNAL if word in str(error)]
    return f"an internal message ({found[0]}): {error}" if found else None
