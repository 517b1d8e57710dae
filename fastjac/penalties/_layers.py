"""Finds the layers of a model while it runs: (pre-activation, weight, activation).

Hooks on the Linear and convolution modules remember each output tensor object; a pre-hook on the
activation modules looks its input up among them. The pair is a hidden layer. Tensor identity is
what counts, so a layer is found however the model's ``forward`` is written, and a tensor that went
through anything else in between (a normalisation, a view, an addition) is not taken for a
pre-activation. The hooks are gone when the model returns or raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

LINEAR = (nn.Linear,)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

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


@dataclass
class Layer:
    """One call of a Linear or convolution module.

    ``weight`` has the units or output channels in dimension 0. ``activation`` is None for the
    output layer, ``post`` the output of the activation (or ``z`` itself).
    """

    name: str
    z: Tensor
    weight: Tensor
    channels_last: bool
    activation: nn.Module | None = None
    post: Tensor | None = None
    # Version counters of z and post when they were seen: in-place writes move them.
    z_version: int = 0
    post_version: int = 0
    in_place: bool = False


def is_activation(module: nn.Module) -> bool:
    """A module whose derivative can be taken elementwise."""
    return isinstance(module, ACTIVATIONS) or callable(getattr(module, "fastjac_activation", None))


def activation_derivative(module: nn.Module, z: Tensor) -> Tensor:
    """``φ'(z)`` elementwise, differentiable in ``z`` and in the activation's own parameters."""
    phi: Callable[[Tensor], Tensor] = getattr(module, "fastjac_activation", module.forward)
    # The copy is for in-place activations, which may not write to the input of vjp.
    value, pull = torch.func.vjp(lambda t: phi(t.clone()), z)
    if value.shape != z.shape:
        raise ValueError(
            f"fastjac_activation of {type(module).__name__} maps {tuple(z.shape)} to "
            f"{tuple(value.shape)}: it must be elementwise"
        )
    (slope,) = pull(torch.ones_like(value))
    return slope


def weight_rows(module: nn.Module) -> Tensor:
    """The weight with one row per unit or output channel in dimension 0."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not isinstance(module, TRANSPOSED):
        return weight
    # [C_in, C_out/g, taps…]: output channel (group, j) sees the inputs of its group.
    groups, (c_in, per_group, *taps) = module.groups, weight.shape
    by_group = weight.reshape(groups, c_in // groups, per_group, *taps).transpose(1, 2)
    return by_group.reshape(groups * per_group, c_in // groups, *taps)


class LayerCollector:
    """Context manager: run the model inside it, then ask for :meth:`layers`."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is {type(model).__name__}: layer-wise penalties look at submodules, so it "
                "must be an nn.Module"
            )
        self.model = model
        self._handles: list[Any] = []
        self._weighted: dict[int, list[Layer]] = {}
        self._order: list[Layer] = []
        self._pending: dict[int, list[Layer]] = {}
        self._never_ran: dict[nn.Module, str] = {}
        self._cached = parametrize.cached()

    def __enter__(self) -> LayerCollector:
        # One weight for the model and for the penalty where it is computed (weight norm); spectral
        # norm would make a power iteration for each access.
        self._cached.__enter__()
        for name, module in self.model.named_modules():
            if isinstance(module, LINEAR + CONVOLUTION):
                self._never_ran[module] = name
                self._handles.append(module.register_forward_hook(self._saw_linear))
            elif is_activation(module):
                self._handles += [
                    module.register_forward_pre_hook(self._before_activation, with_kwargs=True),
                    module.register_forward_hook(self._after_activation),
                ]
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._cached.__exit__(*error)
