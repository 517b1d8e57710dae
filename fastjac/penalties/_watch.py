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
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastjac.functional import OBSERVERS
from fastjac.nn import held_functions
from fastjac.ops import act
from fastjac.ops.act_stats import transformed
from fastjac.penalties._forwards import Forward, Held, Layer, Root, role_of
from fastjac.penalties._layers import CONVOLUTION, LINEAR, Call, Phi
from fastjac.penalties._versions import check_unchanged, refuse_written


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
        self.whole: list[Layer] = []  # layers that the penalty took whole
        self.taps: dict[Layer, tuple[Tensor, Tensor]] = {}  # layer: view of its weight, its r
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
        self.whole: list[Layer] = []  # the layers that the last pass took whole
        self.taps: dict[Layer, tuple[Tensor, Tensor]] = {}  # of the last pass
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
                held = Held(self, value, fn)
                setattr(module, name, held)
                self.undo.append(functools.partial(setattr, module, name, value))
        if attach:
            self._override(Root, self.model)
        OBSERVERS.append(self.observe)
        self.undo.append(lambda: OBSERVERS.remove(self.observe))

    def _override(self, kind: type[Forward], module: nn.Module) -> None:
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
