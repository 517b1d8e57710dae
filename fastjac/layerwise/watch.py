"""Watches a model while it runs: puts `forwards` into its modules, and takes them out again.

A layer is a Linear or convolution module, perhaps a norm, and an activation. While a model is
watched, the ``forward`` of these modules, an attribute of the instance, notes the tensor object
that it returned. An activation that is called with that very object belongs to it. Since the
identity of the tensor counts, a layer is found however the ``forward`` of the model is written, and
a tensor that went through anything else in between (a view, an addition) is not taken for a
pre-activation. The penalty then computes the activation, and its statistic in the same pass.

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

from fastjac import torch_private
from fastjac.distributed import is_dtensor, static_graph
from fastjac.layerwise.forwards import (
    Forward,
    HeldFunction,
    LayerForward,
    ModelForward,
    forward_of,
)
from fastjac.layerwise.layers import CONVOLUTION, LINEAR, Layer, Nonlinearity
from fastjac.layerwise.passes import LayerStatistic, Pass
from fastjac.nn import held_functions
from fastjac.observers import OBSERVERS, Recorded

LOCK = RLock()
"""Held while forwards are put in or taken out: several threads may call penalties of one model."""


class Watch:
    """The forwards that watch a model for one penalty, and the passes of an attached model."""

    def __init__(self, model: Any, statistic: LayerStatistic) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model is {type(model).__name__}: layer-wise penalties look at submodules, so it "
                "must be an nn.Module"
            )
        self.model = model
        # Weak: a penalty that is thrown away must not live on in the model it was attached to.
        self.statistic: Callable[[], LayerStatistic | None] = weakref.ref(statistic)
        self.attached = False
        self.finalizer: Any = None  # removes this when the penalty is thrown away
        self.names = {module: name or "(model)" for name, module in model.named_modules()}
        self.layers: dict[nn.Module, str] = {
            m: name for m, name in self.names.items() if isinstance(m, LINEAR + CONVOLUTION)
        }
        self.passes: list[tuple[Pass | None, Any]] = []  # with the output of the model
        self.current: Pass | None = None
        self.again: Pass | None = None  # of a recomputation by checkpoint
        self.whole: list[Layer] = []  # see `Pass`
        self.ddp: Any = None  # a DistributedDataParallel with a static graph, while it counts
        self.recompute = False
        self.called = 0  # call forms that are running
        self.cache: Any = None
        self.nonlinearities: dict[Any, Nonlinearity] = {}
        self.undo: list[Callable[[], None]] = []

    # ---- the forwards

    def install(self, *, attach: bool) -> None:
        """Put the forwards in. With ``attach``, each call of the model that counts adds a pass."""
        self.attached = attach
        with LOCK:
            for module in self.names:
                kind = forward_of(module)
                if kind is not None:
                    forward = self._override(kind, module)
                    sharded = is_dtensor(module._parameters.get("weight"))
                    if sharded and isinstance(forward, LayerForward):
                        # Tensor parallel: the model goes on with what the hooks make of z.
                        forward.layer.hooked = True
                        self.undo.append(module.register_forward_hook(forward.hook).remove)
                for name, value, fn in held_functions(module):
                    setattr(module, name, HeldFunction(self, value, fn))
                    self.undo.append(functools.partial(setattr, module, name, value))
            if attach:
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
        """The attached model is called: its run is a pass if the penalty wants one."""
        if self.called:
            return forward(*args, **kwargs)
        for t in args:
            if isinstance(t, Recorded):
                t.refuse("a layer-wise penalty is attached to the model")
        nested = self.current is not None and self.running() is not None
        statistic = None if nested else self.statistic()
        wanted = "no" if statistic is None else statistic.wanted()
        if wanted == "no":
            return forward(*args, **kwargs)
        self.recompute = wanted == "yes"
        if wanted == "later":
            output = forward(*args, **kwargs)
            self.passes = [(None, output)]
            return output
        self.forget_stale()
        self.ddp = static_graph()
        try:
            seen = self.begin()
            output = forward(*args, **kwargs)
        finally:
            self.end()
        self.passes.append((seen, output))
        if not seen.compiling:  # what changes from step to step would be compiled again
            self.whole = seen.whole
        return output

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """In this block the model is run by the call form, and its runs are not passes."""
        self.called += 1
        self.recompute = False  # and a checkpoint that recomputes them is not watched
        try:
            yield
        finally:
            self.called -= 1

    def forget_stale(self) -> None:
        """Drop passes that autograd could not go back through any more."""
        if self.passes and not torch.compiler.is_compiling():
            self.passes = [p for p in self.passes if p[0] is not None and not p[0].spent()]

    def begin(self) -> Pass:
        """Begin a pass. Run the model after it, then call `end`, also after an error."""
        statistic = self.statistic()
        assert statistic is not None
        seen = self._pass(statistic)
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
            seen.whole_before = self.whole
        statistic.before_pass(seen)
        return seen

    def end(self) -> None:
        if self.current is not None:
            if self.current.compiling:
                OBSERVERS.pop()
            else:  # other threads may have put theirs behind it
                OBSERVERS.remove(self.observe)
            self.current.statistic = None
            self.current = None
        if self.cache is not None:
            self.cache.__exit__(None, None, None)
            self.cache = None

    def _pass(self, statistic: LayerStatistic, *, dry: bool = False) -> Pass:
        known = self.nonlinearities
        return Pass(statistic, self.layers, known, attached=self.attached, dry=dry)

    def running(self) -> Pass | None:
        """The pass that runs now, or the one that a checkpoint recomputes; None without either."""
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
            # By proxy: a backward that raises leaves this pass, which must not keep the penalty.
            self.again = self._pass(weakref.proxy(statistic), dry=True)
            self.again.task = task
            statistic.before_pass(self.again)
            OBSERVERS.append(self.observe)
            # Runs when this backward is over, unless it raises.
            torch_private.after_backward(self._forget_recomputation)
        return self.again

    def _forget_recomputation(self) -> None:
        """Called after a backward; if that raised, when the next pass begins or the watch ends."""
        if self.again is not None:
            self.again = None
            while self.observe in OBSERVERS:
                OBSERVERS.remove(self.observe)

    def observe(
        self, z: Tensor, fn: str, impl: str, params: dict[str, Any], a: Tensor | None
    ) -> Tensor | None:
        """The observer of functions such as ``fastjac.gelu``: ``φ(z)`` if z is a layer's output."""
        current = self.current
        if current is not None and not current.compiling and current.thread != get_ident():
            return a  # of another model, most likely; if it is of this one, its forwards raise
        running = self.running()
        call = None if running is None else running.find(z)
        if running is None or call is None:
            return a
        return running.activate(call, running.nonlinearity(fn, impl, params), a)
