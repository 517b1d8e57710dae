"""One pass, that is one run of a watched model: the layers that were called, and their terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.distributed import is_dtensor
from fastjac.layerwise.layers import Layer, LayerCall, Nonlinearity
from fastjac.layerwise.norms import batch_normed
from fastjac.layerwise.sharded import sharding
from fastjac.ops import act
from fastjac.ops.act_stats import transformed
from fastjac.torch_private import comptime, saved_tensor_hooks, transforms_active


@dataclass(slots=True)
class Term:
    """What a penalty has computed at one call of a layer."""

    call: LayerCall
    result: Tensor  # in the graph that the penalty's gradient goes back through
    post: Tensor | None = None  # the output of the activation, if ``include_output`` asks for it


class LayerStatistic:
    """What a layer-wise penalty provides, and a pass asks for."""

    include_output: bool
    compute: Callable[[Any, Tensor], Tensor | None] | None = None
    """``compute(module, x)``: the output of a plain Linear or convolution, where the penalty
    computes it in its own way; it returns None to leave a call to the module."""

    def wanted(self) -> str:
        """What the next pass of the attached model is.

        ``"yes"`` if it counts, ``"later"`` if `every` skips it, ``"no"`` if it does not count.
        """
        raise NotImplementedError

    def before_pass(self, seen: Pass) -> None:
        """Called when the model is about to run, and before a checkpoint's recomputation."""

    def at_layer(
        self, seen: Pass, call: LayerCall, phi: Nonlinearity, a: Tensor | None
    ) -> tuple[Tensor, Term]:
        """``φ(z)`` of the output z of the call (a, where that is given), and the layer's term."""
        raise NotImplementedError

    def at_output(self, seen: Pass, call: LayerCall) -> Term:
        """The term of the output layer, which no activation follows."""
        raise NotImplementedError

    def finish(self, seen: Pass, batch: int) -> Any:
        """The penalty of the samples, made from the terms of the pass."""
        raise NotImplementedError


