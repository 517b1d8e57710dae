"""ConfidencePenalty: the negative entropy of the prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjac import arguments, reference
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.penalties.registry import PenaltySpec, logits_example
from fastjac.penalty import Penalty
from fastjac.per_sample import rows


class ConfidencePenalty(Penalty):
    """``R_n = Σ_i p_i log p_i``, ``p = softmax(g_n)``: minus the entropy of the prediction.

    It depends on the output alone, and is part of this library because the papers compare with it.
    Only the batch size of ``x`` is used. The value needs no gradient, so it can also be computed
    under ``torch.no_grad()``.

    Arguments:
        x: ``[N, ...]`` of any dtype. output: logits ``[N, ...]``, flattened to ``[N, m]``,
        ``m >= 2``; ``-inf`` for a class that is absent.

    Options:
        weight, reduction, every, output: see ``help(fastjac.Penalty)``.

    Half precision is computed in float32. The value is differentiable to any order.

    Source: Pereyra et al. 2017, arXiv 1701.06548.

    Example:

        >>> x, output = torch.randn(4, 3), torch.zeros(4, 2)  # p = 1/2
        >>> torch.allclose(fastjac.ConfidencePenalty()(x, output), -torch.tensor(2.0).log())
        True
    """

    needs_grad = False

    def graph_form(self, x: Tensor, output: Tensor) -> Tensor:
        arguments.batch("output", output, "x", arguments.tensor("x", x).shape[0])
        if not output.is_floating_point():
            raise TypeError(f"output has dtype {output.dtype}: it must be floating point logits")
        logits = rows(output.to(accumulate_dtype(output.dtype)))
        arguments.classes("ConfidencePenalty", logits)
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        # 0 · log 0 is 0, and so is its gradient.
        return (p * torch.where(p > 0, log_p, 0)).sum(1)


SPEC = PenaltySpec.of(
    ConfidencePenalty,
    reference.confidence_penalty,
    source="Pereyra et al. 2017, arXiv 1701.06548",
    kind="output",
    example=logits_example,
)
