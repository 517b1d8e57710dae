"""What is measured of a model: `fuse`, DREG and SpectReg, and whether SpectReg is right.

A part that raises gives a text in its place, and the others go on.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastjac
from benchmarks.published_models.models import Published
from benchmarks.published_models.pairs import count
from fastjac.bench.gate import InDouble
from fastjac.bench.measure import Options, Samples, interleave
from fastjac.observers import OBSERVERS

TOLERANCE = 1e-4
"""A wrong or missing second-order term is mostly of order 1; the differences are off by 1e-6."""

NO_LAYER = "model has no layer to penalise"


@dataclass
class Row:
    """A line of the table. A number that is None could not be measured; `failures` says why."""

    model: str
    library: str
    parameters: int = 0
    activations: int | None = None
    fused: int | None = None
    pairs: int | None = None
    dreg_found: int | None = None
    dreg_missing: str = ""
    dreg_cost: float | None = None
    engine: str = ""
    reason: str = ""
    error: float | None = None
    spectreg_cost: float | None = None
    eager_cost: float | None = None
    eager_attention: str = ""
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def speedup(self) -> float | None:
        if self.spectreg_cost is None or self.eager_cost is None:
            return None
        return self.eager_cost / self.spectreg_cost

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A failure in this block is noted under the name."""
        try:
            yield
        except Exception as error:  # whatever a model raises is a result of this script
            text = f"{type(error).__name__}: {error}".split("\n")[0]
            text = re.sub(r"\s+", " ", text)
            self.failures[name] = text if len(text) < 160 else text[:160] + " …"


def measured(model: Published, options: Options) -> Row:
    row = Row(model.name, model.library)
    made: nn.Module | None = None
    with row.part("model"):
        made = model.make()
        row.parameters = sum(p.numel() for p in made.parameters())
    if made is None:
        return row
    x = model.inputs()
    with row.part("pairs"):
        found = count(made, x)
        row.activations, row.pairs = found.activations, len(found.layers)
    with row.part("fuse"):
        row.fused = _fused(copy.deepcopy(made), x)
    with row.part("DREG"):
        penalty = fastjac.DREG()
        try:
            penalty(made, x)
        except RuntimeError as error:
            if NO_LAYER not in str(error):
                raise
        row.dreg_found, row.dreg_missing = _compared(penalty, found.layers)
    with row.part("engine"):
        row.engine, row.reason = _engine(copy.deepcopy(made), x)
    with row.part("right"), InDouble():
        row.error = _error(copy.deepcopy(made).double(), model.inputs(torch.float64))
    with row.part("time"):
        _times(row, made, x, options)
    return row


def _fused(model: nn.Module, x: Tensor) -> int:
    """The number of activations of a run that fastjac computes after `fuse`."""
    calls = []

    def observe(z: Tensor, fn: str, impl: str, params: Any, a: Any) -> Any:
        calls.append(fn)
        return a

    model = fastjac.fuse(model)
    OBSERVERS.append(observe)
    try:
        model(x)
    finally:
        OBSERVERS.remove(observe)
    return len(calls)


def _compared(penalty: Any, layers: list[str]) -> tuple[int, str]:
    """How many of the pairs DREG has found, and the layers of the others, with DREG's reasons."""
    found, pairs = Counter(penalty.layers_found), Counter(layers)
    missing = pairs - found
    reasons = Counter(dict(penalty.layers_left_out).get(name, "not seen") for name in missing)
    first = sorted(missing)[:2]
    texts = [f"{n}× {reason}" for reason, n in reasons.most_common(3)]
    more = "; ".join([*texts, f"e.g. {', '.join(first)}"]) if missing else ""
    return (pairs & found).total(), more


# ---- SpectReg


def _steps_of(penalty: Any, model: nn.Module, x: Tensor, n: int = 3) -> None:
    """The first calls: autograd, then with a program that is traced, then with the program."""
    for _ in range(n):
        torch.manual_seed(0)
        output, value = penalty(model, x)
        (output.square().mean() + value).backward()
    model.zero_grad(set_to_none=True)


def _engine(model: nn.Module, x: Tensor) -> tuple[str, str]:
    """The engine of the third and later calls, and why it is not the chain engine."""
    penalty = fastjac.SpectReg()
    first: Exception | None = None
    try:
        _steps_of(penalty, model, x)
    except Exception as error:
        first = error
    text = penalty.explain(model, x)
    if first is not None:
        raise first
    lines = [line.strip() for line in text.split("\n")]
    engine = lines[0].removeprefix("engine: ")
    return engine, "" if engine == "chain" else " ".join(lines[1:])


