"""Fuzzing of the public functions: right results for right calls, clear errors for wrong ones.

The values and gradients of right calls, of any shape, strides and dtype, equal those of plain torch
in float64. Calls with a wrong argument return, or raise an error that names an argument. Hypothesis
draws and shrinks the cases and prints how to reproduce a failure. FASTJAC_FUZZ_CASES sets the
number of cases.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuzz_cases import (
    ALLOCATIONS,
    FLOATS,
    SIZES,
    broken,
    described,
    fault_of,
    numbers,
    shape_of,
    strided,
    tensors_in,
)  # fmt: skip
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from penalty_cases import SPECS, Call, engines_of, gradients, takes
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import fastjac
from fastjac import functional
from fastjac.activations import IDS, TABLE, get
from fastjac.cli.check import relative_error, tolerance
from fastjac.layerwise.batch_norm import Normed, batch_norm_act, inverse_variance
from fastjac.layerwise.layer_act import LayerActOptions, layer_act
from fastjac.ops.act_stats import composed
from fastjac.ops.dispatch import FLOAT_DTYPES, accumulate_dtype
from fastjac.ops.row_sqnorm import composed_rows

CASES = int(os.environ.get("FASTJAC_FUZZ_CASES", "10000")) // 250
fuzzed = settings(
    max_examples=CASES, deadline=None, print_blob=True, database=None, derandomize=CASES <= 40,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
fuzzed_penalty = settings(fuzzed, max_examples=CASES // 2)  # for each penalty
randoms = st.randoms(use_true_random=False)

WRONG = (
    None, "nope", "", 7, -1, 1.5, math.nan, 10**400, True, [], {}, (1, 2), object(), torch.ones(2),
)  # fmt: skip


@dataclass
class Case:
    """A function, its arguments by name, and the function that it must be equal to."""

    call: Callable[..., Any]
    arguments: dict[str, Any]
    truth: Callable[..., Any] | None = None  # of the same arguments; None: impl="reference"

    @property
    def dtype(self) -> torch.dtype:
        return next(t.dtype for t in tensors_in(list(self.arguments.values())))

    def expected(self, **arguments: Any) -> Any:
        if self.truth is not None:
            return self.truth(**arguments)
        return self.call(**arguments, impl="reference")


def operand(rng: Random, shape: list[int], dtype: torch.dtype) -> Tensor:
    t = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = t.roll(rng.randint(0, 5)).to(dtype)
    return strided(rng, t) if rng.random() < 0.6 else t


def sizes(rng: Random, dims: int) -> list[int]:
    return [rng.choice(SIZES) for _ in range(dims)]


def act(rng: Random) -> Case:
    shape, dtype = shape_of(rng), rng.choice(FLOATS)
    fn = rng.choice(list(TABLE))
    arguments = {"z": operand(rng, shape, dtype), "order": rng.randint(0, 2), "fn": fn}
    if rng.random() < 0.6:
        arguments["g"] = operand(rng, shape, dtype)
    return Case(fastjac.act, arguments | parameters(rng, fn))


def parameters(rng: Random, fn: str) -> dict[str, float]:
    """Parameters of an activation. Torch's hardtanh refuses a minimum above the maximum."""
    values = [rng.choice((0.5, 1.0, 2.0)) for _ in get(fn).params]
    return dict(zip(get(fn).params, sorted(values) if fn == "hardtanh" else values, strict=True))


def drop_in(rng: Random) -> Case:
    name = rng.choice(list(functional.FUNCTIONS))
    arguments: dict[str, Any] = {"z": operand(rng, shape_of(rng), rng.choice(FLOATS))}
    if name == "gelu":
        arguments["approximate"] = rng.choice(("none", "tanh"))
    else:
        arguments |= parameters(rng, name)
    return Case(functional.FUNCTIONS[name], arguments)


