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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastjac.distributed import is_dtensor
from fastjac.functional import OBSERVERS
from fastjac.layerwise.forwards import Forward, Held, Layer, Root, role_of
from fastjac.layerwise.layers import CONVOLUTION, LINEAR, Call, Phi, saved_tensor_hooks
from fastjac.layerwise.sharded import sharding
from fastjac.layerwise.versions import check_unchanged, refuse_written
from fastjac.nn import held_functions
from fastjac.ops import act
from fastjac.ops.act_stats import transformed

LOCK = RLock()
"""Several threads may call penalties of one model: each links its forwards before the others'."""


class Pass:
    """What one run of the model showed."""

    def __init__(self, watch: Watch, *, dry: bool = False) -> None:
        self.watch = watch
        self.computes = watch.owner().computes  # the output of plain layers
        self.dry = dry  # a recomputation by checkpoint: the same operations, nothing is kept
        self.compiling = torch.compiler.is_compiling()
        self.grad = torch.is_grad_enabled()
        self.transformed = transformed()
        self.sharded = sharding()  # weights come and go
        self.calls: list[Call] = []
        self.terms: list[Any] = []
        self.later: list[tuple[Call, Phi]] = []
        self.whole: list[Layer] = []  # layers that the penalty took whole
        self.taps: dict[Layer, Any] = {}  # layer: (its weight, the version), a view of it, its r
        self.inside = 0  # of a module that is itself an activation
        self.thread = 0 if self.compiling else get_ident()
        self.task = -1

    def find(self, z: Tensor) -> Call | None:
        """The call whose output this is, unchanged: ``out += skip`` makes another tensor of it."""
        if not self.inside:
            for call in reversed(self.calls):
                if self.compiling:
                    if call.z is z:
                        refuse_written(z, call.name)
                        return call
                elif call.is_output(z):
                    return call if call.version == z._version else None
        return None

    def activate(self, call: Call, phi: Phi, a: Tensor | None) -> Tensor:
        """``φ(z)`` (``a``, if somebody has computed it), with the penalty's term noted."""
        self._check(call)
        call.used = True
        watch, original = self.watch, call.z
        in_place = a is None and getattr(phi.module, "inplace", False)
        if in_place:  # z is needed as it is now; the model gets it overwritten, as it expects
            call.z = original.clone()
            call.version = call.version if self.compiling else call.z._version
        postponed = not watch.attached and saved_tensor_hooks()
        if a is None and (phi.fn is None or postponed):
            self.inside += 1
            try:
                a = phi.run(call.z.clone() if in_place else call.z)
            finally:
                self.inside -= 1
            check_unchanged(call)  # a module that wrote to z would have its slope taken elsewhere
        if postponed:
            # A checkpoint's recomputation comes when nobody watches any more, and must do what
            # the forward did: the term is computed after the model has run.
            self.later.append((call, phi))
            assert a is not None
        elif self.compiling:
            a = watch.owner().on_layer(self, call, phi, a)
        else:
            try:
                a = watch.owner().on_layer(self, call, phi, a)
            finally:  # a checkpoint stops its recomputation by an exception
                call.release()
        return original.copy_(a) if in_place else a

    def spent(self) -> bool:
        """Whether nothing can be differentiated through this pass any more."""
        if self.transformed or any(c.weight._version != c.weight_version for c in self.calls):
            return True
        try:
            for term in self.terms:
                node = term.value.grad_fn if term.value is not None else term.s.grad_fn
                # Raw: to unpack them would make a checkpoint recompute.
                _ = getattr(node, "_raw_saved_tensors", None)
        except RuntimeError:  # freed by a backward
            return True
        return False

    def _check(self, call: Call) -> None:
        # Under torch.func requires_grad says nothing.
        needed = self.grad and not torch._C._are_functorch_transforms_active()
        if needed and not call.z.requires_grad and call.weight.requires_grad:
            raise RuntimeError(
                f"layer {call.name}: its pre-activation was computed with gradients off (a "
                "reentrant checkpoint, or torch.no_grad() in forward), so the penalty would lose "
                "part of its gradient; use checkpoint(..., use_reentrant=False)"
            )
        if call.z.dim() < 2:
            raise RuntimeError(
                f"layer {call.name}: its output has shape {tuple(call.z.shape)}: dimension 0 must "
                "be the samples all through the model; give x a batch dimension"
            )


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
        self.finalizer: Any = None  # removes this when the owner is thrown away
        self.names = {module: name or "(model)" for name, module in model.named_modules()}
        self.linear = [m for m in self.names if isinstance(m, LINEAR + CONVOLUTION)]
        self.passes: list[tuple[Pass | None, Any]] = []  # with the output of the model
        self.current: Pass | None = None
        self.again: Pass | None = None  # of a recomputation by checkpoint
        self.whole: list[Layer] = []  # the layers that the last pass took whole
        self.ddp: Any = None  # a DistributedDataParallel with a static graph, while it counts
        self.recompute = False
        self.called = 0  # call forms that are running
        self.cache: Any = None
        self.phis: dict[Any, Phi] = {}
        self.undo: list[Callable[[], None]] = []

    def install(self, *, attach: bool) -> None:
        """``attach``: each call of the model that is wanted is a pass, kept in ``passes``."""
        self.attached = attach
        with LOCK:
            self._install(attach)

    def _install(self, attach: bool) -> None:
        for module in self.names:
            role = role_of(module)
            if role is not None:
                self._override(role, module)
            if (
                role is not None
                and issubclass(role, Layer)
                and is_dtensor(module._parameters.get("weight"))
            ):
                # Tensor parallel: what the model goes on with is what the hooks make of it.
                forward = vars(module)["forward"]
                forward.hooked = True
                self.undo.append(module.register_forward_hook(forward.hook).remove)
            for name, value, fn in held_functions(module):
                held = Held(self, value, fn)
                setattr(module, name, held)
                self.undo.append(functools.partial(setattr, module, name, value))
        if attach:
            self._override(Root, self.model)

    def _override(self, kind: type[Forward], module: nn.Module) -> None:
        new = kind(self, module, vars(module).get("forward"))
        new.name = self.names.get(module, "")
        vars(module)["forward"] = new
        self.undo.append(new.remove)

    def remove(self) -> None:
        with LOCK:
            while self.undo:
                self.undo.pop()()
        self._forget_recomputation()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Runs of the model in here are the call form's, and no passes."""
        self.called += 1
        self.recompute = False  # nor does a checkpoint's recomputation of them watch
        try:
            yield
        finally:
            self.called -= 1

    def forget_stale(self) -> None:
        """Drop passes that autograd could not go back through any more."""
        if self.passes and not torch.compiler.is_compiling():
            self.passes = [p for p in self.passes if p[0] is not None and not p[0].spent()]

    def begin(self) -> Pass:
        """A pass: run the model, then `end` it, whatever happened."""
        seen = Pass(self)
        if not seen.compiling and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "inference mode is active: its tensors keep no track of in-place changes; use "
                "torch.no_grad() to get the value alone"
            )
        if seen.compiling and seen.sharded:
            raise RuntimeError(
                "torch.compile traces a model with a layer-wise penalty, in a process that has "
                "models under fully_shard, whose weights come and go: run it without torch.compile"
            )
        if not seen.compiling:
            self._forget_recomputation()
        # One weight for the model and the penalty where a parametrization computes it: spectral
        # norm would make a power iteration for each access.
        self.cache = parametrize.cached()
        self.cache.__enter__()
        self.current = seen
        OBSERVERS.append(self.observe)  # for this pass alone: torch.compile guards on the list
        if self.attached:
            self.owner().before_pass(seen)
        return seen

    def end(self) -> None:
        if self.current is not None:
            if self.current.compiling:
                OBSERVERS.pop()
            else:  # other threads may have put theirs behind it
                OBSERVERS.remove(self.observe)
            self.current = None
        if self.cache is not None:
            self.cache.__exit__(None, None, None)
            self.cache = None

    def running(self) -> Pass | None:
        """The pass that is on, or the recomputation of one."""
        current = self.current
        if current is not None:
            if current.compiling or current.thread == get_ident():
                return current
            if not self.attached:  # the called form, of another thread
                return None
            raise RuntimeError(
                "the model runs in two threads at once (DataParallel?), and the penalty attached "
                "to it can follow one: use DistributedDataParallel, or detach() the penalty"
            )
        if not self.recompute or torch.compiler.is_compiling() or self.owner() is None:
            return None
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        if self.again is None or self.again.task != task:
            self._forget_recomputation()
            self.again = Pass(self, dry=True)
            self.again.task = task
            OBSERVERS.append(self.observe)
            # Runs when this backward is over, unless it raises.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._forget_recomputation)
        return self.again

    def _forget_recomputation(self) -> None:
        """After a backward; one that raised leaves it to whoever comes next."""
        if self.again is not None:
            self.again = None
            while self.observe in OBSERVERS:
                OBSERVERS.remove(self.observe)

    def observe(
        self, z: Tensor, fn: str, impl: str, params: dict[str, Any], a: Tensor | None
    ) -> Tensor | None:
        """For ``fastjac.gelu(z)`` and its like: ``φ(z)`` if z is a layer's output."""
        current = self.current
        if current is not None and not current.compiling and current.thread != get_ident():
            return a  # most likely of another model: this one's forwards say if it is not
        running = self.running()
        call = None if running is None else running.find(z)
        if running is None or call is None:
            return a
        return running.activate(call, self.phi(fn, impl, params), a)

    def phi(self, fn: str, impl: str, params: dict[str, Any]) -> Phi:
        """The same object for the same activation."""
        key = (fn, impl, *params.items())
        if len(self.phis) > 64:  # a parameter that is another number in each step
            self.phis.clear()
        if key not in self.phis:

            def run(z: Tensor) -> Tensor:
                return act(z, fn=fn, impl=impl, **params)

            self.phis[key] = Phi(run, None, fn, impl, dict(params))
        return self.phis[key]
