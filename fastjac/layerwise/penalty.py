"""Base class of the layer-wise penalties: attached to a model, or called with one."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from fastjac import arguments, distributed
from fastjac.layerwise.called import install
from fastjac.layerwise.calls import Calls
from fastjac.layerwise.layers import Table
from fastjac.layerwise.passes import LayerStatistic, Pass, Term
from fastjac.layerwise.watch import Watch
from fastjac.model_output import Picked, State, call_model
from fastjac.penalty import ModelPenalty, PenaltyOptions, options_of
from fastjac.per_sample import attached_zeros
from fastjac.torch_private import comptime


class LayerOptions(PenaltyOptions, total=False):
    include_output: bool


@dataclass
class Sum:
    """``Σ_n R_n = factor total`` of ``count`` samples, if the values of these are not needed."""

    total: Tensor
    count: int
    factor: float = 1.0


class LayerPenalty(LayerStatistic, ModelPenalty):
    """Base class of the penalties that observe the layers of a model while it runs.

    There are two forms:

    * attached: ``penalty = DREG(model, ...)``, then in the training loop ``output = model(x)`` and
      ``loss + penalty()``. The outputs and the ``state_dict`` of the model do not change.
      ``penalty()`` covers the forward passes since its last call, and takes their samples together.
      Passes in ``eval()`` mode, without gradients, or whose graph has been freed do not count. The
      graph is freed by a backward, or when the program deletes the output, and what it computed
      from it, before the next pass begins. ``penalty()`` warns of passes that were so deleted.
      ``detach()`` ends it, and so does deleting the penalty. Deep copies and pickles of the model
      are not attached; shallow copies (``copy.copy``, DataParallel's replicas) run the original.
    * called: ``output, value = DREG(...)(model, x)`` observes this one run.

    After either, ``layers_found`` holds the names of the layers in the order in which they ran in
    the last pass, ``layers_left_out`` the others as ``(name, reason)``, and ``layer_values`` each
    layer's share of the value as ``(name, value)``, before ``weight`` and detached.

    A penalty defines the methods of `LayerStatistic`: ``at_layer``, ``at_output`` and ``finish``.
    A sum of the layers' statistics is a `sums.SumOverLayers`, which defines them.
    """

    needs_grad = False
    needs_weights_afterwards = False  # a weight is read while its layer runs
    _how_to_call = "value = penalty() after model(x)"

    def __init__(self, *, include_output: bool = False, **options: Unpack[PenaltyOptions]) -> None:
        super().__init__(**options)
        self.include_output = arguments.flag("include_output", include_output)
        self.layers_found: list[str] = []
        self.layers_left_out: list[tuple[str, str]] = []
        # Of each pass its number of samples, and (name, v, f) of its layers, whose share is f Σ v.
        self._shares: list[tuple[int, list[tuple[str, Tensor | Table, float]]]] = []
        self._watch: Watch | None = None
        # Of the called form inside torch.compile; see `called`.
        self.calling = False
        self.seen: Pass | None = None

    @property
    def layer_values(self) -> list[tuple[str, Tensor]]:
        """Each layer's share of the last value, before ``weight``, detached."""
        samples = sum(batch for batch, _ in self._shares) or 1
        values: dict[tuple[str, int], Tensor] = {}
        for _, shares in self._shares:
            ran: Counter[str] = Counter()  # a module that ran twice in a pass is listed twice
            for name, v, factor in shares:
                key = name, ran[name]
                ran[name] += 1
                v = v.products() if isinstance(v, Table) else v
                share = v.sum() * (factor / samples if self.reduction == "mean" else factor)
                values[key] = values[key] + share if key in values else share
        return [(name, value) for (name, _), value in values.items()]

    def remember(self, batch: int, shares: Sequence[tuple[Term, Tensor | Table, float]]) -> None:
        """Notes each layer's share ``f Σ v`` of the sum over a pass, given ``(term, v, f)``."""
        noted = [
            (t.call.layer.name, v if isinstance(v, Table) else v.detach(), f) for t, v, f in shares
        ]
        self._shares.append((batch, noted))

    # ---- called

    def forward(self, *args: Any, **named: Any) -> Any:
        """``(model, x, ...) -> (output, value)``, or ``() -> value`` of the attached model."""
        if not (args or named):
            return self._attached_value()
        watch = self._watch
        if watch is not None and len(args) == 1 and isinstance(args[0], Tensor):
            raise TypeError(
                f"{type(self).__name__} is attached to a model and was called with a tensor: call "
                "the model, output = model(x), and then penalty() without arguments"
            )
        if watch is None:
            return super().forward(*args, **named)
        with watch.suspended():
            return super().forward(*args, **named)

    def model_form(self, model: Any, x: Tensor) -> tuple[Any, Any]:
        arguments.tensor("x", x)
        if torch.compiler.is_compiling():
            return self._traced_form(model, x)
        if hasattr(model, "_orig_mod"):
            raise TypeError(
                "model is a torch.compile'd module, whose submodules do not run: pass the module "
                "before compiling, or attach the penalty to it: DREG(model)"
            )
        watch = Watch(model, self)
        watch.install(attach=False)
        try:
            with watch.one_pass() as seen, Calls(seen) if seen.looks else nullcontext():
                seen.batch = x.shape[0] if x.dim() else None
                whole, output = call_model(model, x, self.output)
        finally:
            watch.remove()
        self._shares = []
        seen.complete(self, output if self.output is None else Picked(output))
        return whole, self._finish(seen)

    def _traced_form(self, model: Any, x: Tensor) -> tuple[Any, Any]:
        """The called form inside ``torch.compile``.

        Dynamo does not trace what `Watch.install` does to the model. So the first trace does it,
        and the forwards stay until the penalty is deleted.
        """
        comptime(install)
        self.calling = True
        whole, output = call_model(model, x, self.output)
        seen, self.seen, self.calling = self.seen, None, False
        if seen is None:
            raise RuntimeError(
                "model has no layer to penalise, because torch.export sees the plain model: export "
                "the model without the penalty"
            )
        self._shares = []
        seen.complete(self, output if self.output is None else Picked(output))
        return whole, self._finish(seen)

    def _finish(self, seen: Pass) -> Tensor | Sum:
        # By vars(), since nn.Module's __setattr__ takes 2 µs.
        state = vars(self)
        state["layers_found"] = [term.call.layer.name for term in seen.terms]
        state["layers_left_out"] = list(seen.left_out)
        if self.include_output and not seen.ends_in_layer:
            raise RuntimeError(
                "include_output is True, but the output of the model is neither the output of a "
                "Linear or convolution nor that of an activation after one: set "
                "include_output=False, or let the model return what its last layer returns"
            )
        if not seen.terms:
            reasons = "; ".join(f"{name}: {why}" for name, why in seen.left_out)
            raise RuntimeError(
                "model has no layer to penalise, which is a Linear, convolution or product with a "
                "parameter whose output, unchanged or through one norm, is the input of an "
                "activation: a function or module of torch (F.gelu, nn.GELU), a function of "
                "fastjac, or any module with a callable attribute fastjac_activation. Layers "
                f"seen: {reasons or 'none at all'}"
            )
        return self.finish(seen, seen.check_samples())

    def _reduce(self, values: Any) -> Tensor:
        if not isinstance(values, Sum):
            return super()._reduce(values)
        factor = self._factor(values.total)
        # The mean over no samples would be 0/0.
        count = (values.count or 1) if self.reduction == "mean" else 1
        return values.total * (factor * values.factor / count)

    def explain(self, model: Any = None, x: Any = None) -> str:
        """Returns a text that says which layers are penalised, and which are not and why.

        Each layer has its share of the value. Without arguments, these are the layers of the last
        pass; with ``(model, x)``, those of a run of the model with the options of this penalty.
        """
        if model is None or x is None:
            if not (self.layers_found or self.layers_left_out):
                name = type(self).__name__
                raise RuntimeError(
                    f"{name} has not seen a run of a model: call it first (if it is attached, "
                    "model(x) and then penalty()), or pass a model and a batch, explain(model, x)"
                )
            return self._explained()
        options = {o.name: getattr(self, o.name) for o in options_of(type(self))}
        called = type(self)(**options)
        state = State(model, x)
        with torch.no_grad():  # which makes it no pass of an attached penalty
            called(model, x)
        state.restore()
        return called._explained()

    def _explained(self) -> str:
        name, found, left_out = type(self).__name__, self.layers_found, self.layers_left_out
        lines = [f"{name} penalises {len(found)} of {len(found) + len(left_out)} layers:"]
        values = [(layer, value.item()) for layer, value in self.layer_values]
        total = sum(value for _, value in values)
        width = max(len(layer) for layer in (*found, *(layer for layer, _ in left_out)))
        for layer, value in values:
            share = f"{value / total:7.1%}" if total else ""
            lines.append(f"   {layer:<{width}}  {value:10.4g} {share}".rstrip())
        if left_out:
            lines.append("It does not penalise:")
        lines += [f"   {layer:<{width}}  {reason}" for layer, reason in left_out]
        return "\n".join(lines)

    # ---- attached

    def _attach(self, model: nn.Module) -> None:
        model = distributed.unwrapped(model)
        if isinstance(model, nn.Module):
            distributed.check_model(model)
        self._watch = watch = Watch(model, self)
        watch.install(attach=True)
        # After a detach() the finalizer would keep the model alive.
        watch.undo.append(weakref.finalize(self, watch.remove).detach)

    @property
    def attached(self) -> bool:
        """Whether the penalty is attached to a model."""
        return self._watch is not None

    def wanted(self) -> str:
        assert self._watch is not None
        training = self._watch.model.training
        if not (training and torch.is_grad_enabled()):
            if not torch.compiler.is_compiling():
                self._watch.skipped = training, torch.is_inference_mode_enabled()
            return "no"
        return "yes" if self.due() else "later"

    def detach(self) -> None:
        """Removes the penalty from the model that it is attached to."""
        if self._watch is not None:
            self._watch.remove()
            self._watch.passes.clear()
            self._watch = None

    def clear(self) -> None:
        """Forgets the forward passes since the last ``penalty()``."""
        if self._watch is not None:
            self._watch.passes.clear()
            self._watch.dropped, self._watch.asked = 0, True

    def _attached_value(self) -> Tensor:
        if self._watch is None:
            raise TypeError(
                f"{type(self).__name__}() has no model: attach it, {type(self).__name__}(model), "
                "or call it with (model, x)"
            )
        watch = self._watch
        watch.asked = True
        watch.forget_dropped()
        passes, watch.passes = watch.passes, []
        if not passes:
            raise self._no_pass(watch)
        watch.skipped = None
        due = [(seen, output) for seen, output in passes if seen is not None]
        if not due:
            self.count_call()
            outputs = passes[-1][1].tensors
            # Token ids and the loss may come before the tensor that has the samples.
            outputs = [t for t in outputs if t.is_floating_point() and t.requires_grad] or outputs
            output = next((t for t in outputs if t.dim()), outputs[0].reshape(-1))
            zeros = attached_zeros(output)
            return zeros if self.reduction == "none" else zeros.sum()
        vars(self)["_shares"] = []
        results = [self._finish(seen) for seen, _ in due]
        value = self._reduce(results[0] if len(results) == 1 else _together(results))
        self.count_call()
        if distributed.active():
            value = distributed.attached(value, *[t for _, output in due for t in output.tensors])
        return value if watch.ddp is None else distributed.through_sink(value, watch.ddp)

    def _no_pass(self, watch: Watch) -> RuntimeError:
        """The error of a call without a pass that counts."""
        skipped, watch.skipped = watch.skipped, None
        if skipped is None:
            return RuntimeError(
                "penalty(): the model has not run since the penalty was attached or last called: "
                "call model(x) first, of the model that the penalty is attached to"
            )
        training, inference = skipped
        if not training:
            return RuntimeError(
                "penalty(): the model has run in eval mode, and such a pass does not count: call "
                "model.train() before it, or for validation the call form, output, value = "
                f"{type(self).__name__}()(model, x)"
            )
        mode = "torch.inference_mode()" if inference else "torch.no_grad()"
        return RuntimeError(
            f"penalty(): the model has run under {mode}, and such a pass does not count: run it "
            "with gradients on, and call penalty() after it"
        )

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state["_watch"] = None
        state["_attached_model"] = None if self._watch is None else self._watch.model
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        model = state.pop("_attached_model", None)
        super().__setstate__(state)
        if model is not None and "_modules" not in vars(model):
            raise RuntimeError(
                f"{type(self).__name__} is a part of the model that it is attached to, and cannot "
                "be copied with it: detach() it first, or keep it outside the model"
            )
        if model is not None:
            self._attach(model)


def _together(results: Sequence[Tensor | Sum]) -> Tensor | Sum:
    """The results of several passes as one batch."""
    sums = [r for r in results if isinstance(r, Sum)]
    if sums:
        totals = [s.total if s.factor == 1 else s.total * s.factor for s in sums]
        return Sum(torch.stack(totals).sum(), sum(s.count for s in sums))
    return torch.cat([r for r in results if isinstance(r, Tensor)])