def act_stats(rng: Random) -> Case:
    shape, dtype = sizes(rng, rng.randint(2, 4)), rng.choice(FLOATS)
    dim, per = rng.choice((1, -1)), rng.choice(("channel", "sample"))
    arguments = {
        "z": operand(rng, shape, dtype), "fn": rng.choice(list(TABLE)), "dim": dim, "per": per,
        "scale": rng.choice((None, 0.5)),
    }  # fmt: skip
    if rng.random() < 0.5:
        size = shape[0] if per == "channel" else shape[dim]
        arguments["weights"] = operand(rng, [size], accumulate_dtype(dtype))
    return Case(fastjac.act_stats, arguments)


def row_sqnorm(rng: Random) -> Case:
    dtype = rng.choice(FLOATS)
    weights = [operand(rng, sizes(rng, rng.randint(1, 4)), dtype) for _ in range(rng.randint(1, 4))]
    return Case(fastjac.row_sqnorm, {"weights": weights})


def softmax_residual(rng: Random) -> Case:
    n, m = rng.choice(SIZES), rng.choice(SIZES[1:])
    target = strided(rng, torch.arange(n) * 7 % m)
    logits = operand(rng, [n, m], rng.choice(FLOATS))
    return Case(fastjac.softmax_residual, {"logits": logits, "target": target})


def layer(rng: Random) -> Case:
    """`layer_act`, which the layer-wise penalties call for a layer and its activation."""
    dtype, fn = rng.choice((torch.float32, torch.float64)), rng.choice(list(TABLE))
    n, c_in, c = (rng.choice(SIZES[1:7]) for _ in range(3))
    conv = rng.random() < 0.5
    options = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1) if conv else None
    arguments = {
        "x": operand(rng, [n, c_in, 4, 3] if conv else [n, c_in], dtype),
        "weight": operand(rng, [c, c_in, 3, 3] if conv else [c, c_in], dtype).contiguous(),
        "bias": operand(rng, [c], dtype) if rng.random() < 0.7 else None,
    }
    scale, params = rng.choice((0.5, 1.0)), get(fn).param_values({})

    def z_of(x, weight, bias):
        return torch.convolution(x, weight, bias, *options) if conv else F.linear(x, weight, bias)

    def call(x, weight, bias):
        z = z_of(x.detach(), weight.detach(), None if bias is None else bias.detach())
        rest = LayerActOptions(options, scale, IDS[fn], params, "", "cpu", "cpu")
        return layer_act(x, weight, bias, z, tuple(rest))

    def truth(x, weight, bias):
        a, s = composed(z_of(x, weight, bias), None, 1, False, scale, fn, {}, "reference")
        return a, (s * composed_rows(weight)).sum()

    return Case(call, arguments, truth)


def batch_norm(rng: Random) -> Case:
    """`batch_norm_act`, which they call for a layer, a batch norm and its activation."""
    dtype, fn = rng.choice((torch.float32, torch.float64)), rng.choice(list(TABLE))
    shape = [rng.choice(SIZES[2:7]), rng.choice(SIZES[1:7]), *sizes(rng, rng.randint(0, 2))]
    shape = [max(s, 1) for s in shape]
    arguments = {"z": operand(rng, shape, dtype)}
    for name in ("gamma", "beta"):
        arguments[name] = operand(rng, shape[1:2], dtype) if rng.random() < 0.7 else None
    eps, scale = 0.1, 0.5

    def call(z, gamma, beta):
        with torch.no_grad():
            y, mean, invstd = torch.native_batch_norm(z, gamma, beta, None, None, True, 0.0, eps)
        normed = Normed(y, 0, mean, invstd, eps)
        return batch_norm_act(z, gamma, beta, normed, scale, IDS[fn], get(fn).param_values({}))

    def truth(z, gamma, beta):
        gamma = None if gamma is None else gamma.contiguous()  # see batch_norm.py
        y = F.batch_norm(z, None, None, gamma, beta, training=True, eps=eps)
        a, s = composed(y, None, 1, False, scale, fn, {}, "reference")
        return a, s * inverse_variance(z, eps)

    return Case(call, arguments, truth)


PUBLIC = (act, drop_in, act_stats, row_sqnorm, softmax_residual)
DRAWN = (*PUBLIC, layer, batch_norm)


