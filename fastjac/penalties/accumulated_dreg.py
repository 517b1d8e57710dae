"""AccumulatedDREG: one tangent pushed forward through the layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from typing_extensions import Unpack

from fastjac import reference
from fastjac.penalties import _autograd, _checks, _layers
from fastjac.penalties._base import ModelPenalty, PenaltyOptions
from fastjac.penalties._spec import PenaltySpec, pushed_example


class AccumulatedDREG(ModelPenalty):
    """``R_n = Σ_l ‖J_ln ⋯ J_1n u_n‖²``, ``u ~ N(0, I)``, ``J_l`` the Jacobian of hidden layer l.

    Unbiased for ``Σ_l ‖∂a_ln/∂x_n‖_F²``, the accumulated instead of the single layers' Jacobians
    of DREG; ``a_l`` is the output of the activation. One forward pass with forward-mode autograd.
    A reading of the word "layer-wise" in the abstract of arXiv 2606.23942 beside an author who
    accumulates forwards elsewhere, not a formula printed there.

    The layers counted are those DREG finds; the tangent goes through everything in between as
    well. ``layers_found`` and ``layers_left_out`` are as there.

    Arguments:
        model: an nn.Module of operations that have a forward-mode derivative (torch raises where
        one has none). x: ``[N, ...]`` floating point. tangent: the ``u``, shape, dtype and device
        of ``x``. There is no graph form.

    Options:
        include_output: count ``‖J_g u‖²`` of the output layer too. generator: on the device of
        ``x``; the draw is ``torch.randn(x.shape)``. weight, reduction, every: as for all penalties.

    Sums of squares of half precision are taken in float32. Differentiable in reverse mode as often
    as the network; not inside another forward-mode computation.

    Source: a reading of Martnishn 2026, arXiv 2606.23942.
    """

    needs_grad = False

    def __init__(
        self,
        *,
        include_output: bool = False,
        generator: torch.Generator | None = None,
        **options: Unpack[PenaltyOptions],
    ) -> None:
        super().__init__(**options)
        self.include_output = _checks.flag("include_output", include_output)
        self.generator = _checks.generator(generator)
        self.layers_found: list[str] = []
        self.layers_left_out: list[tuple[str, str]] = []

    def model_form(
        self, model: Any, x: Tensor, *, tangent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        u = self._draw(_checks.floating("x", x)) if tangent is None else self._given(tangent, x)
        with forward_ad.dual_level(), _layers.LayerCollector(model) as seen:
            dual = _autograd.call_model(model, forward_ad.make_dual(x, u))
            found = seen.layers(dual, len(x), include_output=self.include_output)
            self.layers_found = [layer.name for layer in found]
            self.layers_left_out = seen.left_out
            pushed = []
            for layer in found:
                end = seen.check_unchanged(layer, layer.z if layer.post is None else layer.post)
                pushed.append(forward_ad.unpack_dual(end).tangent)
            output = forward_ad.unpack_dual(dual).primal
        for name, t in zip(self.layers_found, pushed, strict=True):
            if t is None:
                raise RuntimeError(
                    f"layer {name} does not depend on x: see that the model does not detach it"
                )
        squares = [_autograd.measure(t, "l2_squared", lead=1) for t in pushed]
        return output, torch.stack(squares).sum(0)

    def _draw(self, x: Tensor) -> Tensor:
        _checks.generator_device(self.generator, x.device)
        dtype = _autograd.accumulate_dtype(x.dtype)
        return torch.randn(x.shape, dtype=dtype, device=x.device, generator=self.generator).to(
            x.dtype
        )

    def _given(self, tangent: Any, x: Tensor) -> Tensor:
        tangent = _checks.tensor("tangent", tangent)
        _checks.like("tangent", tangent, "x", x)
        if tangent.shape != x.shape:
            raise ValueError(
                f"tangent has shape {tuple(tangent.shape)} and x {tuple(x.shape)}: they must be "
                "the same"
            )
        return tangent


SPEC = PenaltySpec.of(
    AccumulatedDREG,
    reference.accumulated_dreg,
    source="a reading of Martnishn 2026, arXiv 2606.23942",
    kind="layer-wise",
    example=pushed_example,
    cases=({"include_output": True},),
)
accumulated_dreg = SPEC.functional
