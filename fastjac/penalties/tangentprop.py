"""TangentProp: directional derivatives along given tangents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, reference
from fastjac.input_jacobian.penalty import InputOptions, InputPenalty
from fastjac.input_jacobian.pullback import Pullback
from fastjac.penalties.registry import Example, PenaltySpec, logits_example, randn
from fastjac.per_sample import attached_zeros, measure


class TangentProp(InputPenalty):
    """``R_n = 1/K Σ_k ‖J_n t_kn‖²`` for directions ``t`` in which the output should be constant.

    The K tangents take one batched JVP, which ``engine="autograd"`` computes as a VJP of a VJP.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N, ...]``. tangents: the shape of
        ``x``, or ``[K, *x.shape]``; dtype and device of ``x``.

    Options:
        chunk_size: the number of tangents per batched pass; 1 does not use vmap.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once. With
    ``engine="autograd"`` the value is a second derivative, so its gradient needs operations that
    are differentiable three times.

    Source: Simard, Victorri, LeCun, Denker 1991.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> w = model.weight
        >>> t = torch.randn(4, 3)
        >>> output, value = fastjac.TangentProp()(model, x, t)
        >>> torch.allclose(value, (t @ w.T).square().sum(1).mean())
        True
    """

    uses_jvp = True

    def __init__(self, *, chunk_size: int | None = None, **options: Unpack[InputOptions]) -> None:
        super().__init__(**options)
        self.chunk_size = arguments.chunk_size(chunk_size)

    def per_sample(self, pull: Pullback, tangents: Any) -> Tensor:
        x = pull.x
        tangents = arguments.tensor("tangents", tangents)
        arguments.like("tangents", tangents, "x", x)
        t = tangents.unsqueeze(0) if tangents.shape == x.shape else tangents
        if t.shape[1:] != x.shape or t.shape[0] == 0:
            raise ValueError(
                f"tangents has shape {tuple(tangents.shape)}: it must have the shape of x, "
                f"{tuple(x.shape)}, or [K, *x.shape]"
            )
        if x.shape[0] == 0:
            return attached_zeros(pull.output)
        return measure(pull.jvp(t, self.chunk_size), "l2_squared").mean(0)


def tangent_example(dtype: torch.dtype, generator: torch.Generator) -> Example:
    """Two tangents for each of three samples."""
    return replace(logits_example(dtype, generator), targets=(randn((2, 3, 4), dtype, generator),))


SPEC = PenaltySpec.of(
    TangentProp,
    reference.tangentprop,
    source="Simard, Victorri, LeCun, Denker 1991",
    example=tangent_example,
)
