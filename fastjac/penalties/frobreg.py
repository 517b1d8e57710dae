"""FrobReg: the full input Jacobian of the logits."""

from __future__ import annotations

from torch import Tensor

from fastjac import reference
from fastjac.input_jacobian.projections import ExactPenalty, unit_rows
from fastjac.penalties.registry import PenaltySpec, logits_example


class FrobReg(ExactPenalty):
    """Frobenius regularisation: ``R_n = ‖J_n‖_F²``, exact, by one batched VJP of m cotangents.

    For a single dense layer it equals weight decay.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N, ...]``, flattened to
        ``[N, m]``.

    Options:
        norm: ``"l2_squared"``, or ``"l2"`` / ``"l1"`` for the sum of the norms of the rows.
        chunk_size: the number of rows per batched pass; 1 does not use vmap.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once; for
    gradients of gradients use ``engine="autograd"``.

    Source: Varga, Csiszárik, Zombori 2017, arXiv 1712.09936, section 5.1.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> w = model.weight
        >>> output, value = fastjac.FrobReg()(model, x)
        >>> torch.allclose(value, w.square().sum())
        True
    """

    def cotangents(self, logits: Tensor) -> tuple[Tensor, float]:
        return unit_rows(logits), 1.0


SPEC = PenaltySpec.of(
    FrobReg,
    reference.frobreg,
    source="Varga, Csiszárik, Zombori 2017, arXiv 1712.09936, section 5.1",
    example=logits_example,
    cases=({"norm": "l2"}, {"norm": "l1"}),
)
