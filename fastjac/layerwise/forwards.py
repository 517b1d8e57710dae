"""What replaces the ``forward`` of each kind of module while a model is watched.

Each forward does what the one before it did, and reports to the `Observer` that it was given.
Without an observer (in copies of the model) it does what the class says. This file does not know
who watches the model, nor why.

On a CPU the cost of a watched layer is Python, so this code makes few calls: a layer of
784-4×512-10 takes 0.4 ms, and one more call, whose code is no longer in the caches, some 2 µs.
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
    CONVOLUTION,
    LAYER_ACTS,
    LINEAR,
    NORM,
    Layer,
    LayerCall,
    Nonlinearity,
    Norm,
    inherits,
    is_activation,
    is_plain,
    nonlinearity_of,
    norm_of,
)
from fastjac.layerwise.products import Product, Products
from fastjac.layerwise.sequence import Run, modules_only, runs_of
from fastjac.nn import Act
from fastjac.recognise import attributes
from fastjac.torch_private import exporting, unseen


class PassObserver(Protocol):
    """What the forwards report in one pass, which is one run of the model."""

    inside: int
    """While it is positive, no function that is called is looked at: the caller reports it."""

    looks: bool
    """Whether the functions that the model calls are reported too."""

    in_layer: bool
    """Whether the forward of a layer is running, which will report its product."""

    compute: Callable[[Any, Tensor], Tensor | None] | None
    """``compute(module, x)`` returns the output of a plain layer, or None to have the module
    compute it. It is None in an observer that computes no layers."""

    @property
    def sequences(self) -> bool:
        """Whether `run_ran` may be called."""

    def run_ran(self, run: Run, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        """Computes several layers of an ``nn.Sequential`` at once."""

    def layer_ran(
        self, layer: Layer, x: Tensor, z: Tensor, products: list[Product] | None
    ) -> LayerCall | None:
        """A layer has computed z from x.

        ``products`` are the calls of ``F.linear`` and convolutions that it made, one of which tells
        the weight; None if that is the module's. Returns None if the weight is not known.
        """

    def output_replaced(self, layer: Layer, z: Tensor) -> None:
        """A forward hook has replaced the output of the layer's last call by z."""

    def find(self, z: Any, folded: bool = False) -> LayerCall | None:
        """The call that returned this tensor object, if it has not been written to since.

        ``folded`` says whether dimension 0 may be the samples and positions together.
        """

    def fits(self, call: LayerCall) -> bool:
        """Whether dimension 0 of the output is the samples, as far as this is known."""

    def norm_ran(self, call: LayerCall, norm: Norm, y: Tensor) -> None:
        """A norm has computed y from the output of the call."""

    def activate(self, call: LayerCall, phi: Nonlinearity, a: Tensor | None) -> Tensor:
        """Returns ``φ(z)`` of the output z of the call, which is a if that is not None."""


class Observer(Protocol):
    """The object that the forwards of a model report to."""

    def running(self) -> PassObserver | None:
        """The pass that runs now, or None."""

    def model_called(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The model is called: return ``forward(*args, **kwargs)``."""


class Forward:
    """Calls the forward that it replaces."""

    def __init__(
        self, observer: Observer | None, module: Any, previous: Any, name: str = ""
    ) -> None:
        self.observer, self.module, self.previous, self.name = observer, module, previous, name
        self.own = type(module).forward.__get__(module)
        self.prepare()

    def prepare(self) -> None:
        """Called once, at the end of ``__init__``."""

    @property
    def __code__(self) -> Any:  # torch.export reads __code__ and __signature__ of every forward
        return self.own.__func__.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that this one replaces."""
        return (self.previous or self.own)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)

    def below(self, running: PassObserver, *args: Any, **kwargs: Any) -> Any:
        """The forward that this one replaces, whose functions are its own.

        That may be one of another watch, which must see the call too.
        """
        running.inside += 1
        try:
            return self.plain(*args, **kwargs)
        finally:
            running.inside -= 1

    def remove(self) -> None:
        self.observer = None
        above, below = None, vars(self.module).get("forward")
        while below is not self and isinstance(below, Forward):  # a later watch replaced it
            above, below = below, below.previous
        if below is not self:
            return  # a forward that is not ours replaced this one, which now only passes calls on
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
    """Whether the user has set a forward on the instance, or a part of one."""
    if "_conv_forward" in vars(module):
        return True
    forward = vars(module).get("forward")
    while isinstance(forward, Forward):
        forward = forward.previous
    return forward is not None


