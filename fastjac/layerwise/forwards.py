"""What stands in the ``forward`` of each kind of module while a model is watched.

Without a watch (in copies of the model) it does what the class says. Python is what a watched layer
costs on a CPU, so this is written in few calls: a layer of 784-4×512-10 takes 0.4 ms, and a call in
between, its code evicted from the caches, some 2 µs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastjac.activations import get
from fastjac.distributed import is_dtensor, static_graph
from fastjac.input_jacobian.chain.links import Unsupported
from fastjac.input_jacobian.chain.tape import Tracked
from fastjac.layerwise.layers import (
    BATCH_NORM,
    CONVOLUTION,
    LINEAR,
    NORM,
    Call,
    Phi,
    batch_normed,
    fused_activation,
    is_activation,
    plain_layer,
)
from fastjac.layerwise.versions import version_of
from fastjac.nn import Act, ConvAct1d, ConvAct2d, ConvAct3d, LinearAct

if TYPE_CHECKING:
    from fastjac.layerwise.watch import Pass, Watch

LAYER_ACTS = (LinearAct, ConvAct1d, ConvAct2d, ConvAct3d)


def role_of(module: nn.Module) -> type[Forward] | None:
    if isinstance(module, LAYER_ACTS):
        return LayerAct
    if isinstance(module, LINEAR + CONVOLUTION):
        return Layer
    if type(module) in NORM and not (
        isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1
    ):
        return Norm
    own = hasattr(module, "fastjac_activation")
    if is_activation(module) and type(module) is not Act and (own or not patched(module)):
        return Activation  # Act calls the observers itself
    return None


def patched(module: nn.Module) -> bool:
    """Whether the instance has a forward that is neither its class's nor ours."""
    forward = vars(module).get("forward")
    while isinstance(forward, Forward):
        forward = forward.previous
    return forward is not None


class Forward:
    """Passes on to what stood there before."""

    def __init__(self, watch: Watch | None, module: Any, previous: Any) -> None:
        self.watch, self.module, self.previous = watch, module, previous
        self.own = type(module).forward.__get__(module)
        self.name = ""

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
        self.watch = None
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


