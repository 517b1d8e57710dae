"""Presets of DREG: the contractive penalties of Rifai et al. and of Gu & Rigazio."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastjac import reference
from fastjac.layerwise.terms import Statistic
from fastjac.model_output import Part
from fastjac.penalties.dreg import DREG
from fastjac.penalties.registry import PenaltySpec, layered_example


class Contractive(DREG):
    """Contractive penalty: ``R_n = ‖diag φ'(z_1n) W_1‖_F²`` of the first hidden layer.

    With a sigmoid encoder this is the penalty of the contractive autoencoder. It is `DREG` of the
    layer that runs first, whose notes apply.

    Arguments:
        model: an nn.Module. x: ``[N, ...]`` of any dtype. There is no graph form.

    Options:
        weight, reduction, every, output: see ``help(fastjac.Penalty)``.

    Source: Rifai, Vincent, Muller, Glorot, Bengio 2011.

    Example:

        >>> encoder = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid())
        >>> output, value = fastjac.Contractive()(encoder, torch.randn(4, 3))
        >>> truth = (output * (1 - output)).square() @ encoder[0].weight.square().sum(1)
        >>> torch.allclose(value, truth.mean())
        True
    """

    not_selected = "not the first hidden layer"

    def __init__(
        self,
        model: nn.Module | None = None,
        /,
        *,
        weight: float | Tensor = 1.0,
        reduction: str = "mean",
        every: int = 1,
        output: Part = None,
    ) -> None:
        super().__init__(model, weight=weight, reduction=reduction, every=every, output=output)

    def select(self, terms: list[Statistic]) -> list[Statistic]:
        return terms[:1]


class GuRigazio(DREG):
    """Deep contractive network: ``R_n = Σ_l λ_l ‖diag φ'(z_ln) W_l‖_F``, with the output layer.

    It is `DREG` with norms that are not squared and ``φ' = 1`` for the output layer; its notes
    apply.

    Arguments:
        model: an nn.Module. x: ``[N, ...]`` of any dtype. There is no graph form.

    Options:
        layer_weights: the ``λ_l``; the default is 1 for each layer.
        weight, reduction, every, output: see ``help(fastjac.Penalty)``.

    Source: Gu & Rigazio 2014, arXiv 1412.5068, eq. 6.

    Example:

        >>> model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.zeros(4, 3)
        >>> output, value = fastjac.GuRigazio()(model, x)
        >>> slope = (model[0].bias > 0).float()  # φ' at x = 0
        >>> truth = (slope @ model[0].weight.square().sum(1)).sqrt() + model[2].weight.norm()
        >>> torch.allclose(value, truth)
        True
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        /,
        *,
        layer_weights: Sequence[float] | None = None,
        weight: float | Tensor = 1.0,
        reduction: str = "mean",
        every: int = 1,
        output: Part = None,
    ) -> None:
        super().__init__(
            model,
            squared=False,
            include_output=True,
            layer_weights=layer_weights,
            weight=weight,
            reduction=reduction,
            every=every,
            output=output,
        )


CONTRACTIVE = PenaltySpec.of(
    Contractive,
    reference.contractive,
    source="Rifai, Vincent, Muller, Glorot, Bengio 2011",
    kind="layer-wise",
    example=layered_example,
)
GU_RIGAZIO = PenaltySpec.of(
    GuRigazio,
    reference.gu_rigazio,
    source="Gu & Rigazio 2014, arXiv 1412.5068, eq. 6",
    kind="layer-wise",
    example=layered_example,
    cases=({"layer_weights": (0.5, 2.0, 3.0)},),
)