class ModelForward(Forward):
    """The forward of the whole model, which may itself be a layer with a forward of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        # An exported program would contain the penalty's detached tensors, so export sees the
        # plain model.
        if observer is None or exporting():
            return self.plain(*args, **kwargs)
        return observer.model_called(self.plain, args, kwargs)


class LayerForward(Forward):
    """The forward of a Linear or convolution module."""

    def prepare(self) -> None:
        # A forward that the user has set on the instance may do anything.
        plain = is_plain(self.module) and not patched(self.module)
        self.layer = Layer(self.module, self.name, plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        running = None if observer is None else observer.running()
        forward = self.previous or self.own
        if running is None:
            return forward(*args, **kwargs)
        layer = self.layer
        z, products = None, None
        running.in_layer = True
        try:
            computes = running.compute is not None and layer.plain and self.previous is None
            if computes and len(args) == 1:
                z = running.compute(self.module, args[0])  # type: ignore[misc]
            if z is None and layer.plain:
                z = forward(*args, **kwargs)
            elif z is None:
                z, products = self.computed(forward, *args, **kwargs)
        finally:
            running.in_layer = False
        if isinstance(z, Tensor):
            x = args[0] if args else first(args, kwargs)
            if running.looks and not torch.compiler.is_compiling():
                with unseen():  # reading the version of a tensor would be a call that `Calls` sees
                    running.layer_ran(layer, x, z, products)
            else:
                running.layer_ran(layer, x, z, products)
        return z

    def computed(self, forward: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The output of the layer, and the products that it made; None if it is a plain layer."""
        if self.layer.plain:
            return forward(*args, **kwargs), None
        products: list[Product] = []
        with Products(products):
            z = forward(*args, **kwargs)
        return z, products

    def hook(self, module: Any, args: Any, z: Any) -> None:
        """The last forward hook of a tensor parallel layer: z is the output that the model gets."""
        running = None if self.observer is None else self.observer.running()
        if running is not None and isinstance(z, Tensor):
            running.output_replaced(self.layer, z)


class LayerActForward(LayerForward):
    """The forward of a `LinearAct` or ``ConvAct``, which is a layer and its activation."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        running = None if observer is None else observer.running()
        if running is None:
            return self.plain(*args, **kwargs)
        x = first(args, kwargs)
        a = None if self.previous is None else self.below(running, *args, **kwargs)
        module = self.module
        if is_dtensor(module._parameters.get("weight")):
            raise RuntimeError(
                f"layer {self.name}: its weight is a DTensor (tensor parallel): use an nn.Linear "
                f"and an activation in place of {type(module).__name__}"
            )
        phi = Nonlinearity(module.act.fn, module.act.impl, module.act.params)
        running.in_layer = True
        try:
            z, products = self.computed(module.pre_activation, x)
        finally:
            running.in_layer = False
        call = running.layer_ran(self.layer, x, z, products)
        if call is None:
            return phi.value(z) if a is None else a
        return running.activate(call, phi, a)


class NormForward(Forward):
    """The forward of a BatchNorm, LayerNorm or GroupNorm module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        running = None if observer is None else observer.running()
        call = None if running is None else running.find(first(args, kwargs), True)
        if running is None or call is None or call.norm is not None:
            return self.plain(*args, **kwargs)
        norm = norm_of(self.module)
        if not norm.fits(call):
            return self.plain(*args, **kwargs)
        running.inside += 1
        try:
            y = self.plain(*args, **kwargs)
        finally:
            running.inside -= 1
        running.norm_ran(call, norm, y)
        return y


