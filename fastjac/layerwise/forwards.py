"""What stands in the ``forward`` of each kind of module while a model is watched.

A forward does what stood there before, and reports to the `Observer` that it was given. Without an
observer (in copies of the model) it does what the class says. This file knows neither who watches
nor why.

On a CPU Python is what a watched layer costs, so this is written in few calls: a layer of
784-4×512-10 takes 0.4 ms, and one more call, its code evicted from the caches, some 2 µs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastjac.activations import get
from fastjac.distributed import is_dtensor
from fastjac.layerwise.layers import (
    BATCH_NORM,
    CONVOLUTION,
    LINEAR,
    NORM,
    Layer,
    LayerCall,
    Nonlinearity,
    fused_activation,
    is_activation,
    is_plain,
)
from fastjac.nn import Act, ConvAct1d, ConvAct2d, ConvAct3d, LinearAct

LAYER_ACTS = (LinearAct, ConvAct1d, ConvAct2d, ConvAct3d)


class PassObserver(Protocol):
    """What the forwards report in one pass, that is one run of the model."""

    compute: Callable[[Any, Tensor], Tensor | None] | None
    """Called as ``compute(module, x)`` for the output of a plain layer: None for the module's own.
    Itself None in an observer that computes no layers."""

    def layer_ran(self, layer: Layer, x: Tensor, z: Tensor) -> LayerCall:
        """A layer has computed z of x."""

    def output_replaced(self, layer: Layer, z: Tensor) -> None:
        """A forward hook has replaced the output of the layer's last call by z."""

    def find(self, z: Any) -> LayerCall | None:
        """The call of a layer that returned this very tensor, if nobody has written to it since."""

    def norm_ran(self, call: LayerCall, norm: nn.Module, y: Tensor) -> None:
        """A norm has computed y of the output of the call."""

    def nonlinearity(self, fn: str, impl: str, params: dict[str, Any]) -> Nonlinearity:
        """A row of the activation table; the same object for the same arguments."""

    def activate(self, call: LayerCall, phi: Nonlinearity, a: Tensor | None) -> Tensor:
        """Compute ``φ(z)`` of the output z of the call; a: its value, if it is computed already."""


