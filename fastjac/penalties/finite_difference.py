"""FiniteDifferenceDataGrad: DataGrad by a second forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, distributed, reference
from fastjac.input_jacobian import by_autograd
from fastjac.model_output import call_model
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.penalties.registry import Example, PenaltySpec, classifier_example, model_arguments
from fastjac.penalty import ModelPenalty, PenaltyOptions
from fastjac.per_sample import attached_zeros, measure, rows


class FiniteDifferenceDataGrad(ModelPenalty):
    """``R_n = ((ℓ_n(x_n + ε v_n/‖v_n‖) − ℓ_n(x_n)) / ε)²``, ``v_n = ∂ℓ_n/∂x_n`` held constant.

    ``ℓ_n`` is the cross-entropy of sample n. The value tends to that of DataGrad as ``ε → 0``. It
    needs no second derivatives, only a second forward pass. A sample with ``v_n = 0`` contributes
    0. The gradient treats ``v`` as a constant, although it depends on the parameters.

    Arguments:
        model: a callable, which is called twice and must compute the same both times (no dropout,
        no BatchNorm in training mode). x: ``[N, ...]`` floating point. target: class indices
        ``[N]`` int64, or probabilities ``[N, m]``. There is no graph form.

    Options:
        eps: ``ε > 0``, which must be well above the resolution of the dtype, since the value is a
            difference of two losses.
        weight, reduction, every, output: see ``help(fastjac.Penalty)``.

    Losses of half precision are computed in float32. The value is differentiable as often as the
    network.

    Source: Ororbia, Kifer, Giles 2017, arXiv 1601.07213.

    Example:

        >>> model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
        >>> y = torch.tensor([0, 1, 1, 0])
        >>> output, value = fastjac.FiniteDifferenceDataGrad(eps=1e-5)(model, x, y)
        >>> torch.allclose(value, fastjac.DataGrad()(model, x, y)[1], rtol=1e-3)
        True
    """

    def __init__(self, eps: float = 1e-2, **options: Unpack[PenaltyOptions]) -> None:
        super().__init__(**options)
        self.eps = arguments.number("eps", eps)
        if self.eps <= 0:
            raise ValueError(f"eps is {eps}: it must be greater than 0")

    def model_form(self, model: Callable[..., Any], x: Tensor, target: Any) -> tuple[Any, Tensor]:
        start, whole, output = by_autograd.run_model(model, x, None, self.output)
        by_autograd.check_graph(start, output)
        distributed.check_graph(start, output, twice=False)
        loss = cross_entropy(output, target)
        if x.shape[0] == 0:
            return whole, attached_zeros(output)
        v = by_autograd.gradient(loss, start)
        length = measure(v, "l2", lead=1)
        moved = length > 0
        step = self.eps / torch.where(moved, length, 1)
        shift = v * step.to(v.dtype).view(-1, *[1] * (x.dim() - 1))
        _, moved_output = call_model(model, x + shift, self.output)
        slope = (cross_entropy(moved_output, target) - loss) / self.eps
        return whole, torch.where(moved, slope.square(), 0)


def cross_entropy(output: Tensor, target: Any) -> Tensor:
    """The loss per sample, ``[N]``."""
    logits = rows(output.to(accumulate_dtype(output.dtype)))
    arguments.classes("FiniteDifferenceDataGrad", logits)
    return -(arguments.class_rows(target, logits) * logits.log_softmax(1)).sum(1)


def finite_difference_example(dtype: torch.dtype, generator: torch.Generator) -> Example:
    """A classifier, which the reference calls itself."""
    return replace(classifier_example(dtype, generator), reference_arguments=model_arguments)


SPEC = PenaltySpec.of(
    FiniteDifferenceDataGrad,
    reference.finite_difference_datagrad,
    source="Ororbia, Kifer, Giles 2017, arXiv 1601.07213",
    example=finite_difference_example,
    cases=({"eps": 0.3},),
)
