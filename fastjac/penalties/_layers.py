"""Finds the layers of a model while it runs: (pre-activation, weight, activation).

Hooks on the Linear and convolution modules remember each output tensor object; a pre-hook on the
activation modules looks its input up among them. The pair is a hidden layer. Tensor identity is
what counts, so a layer is found however the model's ``forward`` is written, and a tensor that went
through anything else in between (a normalisation, a view, an addition) is not taken for a
pre-activation. The hooks are gone when the model returns or raises.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastjac.nn import Act, activation_of

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


@dataclass(frozen=True)
class Layer:
    """One call of a Linear or convolution module, alone or with the activation that took it."""

    name: str
    z: Tensor
    weight: Tensor  # units or output channels in dimension 0
    channels_last: bool
    activation: nn.Module | None = None  # None: the output layer
    post: Tensor | None = None  # output of the activation


def is_activation(module: nn.Module) -> bool:
    """A module whose derivative can be taken elementwise."""
    return (
        activation_of(module) is not None
        or isinstance(module, (Act, *ACTIVATIONS))
        or callable(getattr(module, "fastjac_activation", None))
    )


def activation_derivative(module: nn.Module, z: Tensor) -> Tensor:
    """``φ'(z)`` elementwise, differentiable in ``z`` and in the activation's own parameters.

    By the fused op where the activation table has the module, unless it states its own φ.
    """
    own = getattr(module, "fastjac_activation", None)
    fused = activation_of(module) if own is None else None
    if fused is not None:
        return fused.derivative(z)
    phi: Callable[[Tensor], Tensor] = own or module.forward
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

    def __init__(self, model: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is {type(model).__name__}: layer-wise penalties look at submodules, so it "
                "must be an nn.Module"
            )
        if hasattr(model, "_orig_mod"):
            raise TypeError(
                "model is a torch.compile'd module, whose submodules do not run: pass the module "
                "before compiling, or compile its blocks in place (block.compile())"
            )
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "inference mode is active: its tensors keep no track of in-place changes; use "
                "torch.no_grad() to get the value alone"
            )
        self.left_out: list[tuple[str, str]] = []
        self._names = {module: name or "(model)" for name, module in model.named_modules()}
        self._idle: dict[nn.Module, None] = {
            m: None for m in self._names if isinstance(m, LINEAR + CONVOLUTION)
        }
        self._calls: dict[int, Layer] = {}  # by the id of z, which the Layer keeps alive
        self._pairs: list[Layer] = []
        self._versions: dict[int, int] = {}  # of z and post when first seen, by id
        self._open: list[Layer | None] = []  # activations that are running, outermost first
        self._paired: set[int] = set()
        self._undo = ExitStack()
        self._grad = torch.is_grad_enabled()
        self._thread = threading.get_ident()  # hooks fire for every thread that runs the model

    def __enter__(self) -> LayerCollector:
        with self._undo as undo:
            # One weight for the model and the penalty where a parametrization computes it: spectral
            # norm would make a power iteration for each access.
            undo.enter_context(parametrize.cached())
            for module in self._names:
                if module in self._idle:
                    handles = [module.register_forward_hook(self._saw_linear)]
                elif is_activation(module):
                    handles = [
                        module.register_forward_pre_hook(self._enter_activation, with_kwargs=True),
                        module.register_forward_hook(self._leave_activation),
                    ]
                else:
                    handles = []
                for handle in handles:
                    undo.callback(handle.remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._undo.close()

    def _saw_linear(self, module: nn.Module, args: Any, z: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        self._idle.pop(module, None)
        last = isinstance(module, LINEAR)
        self._calls[id(z)] = Layer(self._names[module], z, weight_rows(module), last)
        self._versions[id(z)] = z._version

    def _enter_activation(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        z = args[0] if args else next(iter(kwargs.values()), None)
        call = None if self._open else self._calls.get(id(z))
        if call is not None and self._changed(call.z):
            call = None  # "out += skip" in between: no longer the layer's own output
        if call is None:
            self._open.append(None)
            return None
        if self._grad and call.weight.requires_grad and not call.z.requires_grad:
            raise RuntimeError(
                f"layer {call.name}: its pre-activation was computed with gradients off (a "
                "reentrant checkpoint, or torch.no_grad() in forward), so the penalty would lose "
                "part of its gradient; use checkpoint(..., use_reentrant=False)"
            )
        self._open.append(replace(call, activation=module))
        if not getattr(module, "inplace", False):
            return None
        # z is needed as it is now: the activation writes over a copy.
        if args:
            return (call.z.clone(), *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): call.z.clone()}

    def _leave_activation(self, module: nn.Module, args: Any, post: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        pair = self._open.pop()
        if pair is not None:
            self._paired.add(id(pair.z))
            self._pairs.append(replace(pair, post=post))
            # Not over the version of z: a module that wrote to z and returned it is found out.
            self._versions.setdefault(id(post), post._version)

    def _changed(self, t: Tensor) -> bool:
        return t._version != self._versions[id(t)]

    def layers(self, output: Tensor, batch: int, *, include_output: bool) -> list[Layer]:
        """The layers to count in the order they ran; fills ``left_out`` with the others."""
        found = list(self._pairs)
        for key, call in self._calls.items():
            if key in self._paired:
                continue
            if call.z is not output:
                why = "its output, unchanged, was the input of no activation module"
            elif include_output:
                found.append(call)
                continue
            else:
                why = "output layer (include_output=False)"
            self.left_out.append((call.name, why))
        self.left_out += [(self._names[m], "was not called") for m in self._idle]
        if include_output and not any(output is t for f in found for t in (f.z, f.post)):
            raise RuntimeError(
                "include_output=True, and the output of the model is the output of no Linear or "
                "convolution module and of no activation module after one"
            )
        if not found:
            seen = "; ".join(f"{name}: {why}" for name, why in self.left_out) or "none at all"
            raise RuntimeError(
                "model has no layer to penalise: a Linear or convolution module whose output goes "
                "straight into an activation module (a torch.nn one, or any module with a callable "
                f"attribute fastjac_activation). Linear and convolution modules seen: {seen}"
            )
        for layer in found:
            dims = layer.z.dim()
            if (
                layer.z.shape[0] != batch
                or dims < 2
                or not (layer.channels_last or dims == layer.weight.dim())
            ):
                raise RuntimeError(
                    f"layer {layer.name}: its output has shape {tuple(layer.z.shape)} and x has "
                    f"batch size {batch}: dimension 0 must be the samples all through the model"
                )
        return found

    def check_unchanged(self, layer: Layer, t: Tensor) -> Tensor:
        """``t``, which an in-place write since it was seen would have made another tensor."""
        if self._changed(t):
            raise RuntimeError(
                f"layer {layer.name}: its output or that of its activation was modified in place "
                "after it was computed; use the out-of-place operation"
            )
        return t
