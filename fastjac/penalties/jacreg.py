"""JacReg: the full input Jacobian of the probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjac import arguments, reference
from fastjac.input_jacobian.projections import ExactPenalty
from fastjac.penalties.registry import PenaltySpec, logits_example


class JacReg(ExactPenalty):
    """Jacobian regularisation: ``R_n = ‖J_n^softmax‖_F²``, exact.

    One batched VJP, whose cotangents are the m rows ``p_i (e_i − p)`` of ``diag(p) − ppᵀ`` with
    ``p = softmax(g_n)``. They depend on the parameters, and the gradient goes through them.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: logits ``[N, ...]``, flattened to
        ``[N, m]``, ``m >= 2``.

    Options:
        norm: ``"l2_squared"``, or ``"l2"`` / ``"l1"`` for the sum of the norms of the rows.
        chunk_size: the number of rows per batched pass; 1 does not use vmap.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once; for
    gradients of gradients use ``engine="autograd"``.

    Source: Sokolić, Giryes, Sapiro, Rodrigues 2017, arXiv 1605.08254.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> w = model.weight
        >>> output, value = fastjac.JacReg()(model, x)
        >>> p = output.softmax(1)
        >>> truth = 2 * (p[:, 0] * p[:, 1] * (w[0] - w[1]).norm()).square()  # m = 2
        >>> torch.allclose(value, truth.mean())
        True
    """

    def cotangents(self, logits: Tensor) -> tuple[Tensor, float]:
        arguments.classes("JacReg", logits)
        p = logits.softmax(1)
        return torch.diag_embed(p).transpose(0, 1) - p.T.unsqueeze(-1) * p, 1.0


SPEC = PenaltySpec.of(
    JacReg,
    reference.jacreg,
    source="Sokolić, Giryes, Sapiro, Rodrigues 2017, arXiv 1605.08254",
    example=logits_example,
    cases=({"norm": "l2"}, {"norm": "l1"}),
)
