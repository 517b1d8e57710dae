"""The gate: a contestant whose gradients are wrong is never timed."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from fastjac.bench.contestants import Contestant, setup_of
from fastjac.bench.problems import Problem, StepProblem, copied
from fastjac.bench.records import Record
from fastjac.bench.steps import Prepared
from fastjac.torch_private import TorchDispatchMode, fresh_cache, tree_leaves, tree_map


@dataclass(frozen=True)
class Expected:
    """What gradients must be.

    Attributes:
        truth: The gradients of plain torch in float64.
        limit: The largest relative L2 error: twice the error of plain torch in the dtype of the
            run, and at least the rounding of a float32 (float64) result.
        gflop: 10^9 operations of the matrix products and convolutions of plain torch.
    """

    truth: Sequence[Tensor]
    limit: float
    gflop: float

    def error(self, gradients: Sequence[Tensor]) -> float:
        """The relative error of a contestant's gradients."""
        return relative_error(gradients, self.truth)


@dataclass(frozen=True)
class Gate:
    """What is expected of ``plain`` (a step without penalty, or ``φ(z)``) and of the others.

    Attributes:
        plain, full: Of the problem.
        nearby: Of a user's model, other problems and their gates; see `open_gate`.
    """

    plain: Expected
    full: Expected
    nearby: Sequence[tuple[Problem, Gate]] = ()

    def of(self, contestant: str) -> Expected:
        return self.plain if contestant in ("plain", "plain-compiled") else self.full


def relative_error(values: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """``||values - truth|| / ||truth||`` over all tensors together in float64; NaN becomes inf.

    Raises:
        ValueError: The number of tensors or a shape differs.
    """
    shapes, wanted = [tuple(v.shape) for v in values], [tuple(t.shape) for t in truth]
    if shapes != wanted:
        raise ValueError(f"The gradients have the shapes {shapes}; expected {wanted}.")
    missed = sum(float((v.double() - t).square().sum()) for v, t in zip(values, truth, strict=True))
    norm = sum(float(t.square().sum()) for t in truth)
    error = (missed / norm) ** 0.5 if norm else missed**0.5
    return error if error == error else float("inf")


class FlopCounter(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions by torch's own formulas.

    ``torch.utils.flop_counter.FlopCounterMode`` cannot be used: it follows modules by hooks that
    ``autograd.grad(create_graph=True)`` refuses (torch 2.13).
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


NARROW = (torch.float32, torch.bfloat16, torch.float16)


class InDouble(TorchFunctionMode):
    """In this block float64 replaces the narrower dtypes that some models cast to in their norms.

    Their rounding would be an error of the truth. Tensors that a model creates are float64 too, and
    so are those that meet a float64 tensor in a function, such as the weight of a loss.
    """

    def __enter__(self) -> InDouble:
        self.default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self.default)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = (args, kwargs or {})
        wide = any(isinstance(v, Tensor) and v.dtype == torch.float64 for v in tree_leaves(given))
        mixed = wide and not _writes(func, given[1])

        def wider(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.double() if mixed and value.dtype in NARROW else value
            return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value

        args, named = tree_map(wider, given)
        casts = (Tensor.float, Tensor.bfloat16, Tensor.half)
        return (Tensor.double if func in casts else func)(*args, **named)


def _writes(func: Any, named: dict[str, Any]) -> bool:
    """Whether a function writes to a tensor, so that it must get that one and no copy."""
    name = getattr(func, "__name__", "")
    return name.rstrip("_") + "_" == name or name in ("__set__", "__setitem__") or "out" in named


def nearby(problem: StepProblem, seed: int) -> StepProblem:
    """The problem with parameters and input that are changed by about 0.1%."""
    model, x = copied(problem.model), problem.x.clone()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), x):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                scale = max(1e-3, 2 * torch.finfo(tensor.dtype).eps)
                tensor.addcmul_(tensor, noise, value=scale)
    return replace(problem, model=model, x=x)


