"""DataGrad: the input gradient of the cross-entropy (double backpropagation)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, reference
from fastjac.input_jacobian.projections import ProjectionOptions, ProjectionPenalty
from fastjac.model_output import part_of
from fastjac.modes import check_not_recomputed
from fastjac.ops.softmax_residual import softmax_residual
from fastjac.penalties.registry import PenaltySpec, classifier_example
from fastjac.per_sample import rows

# The weight of a call in the mean of the loss: some twenty calls count, since one batch is noisy.
SHARE = 0.05


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
        bound: a number κ; the weight is then at most ``κ / ℓ̄²``, with the running mean ℓ̄ of the
            cross-entropy, a constant. Early in training, when the loss is large, a large weight
            would hold the model where its output does not depend on x; the bound lets it grow as
            the loss falls. Start with κ = 0.1 times the variance of an input; docs/WEIGHT.md has
            the evidence. If the inputs are multiplied by c, multiply κ by c². It is for
            ``"l2_squared"`` only.
            ℓ̄ is a buffer of the module. The first call sets it, and in training mode each later
            one counts 5%, also each micro-batch; each process has its own. The function uses the
            loss of its batch. In a checkpointed function, which runs twice, it raises.
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

    mean_loss: Tensor | None

    def __init__(self, *, bound: float | None = None, **options: Unpack[ProjectionOptions]) -> None:
        super().__init__(**options)
        self.bound = None if bound is None else arguments.factor("bound", bound)
        if self.bound == 0:
            raise ValueError("bound is 0: it must be above 0, since the weight would always be 0")
        if bound is not None and self.norm != "l2_squared":
            raise ValueError(
                f"bound is {bound} and norm is {self.norm!r}: a bound is for 'l2_squared', whose "
                "values fall with the square of the loss; leave one of them out"
            )
        initial = None if bound is None else torch.tensor(math.nan, device="cpu")
        self.register_buffer("mean_loss", initial)

    def cotangents(self, logits: Tensor, target: Any) -> tuple[Tensor, float]:
        arguments.classes("DataGrad", logits)
        y = arguments.class_target(target, logits)
        w = logits.softmax(1) - y if y.is_floating_point() else softmax_residual(logits, y)
        return w.unsqueeze(0), 1.0

    def graph_form(self, x: Tensor, output: Tensor, *targets: Any, **named: Any) -> Tensor:
        values = super().graph_form(x, output, *targets, **named)
        self._see(output, *targets, **named)
        return values

    def model_form(
        self, model: Callable[..., Any], x: Tensor, *targets: Any, **named: Any
    ) -> tuple[Any, Tensor]:
        whole, values = super().model_form(model, x, *targets, **named)
        self._see(part_of(whole, self.output), *targets, **named)
        return whole, values

    def _see(self, output: Tensor, target: Tensor) -> None:
        """Add the loss of a batch to the running mean, without waiting for its device."""
        if self.mean_loss is None or not output.shape[0]:
            return
        if self.training:
            check_not_recomputed("has a bound")
        logits = rows(output.detach())
        y = arguments.class_target(target, logits)
        y = y.to(torch.float32) if y.is_floating_point() else y
        loss = F.cross_entropy(logits.to(torch.float32), y)
        if self.mean_loss.device != loss.device:
            self.mean_loss = self.mean_loss.to(loss.device)
        mean = self.mean_loss.to(torch.float32).lerp(loss, SHARE if self.training else 0.0)
        # NaN before the first call; and a loss that overflowed is forgotten at the next one.
        self.mean_loss.copy_(torch.where(mean.isfinite(), mean, loss))

    def _factor(self, values: Tensor) -> float | Tensor:
        factor = super()._factor(values)
        if self.bound is None or self.mean_loss is None:
            return factor
        every = self.every if self.training else 1
        most = every * self.bound / self.mean_loss.to(torch.float32).square()
        most = most.nan_to_num(math.inf).to(values)  # NaN if an empty batch came first
        if isinstance(factor, Tensor):
            return torch.minimum(most, factor.to(values))
        return most.clamp(max=factor)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        if self.bound is None:  # the state of a penalty that had one
            state_dict.pop(prefix + "mean_loss", None)
        super()._load_from_state_dict(state_dict, prefix, *others)


SPEC = PenaltySpec.of(
    DataGrad,
    reference.datagrad,
    source="Drucker & LeCun 1991; Ororbia et al. 2017, arXiv 1601.07213",
    example=classifier_example,
    # At these sizes the bound is not reached; tests/test_bound.py is about it.
    cases=({"norm": "l2"}, {"norm": "l1"}, {"bound": 1e3}),
)
