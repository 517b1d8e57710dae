"""DREG: a layer-wise Jacobian penalty."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from typing_extensions import Unpack

from fastjac import arguments, reference
from fastjac.layerwise.statistics import Statistic
from fastjac.layerwise.sums import SumOverLayers
from fastjac.penalties.registry import PenaltySpec, layered_example
from fastjac.penalty import PenaltyOptions


class DREG(SumOverLayers):
    """Layer-wise Jacobian penalty: ``R_n = Σ_l Σ_i φ'(z_lni)² ‖W_l[i, :]‖²``.

    That is ``Σ_l ‖diag φ'(z_ln) W_l‖_F²``: the squared norm of the Jacobian of each hidden layer
    ``a_l = φ(W_l a_{l-1} + b_l)``, summed over the layers. Only the abstract of arXiv 2606.23942 is
    public. It gives the idea: a layer-wise Jacobian penalty, strongest where the derivative of the
    activation is largest. The formula is a reading of it and is not printed there. It assumes
    squared Frobenius norms, summed over units, layers and positions, of the hidden layers alone;
    each of these is an option.

    Convolutions: each output position is a row, so the sum runs over positions too, and
    ``‖W_c‖²`` counts all taps of output channel c, also those that fall on padding and, in a
    strided transposed convolution, those that miss the position. Grouped convolutions likewise. A
    Linear on ``[N, T, C]`` has T positions.

    A layer is a Linear or convolution module whose output tensor, perhaps through one BatchNorm or
    LayerNorm module, is the input of an activation: a torch.nn module (elementwise and
    deterministic), a function of fastjac (``fastjac.gelu(z)``), a torch function that a module
    holds (``nn.TransformerEncoderLayer``), or any module with a callable attribute
    ``fastjac_activation``, its elementwise ``φ``. A last layer that ends in an activation is a
    layer like the rest. With a norm ``y = γ (z − μ)/σ + β`` in between, the layer's Jacobian is
    ``diag φ'(y) diag(γ/σ) W``: exact for BatchNorm in eval mode; elsewhere μ and σ, which depend on
    the sample or the batch, are held constant in the Jacobian (not in the gradient of the penalty,
    which goes through them).

    Two forms. Attached, the fast one: ``penalty = DREG(model)``, then in each step
    ``loss(model(x), y) + penalty()``. The activations of the model are then computed with their
    statistic in one pass, forward and backward; outputs and ``state_dict`` stay. It covers all
    forward passes since the last ``penalty()``, their samples taken together; passes in eval mode
    or without gradients do not count. Checkpointing (``use_reentrant=False``) and compiling the
    model, or the whole step, afterwards keep the numbers. ``detach()`` undoes it; copies of the
    model are not attached. Called: ``output, value = DREG()(model, x)``, without torch.compile.
    After either, ``layers_found`` has the names in the order they ran, ``layers_left_out`` the
    others with the reason, ``layer_values`` each layer's share of the value.

    Arguments:
        model: an nn.Module. x: ``[N, ...]`` of any dtype. There is no graph form. Dimension 0 must
        stay the samples all through the model.

    Options:
        over: ``"sum"``, ``"units"`` (a layer's term divided by its units or output channels) or
        ``"elements"`` (by the numbers in W). positions: ``"sum"`` or ``"mean"`` over output
        positions. layers: ``"sum"`` or ``"mean"`` over the layers counted. include_output: count
        the output layer, with ``φ' = 1``. use_weight: False for ``φ'²`` without ``‖W‖²`` (and
        without a norm's ``γ/σ``). squared: False for the root of each layer's term per sample,
        after the divisions; its gradient at 0 is taken as 0. layer_weights: a factor per layer, in
        the order of ``layers_found``. weight, reduction, every: as for all
        penalties.

    Half precision is computed in float32 from ``φ'(z)`` on. Gradients: once by fused kernels; twice
    through ``create_graph=True``; a derivative past the third of φ raises. The called form gives
    the value alone under ``torch.no_grad()``.

    Source: Martnishn 2026, arXiv 2606.23942 (abstract); the norm of each layer's Jacobian: Gu &
    Rigazio 2014, arXiv 1412.5068, eq. 6.

    Example:

        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 2))
        >>> penalty = fastjac.DREG(model)
        >>> x, w = torch.randn(4, 3), model[0].weight
        >>> output, value = model(x), penalty()
        >>> s = torch.sigmoid(nn.functional.linear(x, w, model[0].bias))
        >>> slope = (s * (1 - s)).square()  # φ'²
        >>> torch.allclose(value, (slope @ w.square().sum(1)).mean())
        True
        >>> penalty.layers_found
        ['0']
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        /,
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
        super().__init__(include_output=include_output, **options)
        self.over = arguments.choice("over", over, ("sum", "units", "elements"))
        self.layers = arguments.choice("layers", layers, ("sum", "mean"))
        self.positions = arguments.choice("positions", positions, ("sum", "mean"))
        self.use_weight = arguments.flag("use_weight", use_weight)
        self.squared = arguments.flag("squared", squared)
        self.layer_weights = arguments.numbers("layer_weights", layer_weights)
        if model is not None:  # last: an option that is refused leaves the model as it was
            self._attach(model)

    # R_n = Σ_l f_l t_ln / d_l, where t_ln = Σ_p Σ_c φ'² ‖W_c‖² is the statistic of layer l.

    def divisor(self, term: Statistic) -> float:
        if self.over == self.positions == "sum":
            return 1.0
        count = {"sum": 1, "units": term.units, "elements": term.elements}[self.over]
        return float(count * (term.positions if self.positions == "mean" else 1))

    def factors(self, count: int) -> list[float]:
        weights = [1.0] * count if self.layer_weights is None else self.layer_weights
        if len(weights) != count:
            raise ValueError(
                f"layer_weights has {len(weights)} numbers and the model {count} layers: "
                f"{', '.join(self.layers_found)}"
            )
        return [w / (count if self.layers == "mean" else 1) for w in weights]


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
