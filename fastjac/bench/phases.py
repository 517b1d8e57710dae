"""Set-up functions of the contestants for one phase of an activation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastjac
from fastjac.bench.problems import ElementwiseProblem
from fastjac.bench.steps import Prepared

Phi = Callable[[Tensor], Tensor]


def _in_turn(calls: Sequence[Callable[[], Any]]) -> Prepared:
    turn = itertools.cycle(calls)

    def outputs() -> list[Tensor]:
        result = calls[0]()
        return list(result) if isinstance(result, tuple) else [result]

    return Prepared(lambda: next(turn)(), outputs)


def forward_phase(problem: ElementwiseProblem, phi: Phi) -> Prepared:
    """``phi(z)``, whatever the phase of the problem."""

    def call(z: Tensor) -> Tensor:
        with torch.no_grad():
            return phi(z)

    return _in_turn([functools.partial(call, z) for z in problem.z])


def autograd_phase(
    problem: ElementwiseProblem, phi: Phi, vjp: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Prepared:
    """The phase as autograd runs it, on graphs that were recorded before: no forward is timed.

    Args:
        problem: its phase says what is timed.
        phi: the activation.
        vjp: direct ``(z, g) -> phi'(z) g`` where there is one; else a retained graph.
    """
    if problem.phase == "forward":
        return forward_phase(problem, phi)
    if problem.phase == "backward" and vjp is not None:
        direct = vjp

        def call(z: Tensor, g: Tensor) -> Tensor:
            with torch.no_grad():
                return direct(z, g)

        pairs = zip(problem.z, problem.g, strict=True)
        return _in_turn([functools.partial(call, z, g) for z, g in pairs])
    calls = []
    for k in range(len(problem.z)):
        z = problem.z[k].detach().requires_grad_()
        g = problem.g[k].detach().requires_grad_(problem.phase == "double")
        a = phi(z)
        if problem.phase == "backward":
            outputs, inputs, cotangent = a, [z], g
        else:
            (outputs,) = torch.autograd.grad(a, z, g, create_graph=True)
            inputs, cotangent = [z, g], problem.u[k]
            if not outputs.requires_grad:
                raise RuntimeError(f"{problem.fn}: its VJP has no graph to differentiate again")
        calls.append(
            functools.partial(
                torch.autograd.grad,
                *(outputs, inputs, cotangent),
                retain_graph=True,
                materialize_grads=True,  # phi'' = 0 of a piecewise linear function
            )
        )
    return _in_turn(calls)


def eager_phase(problem: ElementwiseProblem) -> Prepared:
    """torch's kernels."""
    return autograd_phase(problem, problem.phi)


def compiled_phase(problem: ElementwiseProblem, backend: str = "inductor") -> Prepared:
    """The phase alone under torch.compile, by ``torch.func.vjp`` of ``phi`` once or twice."""
    phi = problem.phi

    def backward(z: Tensor, g: Tensor) -> Tensor:
        return torch.func.vjp(phi, z)[1](g)[0]

    def double(z: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(backward, z, g)[1](u)

    functions: dict[str, Callable[..., Any]] = {
        "forward": phi,
        "backward": backward,
        "double": double,
    }
    function = torch.compile(functions[problem.phase], fullgraph=True, backend=backend)
    n_inputs = problem.accesses - {"forward": 1, "backward": 1, "double": 2}[problem.phase]
    columns = (problem.z, problem.g, problem.u)[:n_inputs]
    return _in_turn([functools.partial(function, *row) for row in zip(*columns, strict=True)])


def fastjac_phase(problem: ElementwiseProblem, impl: str = "auto") -> Prepared:
    """``fastjac.act``; the double backward through autograd, as a penalty's backward meets it."""
    return autograd_phase(
        problem,
        lambda z: fastjac.act(z, fn=problem.fn, impl=impl),
        lambda z, g: fastjac.act(z, g, 1, problem.fn, impl=impl),
    )