def results(
    function: Callable[..., Any], arguments: dict[str, Any], recorded: bool = False
) -> list[Tensor]:
    """The outputs, and the gradients with respect to all floating-point tensors in the arguments.

    With `recorded` the backward itself is differentiable.
    """
    flat, spec = tree_flatten(arguments)
    flat = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in flat
    ]
    leaves = [a for a in flat if isinstance(a, Tensor) and a.requires_grad]
    outs = tensors_in(function(**tree_unflatten(flat, spec)))
    # An output that does not depend on the arguments has no graph, and the gradient is 0.
    roots = [o for o in outs if o.requires_grad]
    cotangents = [
        torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).view(o.shape).to(o.dtype)
        for o in roots
    ]
    options = {"allow_unused": True, "materialize_grads": True, "create_graph": recorded}
    grads = torch.autograd.grad(roots, leaves, cotangents, **options) if roots else []
    return [t.detach() for t in (*outs, *(grads or map(torch.zeros_like, leaves)))]


def widened(arguments: dict[str, Any]) -> dict[str, Any]:
    def wide(t):
        return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

    return tree_map(wide, arguments)


def error_of(got: Tensor, truth: Tensor) -> float:
    """Relative to the norm, or to numbers of order 1 if the norm is small (sums may cancel)."""
    least = 0.1 * truth.numel() ** 0.5
    norm = torch.linalg.vector_norm(truth.double()).item()
    return relative_error(got, truth) * (norm / max(norm, least) if norm > 0 else 1)


@pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
@fuzzed
@given(rng=randoms)
def test_equal_to_the_reference(draw, rng):
    case = draw(rng)
    got = results(case.call, case.arguments, recorded=rng.random() < 0.5)
    truth = results(case.expected, widened(case.arguments))
    eager = results(case.expected, case.arguments)
    bound = 4 * tolerance("cpu", case.dtype)
    assert len(got) == len(truth)
    for g, t, e in zip(got, truth, eager, strict=True):
        assert g.shape == t.shape and g.dtype == e.dtype
        # Long sums in half precision: the error may be as large as that of eager torch.
        allowed = max(bound, min(2 * error_of(e, t), 100 * bound))
        assert error_of(g, t) <= allowed, described(list(case.arguments.values()))


@fuzzed
@given(rng=randoms)
def test_special_values(rng):
    """NaN, infinities, huge and subnormal numbers are compared by elements; NaN stays NaN."""
    case = act(rng)
    shape, dtype = list(case.arguments["z"].shape), case.dtype
    assume(math.prod(shape) > 0)
    for name in case.arguments.keys() & {"z", "g"}:
        case.arguments[name] = numbers(rng, shape, dtype)
    got, truth = case.call(**case.arguments), case.expected(**widened(case.arguments))
    z, g = case.arguments["z"].double(), case.arguments.get("g", torch.ones(())).double()
    # Intermediate products may overflow the dtype.
    scale = truth.abs() + g.abs() * (1 + z.abs())
    inside = (scale < torch.finfo(dtype).max / 4) & truth.isfinite()
    error = (got.double() - truth).abs()
    least = torch.finfo(dtype).tiny  # subnormal results may be flushed to zero
    bound = 4 * tolerance("cpu", dtype) * scale + least
    assert (error <= bound)[inside].all(), described(list(case.arguments.values()))
    if case.arguments["order"] == 0 and "g" not in case.arguments:
        assert got[z.isnan()].isnan().all()


# ---- wrong calls


def assert_clear(error: Exception, names: set[str], what: str) -> None:
    assert fault_of(error) is None, f"{what}: {fault_of(error)}"
    text = str(error)
    memory = "can't allocate" in text or any(name in text for name in ALLOCATIONS)
    named = any(re.search(rf"\b{name}\b", text) for name in names)
    assert memory or named, f"{what}: names none of {sorted(names)}: {type(error).__name__}: {text}"