def open_gate(problem: Problem, dtype: torch.dtype) -> Gate:
    """Compute the truth. The weight of a step's penalty is set first, see `StepProblem.weight`.

    The networks of the benchmark are smooth, or their inputs are away from the kinks of their
    activations. That of a user may have kinks. If a unit of a ReLU is within rounding of 0, two
    correct contestants may take different branches, and their gradients differ. So the gate of a
    user's model has two more problems nearby, whose units are elsewhere. The limit is taken from
    the median of the errors of plain torch, and a contestant passes if it is right on one of the
    three: a missing term is missing on all.

    Raises:
        ValueError: Loss or penalty has no gradient that can be compared.
    """
    own = isinstance(problem, StepProblem) and problem.own
    in_double: Any = InDouble() if own else contextlib.nullcontext()
    if isinstance(problem, StepProblem):
        with in_double:
            problem.weight = _balanced_weight(problem.double())
    looks: list[Problem] = [problem]
    if isinstance(problem, StepProblem) and own:
        looks += [nearby(problem, seed) for seed in range(2)]
    # 8 eps of float32: the difference between two sums of the same rounded terms in another order.
    # A 16-bit contestant must stay within twice eager's error. A user's model may be conditioned
    # worse, but a fault in one layer of a deep network is small too (tests/test_own_model.py).
    double = dtype == torch.float64
    floor = (1e-9 if double else 1e-4) if own else 1e-12 if double else 1e-6

    def expected(form: str) -> list[Expected]:
        truths, errors = [], []
        counter = FlopCounter()
        for look in looks:
            with in_double:
                truths.append(setup_of(form)(look.double()).gradients())
            prepared = setup_of(form)(look)
            with counter if look is problem else contextlib.nullcontext():
                gradients = prepared.gradients()
            errors.append(relative_error(gradients, truths[-1]))
            prepared.close()
        error = statistics.median(errors)
        if not error < 0.25:
            raise ValueError(
                f"the gradients of PyTorch in {dtype} differ from those in float64 by "
                f"{error:.2g} of their norm, so that a fault could not be told from rounding"
            )
        return [Expected(truth, max(2 * error, floor), counter.total / 1e9) for truth in truths]

    gates = [Gate(*both) for both in zip(expected("plain"), expected("eager"), strict=True)]
    return replace(gates[0], nearby=[*zip(looks, gates, strict=True)][1:])


def _balanced_weight(wide: StepProblem) -> float:
    """The power of two that gives loss and penalty gradients of similar norm."""
    loss = setup_of("plain")(wide).gradients()
    both = setup_of("eager")(wide).gradients()  # its weight is 1
    penalty = sum(float((b - a).square().sum()) for a, b in zip(loss, both, strict=True)) ** 0.5
    own = sum(float(a.square().sum()) for a in loss) ** 0.5
    for what, norm in (("loss", own), ("penalty", penalty)):
        if not 0 < norm < math.inf:
            raise ValueError(
                f"the gradient of the {what} with respect to all parameters that require grad has "
                f"norm {norm:.3g} on this batch: it must be finite and not 0"
            )
    return float(2.0 ** round(math.log2(own / penalty)))


def admit(
    contestant: Contestant, problem: Problem, gate: Gate, record: Record, ends: contextlib.ExitStack
) -> Prepared | None:
    """Set a contestant up and compare its gradients; its record says why it is not admitted.

    What the contestant holds is released when ``ends`` is closed.
    """
    cache = contextlib.nullcontext()
    try:
        if contestant.compiler == "torch":
            _start_compiler(record.device)
            cache = fresh_cache()()  # no code that an earlier run left on disk
            ends.callback(torch.compiler.reset)  # frees the graphs of this case, and its model
        with cache:
            began = time.perf_counter()
            prepared = contestant.setup(problem)
            ends.callback(prepared.close)
            gradients = prepared.gradients()
            took = time.perf_counter() - began
            expected = gate.of(contestant.name)
            error = expected.error(gradients)
            for other, its_gate in gate.nearby:
                if error > expected.limit:
                    again = contestant.setup(other)
                    error = min(error, its_gate.of(contestant.name).error(again.gradients()))
                    again.close()
        record.compile_s = took if contestant.compiler else None
        record.engine = prepared.engine
        record.rel_err, record.rel_err_limit = error, expected.limit
    except Exception as error:
        record.status, record.message = "failed", short(error)
        return None
    if record.rel_err <= record.rel_err_limit:
        return prepared
    record.status = "wrong"
    record.message = (
        f"the relative error of its gradients is {record.rel_err:.2e}, "
        f"the limit is {record.rel_err_limit:.2e}"
    )
    return None


def short(error: Exception) -> str:
    """The first line of an error as a traceback shows it, and the next if it ends with a colon."""
    first, *rest = traceback.format_exception_only(error)[-1].strip().split("\n")
    text = f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
    return text[:300]


@functools.cache
def _start_compiler(device: str) -> None:
    """Compile a function once, so that no contestant's time counts the start of the compiler."""
    torch.compile(torch.sin, fullgraph=True)(torch.ones(8, device=device))
