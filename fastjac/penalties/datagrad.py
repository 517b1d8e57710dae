"""DataGrad: the input gradient of the cross-entropy (double backpropagation)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastjac import arguments, reference
from fastjac.input_jacobian.projections import ProjectionPenalty
from fastjac.ops.softmax_residual import softmax_residual
from fastjac.penalties.registry import PenaltySpec, classifier_example


class DataGrad(ProjectionPenalty):
    """Double backpropagation: ``R_n = ‖J_nᵀ (softmax(g_n) − y_n)‖²``.

    This is ``‖∂ℓ_n/∂x_n‖²`` for the cross-entropy ``ℓ_n`` of sample n. It is not that of the batch
    mean, whose gradient has a factor ``1/N``. The gradient of the penalty goes through
    ``softmax(g) − y`` too, which depends on the parameters.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: logits ``[N, ...]``, flattened to
        ``[N, m]``, ``m >= 2``. target: class indices ``[N]`` int64, or probabilities ``[N, m]``
        whose rows sum to 1 (which is not checked).

    Options:
        norm: ``"l2_squared"``, ``"l2"`` or ``"l1"``.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once; for
    gradients of gradients use ``engine="autograd"``.

    Source: Drucker & LeCun 1991; Ororbia et al. 2017, arXiv 1601.07213; as a projection: Varga,
    Csiszárik, Zombori 2017, arXiv 1712.09936, claim 2.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> w = model.weight
        >>> y = torch.tensor([0, 1, 1, 0])
        >>> output, value = fastjac.DataGrad()(model, x, y)
        >>> residual = output.softmax(1) - nn.functional.one_hot(y)
        >>> torch.allclose(value, (residual @ w).square().sum(1).mean())
        True
    """

    def cotangents(self, logits: Tensor, target: Any) -> tuple[Tensor, float]:
        arguments.classes("DataGrad", logits)
        y = arguments.class_target(target, logits)
        w = logits.softmax(1) - y if y.is_floating_point() else softmax_residual(logits, y)
        return w.unsqueeze(0), 1.0


SPEC = PenaltySpec.of(
    DataGrad,
    reference.datagrad,
    source="Drucker & LeCun 1991; Ororbia et al. 2017, arXiv 1601.07213",
    example=classifier_example,
    cases=({"norm": "l2"}, {"norm": "l1"}),
)