class ActivationForward(Forward):
    """The forward of an activation module."""

    def prepare(self) -> None:
        self.phi = nonlinearity_of(self.module, self.plain)
        # The attributes that decide which activation it is; a schedule may change them.
        row = None if self.phi.fn is None else get(self.phi.fn)
        if self.phi.writes is not None:  # recognised by what it computed with its attributes
            self.chosen_by = attributes(self.module) or []
            return
        names = () if row is None else (*row.params, *row.torch_kwargs)
        self.chosen_by = [(name, getattr(self.module, name)) for name in names]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        running = None if observer is None else observer.running()
        call = None
        if running is not None:
            call = running.find(args[0] if args else first(args, kwargs))
        if running is None or call is None or (call.parent is not None and not running.fits(call)):
            return self.plain(*args, **kwargs)
        phi, a = self.current(), None
        # A module that is not of torch computes the value itself: it may do more than that.
        if self.previous is not None or phi.writes is False:
            a = self.below(running, *args, **kwargs)
        return running.activate(call, phi, a)

    def current(self) -> Nonlinearity:
        """The activation that the attributes of the module choose now."""
        for name, value in self.chosen_by:
            if getattr(self.module, name) != value:
                self.prepare()
                break
        return self.phi


class SequentialForward(Forward):
    """The forward of an ``nn.Sequential``, which computes several small layers at once."""

    def prepare(self) -> None:
        self.modules: list[Any] | None = None
        self.runs: dict[int, Run] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        running = None if observer is None else observer.running()
        if running is None or not running.sequences or len(args) != 1 or kwargs:
            return self.plain(*args, **kwargs)
        x = args[0]
        modules = list(self.module._modules.values())
        if modules != self.modules:
            self.modules = modules
            self.runs = runs_of(modules, observer, (LayerForward, ActivationForward))
        if self.previous is not None or not self.runs or not modules_only(running.looks):
            return self.plain(x)
        place = 0
        while place < len(modules):
            run = self.runs.get(place)
            given = None if run is None or not isinstance(x, Tensor) else run.parameters(x)
            if run is None or given is None:
                if run is not None and run.stale:
                    self.modules = None
                x = modules[place](x)
                place += 1
            else:
                x = running.run_ran(run, x, *given)
                place += 2 * len(run.pairs)
        return x


class HeldFunction:
    """Replaces a function attribute such as ``nn.TransformerEncoderLayer.activation``."""

    def __init__(self, observer: Observer | None, function: Callable[..., Any], fn: str) -> None:
        self.observer, self.function, self.fn = observer, function, fn
        self.phi = Nonlinearity(fn, run=function)

    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        running = None if self.observer is None else self.observer.running()
        call = None if running is None else running.find(z)
        if running is None or call is None or args or kwargs:
            return self.function(z, *args, **kwargs)
        return running.activate(call, self.phi, None)

    def __reduce__(self) -> Any:
        return type(self), (None, self.function, self.fn)


def forward_of(module: nn.Module) -> type[Forward] | None:
    """The class of the forward that replaces that of a module; None if nothing replaces it."""
    if isinstance(module, LAYER_ACTS) and inherits(module, LAYER_ACTS) and not patched(module):
        return LayerActForward
    if isinstance(module, LINEAR + CONVOLUTION):
        return LayerForward
    if type(module) in NORM and not patched(module):
        over_several = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1
        return None if over_several else NormForward
    if type(module) is nn.Sequential and not patched(module):
        return SequentialForward
    own = hasattr(module, "fastjac_activation")
    if is_activation(module) and type(module) is not Act and (own or not patched(module)):
        return ActivationForward  # an Act calls the observers itself
    return None
