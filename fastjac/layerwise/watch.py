"""Watches a model while it runs: replaces the ``forward`` of its modules, and restores it.

A layer is a Linear or convolution module, perhaps a norm, and an activation. While a model is
watched, `forwards` replace the ``forward`` of these modules, as attributes of the instances, and
report the tensor objects that they return. An activation that is called with the same object
belongs to that layer. Since the tensors are compared by identity, the ``forward`` of the model may
be written in any way, and a tensor that went through another operation in between (a view, an
addition) is not taken for a pre-activation. The penalty then computes the activation and its
statistic in the same pass.

Copies of a watched model (``deepcopy``, pickle) are not watched.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import torch_private
from fastjac.distributed import is_dtensor, static_graph
from fastjac.fusing import held_functions
from fastjac.layerwise.calls import Calls
from fastjac.layerwise.forwards import (
    Forward,
    HeldFunction,
    LayerForward,
    ModelForward,
    forward_of,
)
from fastjac.layerwise.layers import CONVOLUTION, LINEAR, Layer, Nonlinearity
from fastjac.layerwise.outputs import Output, apart
from fastjac.layerwise.passes import LayerStatistic, Pass, samples_of
from fastjac.layerwise.sight import AGAIN, Sight
from fastjac.observers import OBSERVERS
from fastjac.ops.autograd import refuse_inference

LOCK = RLock()
"""Held while forwards are replaced: several threads may call penalties of one model."""


class Watch:
    """The observer of a model for one penalty, and the passes of an attached model."""

    stays = False  # whether the forwards stay after a call of the model

    def __init__(self, model: Any, statistic: LayerStatistic) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is {type(model).__name__}: it must be an nn.Module, since layer-wise "
                "penalties look at its submodules"
            )
        self.model = model
        # Weak, so that the model does not keep a deleted penalty alive.
        self.statistic: Callable[[], LayerStatistic | None] = weakref.ref(statistic)
        self.attached = False
        self.names = {module: name or "(model)" for name, module in model.named_modules()}
        self.layers: dict[nn.Module, str] = {
            m: name for m, name in self.names.items() if isinstance(m, LINEAR + CONVOLUTION)
        }
        # With the output of the model; None for a pass that `every` skips.
        self.passes: list[tuple[Pass | None, Output]] = []
        self.current: Pass | None = None
        self.again: Pass | None = None  # the recomputation of a pass by a checkpoint
        self.recompute = False  # whether a recomputation counts
        self.whole: list[Layer] = []  # see `Pass`
        self.ddp: Any = None  # see `distributed.static_graph`
        # Of the last pass that did not count: whether in training mode, and in inference mode.
        self.skipped: tuple[bool, bool] | None = None
        self.asked = False  # whether penalty() has been called
        self.unasked = 0  # the number of passes before that whose backward has run
        self.dropped = 0  # the number of passes since the last penalty() that were dropped
        self.called = 0  # the number of call forms that are running
        self.owners = owners_of(model)
        self.products: dict[Any, Layer] = {}
        self.sight = Sight()
        self.left_out: list[tuple[str, str]] = []  # of the last pass
        self.undo: list[Callable[[], Any]] = []

    # ---- the forwards

    def install(self, *, attach: bool) -> None:
        """Replaces the forwards. With ``attach``, each call of the model that counts is a pass."""
        self.attached = attach
        with LOCK:
            for module in self.names:
                kind = forward_of(module)
                if kind is not None:
                    forward = self._override(kind, module)
                    sharded = is_dtensor(module._parameters.get("weight"))
                    if sharded and isinstance(forward, LayerForward):
                        # Tensor parallel: the model continues with z as changed by the hooks.
                        forward.layer.hooked = True
                        self.undo.append(module.register_forward_hook(forward.hook).remove)
                for name, value, fn in held_functions(module):
                    setattr(module, name, HeldFunction(self, value, fn))
                    self.undo.append(functools.partial(setattr, module, name, value))
            if attach or self.stays:
                self._override(ModelForward, self.model)

    def _override(self, kind: type[Forward], module: nn.Module) -> Forward:
        new = kind(self, module, vars(module).get("forward"), self.names[module])
        vars(module)["forward"] = new
        self.undo.append(new.remove)
        return new

    def remove(self) -> None:
        with LOCK:
            while self.undo:
                self.undo.pop()()
        self._forget_recomputation()

    # ---- runs of the model

    def model_called(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.called:
            return forward(*args, **kwargs)
        nested = self.current is not None and self.running() is not None
        statistic = None if nested else self.statistic()
        wanted = "no" if statistic is None else statistic.wanted()
        if wanted == "no":
            return forward(*args, **kwargs)
        self.recompute = wanted == "yes"
        if wanted == "later":
            output = forward(*args, **kwargs)
            self.passes = [(None, Output(output))]
            return output
        assert statistic is not None
        if self.passes:
            self.forget_stale()
        self.ddp = static_graph()
        if torch.compiler.is_compiling():  # which cannot leave a block with try in its middle
            with self.one_pass() as seen:
                seen.batch = samples_of(args, kwargs)
                with Calls(seen):
                    output = forward(*args, **kwargs)
                seen.complete(seen.statistic, output)
            # A new list: torch.compile returns from its graph what was put into an existing one.
            self.passes = [*self.passes, (seen, Output(output))]
            return output
        seen = self._new_pass(statistic)
        try:
            self._begin(seen)
            seen.batch = samples_of(args, kwargs)
            if seen.looks:
                with Calls(seen, self.running):
                    output = forward(*args, **kwargs)
            else:
                output = forward(*args, **kwargs)
            seen.complete(statistic, output)
            if seen.left_out != self.left_out:
                self._look_for_replaced(seen)
        except RuntimeError as error:
            given = [("an input of the model", a) for a in args]
            refuse_inference(error, [*given, *kwargs.items()], self.model)
            raise
        finally:
            self._end(seen)
        output = apart(output, seen.terms)
        self.passes.append((seen, Output(output)))
        self.whole = seen.whole
        return output

    def _look_for_replaced(self, seen: Pass) -> None:
        self.left_out = list(seen.left_out)
        now = dict(self.model.named_modules())
        replaced = {
            name: module
            for module, name in self.names.items()
            if forward_of(module) and now.get(name, module) is not module
        }
        if replaced:
            for module in replaced.values():
                del self.names[module]
                self.layers.pop(module, None)
            self.owners = owners_of(self.model)
            self.sight.replaced([*replaced], seen)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """In this block the call form runs the model, and its runs are not passes."""
        self.called += 1
        self.recompute = False  # nor is their recomputation by a checkpoint
        try:
            yield
        finally:
            self.called -= 1

    def forget_stale(self) -> None:
        """Drops the passes that autograd can no longer go back through, or that nobody wants to."""
        if self.passes and not torch.compiler.is_compiling():
            before = sum(p[0] is not None for p in self.passes)
            self.passes = [p for p in self.passes if p[0] is not None and not p[0].spent()]
            if not self.asked and len(self.passes) < before:
                self._warn_unasked(before - len(self.passes))
            self._forget(self.passes)

    def _warn_unasked(self, spent: int) -> None:
        """Warns once if two passes were differentiated, and penalty() was never called."""
        self.unasked += spent
        if self.unasked >= 2:
            self.asked = True
            name = type(self.statistic()).__name__
            warnings.warn(
                f"{name} is attached to the model, but penalty() has not been called yet, and "
                f"{self.unasked} forward passes have had their backward without it: add penalty() "
                "to the loss, or detach() the penalty",
                stacklevel=6,
            )

    def forget_dropped(self) -> None:
        """Drops the passes whose output the program has dropped, except the latest."""
        if (len(self.passes) < 2 and not self.dropped) or torch.compiler.is_compiling():
            return
        self._forget(self.passes[:-1])
        if self.dropped:
            warnings.warn(
                f"{self.dropped} forward passes of the model since the last penalty() do not count "
                "in it, since their outputs were deleted: keep the outputs until penalty(), or run "
                "a pass that shall not count under torch.no_grad()",
                stacklevel=5,
            )
            self.dropped = 0

    def _forget(self, passes: list[tuple[Pass | None, Output]]) -> None:
        for one in passes:
            one[1].let_go()
        dropped = [one for one in passes if one[1].dropped()]
        self.dropped += len(dropped)
        self.passes = [one for one in self.passes if not any(one is d for d in dropped)]

    @contextmanager
    def one_pass(self) -> Iterator[Pass]:
        """In this block the model runs once, which is a pass."""
        statistic = self.statistic()
        assert statistic is not None
        seen = self._new_pass(statistic)
        try:
            self._begin(seen)
            yield seen
        finally:
            self._end(seen)

    def _new_pass(self, statistic: LayerStatistic) -> Pass:
        seen = Pass(statistic, self.layers, attached=self.attached)
        if not seen.compiling and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "inference mode is active, whose tensors do not count in-place changes: use "
                "torch.no_grad() to get the value without a gradient"
            )
        if seen.compiling and seen.sharded:
            raise RuntimeError(
                "torch.compile traces a model with a layer-wise penalty in a process that has "
                "models under fully_shard, which gathers and frees weights: run the model without "
                "torch.compile"
            )
        return seen

    def _begin(self, seen: Pass) -> None:
        if self.again is not None and not seen.compiling:
            self._forget_recomputation()
        if OBSERVERS:
            others: list[Any] = [observe.__self__.current for observe in OBSERVERS]  # type: ignore[attr-defined]
            seen.within = any([o is not None and o.thread == seen.thread for o in others])
        self.current = seen
        OBSERVERS.append(self.observe)  # only for this pass: torch.compile guards on the list
        # In torch.compile a value that changes in each step would be compiled again.
        seen.whole_before = self.whole
        sight = self.sight
        seen.looks = not self.attached or seen.compiling or sight.looks or sight.blind >= AGAIN
        if seen.looks and not seen.compiling and any(map(compiled_by_itself, self.names)):
            seen.looks, seen.hides = False, True
        seen.sight = sight if self.attached and not seen.compiling else None
        seen.owners = self.owners
        if not seen.compiling:
            seen.products = self.products
        seen.statistic.before_pass(seen)

    def _end(self, seen: Pass) -> None:
        if seen.compiling:
            OBSERVERS.pop()
        else:  # other threads may have added theirs
            OBSERVERS.remove(self.observe)
        seen.statistic = self.current = None

    def running(self) -> Pass | None:
        """The pass that runs now, or the one that a checkpoint recomputes, or None."""
        current = self.current
        if current is not None:
            if current.compiling or current.thread == get_ident():
                return current
            if not self.attached:  # the call form in another thread
                return None
            raise RuntimeError(
                "the model runs in two threads at once (DataParallel?), but the penalty attached "
                "to it can observe one: use DistributedDataParallel, or detach() the penalty"
            )
        if not self.recompute or torch.compiler.is_compiling():
            return None
        statistic = self.statistic()
        if statistic is None:
            return None
        task = torch_private.current_backward()
        if task == -1:
            return None
        if self.again is None or self.again.task != task:
            self._forget_recomputation()
            # By proxy, since this pass remains if the backward raises, and must not keep the
            # penalty alive.
            proxy = weakref.proxy(statistic)
            self.again = Pass(proxy, self.layers, attached=self.attached, task=task)
            statistic.before_pass(self.again)
            OBSERVERS.append(self.observe)
            # Not called if this backward raises.
            torch_private.after_backward(self._forget_recomputation)
        return self.again

    def _forget_recomputation(self) -> None:
        """Called after a backward; if it raised, when the next pass begins or the watch ends."""
        if self.again is not None:
            self.again = None
            while self.observe in OBSERVERS:
                OBSERVERS.remove(self.observe)

    def observe(
        self, z: Tensor, fn: str, impl: str, params: dict[str, Any], a: Tensor | None
    ) -> Tensor | None:
        """Observes functions such as ``fastjac.gelu``: ``φ(z)`` if z is the output of a layer."""
        current = self.current
        if current is not None and not current.compiling and current.thread != get_ident():
            return a  # most likely of another model; the forwards of this one raise
        running = self.running()
        call = None if running is None else running.find(z)
        if running is None or call is None:
            return a
        return running.activate(call, Nonlinearity(fn, impl, params), a)


def compiled_by_itself(module: nn.Module) -> bool:
    """Whether the call of a module runs code of torch.compile, which may not see `Calls`.

    With a mode around it, torch 2.13 resumed a function after a graph break with wrong variables.
    """
    return "_orig_mod" in module._modules or torch_private.compiled_call(module) is not None


def owners_of(model: nn.Module) -> dict[nn.Parameter, tuple[str, Any]]:
    """The layer that each weight belongs to: its name, and the module if it is a layer."""
    found: dict[nn.Parameter, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        layer = module if isinstance(module, LINEAR + CONVOLUTION) else None
        for name, parameter in module._parameters.items():
            if parameter is not None:
                whole = path if name == "weight" else f"{path}.{name}" if path else name
                found[parameter] = whole or "(model)", layer
    return found
