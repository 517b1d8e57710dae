"""Watches a model run and finds its layers: (Linear or convolution, perhaps a norm, activation).

While a model is watched, the ``forward`` of these modules (an attribute of the instance, gone when
the watch ends) notes the tensor object it returned; an activation that is called with that very
object belongs to it. Tensor identity is what counts, so a layer is found however the model's
``forward`` is written, and a tensor that went through anything else in between (a view, an
addition) is not taken for a pre-activation. The activation is then computed by the penalty, which
gets its statistic from the same pass.

Copies of a watched model (``deepcopy``, pickle) are not watched: their ``forward`` does what the
class says.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.comptime import comptime
from torch.nn.utils import parametrize

from fastjac.functional import OBSERVERS
from fastjac.nn import Act, ConvAct1d, ConvAct2d, ConvAct3d, LinearAct, held_functions
from fastjac.ops import act
from fastjac.ops.act_stats import transformed
from fastjac.penalties._layers import (
    BATCH_NORM,
    CONVOLUTION,
    LINEAR,
    NORM,
    Call,
    Phi,
    batch_statistics,
    conv_options,
    fused_activation,
    is_activation,
    plain_layer,
)

LAYER_ACTS = (LinearAct, ConvAct1d, ConvAct2d, ConvAct3d)


class Pass:
    """What one run of the model showed."""

    def __init__(self, watch: Watch, *, dry: bool = False) -> None:
        self.watch = watch
        self.dry = dry  # a recomputation by checkpoint: the same operations, nothing is kept
        self.compiling = torch.compiler.is_compiling()
        self.grad = torch.is_grad_enabled()
        self.transformed = transformed()
        self.calls: list[Call] = []
        self.terms: list[Any] = []
        self.later: list[tuple[Call, Phi]] = []
        self.whole: list[_Layer] = []  # layers that the penalty took whole
        self.taps: dict[_Layer, tuple[Tensor, Tensor]] = {}  # layer: view of its weight, its r
        self.inside = 0  # of a module that is itself an activation
        self.thread = 0 if self.compiling else get_ident()
        self.task = -1

    def find(self, z: Tensor) -> Call | None:
        """The call whose output this is, unchanged: ``out += skip`` makes another tensor of it."""
        if not self.inside:
            for call in reversed(self.calls):
                if call.z is z:
                    if self.compiling:
                        refuse_written(z, call.name)
                        return call
                    return call if call.version == z._version else None
        return None

    def activate(self, call: Call, phi: Phi, a: Tensor | None) -> Tensor:
        """``φ(z)`` (``a``, if somebody has computed it), with the penalty's term noted."""
        if self.grad and not call.z.requires_grad and call.weight.requires_grad:
            raise RuntimeError(
                f"layer {call.name}: its pre-activation was computed with gradients off (a "
                "reentrant checkpoint, or torch.no_grad() in forward), so the penalty would lose "
                "part of its gradient; use checkpoint(..., use_reentrant=False)"
            )
        call.used = True
        watch = self.watch
        postponed = not watch.attached and saved_tensor_hooks()
        if a is None and (phi.fn is None or postponed):
            self.inside += 1
            try:
                # In-place activations write over a copy: z is needed as it is now.
                in_place = getattr(phi.module, "inplace", False)
                a = phi.run(call.z.clone() if in_place else call.z)
            finally:
                self.inside -= 1
            check_unchanged(call)  # a module that wrote to z would have its slope taken elsewhere
        if postponed:
            # A checkpoint's recomputation comes when nobody watches any more, and must do what
            # the forward did: the term is computed after the model has run.
            self.later.append((call, phi))
            assert a is not None
            return a
        return watch.owner().on_layer(self, call, phi, a)


def check_unchanged(call: Call) -> None:
    # A call that was compiled (version -1) has no in-place writes left.
    if call.version >= 0 and not torch.compiler.is_compiling() and call.z._version != call.version:
        raise RuntimeError(
            f"layer {call.name}: its output or that of its activation was modified in place "
            "after it was computed; use the out-of-place operation"
        )


def version_of(z: Tensor, compiling: bool) -> int:
    """How often z was written to; -1 while compiling, where it is kept with the fake tensor."""
    if not compiling:
        return z._version

    @comptime
    def keep(context: Any) -> None:
        fake = context.get_local("z").as_fake()
        fake._fastjac_version = fake._version

    return -1