class Pass:
    """What one run of the model showed."""

    def __init__(
        self,
        statistic: LayerStatistic,
        layers: dict[nn.Module, str],
        nonlinearities: dict[Any, Nonlinearity],
        *,
        attached: bool,
        dry: bool = False,
    ) -> None:
        # None once the model has run: a pass that is kept does not keep the penalty alive.
        self.statistic: Any = statistic
        self.layers = layers  # all of the model, with their names
        self.nonlinearities = nonlinearities  # kept from pass to pass
        self.attached = attached
        self.dry = dry  # a recomputation by checkpoint: the same operations, nothing is kept
        self.compute = statistic.compute
        self.include_output = statistic.include_output
        self.wanted: Any = None  # the statistic's own, from `before_pass`
        self.compiling = torch.compiler.is_compiling()
        self.grad = torch.is_grad_enabled()
        self.transformed = transformed()
        self.sharded = sharding()  # weights come and go
        self.calls: list[LayerCall] = []
        self.terms: list[Any] = []  # each a `Term`
        self.postponed: list[tuple[LayerCall, Nonlinearity]] = []
        self.inside = 0  # of a module that is itself an activation
        self.thread = 0 if self.compiling else get_ident()
        self.task = -1  # the backward that a dry pass belongs to
        # For the row norms of all layers at once (`statistics.norms_of_rows_at_once`):
        self.whole: list[Layer] = []  # the layers whose term is one node with the layer
        self.whole_before: list[Layer] = []  # those of the pass before
        self.taps: dict[Layer, Any] = {}  # (identity of the weight, a view of it, its row norms)

    # ---- what the forwards report

    def layer_ran(self, layer: Layer, x: Tensor, z: Tensor) -> LayerCall:
        module = layer.module
        weight = module._parameters.get("weight")
        if weight is None:  # parametrised, or swapped by functional_call
            weight = module.weight
        if not layer.hooked and is_dtensor(weight):
            raise RuntimeError(
                f"layer {layer.name}: its weight became a DTensor (tensor parallel) after the "
                "penalty was attached: attach the penalty after parallelize_module"
            )
        if self.compiling:
            call = LayerCall(layer, x, z, weight, version_of(z), -1, -1)
        else:
            call = LayerCall(layer, x, z, weight, z._version, weight._version, x._version)
        self.calls.append(call)
        return call

    def output_replaced(self, layer: Layer, z: Tensor) -> None:
        calls = [c for c in self.calls if c.layer is layer]
        if calls and not calls[-1].used:
            calls[-1].z, calls[-1].version = z, z._version

    def find(self, z: Any) -> LayerCall | None:
        """By identity: ``out += skip`` makes another tensor of the output of a layer."""
        if not self.inside:
            for call in reversed(self.calls):
                if self.compiling:
                    if call.z is z:
                        refuse_written(z, call.name)
                        return call
                elif call.is_output(z):
                    return call if call.version == z._version else None
        return None

    def norm_ran(self, call: LayerCall, norm: nn.Module, y: Tensor) -> None:
        call.used = True
        version = version_of(y) if self.compiling else y._version
        after = replace(call, z=y, version=version, used=False)
        after.norm, after.before_norm = norm, call.z
        if not self.compiling and not self.transformed:
            after.normed = batch_normed(y, norm)
        self.calls.append(after)
        if not self.compiling:
            call.release()

    def nonlinearity(self, fn: str, impl: str, params: dict[str, Any]) -> Nonlinearity:
        key, known = (fn, impl, *params.items()), self.nonlinearities
        if len(known) > 64:  # a parameter that is another number in each step
            known.clear()
        if key not in known:

            def run(z: Tensor) -> Tensor:
                return act(z, fn=fn, impl=impl, **params)

            known[key] = Nonlinearity(run, None, fn, impl, dict(params))
        return known[key]

    def activate(self, call: LayerCall, phi: Nonlinearity, a: Tensor | None) -> Tensor:
        """``φ(z)``, with the term of the layer noted."""
        self._check(call)
        call.used = True
        original = call.z
        in_place = a is None and getattr(phi.module, "inplace", False)
        if in_place:  # z is needed as it is now; the model gets it overwritten, as it expects
            call.z = original.clone()
            call.version = call.version if self.compiling else call.z._version
        postponed = not self.attached and saved_tensor_hooks() is not None
        if a is None and (phi.fn is None or postponed):
            self.inside += 1
            try:
                a = phi.run(call.z.clone() if in_place else call.z)
            finally:
                self.inside -= 1
            call.check_unchanged()  # a module that wrote to z would have its slope taken elsewhere
        if postponed:
            # A checkpoint's recomputation comes when nobody watches any more, and must do what
            # the forward did: the term is computed after the model has run.
            self.postponed.append((call, phi))
            assert a is not None
        else:
            try:
                a, term = self.statistic.at_layer(self, call, phi, a)
            finally:  # a checkpoint stops its recomputation by an exception
                if not self.compiling:
                    call.release()
            self._append(term, a)
        return original.copy_(a) if in_place else a

    def _append(self, term: Term, a: Tensor) -> None:
        if not self.dry:
            if self.include_output:
                term.post = a
            self.terms.append(term)

    def _check(self, call: LayerCall) -> None:
        # Under torch.func requires_grad says nothing.
        needed = self.grad and not transforms_active()
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

    # ---- after the run

    def spent(self) -> bool:
        """Whether nothing can be differentiated through this pass any more."""
        if self.transformed or any(c.weight._version != c.weight_version for c in self.calls):
            return True
        try:
            for term in self.terms:
                # Raw: to unpack them would make a checkpoint recompute.
                _ = getattr(term.result.grad_fn, "_raw_saved_tensors", None)
        except RuntimeError:  # freed by a backward
            return True
        return False

    def complete(self, statistic: LayerStatistic, outputs: list[Any]) -> list[tuple[str, str]]:
        """Compute the terms that are missing; the names of the layers without one, and why."""
        for call, phi in self.postponed:
            a, term = statistic.at_layer(self, call, phi, call.z)
            self._append(term, a)
        left_out, ran = [], set()
        for call in self.calls:
            ran.add(call.layer)
            if call.used:
                continue
            if not any(call.z is t for t in outputs):
                why = "its output, unchanged, was the input of no activation module"
                if call.norm is not None:
                    why = "the output of the norm after it was the input of no activation module"
            elif self.include_output:
                self.terms.append(statistic.at_output(self, call))
                continue
            else:
                why = "output layer (include_output=False)"
            left_out.append((call.name, why))
        if len(ran) < len(self.layers):
            modules = {layer.module for layer in ran}
            missing = [name for module, name in self.layers.items() if module not in modules]
            left_out += [(name, "was not called") for name in missing]
        return left_out

    def check_samples(self, batch: int | None) -> int:
        """The number of samples, which must be dimension 0 of each layer that has a term."""
        found = [term.call for term in self.terms]
        batch = found[0].shape[0] if batch is None else batch
        for call in found:
            call.check_unchanged()
            shape = call.shape
            fits = len(shape) >= 2 and (call.layer.linear or len(shape) == call.weight.dim())
            if shape[0] != batch or not fits:
                raise RuntimeError(
                    f"layer {call.name}: its output has shape {tuple(shape)} and x has "
                    f"batch size {batch}: dimension 0 must be the samples all through the model"
                )
        return batch


# ---- writes in place, under torch.compile


def version_of(z: Tensor) -> int:
    """−1, while compiling: how often z was written to is noted at its fake tensor."""

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
