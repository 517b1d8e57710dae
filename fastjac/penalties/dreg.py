"""DREG: a layer-wise Jacobian penalty, with its presets Contractive and GuRigazio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastjac import reference
from fastjac.penalties import _autograd, _checks, _layers
from fastjac.penalties._base import ModelPenalty, PenaltyOptions
from fastjac.penalties._spec import PenaltySpec, layered_example


class DREG(ModelPenalty):
    """Layer-wise Jacobian penalty: ``R_n = Σ_l Σ_i φ'(z_lni)² ‖W_l[i, :]‖²``.

    That is ``Σ_l ‖diag φ'(z_ln) W_l‖_F²``, for each hidden layer ``a_l = φ(W_l a_{l-1} + b_l)`` the
    squared norm of its own Jacobian. The abstract of arXiv 2606.23942, all that is public, gives
    the idea: a layer-wise Jacobian penalty, strongest where the activation derivative is largest.
    This is a reading of it, not a formula printed there: it assumes squared Frobenius norms,
    summed over units, layers and positions, of hidden layers alone. The options change each.

    Convolutions: each output position is a row, so the sum runs over positions too, and
    ``‖W_c‖²`` counts all taps of output channel c, also those that fall on padding and, in a
    strided transposed convolution, those that miss the position. Grouped convolutions likewise. A
    Linear on ``[N, T, C]`` has T positions.

    A layer is a Linear or convolution module whose output tensor is the input of an activation
    module: one of torch.nn (elementwise and deterministic), or any module with a callable
    attribute ``fastjac_activation``, its elementwise ``φ``. After a call of the module form,
    ``layers_found`` holds their names in the order they ran and ``layers_left_out`` the others,
    ``(name, reason)``. A last layer that ends in an activation module is a layer like the rest.

    Arguments:
        model: an nn.Module. x: ``[N, ...]`` of any dtype. There is no graph form. Dimension 0 must
        stay the samples all through the model.

    Options:
        over: ``"sum"``, ``"units"`` (a layer's term divided by its units or output channels) or
        ``"elements"`` (by the numbers in W). positions: ``"sum"`` or ``"mean"`` over output
        positions. layers: ``"sum"`` or ``"mean"`` over the layers counted. include_output: count
        the output layer, with ``φ' = 1``. use_weight: False for ``φ'²`` without ``‖W‖²``.
        squared: False for the root of each layer's term per sample, after the divisions; its
        gradient at 0 is taken as 0. layer_weights: a factor per layer, in the order of
        ``layers_found``. weight, reduction, every: as for all penalties.

    Half precision is computed in float32 from ``φ'(z)`` on. Differentiable as often as φ' is. The
    value alone can be had under ``torch.no_grad()``.

    Source: Martnishn 2026, arXiv 2606.23942 (abstract); the norm of each layer's Jacobian: Gu &
    Rigazio 2014, arXiv 1412.5068, eq. 6.
    """

    needs_grad = False

    def __init__(
        self,
        *,
        over: str = "sum",
        layers: str = "sum",
        positions: str = "sum",
        include_output: bool = False,
        use_weight: bool = True,
        squared: bool = True,
        layer_weights: Sequence[float] | None = None,
        **options: Unpack[PenaltyOptions],
    ) -> None:
        super().__init__(**options)
        self.over = _checks.choice("over", over, ("sum", "units", "elements"))
        self.layers = _checks.choice("layers", layers, ("sum", "mean"))
        self.positions = _checks.choice("positions", positions, ("sum", "mean"))
        self.include_output = _checks.flag("include_output", include_output)
        self.use_weight = _checks.flag("use_weight", use_weight)
        self.squared = _checks.flag("squared", squared)
        self.layer_weights = (
            None
            if layer_weights is None
            else tuple(_checks.number("layer_weights", c) for c in layer_weights)
        )
        self.layers_found: list[str] = []
        self.layers_left_out: list[tuple[str, str]] = []

    def model_form(self, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        _checks.tensor("x", x)
        with _layers.LayerCollector(model) as seen:
            output = _autograd.call_model(model, x)
        found = self.select(seen, output, len(x))
        terms = [self.term(layer, seen.check_unchanged(layer, layer.z)) for layer in found]
        if self.layer_weights is not None:
            if len(self.layer_weights) != len(terms):
                raise ValueError(
                    f"layer_weights has {len(self.layer_weights)} numbers and the model "
                    f"{len(terms)} layers: {', '.join(self.layers_found)}"
                )
            terms = [c * t for c, t in zip(self.layer_weights, terms, strict=True)]
        total = torch.stack(terms).sum(0)
        return output, total / len(terms) if self.layers == "mean" else total

    def select(self, seen: _layers.LayerCollector, output: Tensor, batch: int) -> list[Any]:
        """The layers to count; remembers their names."""
        found = seen.layers(output, batch, include_output=self.include_output)
        self.layers_found = [layer.name for layer in found]
        self.layers_left_out = seen.left_out
        return found

    def term(self, layer: _layers.Layer, z: Tensor) -> Tensor:
        """One layer's share of ``R_n``, as ``[N]``."""
        weight = layer.weight
        dtype = _autograd.accumulate_dtype(z.dtype)
        if layer.activation is None:
            slope = torch.ones_like(z, dtype=dtype)
        else:
            slope = _layers.activation_derivative(layer.activation, z).to(dtype)
        if not layer.channels_last:
            slope = slope.movedim(1, -1)
        n, *places, units = slope.shape
        per_unit = slope.square().reshape(n, math.prod(places), units).sum(1)
        if self.use_weight:  # not a matrix product, which autocast would round to half precision
            per_unit = per_unit * _row_norms(weight)
        value = per_unit.sum(1)
        count = {"sum": 1, "units": units, "elements": weight.numel()}[self.over]
        if self.positions == "mean":
            count *= math.prod(places)
        value = value / count
        return value if self.squared else _root(value)


def _row_norms(weight: Tensor) -> Tensor:
    """``‖W[i, :]‖²`` in at least float32."""
    w = weight.to(_autograd.accumulate_dtype(weight.dtype))
    return w.square().flatten(1).sum(1)


def _root(value: Tensor) -> Tensor:
    """The square root, with the gradient 0 at 0."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1).sqrt(), 0)


class Contractive(DREG):
    """Contractive penalty: ``R_n = ‖diag φ'(z_1n) W_1‖_F²`` of the first hidden layer.

    With a sigmoid encoder this is the penalty of the contractive autoencoder. DREG on the layer
    that runs first; the notes there hold here.

    Arguments:
        model: an nn.Module. x: ``[N, ...]`` of any dtype. There is no graph form.

    Options:
        weight, reduction, every: as for all penalties.

    Source: Rifai, Vincent, Muller, Glorot, Bengio 2011.
    """

    def __init__(self, *, weight: float = 1.0, reduction: str = "mean", every: int = 1) -> None:
        super().__init__(weight=weight, reduction=reduction, every=every)

    def select(self, seen: _layers.LayerCollector, output: Tensor, batch: int) -> list[Any]:
        first, *others = super().select(seen, output, batch)
        self.layers_found = [first.name]
        self.layers_left_out += [(layer.name, "not the first hidden layer") for layer in others]
        return [first]


class GuRigazio(DREG):
    """Deep contractive network: ``R_n = Σ_l λ_l ‖diag φ'(z_ln) W_l‖_F``, with the output layer.

    DREG with unsquared norms and ``φ' = 1`` for the output layer; the notes there hold here.

    Arguments:
        model: an nn.Module. x: ``[N, ...]`` of any dtype. There is no graph form.

    Options:
        layer_weights: the ``λ_l``, default 1. weight, reduction, every: as for all penalties.

    Source: Gu & Rigazio 2014, arXiv 1412.5068, eq. 6.
    """

    def __init__(
        self,
        *,
        layer_weights: Sequence[float] | None = None,
        weight: float = 1.0,
        reduction: str = "mean",
        every: int = 1,
    ) -> None:
        super().__init__(
            squared=False,
            include_output=True,
            layer_weights=layer_weights,
            weight=weight,
            reduction=reduction,
            every=every,
        )


DREG_SPEC = PenaltySpec.of(
    DREG,
    reference.dreg,
    source="Martnishn 2026, arXiv 2606.23942 (a reading of the abstract)",
    kind="layer-wise",
    example=layered_example,
    cases=(
        {"over": "units"},
        {"over": "elements"},
        {"layers": "mean"},
        {"positions": "mean"},
        {"include_output": True},
        {"use_weight": False},
        {"squared": False},
        {"squared": False, "over": "elements", "layers": "mean"},
        {"layer_weights": (0.5, 2.0)},
        {"layer_weights": (0.5, 2.0, 3.0), "include_output": True, "layers": "mean"},
    ),
)
CONTRACTIVE_SPEC = PenaltySpec.of(
    Contractive,
    reference.contractive,
    source="Rifai, Vincent, Muller, Glorot, Bengio 2011",
    kind="layer-wise",
    example=layered_example,
)
GU_RIGAZIO_SPEC = PenaltySpec.of(
    GuRigazio,
    reference.gu_rigazio,
    source="Gu & Rigazio 2014, arXiv 1412.5068, eq. 6",
    kind="layer-wise",
    example=layered_example,
    cases=({"layer_weights": (0.5, 2.0, 3.0)},),
)
dreg = DREG_SPEC.functional
contractive = CONTRACTIVE_SPEC.functional
gu_rigazio = GU_RIGAZIO_SPEC.functional