def _error(model: nn.Module, x: Tensor) -> float:
    """The error of the gradients of SpectReg's value, against central differences of the value.

    Along two random directions in the parameters and one in x, with the same projection and the
    same random numbers in each run. The value is written out here, so that nothing of fastjac and
    no second derivative of torch takes part in the truth. A direction moves a parameter by the
    step times its own size. The error is relative to the size that the derivative along such a
    direction has on average. Of each direction the second smallest error over five steps is taken,
    because a unit of a ReLU may change its side within a step. The largest of the directions is
    returned.

    Weights that are constant at the beginning get random numbers added: zeros (the last norm of
    a residual block, the head of some models) and layer scales of 1e-6 hide the terms behind them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        torch.manual_seed(3)
        for name, p in model.named_parameters():
            if p.min() == p.max() and not name.endswith("bias"):
                p.add_(0.5 * torch.rand_like(p) - 0.25)
    x.requires_grad_()
    with torch.no_grad():
        torch.manual_seed(0)
        output = model(x)
    generator = torch.Generator().manual_seed(2)
    m = output[0].numel()
    w = torch.randn(len(x), m, generator=generator, dtype=x.dtype) / math.sqrt(m)

    def value() -> float:
        torch.manual_seed(0)
        (v,) = torch.autograd.grad(model(x).flatten(1), x, w)
        return v.square().sum().item() / len(x)

    penalty = fastjac.SpectReg()
    for _ in range(3):  # the third call is the steady state
        torch.manual_seed(0)
        _, got = penalty(model, x, projection=w)
        tensors = [*parameters, x]
        gradients = torch.autograd.grad(got, tensors, allow_unused=True, materialize_grads=True)
    if not math.isclose(got.item(), value(), rel_tol=1e-9):
        return math.inf
    if got == 0:
        raise ValueError("the value is 0, so nothing is compared")
    errors = []
    for k in range(3):
        moved = [(x, gradients[-1])] if k == 2 else list(zip(parameters, gradients, strict=False))
        errors.append(_along_one(moved, value, generator))
    return max(errors)


def _along_one(
    moved: list[tuple[Tensor, Tensor]], value: Callable[[], float], generator: torch.Generator
) -> float:
    before = [t.detach().clone() for t, _ in moved]
    sizes = [t.square().mean().sqrt().clamp_min(1e-3) for t in before]
    direction = [
        size * torch.randn(t.shape, generator=generator, dtype=t.dtype)
        for size, t in zip(sizes, before, strict=True)
    ]
    derivative = sum((g * d).sum().item() for (_, g), d in zip(moved, direction, strict=True))
    scale = math.sqrt(
        sum((g * size).square().sum().item() for (_, g), size in zip(moved, sizes, strict=True))
    )

    # Of a network of ReLU without norms, the value does not depend on x between its jumps.
    size = abs(value())
    scale = max(scale, 0.01 * size)
    # A relative change of the value of 1e-7.5 to 1e-9.5. With 1e-7 a few of a million ReLU change
    # their side, and the value jumps; with 1e-10 the rounding is an error of 1e-5.
    unit = size / scale

    def at(step: float) -> float:
        with torch.no_grad():
            for (t, _), start, d in zip(moved, before, direction, strict=True):
                t.copy_(start + step * d)
        return value()

    steps = [unit * 10.0**-k for k in (7.5, 8.0, 8.5, 9.0, 9.5)]
    slopes = [(at(h) - at(-h)) / (2 * h) for h in steps]
    at(0.0)
    # A wrong gradient disagrees with the differences of every step, a jump with some of them.
    return sorted(abs(slope - derivative) for slope in slopes)[1] / scale


# ---- times


def _eager(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """SpectReg as one writes it with torch alone."""
    x = x.detach().requires_grad_()
    output = model(x)
    flat = output.flatten(1)
    w = torch.randn_like(flat) / math.sqrt(flat.shape[1])
    (v,) = torch.autograd.grad(flat, x, w, create_graph=True)
    return output, v.square().flatten(1).sum(1).mean()


def _times(row: Row, model: nn.Module, x: Tensor, options: Options) -> None:
    """Plain, DREG, SpectReg and eager steps, sampled in turn."""
    steps: dict[str, Callable[[], None]] = {}
    kept: list[Any] = []

    def add(
        name: str, forward: Callable[[nn.Module], tuple[Tensor, Any]], attach: Any = None
    ) -> None:
        mine = copy.deepcopy(model)
        penalty = None if attach is None else attach(mine)
        kept.append(penalty)

        def step() -> None:
            for p in mine.parameters():
                p.grad = None
            output, value = forward(mine)
            loss = output.square().mean()
            if penalty is not None:
                value = penalty()
            (loss if value is None else loss + value).backward()

        with row.part(name):
            for _ in range(3):
                step()
            steps[name] = step

    add("plain", lambda m: (m(x), None))
    add("DREG time", lambda m: (m(x), None), fastjac.DREG)
    spectreg = fastjac.SpectReg()
    add("SpectReg time", lambda m: spectreg(m, x))
    add("eager", lambda m: _eager(m, x))
    if "eager" not in steps and "attention" in row.failures.get("eager", ""):
        row.eager_attention = "MATH"
        del row.failures["eager"]

        def by_math(m: nn.Module) -> tuple[Tensor, Tensor]:
            with sdpa_kernel(SDPBackend.MATH):
                return _eager(m, x)

        add("eager", by_math)
    samples = Samples()
    interleave(steps, {}, options, samples)
    costs = {name: samples.ratio(name, "plain")[0] for name in steps}
    row.dreg_cost, row.spectreg_cost = costs.get("DREG time"), costs.get("SpectReg time")
    row.eager_cost = costs.get("eager")
