"""DREG: a layer-wise Jacobian penalty."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from typing_extensions import Unpack

from fastjac import arguments, reference
from fastjac.layerwise.sums import SumOverLayers
from fastjac.layerwise.terms import Statistic
from fastjac.penalties.registry import PenaltySpec, layered_example
from fastjac.penalty import PenaltyOptions


class DREG(SumOverLayers):
    """Layer-wise Jacobian penalty: ``R_n = Σ_l Σ_i φ'(z_lni)² ‖W_l[i, :]‖²``.

    That is ``Σ_l ‖diag φ'(z_ln) W_l‖_F²``: the squared norm of the Jacobian of each hidden layer
    ``a_l = φ(W_l a_{l-1} + b_l)``, summed over the layers. Only the abstract of arXiv 2606.23942 is
    public. It describes a layer-wise Jacobian penalty that is strongest where the derivative of the
    activation is largest, but does not print a formula. This one is a reading of it: squared
    Frobenius norms, summed over units, layers and positions, of the hidden layers only. Each of
    these choices is an option.

    A layer is a Linear or convolution whose output tensor, unchanged or through one BatchNorm,
    LayerNorm, GroupNorm or InstanceNorm, is the input of an activation. Each may be a module or a
    function: a product with a parameter of the model (``F.linear(x, self.w)``, ``x @ self.w``) is a
    layer, and ``F.gelu(z)``, ``z.relu_()`` and ``fastjac.gelu(z)`` are activations as ``nn.GELU``
    is. So are modules of other libraries that compute one, and any module with a callable attribute
    ``fastjac_activation``, its elementwise ``φ``. Between them the output may go through views,
    numbers as factors and constants that are added: before ``φ(c z)`` the weight counts as ``c W``.
    A last layer with an activation is a layer too.
    ``W`` is the weight that ``F.linear`` or the convolution was called with in this run, which a
    subclass or a parametrization may have computed, and the gradient flows back into what computed
    it. A layer whose forward does not return the result of such a call is left out. docs/LAYERS.md
    shows which layers, norms and activations count.

    The rows of a convolution are its output positions, so the sum includes the positions.
    ``‖W_c‖²`` contains all taps of output channel c, also those that fall on padding or, in a
    strided transposed convolution, do not reach the position. A Linear on ``[N, T, C]`` has T
    positions.

    With a norm ``y = γ (z − μ)/σ + β``, the Jacobian of the layer is ``diag φ'(y) diag(γ/σ) W``,
    with the σ of the channel, of the position (LayerNorm) or of the sample and group (GroupNorm).
    This is exact for BatchNorm in eval mode. Otherwise μ and σ depend on the sample or the batch;
    the Jacobian treats them as constants, but the gradient of the penalty goes through them.

    There are two forms. The attached form is faster: ``penalty = DREG(model)``, then in each step
    ``loss(model(x), y) + penalty()``. The activations of the model are then computed together with
    their statistic in one pass, forward and backward; outputs and ``state_dict`` do not change. It
    covers the forward passes since the last ``penalty()``, and takes their samples together. Passes
    in eval mode or without gradients do not count, nor do passes whose output, and all that was
    computed from it, is deleted before the next pass begins; the latest pass always counts. The
    model may use checkpoints (``use_reentrant=False``), and the model or the whole step may be
    compiled afterwards.
    ``detach()`` ends it; copies of the model are not attached. The call form is
    ``output, value = DREG()(model, x)``, without torch.compile. After either, ``layers_found`` has
    the names of the layers in the order in which they ran, ``layers_left_out`` the others with the
    reason, and ``layer_values`` each layer's share of the value.

    Arguments:
        model: an nn.Module in which dimension 0 of all tensors is the samples. Their number N is
        that of x, or of the first tensor that an attached model is called with; a layer with
        another number of rows, or a model without such a tensor, raises. x: ``[N, ...]`` of any
        dtype. There is no graph form.

    Options:
        over: ``"sum"``, ``"units"`` to divide the term of a layer by the number of its units or
            output channels, or ``"elements"`` to divide it by the number of elements of W.
        positions: ``"sum"`` or ``"mean"`` over the output positions. The sum grows with the area of
            an image, and a good weight shrinks: the values of the convolutional network of
            docs/WEIGHT.md are 75, 1200 and 4800 for 8, 32 and 64 pixels; those of the mean are 2.2.
        layers: ``"sum"`` or ``"mean"`` over the layers.
        include_output: adds the output layer, with ``φ' = 1``.
        use_weight: False for ``φ'²`` without ``‖W‖²`` and without the ``γ/σ`` of a norm.
        squared: False for the square root of each layer's term per sample, after the divisions; its
            gradient at 0 is defined as 0.
        layer_weights: a factor for each layer, in the order of ``layers_found``.
        weight, reduction, every, output: see ``help(fastjac.Penalty)``.

    Half precision is computed in float32 from ``φ'(z)`` on. The gradient is computed by fused
    kernels. The second one needs ``create_graph=True``; one that needs a derivative of φ past the
    third raises. Under ``torch.no_grad()`` the call form returns the value without a gradient.

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
        self.layer_weights = arguments.factors("layer_weights", layer_weights)
        if model is not None:  # last, so that an invalid option leaves the model unchanged
            self._attach(model)

    def one_factor(self) -> bool:
        every = type(self).select is SumOverLayers.select
        return every and self.over == self.positions == "sum" and self.layer_weights is None

    def divisor(self, term: Statistic) -> float:
        if self.over == self.positions == "sum":
            return 1.0
        count = {"sum": 1, "units": term.units, "elements": term.elements}[self.over]
        return float(count * (term.positions if self.positions == "mean" else 1))

    def factors(self, count: int) -> list[float]:
        weights = [1.0] * count if self.layer_weights is None else self.layer_weights
        if len(weights) != count:
            raise ValueError(
                f"layer_weights has {len(weights)} numbers, but the model has {count} layer(s), "
                f"{', '.join(self.layers_found)}: pass one number for each"
            )
        return [w / (count if self.layers == "mean" else 1) for w in weights]


SPEC = PenaltySpec.of(
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
