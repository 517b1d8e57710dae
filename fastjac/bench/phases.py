"""Set-up functions of the contestants for one phase of a fused op."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastjac
from fastjac.bench.problems import PHASES, OpProblem
from fastjac.bench.steps import Prepared

Phi = Callable[[Tensor], Tensor]
#: of ``z``: one output, or the activation and its statistic
Op = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Forms:
    """An op in plain torch and as fastjac has it.

    Attributes:
        torch: torch's activation -> the op.
        ours: ``(z, fn, impl)`` -> what the op gives.
        vjp: ``(z, g, fn, impl) -> φ'(z) g`` in one call; None if only autograd runs it.
        statistic: there is a second output, whose cotangent is ``q``.
    """

    torch: Callable[[Phi], Op]
    ours: Callable[[Tensor, str, str], Any]
    vjp: Callable[[Tensor, Tensor, str, str], Tensor] | None = None
    statistic: bool = False


def _with_statistic(phi: Phi) -> Op:
    """``z -> (φ(z), Σ_n φ'(z)² / √N)``; the factor makes both outputs of like norm."""

    def op(z: Tensor) -> tuple[Tensor, Tensor]:
        a, vjp = torch.func.vjp(phi, z)  # type: ignore[misc]  # no has_aux: two values
        slope = vjp(torch.ones_like(a))[0]
        return a, slope.square().sum(0) * len(z) ** -0.5

    return op


def _act_stats(z: Tensor, fn: str, impl: str) -> tuple[Tensor, Tensor]:
    return fastjac.act_stats(z, fn, scale=len(z) ** -0.5, impl=impl)


OPS = {
    "act": Forms(
        lambda phi: phi,
        lambda z, fn, impl: fastjac.act(z, fn=fn, impl=impl),
        lambda z, g, fn, impl: fastjac.act(z, g, 1, fn, impl=impl),
    ),
    "act_stats": Forms(_with_statistic, _act_stats, statistic=True),
}


def _in_turn(calls: Sequence[Callable[[], Any]]) -> Prepared:
    turn = itertools.cycle(calls)

    def outputs() -> list[Tensor]:
        result = calls[0]()
        return list(result) if isinstance(result, tuple) else [result]

    return Prepared(lambda: next(turn)(), outputs)


def forward_phase(problem: OpProblem, op: Op) -> Prepared:
    """``op(z)``, whatever the phase of the problem."""
    return _in_turn([functools.partial(torch.no_grad()(op), z) for z in problem.z])


def autograd_phase(problem: OpProblem, op: Op) -> Prepared:
    """The phase as autograd runs it, on graphs that were recorded before: no forward is timed."""
    if problem.phase == "forward":
        return forward_phase(problem, op)
    calls = []
    for k in range(len(problem.z)):
        z = problem.z[k].detach().requires_grad_()
        if problem.phase == "backward":
            outputs, inputs = op(z), [z]
            cotangent = _cotangent(problem, k, outputs)
        else:
            g = problem.g[k].detach().requires_grad_()
            (outputs,) = torch.autograd.grad(op(z), z, g, create_graph=True)
            inputs, cotangent = [z, g], problem.u[k]
            if not outputs.requires_grad:
                raise RuntimeError(f"{problem.fn}: its VJP has no graph to differentiate again")
        calls.append(
            functools.partial(
                torch.autograd.grad,
                *(outputs, inputs, cotangent),
                retain_graph=True,
                materialize_grads=True,  # φ'' = 0 of a piecewise linear function
            )
        )
    return _in_turn(calls)


def _cotangent(problem: OpProblem, k: int, outputs: Any) -> Any:
    if not OPS[problem.op].statistic:
        return problem.g[k]
    return problem.g[k], problem.q.to(outputs[1].dtype)


def plain(problem: OpProblem) -> Prepared:
    """torch's activation, forward."""
    return forward_phase(problem, problem.phi)


def eager(problem: OpProblem) -> Prepared:
    """torch's kernels."""
    return autograd_phase(problem, OPS[problem.op].torch(problem.phi))


def compiled(problem: OpProblem, backend: str = "inductor") -> Prepared:
    """The phase alone under torch.compile, by ``torch.func.vjp`` of the op once or twice."""
    op = OPS[problem.op].torch(problem.phi)

    def backward(z: Tensor, g: Any) -> Tensor:
        return torch.func.vjp(op, z)[1](g)[0]

    def double(z: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(backward, z, g)[1](u)

    functions: dict[str, Callable[..., Any]] = dict(
        zip(PHASES, (op, backward, double), strict=True)
    )
    function = torch.compile(functions[problem.phase], fullgraph=True, backend=backend)
    g = [_cotangent(problem, k, (z, z)) for k, z in enumerate(problem.z[: len(problem.g)])]
    columns = (problem.z, g, problem.u)[: [*PHASES].index(problem.phase) + 1]
    return _in_turn([functools.partial(function, *row) for row in zip(*columns, strict=True)])


def ours(problem: OpProblem, impl: str = "auto") -> Prepared:
    """fastjac's op; what has no direct VJP goes through autograd, as a training step meets it."""
    forms, fn = OPS[problem.op], problem.fn
    if problem.phase == "backward" and forms.vjp is not None:
        vjp = torch.no_grad()(forms.vjp)
        pairs = zip(problem.z, problem.g, strict=True)
        return _in_turn([functools.partial(vjp, z, g, fn, impl) for z, g in pairs])
    return autograd_phase(problem, lambda z: forms.ours(z, fn, impl))
