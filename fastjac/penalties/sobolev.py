"""Sobolev: the distance of the input Jacobian from a given one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, reference
from fastjac.input_jacobian.penalty import InputOptions, InputPenalty
from fastjac.input_jacobian.projections import unit_rows
from fastjac.input_jacobian.pullback import Pullback
from fastjac.penalties.registry import Example, PenaltySpec, logits_example, randn
from fastjac.per_sample import attached_zeros, measure, rows


class Sobolev(InputPenalty):
    """Sobolev training, force matching: ``R_n = ‖J_n − T_n‖_F²`` for given Jacobians ``T``.

    For a model that returns an energy, the forces are ``F = −∇energy``: pass ``−F`` as T. The force
    that the model predicts is minus the gradient of its output.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N, ...]``, flattened to
        ``[N, m]``. target_grad: ``[N, m, *x.shape[1:]]``, or the shape of ``x`` if ``m = 1``;
        dtype and device of ``x``.

    Options:
        chunk_size: the number of rows per batched pass; 1 does not use vmap.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once; for
    gradients of gradients use ``engine="autograd"``.

    Source: Czarnecki et al. 2017, arXiv 1706.04859.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> w = model.weight
        >>> output, value = fastjac.Sobolev()(model, x, w.detach().expand(4, 2, 3))
        >>> value.item() == 0.0
        True
        >>> energy, forces = nn.Linear(3, 1), torch.randn(4, 3)
        >>> output, value = fastjac.sobolev(energy, x, -forces)  # the mean of ‖∇energy + F‖²
        >>> torch.allclose(value, (energy.weight + forces).square().sum(1).mean())
        True
    """

    def __init__(self, *, chunk_size: int | None = None, **options: Unpack[InputOptions]) -> None:
        super().__init__(**options)
        self.chunk_size = arguments.chunk_size(chunk_size)

    def per_sample(self, pull: Pullback, target_grad: Any) -> Tensor:
        x, output = pull.x, pull.output
        logits = rows(output)
        n, m = logits.shape
        goal = arguments.batch("target_grad", target_grad, "x", n)
        arguments.like("target_grad", goal, "x", x)
        if goal.shape != (n, m, *x.shape[1:]) and (m != 1 or goal.shape != x.shape):
            or_x = " or the shape of x" if m == 1 else ""
            raise ValueError(
                f"target_grad has shape {tuple(goal.shape)}: it must be [N, m, *x.shape[1:]] = "
                f"{(n, m, *x.shape[1:])}{or_x}"
            )
        if n == 0:
            return attached_zeros(output)
        goal = goal.reshape(n, m, *x.shape[1:]).transpose(0, 1)
        w = unit_rows(logits).reshape(m, *output.shape)
        return measure(pull.vjp(w, self.chunk_size) - goal, "l2_squared").sum(0)


def sobolev_example(dtype: torch.dtype, generator: torch.Generator) -> Example:
    """A Jacobian of three rows for each of three samples."""
    return replace(logits_example(dtype, generator), targets=(randn((3, 3, 4), dtype, generator),))


SPEC = PenaltySpec.of(
    Sobolev,
    reference.sobolev,
    source="Czarnecki et al. 2017, arXiv 1706.04859",
    example=sobolev_example,
)