def refuse_written(z: Tensor, name: str) -> None:
    """While compiling, a tensor that was written to in place is still the same object."""

    @comptime
    def check(context: Any) -> None:
        fake = context.get_local("z").as_fake()
        if fake._version != fake._fastjac_version:
            raise RuntimeError(
                f"layer {context.get_local('name').as_python_constant()}: its output was modified "
                "in place before the activation; under torch.compile use the out-of-place operation"
            )


def saved_tensor_hooks() -> bool:
    """Whether a checkpoint (or another saver of tensors) is active."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class Watch:
    """Puts the watching ``forward``s into a model and takes them out again."""

    def __init__(self, model: Any, owner: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is {type(model).__name__}: layer-wise penalties look at submodules, so it "
                "must be an nn.Module"
            )
        self.model = model
        # Weak: a penalty that is thrown away must not live on in the model it was attached to.
        self.owner: Callable[[], Any] = weakref.ref(owner)
        self.attached = False
        self.names = {module: name or "(model)" for name, module in model.named_modules()}
        self.linear = [m for m in self.names if isinstance(m, LINEAR + CONVOLUTION)]
        self.passes: list[tuple[Pass | None, Any]] = []  # with the output of the model
        self.current: Pass | None = None
        self.again: Pass | None = None  # of a recomputation by checkpoint
        self.whole: list[_Layer] = []  # the layers that the last pass took whole
        self.taps: dict[_Layer, tuple[Tensor, Tensor]] = {}  # of the last pass
        self.recompute = False
        self.parametrized = any(map(parametrize.is_parametrized, self.names))
        self.cache: Any = None
        self.phis: dict[Any, Phi] = {}
        self.undo: list[Callable[[], None]] = []

    def install(self, *, attach: bool) -> None:
        """``attach``: each call of the model that is wanted is a pass, kept in ``passes``."""
        self.attached = attach
        for module in self.names:
            role = role_of(module)
            if role is not None:
                self._override(role, module)
            for name, value, fn in held_functions(module):
                held = _Held(self, value, fn)
                setattr(module, name, held)
                self.undo.append(functools.partial(setattr, module, name, value))
        if attach:
            self._override(_Root, self.model)
        OBSERVERS.append(self.observe)
        self.undo.append(lambda: OBSERVERS.remove(self.observe))

    def _override(self, kind: type[_Forward], module: nn.Module) -> None:
        new = kind(self, module, vars(module).get("forward"))
        new.name = self.names.get(module, "")
        vars(module)["forward"] = new
        self.undo.append(new.remove)

    def remove(self) -> None:
        while self.undo:
            self.undo.pop()()

    def forget_stale(self) -> None:
        """Drop passes from before a step of the optimiser: autograd could not use them any more."""
        if self.passes and not torch.compiler.is_compiling():
            seen = self.passes[0][0]
            if seen is None or any(c.weight._version != c.weight_version for c in seen.calls):
                self.passes.clear()

    def begin(self) -> Pass:
        """A pass: run the model, then `end` it, whatever happened."""
        seen = Pass(self)
        if not seen.compiling and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "inference mode is active: its tensors keep no track of in-place changes; use "
                "torch.no_grad() to get the value alone"
            )
        if self.parametrized:
            # One weight for the model and the penalty: spectral norm would make a power iteration
            # for each access.
            self.cache = parametrize.cached()
            self.cache.__enter__()
        self.current = seen
        if self.attached:
            self.owner().before_pass(seen)
        return seen

    def end(self) -> None:
        self.current = None
        if self.cache is not None:
            self.cache.__exit__(None, None, None)
            self.cache = None

    def running(self) -> Pass | None:
        """The pass that is on, or the recomputation of one."""
        current = self.current
        if current is not None:
            return current if current.compiling or current.thread == get_ident() else None
        if not self.recompute or torch.compiler.is_compiling():
            return None
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        if self.again is None or self.again.task != task:
            self.again = Pass(self, dry=True)
            self.again.task, self.again.taps = task, self.taps
        return self.again

    def observe(
        self, z: Tensor, fn: str, impl: str, params: dict[str, Any], a: Tensor | None
    ) -> Tensor | None:
        """For ``fastjac.gelu(z)`` and its like: ``φ(z)`` if z is a layer's output."""
        running = self.running()
        call = None if running is None else running.find(z)
        if running is None or call is None:
            return a

        return running.activate(call, self.phi(fn, impl, params), a)

    def phi(self, fn: str, impl: str, params: dict[str, Any]) -> Phi:
        """The same object for the same activation."""
        key = (fn, impl, *params.items())
        if key not in self.phis:

            def run(z: Tensor) -> Tensor:
                return act(z, fn=fn, impl=impl, **params)

            self.phis[key] = Phi(run, None, fn, impl, dict(params))
        return self.phis[key]


