"""What a layer is: Linear, convolution, norm and activation modules, and what they contribute."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.layerwise.batch_norm import Normed, inverse_variance
from fastjac.nn import Act, ConvAct1d, ConvAct2d, ConvAct3d, LinearAct, activation_of
from fastjac.ops import act
from fastjac.ops.act_stats import recorded
from fastjac.ops.autograd import Function
from fastjac.ops.dispatch import accumulate_dtype

LINEAR = (nn.Linear,)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORM = (*BATCH_NORM, nn.LayerNorm)
BATCH_NORM_NODES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0")

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


@dataclass(frozen=True, eq=False)
class Phi:
    """An activation: ``fn`` of the table, or (None) any module that torch can differentiate.

    ``run`` computes ``φ(z)`` the model's own way.
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
class Call:
    """One call of a Linear or convolution module, perhaps with the norm module that followed.

    ``z`` is what the activation takes: the output of the layer or of the norm.
    """

    layer: Any  # the `_forwards.Layer` that stands in the module's forward
    x: Any
    z: Any  # a tensor until `release`
    weight: Tensor  # what the layer computed with: a parametrization makes another each time
    version: int  # of z, when it was first seen
    weight_version: int
    x_version: int
    norm: Any = None  # the module
    before_norm: Tensor | None = None
    normed: Normed | None = None  # by a BatchNorm in training mode
    used: bool = False
    ref: Any = None  # a weak reference to z, for those who ask for it again
    shape: Any = None  # of z

    @property
    def name(self) -> str:
        return self.layer.name

    def release(self) -> None:
        """Let go of the tensors: under checkpoint the graph does not hold them either."""
        self.shape, self.ref = self.z.shape, weakref.ref(self.z)
        self.x = self.z = self.before_norm = self.normed = None

    def is_output(self, z: Tensor) -> bool:
        """Whether this call returned z; takes it back if it was let go."""
        if self.z is z:
            return True
        if self.ref is None or self.ref() is not z:
            return False
        self.z = z  # without x: a second activation of the same z is computed apart
        return True

    @property
    def dim(self) -> int:
        """The dimension of z that holds the units or channels."""
        return self.z.dim() - 1 if self.layer.linear else 1

    @property
    def rows(self) -> Tensor:
        """The weight with one row per unit or output channel in dimension 0."""
        return weight_rows(self.layer.module, self.weight)

    @property
    def positions(self) -> int:
        n, c = self.z.shape[0], self.z.shape[self.dim]
        return self.z.numel() // (n * c) if n and c else 0


def is_activation(module: nn.Module) -> bool:
    """A module whose derivative can be taken elementwise."""
    return (
        activation_of(module) is not None
        or isinstance(module, (Act, *ACTIVATIONS))
        or callable(getattr(module, "fastjac_activation", None))
    )


def fused_activation(module: nn.Module) -> Act | None:
    """The activation in the table, unless the module states its own φ."""
    return None if hasattr(module, "fastjac_activation") else activation_of(module)


def activation_derivative(module: nn.Module, z: Tensor) -> Tensor:
    """``φ'(z)`` elementwise, differentiable in ``z`` and in the activation's own parameters.

    By the fused op where the activation table has the module, unless it states its own φ.
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
    if not isinstance(module, TRANSPOSED):
        return weight
    # [C_in, C_out/g, taps…]: output channel (group, j) sees the inputs of its group.
    groups, (c_in, per_group, *taps) = module.groups, weight.shape
    by_group = weight.reshape(groups, c_in // groups, per_group, *taps).transpose(1, 2)
    return by_group.reshape(groups * per_group, c_in // groups, *taps)


def plain_layer(module: Any) -> bool:
    """Whether torch's own linear or convolution is all that the module does."""
    return type(module) in PLAIN and (
        isinstance(module, LINEAR)
        or (module.padding_mode == "zeros" and not isinstance(module.padding, str))
    )


def conv_options(module: Any) -> tuple[Any, ...] | None:
    """Of ``torch.convolution``; None for a Linear."""
    if isinstance(module, LINEAR):
        return None
    options = (module.stride, module.padding, module.dilation, False, module.output_padding)
    return (*options, module.groups)


class Gain(NamedTuple):
    """``k²`` of a norm ``y = k (z − μ) + β``, its statistics held constant; None stands for 1.

    Differentiable, through the statistics too.
    """

    gamma: Tensor | None = None  # [C], not yet squared
    inverse: Tensor | None = None  # 1 / (σ² + ε), [C]
    place: Tensor | None = None  # the same of a LayerNorm: per sample and position, [N, ...]

    def channel(self) -> Tensor | None:
        """The factor per channel."""
        if self.gamma is None or self.inverse is None:
            return self.inverse if self.gamma is None else self.gamma.square()
        return self.gamma.square() * self.inverse


def norm_gain(call: Call) -> Gain:
    norm, z = call.norm, call.before_norm
    if norm is None or z is None:
        return Gain()
    dtype = accumulate_dtype(z.dtype)
    gamma = None if norm.weight is None else norm.weight.to(dtype)
    if isinstance(norm, nn.LayerNorm):
        return Gain(gamma, place=1 / (z.to(dtype).var(-1, unbiased=False) + norm.eps))
    if not norm.training and norm.running_var is not None:
        return Gain(gamma, 1 / (norm.running_var.to(dtype) + norm.eps))
    if call.normed is not None:
        return Gain(gamma, InverseVariance.apply(z, *call.normed[2:]))
    return Gain(gamma, inverse_variance(z, norm.eps))


def batch_normed(y: Tensor, norm: Any) -> Normed | None:
    """What a BatchNorm in training mode has just computed."""
    node = y.grad_fn
    # Under checkpoint to read what the node saved would run the model again.
    if node is None or node.name() not in BATCH_NORM_NODES or saved_tensor_hooks():
        return None
    if not node._saved_training:  # type: ignore[attr-defined]
        return None
    version = 0 if norm.bias is None else norm.bias._version
    mean, invstd = node._saved_result1, node._saved_result2  # type: ignore[attr-defined]
    return Normed(y, version, mean, invstd, norm.eps)


def top_hooks() -> Any:
    """The hooks on saved tensors of the innermost checkpoint, or other saver of tensors, if any."""
    if torch.compiler.is_compiling():
        return None
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def saved_tensor_hooks() -> bool:
    """Whether a checkpoint (or another saver of tensors) is active."""
    return top_hooks() is not None


class InverseVariance(Function):
    """``1 / (σ_c² + ε)`` of a batch, from the statistics that BatchNorm saved.

    ``Tensor.var`` would go over z again, and so would its backward; here the forward costs nothing
    and the backward is one pass.
    """

    @staticmethod
    def forward(ctx, z, mean, invstd, eps):
        ctx.save_for_backward(z, mean, invstd)
        ctx.eps = eps
        return invstd.square()

    @staticmethod
    def backward(ctx, c):
        z, mean, invstd = ctx.saved_tensors
        shape = [-1 if d == 1 else 1 for d in range(z.dim())]
        count = z.numel() // z.shape[1]
        if recorded(c):
            others = [d for d in range(z.dim()) if d != 1]
            mean, inverse = z.mean(others), inverse_variance(z, ctx.eps)
            slope = (-2 / count * c * inverse.square()).view(shape)
            return (slope * (z - mean.view(shape))).to(z.dtype), None, None, None
        slope = -2 / count * c * invstd.square().square()
        shift = (-slope * mean).to(z.dtype).view(shape)
        return torch.addcmul(shift, z, slope.to(z.dtype).view(shape)), None, None, None