class Root(Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # An exported program would hold the penalty's detached tensors: it gets the plain model.
        watch = None if torch.compiler.is_exporting() else self.watch
        if watch is not None and watch.called:
            watch = None
        if watch is not None and any(type(t) is Tracked for t in args):
            raise Unsupported("a layer-wise penalty is attached to the model")
        nested = watch is not None and watch.current is not None and watch.running() is not None
        owner = None if watch is None or nested else watch.owner()
        wanted = "no" if owner is None else owner.wanted()
        if watch is None or wanted == "no":
            return self.plain(*args, **kwargs)
        watch.recompute = wanted == "yes"
        if wanted == "later":
            output = self.plain(*args, **kwargs)
            watch.passes = [(None, output)]
            return output
        watch.forget_stale()
        watch.ddp = static_graph()
        try:
            seen = watch.begin()
            output = self.plain(*args, **kwargs)
        finally:
            watch.end()
        watch.passes.append((seen, output))
        if not seen.compiling:  # what changes from step to step would be compiled again
            watch.whole = seen.whole
        return output


class Layer(Forward):
    def __init__(self, watch: Watch | None, module: Any, previous: Any) -> None:
        super().__init__(watch, module, previous)
        self.linear = isinstance(module, LINEAR)
        # A forward that somebody has put into the instance may do anything.
        self.plain_layer = plain_layer(module) and not patched(module)
        self.memo: dict[Any, Any] = {}  # the penalty's, by activation
        self.hooked = False  # whether `hook` is registered

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        running = None if watch is None else watch.running()
        z = None
        if (
            running is not None
            and running.computes
            and self.plain_layer
            and self.previous is None
            and len(args) == 1
        ):
            z = running.watch.owner().compute(self.module, args[0])
        if z is None:
            z = (self.previous or self.own)(*args, **kwargs)
        if running is not None and isinstance(z, Tensor):
            self.note(running, args[0] if args else first(args, kwargs), z)
        return z

    def note(self, running: Pass, x: Tensor, z: Tensor) -> Call:
        module = self.module
        weight = module._parameters.get("weight")
        if weight is None:  # parametrised, or swapped by functional_call
            weight = module.weight
        if not self.hooked and is_dtensor(weight):
            raise RuntimeError(
                f"layer {self.name}: its weight became a DTensor (tensor parallel) after the "
                "penalty was attached: attach the penalty after parallelize_module"
            )
        if running.compiling:
            call = Call(self, x, z, weight, version_of(z, True), -1, -1)
        else:
            call = Call(self, x, z, weight, z._version, weight._version, x._version)
        running.calls.append(call)
        return call

    def hook(self, module: Any, args: Any, z: Any) -> None:
        """A forward hook, the last: ``z`` is what the model gets of a tensor parallel layer."""
        running = None if self.watch is None else self.watch.running()
        calls = [] if running is None else [c for c in running.calls if c.layer is self]
        if calls and isinstance(z, Tensor) and not calls[-1].used:
            calls[-1].z, calls[-1].version = z, z._version


class LayerAct(Layer):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        running = None if watch is None else watch.running()
        if running is None:
            return self.plain(*args, **kwargs)
        x = first(args, kwargs)
        # Another watch's forward that stands behind this one must see the call too.
        a = None if self.previous is None else self.previous(*args, **kwargs)
        if is_dtensor(self.module._parameters.get("weight")):
            raise RuntimeError(
                f"layer {self.name}: its weight is a DTensor (tensor parallel): use an nn.Linear "
                f"and an activation in place of {type(self.module).__name__}"
            )
        act = self.module.act
        phi = running.watch.phi(act.fn, act.impl, act.params)
        return running.activate(self.note(running, x, self.module.pre_activation(x)), phi, a)


class Norm(Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        running = None if watch is None else watch.running()
        z = first(args, kwargs)
        call = None if running is None else running.find(z)
        y = self.plain(*args, **kwargs)
        if running is None or call is None or call.norm is not None:
            return y
        if isinstance(self.module, BATCH_NORM) or call.dim == z.dim() - 1:
            call.used = True
            version = version_of(y, running.compiling)
            normed = replace(call, z=y, version=version, used=False)
            normed.norm, normed.before_norm = self.module, z
            if not running.compiling and not running.transformed and isinstance(y, Tensor):
                normed.normed = batch_normed(y, self.module)
            running.calls.append(normed)
            if not running.compiling:
                call.release()
        return y


class Activation(Forward):
    def __init__(self, watch: Watch | None, module: Any, previous: Any) -> None:
        super().__init__(watch, module, previous)
        self._choose()

    def _choose(self) -> None:
        module, act = self.module, fused_activation(self.module)
        # Attributes that decide which activation it is, and that a schedule may change.
        self.chosen_by: list[tuple[str, Any]] = []
        if act is None:
            self.phi = Phi(self.plain, module)
            return
        self.phi = Phi(self.plain, module, act.fn, act.impl, act.params)
        if type(module) is not Act:
            row = get(act.fn)
            names = (*row.params, *row.torch_kwargs)
            self.chosen_by = [(name, getattr(module, name)) for name in names]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        running = None if watch is None else watch.running()
        call = None if running is None else running.find(first(args, kwargs))
        if running is None or call is None:
            return self.plain(*args, **kwargs)
        # Another watch's forward that stands behind this one must see z too.
        a = None if self.previous is None else self.previous(*args, **kwargs)
        module = self.module
        if any(getattr(module, name) != value for name, value in self.chosen_by):
            self._choose()
        return running.activate(call, self.phi, a)


class Held:
    """In place of a function attribute (``nn.TransformerEncoderLayer.activation``)."""

    def __init__(self, watch: Watch | None, function: Callable[..., Any], fn: str) -> None:
        self.watch, self.function, self.fn = watch, function, fn
        self.phi = Phi(function, None, fn)

    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        running = None if self.watch is None else self.watch.running()
        call = None if running is None else running.find(z)
        if running is None or call is None or args or kwargs:
            return self.function(z, *args, **kwargs)
        return running.activate(call, self.phi, None)

    def __reduce__(self) -> Any:
        return type(self), (None, self.function, self.fn)