def break_one(rng: Random, arguments: dict[str, Any]) -> str:
    """Changes one argument, or replaces it by one of `WRONG`; returns its name."""
    key = rng.choice(list(arguments))
    value = arguments[key]
    others = tensors_in(list(arguments.values()))
    if rng.random() < 0.3 or not tensors_in([value]):
        arguments[key] = rng.choice(WRONG)
    else:
        arguments[key] = broken(rng, value, others)
    for t in tensors_in(list(arguments.values())):  # only fuzz_ops.py limits its memory
        assume(t.is_nested or max(t.shape, default=0) < 2**20)
    return key


@pytest.mark.parametrize("draw", PUBLIC, ids=lambda draw: draw.__name__)
@fuzzed
@given(rng=randoms)
def test_a_broken_argument_is_named(draw, rng):
    case = draw(rng)
    case.arguments.setdefault("impl", rng.choice(("auto", "cpu", "reference")))
    for _ in range(rng.randint(1, 2)):
        key = break_one(rng, case.arguments)
    what = f"{case.call.__name__}({key} broken: {described(list(case.arguments.items()))})"
    try:
        out = case.call(**case.arguments)
    except Exception as error:
        assert_clear(error, set(case.arguments), what)
        return
    tensors = tensors_in(list(case.arguments.values()))
    for t in tensors_in(out):
        assert t.dtype in FLOAT_DTYPES and t.device in {a.device for a in tensors}, what


# ---- penalties


def resized_batch(call: Call, n: int, rng: Random) -> None:
    """Replaces the samples of the example by n others."""
    old = call.x.shape[0]
    index = torch.tensor([rng.randrange(old) for _ in range(n)], dtype=torch.int64)
    steps = torch.arange(n, dtype=call.x.dtype).view(-1, *[1] * (call.x.dim() - 1))
    x = call.x.detach()[index] + 0.1 * steps
    call.x = (strided(rng, x) if rng.random() < 0.5 else x).detach().requires_grad_()
    call.targets = tuple(t.index_select(0 if t.shape[0] == old else 1, index) for t in call.targets)


@pytest.mark.parametrize("spec", SPECS)
@fuzzed_penalty
@given(rng=randoms)
def test_penalties_equal_the_reference(spec, rng):
    options = dict(rng.choice(spec.cases))
    call = Call(spec, options, engine=rng.choice(engines_of(spec)))
    resized_batch(call, rng.choice((0, 1, 2, 3, 5)), rng)
    if len(call.x) == 0:  # no values, and the gradients are 0
        call.engine = None
        value = call.values()
        assert value.shape == (0,) and not any(g.any() for g in gradients(value, call.inputs))
        return
    want = call.reference()
    values = [call.values()]
    if spec.kind == "input-jacobian" and not takes(spec, "model"):
        rest = {"reduction": "none", **call.options, **call.random()}
        values.append(spec.functional(call.x, call.model(call.x), *call.targets, **rest))
    for value in values:
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-11)
        both = (gradients(v, call.inputs) for v in (value, want))
        torch.testing.assert_close(*both, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("spec", SPECS)
@fuzzed_penalty
@given(rng=randoms)
def test_a_broken_argument_of_a_penalty_is_named(spec, rng):
    call = Call(spec, dict(rng.choice(spec.cases)))
    signature = inspect.signature(spec.functional).parameters
    options = {
        name: parameter.default for name, parameter in signature.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    } | call.options  # fmt: skip
    graph = spec.kind != "layer-wise" and rng.random() < 0.5
    output = call.model(call.x)
    first = {"x": call.x, "output": output} if graph else {"model": call.model, "x": call.x}
    first |= {f"target {i}": t for i, t in enumerate(call.targets)}
    key = break_one(rng, options if rng.random() < 0.5 else first)
    what = f"{spec.name}({key} broken: {described([*first.items(), *options.items()])})"
    own_error = "model" in first and key == "x"  # the model may raise any error
    try:
        found = spec.functional(*first.values(), **options)
    except Exception as error:
        if not own_error:
            names = {*signature, "x", "output", "target", "model", "first argument"}
            assert_clear(error, names, what)
        return
    value = found[1] if isinstance(found, tuple) else found
    assert isinstance(value, Tensor) and value.dtype in FLOAT_DTYPES, what
