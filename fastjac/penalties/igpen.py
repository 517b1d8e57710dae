"""IGPen: the input gradient of any per-sample loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from fastjac import reference
from fastjac.input_jacobian.projections import ProjectionOptions, ProjectionPenalty
from fastjac.input_jacobian.pullback import Pullback
from fastjac.penalties.registry import PenaltySpec, classifier_example
from fastjac.signatures import shown


class IGPen(ProjectionPenalty):
    """Input-gradient penalty: ``R_n = ‖∂ℓ_n/∂x_n‖²``, ``ℓ = loss_fn(output, *targets)`` ``[N]``.

    The loss must be per sample, since the gradient of a batch mean has a factor ``1/N``, which
    would make the penalty depend on the batch size. A loss of another shape than ``[N]`` raises.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N, ...]``, the first argument of
        ``loss_fn``. targets: the other arguments of ``loss_fn``.

    Options:
        loss_fn: the loss; the default is the cross-entropy per sample, as in DataGrad.
        norm: ``"l2_squared"``, ``"l2"`` or ``"l1"``.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once; for
    gradients of gradients use ``engine="autograd"``.

    Source: Drucker & LeCun 1991; Ross & Doshi-Velez 2018, arXiv 1711.09404.

    Example:

        >>> model, x, y = nn.Linear(3, 1), torch.randn(4, 3), torch.randn(4, 1)
        >>> penalty = fastjac.IGPen(lambda output, y: (output - y).square().sum(1))
        >>> output, value = penalty(model, x, y)
        >>> truth = (2 * (output - y) @ model.weight).square().sum(1).mean()
        >>> torch.allclose(value, truth)
        True
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor] | None = None,
        **options: Unpack[ProjectionOptions],
    ) -> None:
        super().__init__(**options)
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn is {loss_fn!r}: it must be a function (output, *targets)")
        self.loss_fn = loss_fn

    def cotangents(self, logits: Tensor, *targets: Any) -> tuple[Tensor, float]:
        return logits.new_ones(1, *logits.shape), 1.0

    def per_sample(self, pull: Pullback, *targets: Any, **named: Any) -> Tensor:
        if self.loss_fn is None and not (targets or named):
            raise TypeError(
                "IGPen needs target, since its loss is the cross-entropy: call it with (model, x, "
                "target) or (x, output, target), or set loss_fn"
            )
        loss_fn = self.loss_fn or partial(F.cross_entropy, reduction="none")
        n = pull.output.shape[0]

        def losses(output: Tensor) -> Tensor:
            loss = loss_fn(output, *targets, **named)
            if not isinstance(loss, Tensor) or loss.shape != (n,):
                raise ValueError(
                    f"loss_fn returned {shown(loss)}: it must return one loss per sample, [{n}] "
                    "(with reduction='none' for the losses of torch)"
                )
            if not loss.requires_grad:
                raise RuntimeError(
                    "loss_fn returned a loss that does not require grad: it must not detach output"
                )
            return loss

        return super().per_sample(pull.then(losses))


SPEC = PenaltySpec.of(
    IGPen,
    reference.igpen,
    source="Drucker & LeCun 1991; Ross & Doshi-Velez 2018, arXiv 1711.09404",
    example=classifier_example,
    cases=(
        {"norm": "l2"},
        {"norm": "l1"},
        {"loss_fn": partial(F.cross_entropy, reduction="none", label_smoothing=0.1)},
    ),
)
