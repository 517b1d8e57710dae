"""Which modules of a model are layers, norms and activations, and what is noted of each call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.layerwise.batch_norm import Normed
from fastjac.nn import Act, ConvAct1d, ConvAct2d, ConvAct3d, LinearAct, activation_of
from fastjac.ops import act

LINEAR = (nn.Linear,)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORM = (*BATCH_NORM, nn.LayerNorm)

# Their forward is exactly one call of torch's linear or convolution with the module's weight.
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, LinearAct, ConvAct1d, ConvAct2d, ConvAct3d)

# Elementwise and deterministic. RReLU draws its slopes; softmax and GLU mix elements.
ACTIVATIONS = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    nn.Threshold,
)


@dataclass(eq=False)
class Layer:
    """A Linear or convolution module of a watched model."""

    module: Any
    name: str  # of the module in the model
    plain: bool  # whether its forward is one call of torch's linear or convolution, and no more
    hooked: bool = False  # whether the watch has a forward hook on it (tensor parallel)
    memo: dict[Any, Any] = field(default_factory=dict)  # the statistic's, by nonlinearity

    def __post_init__(self) -> None:
        self.linear = isinstance(self.module, LINEAR)


@dataclass(frozen=True, eq=False)
class Nonlinearity:
    """``φ`` at one place of a model: a row of the activation table, or any activation module.

    ``run`` computes ``φ(z)`` the way the model does. ``fn``, ``impl`` and ``params`` are the
    arguments of `fastjac.act`; ``fn`` is None if the table does not have the activation, and torch
    then differentiates the module.
    """

    run: Callable[[Tensor], Tensor]
    module: nn.Module | None = None
    fn: str | None = None
    impl: str = "auto"
    params: dict[str, Any] = field(default_factory=dict)

    def derivative(self, z: Tensor) -> Tensor:
        """``φ'(z)``."""
        if self.fn is not None:
            return act(z, None, 1, self.fn, impl=self.impl, **self.params)
        assert self.module is not None
        return activation_derivative(self.module, z)


@dataclass(slots=True)
class LayerCall:
    """One call of a layer, perhaps with the norm module that followed.

    ``z`` is what the activation takes: the output of the layer, or of the norm. The versions count
    the writes in place to a tensor, and show whether it was written to since; they are −1 under
    torch.compile.
    """

    layer: Layer
    x: Any
    z: Any  # a tensor until `release`
    weight: Tensor  # what the layer computed with: a parametrization makes another each time
    version: int  # of z, when it was first seen
    weight_version: int
    x_version: int
    norm: Any = None  # the module
    before_norm: Tensor | None = None
    normed: Normed | None = None  # the result of a BatchNorm in training mode
    used: bool = False  # whether an activation or a norm took z
    ref: Any = None  # a weak reference to z, once it was released
    released_shape: Any = None

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def shape(self) -> Any:
        """The shape of z."""
        return self.released_shape if self.z is None else self.z.shape

    @property
    def dim(self) -> int:
        """The dimension of z that holds the units or channels."""
        return len(self.shape) - 1 if self.layer.linear else 1

    @property
    def rows(self) -> Tensor:
        """The weight with one row per unit or output channel in dimension 0."""
        return weight_rows(self.layer.module, self.weight)

    def release(self) -> None:
        """Let go of the tensors: under checkpoint the graph does not hold them either."""
        self.released_shape, self.ref = self.z.shape, weakref.ref(self.z)
        self.x = self.z = self.before_norm = self.normed = None

    def is_output(self, z: Tensor) -> bool:
        """Whether z is the output of this call. If it was released, the call holds it again."""
        if self.z is z:
            return True
        if self.ref is None or self.ref() is not z:
            return False
        self.z = z  # without x: a second activation of the same z is computed apart
        return True

    def check_unchanged(self) -> None:
        """Raise if z was written to in place since it was computed."""
        # A call that was compiled (version -1) has no in-place writes left.
        if self.version < 0 or torch.compiler.is_compiling():
            return
        z = self.z if self.ref is None else self.ref()
        if z is not None and z._version != self.version:
            raise written_to(self.name)


def written_to(name: str) -> RuntimeError:
    return RuntimeError(
        f"layer {name}: its output or that of its activation was modified in place after it was "
        "computed; use the out-of-place operation"
    )


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation whose derivative can be taken elementwise."""
    return (
        activation_of(module) is not None
        or isinstance(module, (Act, *ACTIVATIONS))
        or callable(getattr(module, "fastjac_activation", None))
    )


def fused_activation(module: nn.Module) -> Act | None:
    """The activation in the table; None if there is none or the module states its own φ."""
    return None if hasattr(module, "fastjac_activation") else activation_of(module)


def activation_derivative(module: nn.Module, z: Tensor) -> Tensor:
    """``φ'(z)`` elementwise, differentiable in ``z`` and in the activation's own parameters.

    The fused op computes it if the activation table has the module and the module does not state
    its own φ.
    """
    fused = fused_activation(module)
    if fused is not None:
        return fused.derivative(z)
    phi: Callable[[Tensor], Tensor] = getattr(module, "fastjac_activation", None) or (
        lambda t: type(module).forward(module, t)
    )
    if isinstance(module, nn.Hardsigmoid):
        phi = hardsigmoid
    # The copy is for in-place activations, which may not write to the input of vjp.
    value, pull = torch.func.vjp(lambda t: phi(t.clone()), z)[:2]
    if value.shape != z.shape:
        raise ValueError(
            f"fastjac_activation of {type(module).__name__} maps {tuple(z.shape)} to "
            f"{tuple(value.shape)}: it must be elementwise"
        )
    (slope,) = pull(torch.ones_like(value))
    return slope


def hardsigmoid(z: Tensor) -> Tensor:
    """The same function in operations that torch can differentiate twice."""
    return F.relu6(z + 3) / 6


def weight_rows(module: Any, weight: Tensor) -> Tensor:
    """The weight with one row per unit or output channel in dimension 0."""
    if not isinstance(module, TRANSPOSED):
        return weight
    # [C_in, C_out/g, taps…]: output channel (group, j) sees the inputs of its group.
    groups, (c_in, per_group, *taps) = module.groups, weight.shape
    by_group = weight.reshape(groups, c_in // groups, per_group, *taps).transpose(1, 2)
    return by_group.reshape(groups * per_group, c_in // groups, *taps)


def is_plain(module: Any) -> bool:
    """Whether the class's forward is one call of torch's linear or convolution."""
    return type(module) in PLAIN and (
        isinstance(module, LINEAR)
        or (module.padding_mode == "zeros" and not isinstance(module.padding, str))
    )


def conv_options(module: Any) -> tuple[Any, ...] | None:
    """The options of ``torch.convolution`` after the bias; None for a Linear."""
    if isinstance(module, LINEAR):
        return None
    options = (module.stride, module.padding, module.dilation, False, module.output_padding)
    return (*options, module.groups)
