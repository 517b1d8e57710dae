"""DREG of any model in plain torch, to compare with: torch's activations, slopes and sums.

The layers are those that fastjac finds, because torch has no way to find the layer of an activation
that is a function. The arithmetic is torch's own: nothing here runs a fused kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.bench.problems import StepProblem
from fastjac.layerwise.layers import LayerCall, Nonlinearity
from fastjac.layerwise.passes import Pass, Term
from fastjac.layerwise.penalty import Sum
from fastjac.model_output import part_of
from fastjac.observers import TORCH
from fastjac.penalties.dreg import DREG
from fastjac.torch_private import saved_tensor_hooks


class PlainDreg(DREG):
    """``Σ_n R_n / N`` with ``R_n = Σ_l Σ_p Σ_c φ'(y_lnpc)² k² ‖W_lc‖²``, see `fastjac.DREG`.

    ``k`` is the factor of a norm between the layer and its activation. The sum is over all samples
    at once, as the eager idiom of the benchmark's own networks has it, so there is no value for
    each sample.
    """

    @classmethod
    def eager(cls, problem: StepProblem, model: nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
        """``() -> (output, mean_n R_n)``; the penalty is attached to the model."""
        attached = cls(model)

        def forward() -> tuple[Tensor, Tensor]:
            output = part_of(model(problem.x), problem.output)
            return output, attached()

        return forward

    def before_pass(self, seen: Pass) -> None:
        pass

    def at_layer(  # type: ignore[override]
        self, seen: Pass, call: LayerCall, phi: Nonlinearity, a: Tensor | None
    ) -> tuple[Tensor, Term]:
        y = call.z
        function = _function(phi)
        if a is None:
            a = function(y)
        # Eager, autograd.grad is faster. In a checkpoint it would recompute at once, and y has no
        # gradient if all layers up to here are frozen.
        compiling = torch.compiler.is_compiling()
        if compiling or saved_tensor_hooks() is not None or not y.requires_grad:
            slope = torch.func.jvp(function, (y,), (torch.ones_like(y),))[1]
        else:
            (slope,) = torch.autograd.grad(a, y, torch.ones_like(a), create_graph=True)
        square = slope.square()
        dim = call.dim % y.dim()
        rows = call.rows.flatten(1).square().sum(1)
        k = _gain(call, y.dim(), dim)
        if k is not None and k.numel() == k.shape[dim]:
            rows = rows * k.flatten()  # a pass over [C] instead of one over y
        elif k is not None:
            square = square * k
        s = square.sum([d for d in range(y.dim()) if d != dim])  # [C]
        return a, Term(call, (s * rows).sum() * call.factor**2)

    def finish(self, seen: Pass, batch: int) -> Sum:
        return Sum(torch.stack([term.result for term in seen.terms]).sum(), batch)


def _function(phi: Nonlinearity) -> Any:
    """``φ`` by torch."""
    if phi.fn is not None:
        function, options = TORCH[phi.fn]
        params = {**options, **phi.params}
        return lambda z: function(z, **params)
    return phi.function or phi.value


def _gain(call: LayerCall, dims: int, channel: int) -> Tensor | None:
    """``k²`` of a norm ``y = k (z − μ) + β``, of a shape that broadcasts with y."""
    norm, z = call.norm, call.before_norm
    if norm is None or z is None:
        return None
    by_channel = [-1 if d == channel else 1 for d in range(dims)]
    if norm.kind == "layer":
        variance = z.var(-1, unbiased=False, keepdim=True)
    elif norm.kind == "group":
        groups = z.reshape(z.shape[0], norm.groups, -1).var(-1, unbiased=False)
        variance = groups.repeat_interleave(z.shape[1] // norm.groups, 1)
        variance = variance.reshape(*variance.shape, *[1] * (dims - 2))
    elif norm.running_var is not None:
        variance = norm.running_var.view(by_channel)
    else:
        others = [d for d in range(dims) if d != channel]
        variance = z.var(others, unbiased=False).view(by_channel)
    inverse = 1 / (variance + norm.eps)
    return inverse if norm.weight is None else inverse * norm.weight.square().view(by_channel)