def role_of(module: nn.Module) -> type[_Forward] | None:
    if isinstance(module, LAYER_ACTS):
        return _LayerAct
    if isinstance(module, LINEAR + CONVOLUTION):
        return _Layer
    if type(module) in NORM and not (
        isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1
    ):
        return _Norm
    if is_activation(module) and type(module) is not Act:  # Act calls the observers itself
        return _Activation
    return None


class _Forward:
    """Stands in a module's ``forward``; without a watch (in copies) it does what the class says.

    Python is what a watched layer costs on a CPU, so these are written in few calls: a layer of
    784-4×512-10 takes 0.4 ms, and a call in between evicted caches some 2 µs.
    """

    def __init__(self, watch: Watch | None, module: Any, previous: Any) -> None:
        self.watch, self.module, self.previous = watch, module, previous
        self.own = type(module).forward.__get__(module)
        self.name = ""

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """What stood there before."""
        return (self.previous or self.own)(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **kwargs)

    def remove(self) -> None:
        self.watch = None
        above, below = None, vars(self.module).get("forward")
        while below is not self and isinstance(below, _Forward):  # a later watch stands before it
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
        return _Forward, (None, self.module, self.previous)


def first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


class _Root(_Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        owner = None if watch is None or watch.current is not None else watch.owner()
        wanted = "no" if owner is None else owner.wanted()
        if watch is None or wanted == "no":
            return self.plain(*args, **kwargs)
        watch.recompute = wanted == "yes"
        if wanted == "later":
            output = self.plain(*args, **kwargs)
            watch.passes = [(None, output)]
            return output
        watch.forget_stale()
        seen = watch.begin()
        try:
            output = self.plain(*args, **kwargs)
        finally:
            watch.end()
        watch.passes.append((seen, output))
        if not seen.compiling:  # what changes from step to step would be compiled again
            watch.whole = seen.whole
        return output


class _Layer(_Forward):
    def __init__(self, watch: Watch | None, module: Any, previous: Any) -> None:
        super().__init__(watch, module, previous)
        self.linear = isinstance(module, LINEAR)
        self.plain_layer = plain_layer(module)
        self.conv = conv_options(module) if self.plain_layer else None
        self.memo: dict[Any, Any] = {}  # the penalty's, by activation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        running = None if watch is None else watch.running()
        z = (self.previous or self.own)(*args, **kwargs)
        if running is not None and isinstance(z, Tensor):
            self.note(running, args[0] if args else first(args, kwargs), z)
        return z

    def note(self, running: Pass, x: Tensor, z: Tensor) -> Call:
        module = self.module
        weight = module._parameters.get("weight")
        if weight is None:  # parametrised, or swapped by functional_call
            weight = module.weight
        if running.compiling:
            call = Call(self, x, z, weight, version_of(z, True), -1)
        else:
            call = Call(self, x, z, weight, z._version, weight._version)
        running.calls.append(call)
        return call


class _LayerAct(_Layer):
    def __init__(self, watch: Watch | None, module: Any, previous: Any) -> None:
        super().__init__(watch, module, previous)
        self.phi = Phi.of(module.act, module.act.compute, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        running = None if watch is None else watch.running()
        if running is None:
            return self.plain(*args, **kwargs)
        x = first(args, kwargs)
        # Another watch's forward that stands behind this one must see the call too.
        a = None if self.previous is None else self.previous(*args, **kwargs)
        return running.activate(self.note(running, x, self.module.pre_activation(x)), self.phi, a)


class _Norm(_Forward):
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
            if not running.compiling and not running.transformed and isinstance(z, Tensor):
                normed.batch_statistics = batch_statistics(y)
            running.calls.append(normed)
        return y


class _Activation(_Forward):
    def __init__(self, watch: Watch | None, module: Any, previous: Any) -> None:
        super().__init__(watch, module, previous)
        act = fused_activation(module)
        self.phi = Phi(self.plain, module) if act is None else Phi.of(act, self.plain, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        watch = self.watch
        running = None if watch is None else watch.running()
        call = None if running is None else running.find(first(args, kwargs))
        if running is None or call is None:
            return self.plain(*args, **kwargs)
        # Another watch's forward that stands behind this one must see z too.
        a = None if self.previous is None else self.previous(*args, **kwargs)
        return running.activate(call, self.phi, a)


class _Held:
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
