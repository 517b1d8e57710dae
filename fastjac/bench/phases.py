"""Set-up functions of the contestants for one phase of a fused op."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastjac
from fastjac.bench.problems import OpProblem
from fastjac.bench.steps import Prepared
from fastjac.ops.dispatch import accumulate_dtype

#: ``z -> φ(z)``, or ``z -> (φ(z), statistic)``.
Op = Callable[[Tensor], Any]


def _with_statistic(phi: Op) -> Op:
    """``z -> (φ(z), Σ_n φ'(z)² / √N)``; the factor gives both outputs a similar norm."""

    def op(z: Tensor) -> tuple[Tensor, Tensor]:
        a, vjp = torch.func.vjp(phi, z)  # type: ignore[misc]  # no has_aux: two values
        slope = vjp(torch.ones_like(a))[0]
        return a, slope.square().sum(0) * len(z) ** -0.5

    return op


def _act_stats(z: Tensor, fn: str, impl: str) -> tuple[Tensor, Tensor]:
    return fastjac.act_stats(z, fn, scale=len(z) ** -0.5, impl=impl)


@functools.lru_cache(maxsize=1)
def _classes(n: int, m: int, device: torch.device) -> Tensor:
    return torch.arange(n, device=device) * 13 % m


@functools.lru_cache(maxsize=1)
def _one_hot(n: int, m: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.one_hot(_classes(n, m, device), m).to(dtype)


def _residual(z: Tensor) -> Tensor:
    """``softmax(z) - y`` for labels that are kept as unit vectors."""
    return z.softmax(1) - _one_hot(*z.shape, z.device, z.dtype)


def _row_sqnorm(z: Tensor) -> Tensor:
    """Squares and sums in float32 for a 16-bit z, as fastjac does."""
    return z.to(accumulate_dtype(z.dtype)).square().sum(1)


#: Op -> (torch's activation -> the op in plain torch; the op of fastjac, ``(z, fn, impl)``).
OPS: dict[str, tuple[Callable[[Op], Op], Callable[[Tensor, str, str], Any]]] = {
    "act": (lambda phi: phi, lambda z, fn, impl: fastjac.act(z, fn=fn, impl=impl)),
    "act_stats": (_with_statistic, _act_stats),
    "softmax_residual": (
        lambda phi: _residual,
        lambda z, fn, impl: fastjac.softmax_residual(z, _classes(*z.shape, z.device), impl=impl),
    ),
    "row_sqnorm": (
        lambda phi: _row_sqnorm,
        lambda z, fn, impl: fastjac.row_sqnorm([z], impl=impl)[0],
    ),
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
    """The phase as autograd runs it, on graphs that exist already, so no forward is timed."""
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
                raise RuntimeError(f"The VJP of {problem.fn} cannot be differentiated again.")
        grad = functools.partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
        calls.append(functools.partial(grad, outputs, inputs, cotangent))
    return _in_turn(calls)


def _cotangent(problem: OpProblem, k: int, outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return problem.g[k], problem.q.to(outputs[1].dtype)
    if outputs.dim() == 1:  # row_sqnorm
        return problem.q.to(outputs.dtype)
    return problem.g[k]


def plain(problem: OpProblem) -> Prepared:
    """torch's activation, forward."""
    return forward_phase(problem, problem.phi)


def eager(problem: OpProblem) -> Prepared:
    """torch's kernels."""
    return autograd_phase(problem, OPS[problem.op][0](problem.phi))


def compiled(problem: OpProblem, backend: str = "inductor") -> Prepared:
    """The phase alone under torch.compile, by ``torch.func.vjp`` of the op once or twice."""
    op = OPS[problem.op][0](problem.phi)

    def backward(z: Tensor, g: Any) -> Tensor:
        return torch.func.vjp(op, z)[1](g)[0]

    def double(z: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(backward, z, g)[1](u)

    example = op(problem.z[0])
    g = [_cotangent(problem, k, example) for k in range(len(problem.g))]
    choices: dict[str, tuple[Callable[..., Any], tuple[list[Any], ...]]] = {
        "forward": (op, (problem.z,)),
        "backward": (backward, (problem.z, g)),
        "double": (double, (problem.z, g, problem.u)),
    }
    function, columns = choices[problem.phase]
    run = torch.compile(function, fullgraph=True, backend=backend)
    return _in_turn([functools.partial(run, *row) for row in zip(*columns, strict=True)])


def ours(problem: OpProblem, impl: str = "auto") -> Prepared:
    """fastjac's op. ``act`` has a VJP of its own; the rest is run by autograd, as in training."""
    fn = problem.fn
    if problem.op == "act" and problem.phase == "backward":
        vjp = torch.no_grad()(lambda z, g: fastjac.act(z, g, 1, fn, impl=impl))
        pairs = zip(problem.z, problem.g, strict=True)
        return _in_turn([functools.partial(vjp, z, g) for z, g in pairs])
    return autograd_phase(problem, lambda z: OPS[problem.op][1](z, fn, impl))