class Observer(Protocol):
    """Whom the forwards of a model report to."""

    def running(self) -> PassObserver | None:
        """The pass that is on; None if nobody wants to know of it."""

    def model_called(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The model is called: return ``forward(*args, **kwargs)``."""


class Forward:
    """Does what stood there before."""

    def __init__(
        self, observer: Observer | None, module: Any, previous: Any, name: str = ""
    ) -> None:
        self.observer, self.module, self.previous, self.name = observer, module, previous, name
        self.own = type(module).forward.__get__(module)

    @property
    def __code__(self) -> Any:  # torch.export reads both of any forward
        return self.own.__func__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """What stood there before."""
        return (self.previous or self.own)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)

    def remove(self) -> None:
        self.observer = None
        above, below = None, vars(self.module).get("forward")
        while below is not self and isinstance(below, Forward):  # a later watch stands before it
            above, below = below, below.previous
        if below is not self:
            return  # somebody else's forward was put over it: this one passes on
        if above is not None:
            above.previous = self.previous
        elif self.previous is None:
            del vars(self.module)["forward"]
        else:
            vars(self.module)["forward"] = self.previous

    def __reduce__(self) -> Any:
        return Forward, (None, self.module, self.previous)


def first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def patched(module: nn.Module) -> bool:
    """Whether the instance has a forward that is neither its class's nor ours."""
    forward = vars(module).get("forward")
    while isinstance(forward, Forward):
        forward = forward.previous
    return forward is not None


class ModelForward(Forward):
    """Of the whole model. It stands before the other forward that the model itself may have."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        # An exported program would hold the penalty's detached tensors: it gets the plain model.
        if observer is None or torch.compiler.is_exporting():
            return self.plain(*args, **kwargs)
        return observer.model_called(self.plain, args, kwargs)


class LayerForward(Forward):
    """Of a Linear or convolution module."""

    def __init__(
        self, observer: Observer | None, module: Any, previous: Any, name: str = ""
    ) -> None:
        super().__init__(observer, module, previous, name)
        # A forward that somebody has put into the instance may do anything.
        self.layer = Layer(module, name, plain=is_plain(module) and not patched(module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        running = None if observer is None else observer.running()
        z = None
        if (
            running is not None
            and running.compute is not None
            and self.layer.plain
            and self.previous is None
            and len(args) == 1
        ):
            z = running.compute(self.module, args[0])
        if z is None:
            z = (self.previous or self.own)(*args, **kwargs)
        if running is not None and isinstance(z, Tensor):
            running.layer_ran(self.layer, args[0] if args else first(args, kwargs), z)
        return z

    def hook(self, module: Any, args: Any, z: Any) -> None:
        """A forward hook, the last: ``z`` is what the model gets of a tensor parallel layer."""
        running = None if self.observer is None else self.observer.running()
        if running is not None and isinstance(z, Tensor):
            running.output_replaced(self.layer, z)


class LayerActForward(LayerForward):
    """Of a `LinearAct` or ``ConvAct``, which is a layer and its activation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        running = None if observer is None else observer.running()
        if running is None:
            return self.plain(*args, **kwargs)
        x = first(args, kwargs)
        # Another watch's forward that stands behind this one must see the call too.
        a = None if self.previous is None else self.previous(*args, **kwargs)
        module = self.module
        if is_dtensor(module._parameters.get("weight")):
            raise RuntimeError(
                f"layer {self.name}: its weight is a DTensor (tensor parallel): use an nn.Linear "
                f"and an activation in place of {type(module).__name__}"
            )
        phi = running.nonlinearity(module.act.fn, module.act.impl, module.act.params)
        call = running.layer_ran(self.layer, x, module.pre_activation(x))
        return running.activate(call, phi, a)


class NormForward(Forward):
    """Of a BatchNorm or LayerNorm module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        running = None if observer is None else observer.running()
        z = first(args, kwargs)
        call = None if running is None else running.find(z)
        y = self.plain(*args, **kwargs)
        if running is None or call is None or call.norm is not None:
            return y
        if isinstance(self.module, BATCH_NORM) or call.dim == z.dim() - 1:
            running.norm_ran(call, self.module, y)
        return y


class ActivationForward(Forward):
    """Of an activation module."""

    def __init__(
        self, observer: Observer | None, module: Any, previous: Any, name: str = ""
    ) -> None:
        super().__init__(observer, module, previous, name)
        self._choose()

    def _choose(self) -> None:
        module, act = self.module, fused_activation(self.module)
        # Attributes that decide which activation it is, and that a schedule may change.
        self.chosen_by: list[tuple[str, Any]] = []
        if act is None:
            self.phi = Nonlinearity(self.plain, module)
            return
        self.phi = Nonlinearity(self.plain, module, act.fn, act.impl, act.params)
        if type(module) is not Act:
            row = get(act.fn)
            names = (*row.params, *row.torch_kwargs)
            self.chosen_by = [(name, getattr(module, name)) for name in names]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        running = None if observer is None else observer.running()
        call = None if running is None else running.find(first(args, kwargs))
        if running is None or call is None:
            return self.plain(*args, **kwargs)
        # Another watch's forward that stands behind this one must see z too.
        a = None if self.previous is None else self.previous(*args, **kwargs)
        module = self.module
        if any(getattr(module, name) != value for name, value in self.chosen_by):
            self._choose()
        return running.activate(call, self.phi, a)


class HeldFunction:
    """In place of a function attribute (``nn.TransformerEncoderLayer.activation``)."""

    def __init__(self, observer: Observer | None, function: Callable[..., Any], fn: str) -> None:
        self.observer, self.function, self.fn = observer, function, fn
        self.phi = Nonlinearity(function, None, fn)

    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        running = None if self.observer is None else self.observer.running()
        call = None if running is None else running.find(z)
        if running is None or call is None or args or kwargs:
            return self.function(z, *args, **kwargs)
        return running.activate(call, self.phi, None)

    def __reduce__(self) -> Any:
        return type(self), (None, self.function, self.fn)


def forward_of(module: nn.Module) -> type[Forward] | None:
    """The kind of forward that is put into a module; None for a module that is left as it is."""
    if isinstance(module, LAYER_ACTS):
        return LayerActForward
    if isinstance(module, LINEAR + CONVOLUTION):
        return LayerForward
    if type(module) in NORM and not (
        isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1
    ):
        return NormForward
    own = hasattr(module, "fastjac_activation")
    if is_activation(module) and type(module) is not Act and (own or not patched(module)):
        return ActivationForward  # Act calls the observers itself
    return None
