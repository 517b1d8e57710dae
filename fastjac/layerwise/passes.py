"""One pass, that is one run of a watched model: the layers that were called, and their terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.distributed import is_dtensor
from fastjac.layerwise.layers import Layer, LayerCall, Nonlinearity, Norm, Table
from fastjac.layerwise.norms import batch_normed
from fastjac.layerwise.products import Product, refuse_unseen, refuse_written, version_of
from fastjac.layerwise.reasons import (
    HIDDEN,
    NOT_CALLED,
    NOT_FOLLOWED,
    NOT_FOLLOWED_NORM,
    UNKNOWN_WEIGHT,
    without_gradient,
    without_samples,
)
from fastjac.layerwise.sequence import Run
from fastjac.layerwise.sharded import sharding
from fastjac.layerwise.sight import Sight
from fastjac.model_output import Part, part_of
from fastjac.ops.autograd import transformed
from fastjac.torch_private import saved_tensor_hooks, transforms_active, tree_leaves


@dataclass(slots=True)
class Term:
    """The result of a penalty at one call of a layer."""

    call: LayerCall
    result: Tensor  # in the graph that the gradient of the penalty goes through


class LayerStatistic:
    """The part of a layer-wise penalty that a pass calls."""

    include_output: bool
    output: Part  # the part of what the model returns that `include_output` is about
    compute: Callable[[Any, Tensor], Tensor | None] | None = None
    """``compute(module, x)``, if the penalty computes the outputs of plain Linear and convolution
    modules itself. It returns None for a call that the module should compute."""

    def wanted(self) -> str:
        """Says what the next pass of the attached model is.

        ``"yes"`` if it counts, ``"later"`` if `every` skips it, ``"no"`` if it does not count.
        """
        raise NotImplementedError

    def before_pass(self, seen: Pass) -> None:
        """Called before the model runs, and before a checkpoint recomputes a part of it."""

    def at_layer(
        self, seen: Pass, call: LayerCall, phi: Nonlinearity, a: Tensor | None
    ) -> tuple[Tensor, Term]:
        """``φ(z)`` for the output z of the call (which is a, if that is given), and the term."""
        raise NotImplementedError

    def of_run(self, calls: list[LayerCall], total: Tensor, tables: list[Table]) -> list[Any]:
        """The terms of the layers of a run, if the statistic sets `Pass.running`."""
        raise NotImplementedError

    def at_output(self, seen: Pass, call: LayerCall) -> Term:
        """The term of the output layer, which no activation follows."""
        raise NotImplementedError

    def finish(self, seen: Pass, batch: int) -> Any:
        """The penalty of the samples, from the terms of the pass."""
        raise NotImplementedError


class Pass:
    """The layers and the terms of one run of the model."""

    def __init__(
        self,
        statistic: LayerStatistic,
        layers: dict[nn.Module, str],
        *,
        attached: bool,
        task: int = -1,
    ) -> None:
        # None after the run: a pass that is kept does not keep the penalty alive.
        self.statistic: Any = statistic
        self.layers = layers  # all layers of the model, with their names
        self.attached = attached
        self.task = task  # the backward in which a checkpoint recomputes; −1 in other passes
        self.compute = statistic.compute
        self.include_output = statistic.include_output
        self.wanted: Any = None  # belongs to the statistic, which sets it in `before_pass`
        self.compiling = torch.compiler.is_compiling()
        self.grad = torch.is_grad_enabled()
        self.transformed = transformed()
        self.sharded = sharding()  # whether FSDP gathers and frees the weights
        self.calls: list[LayerCall] = []
        self.left_out: list[tuple[str, str]] = []  # (name, reason) of the layers without a term
        self.batch: int | None = None  # the number of samples; None if it cannot be told
        self.ends_in_layer = False  # whether the output of the model is that of a layer
        self.terms: list[Any] = []  # of `Term`
        self.postponed: list[tuple[LayerCall, Nonlinearity]] = []
        self.activated: list[Tensor] = []  # the outputs of the activations, with include_output
        self.ran: set[nn.Module] = set()
        self.inside = 0  # the number of activations and norms that are running
        self.in_layer = False  # whether the forward of a layer is running
        # For `calls.Calls`, which sees the functions that the model calls:
        self.names = set(layers.values())
        self.pending: dict[int, LayerCall] = {}  # by the id of z
        self.owners: dict[nn.Parameter, tuple[str, Any]] = {}  # the name and module of a weight
        self.products: dict[Any, Layer] = {}  # the layers that are functions
        self.looks = False  # whether functions are seen
        self.hides = (
            False  # whether they cannot be, since a part of the model is compiled by itself
        )
        self.sight: Sight | None = None  # of an attached model, not compiled
        self.within = False  # whether the model runs in a pass of another penalty too
        self.follows = False  # whether a view or a multiple of an output is followed
        self.functions = False  # whether a function took part in a term
        self.thread = 0 if self.compiling else get_ident()
        # For the row norms of all layers at once (`statistics.norms_of_rows_at_once`):
        self.whole: list[Layer] = []  # the layers that are one node with their term
        self.whole_before: list[Layer] = []  # those of the previous pass
        self.taps: dict[Layer, Any] = {}  # (identity of the weight, a view of it, its row norms)
        # Whether all terms have one factor. A layer on a CPU then adds its term to the total of
        # those before it, in its own node, instead of `finish` in nodes of its own.
        self.running = False
        self.totals: dict[torch.dtype, Tensor] = {}  # by the dtype of z
        self.added = 0  # the number of these layers

    # ---- what the forwards report

    def layer_ran(
        self, layer: Layer, x: Tensor, z: Tensor, products: list[Product] | None
    ) -> LayerCall | None:
        module, groups = layer.module, 1
        if products is None:
            weight = module._parameters.get("weight")
            if weight is None:  # pruned, or replaced by functional_call
                weight = module.weight
            groups = 1 if layer.linear else module.groups
        else:
            product = layer.product_of(z, products)
            if product is None:
                self.ran.add(module)
                self.left_out.append((layer.name, UNKNOWN_WEIGHT))
                return None
            weight, groups = product.weight, product.groups
        if type(weight) is not nn.Parameter and not layer.hooked and is_dtensor(weight):
            raise RuntimeError(
                f"layer {layer.name}: its weight became a DTensor (tensor parallel) after the "
                "penalty was attached: attach the penalty after parallelize_module"
            )
        if self.compiling:
            call = LayerCall(layer, weight, version_of(z), -1, -1, groups)
        else:
            versions = z._version, weight._version, x._version
            call = LayerCall(layer, weight, *versions, groups)
            self.pending[id(z)] = call
        call.x, call.z = x, z
        self.calls.append(call)
        return call

    @property
    def sequences(self) -> bool:
        return self.running and self.grad and not (self.include_output or self.inside)

    def run_ran(self, run: Run, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        calls = run.calls(x, weights)
        a, total, tables = run(x, self.totals.get(x.dtype), weights, biases)
        self.calls += calls
        if self.task == -1:
            self.totals[x.dtype] = total
            self.added += len(calls)
            self.terms += self.statistic.of_run(calls, total, tables)
        return a

    def output_replaced(self, layer: Layer, z: Tensor) -> None:
        calls = [c for c in self.calls if c.layer is layer]
        if calls and not calls[-1].used:
            calls[-1].z, calls[-1].version = z, z._version
            self.pending[id(z)] = calls[-1]

    def find(self, z: Any, folded: bool = False) -> LayerCall | None:
        if self.inside:
            return None
        if self.compiling:
            for call in reversed(self.calls):
                if call.z is z and call.folded <= folded:
                    refuse_written(z, call.name)
                    return call
            return None
        found = self.pending.get(id(z))
        if found is None or not (found.z is z or found.is_output(z)) or found.folded > folded:
            return None
        # After ``out += skip`` it is the same object with other values.
        return found if found.version == z._version else None

    def norm_ran(self, call: LayerCall, norm: Norm, y: Tensor, function: bool = False) -> None:
        call.used = True
        if call.function:
            call.use()
        version = version_of(y) if self.compiling else y._version
        after = replace(call, version=version, used=False, parent=None)
        after.x, after.z, after.norm, after.before_norm = call.x, y, norm, call.z
        after.function = call.function or function
        if not self.compiling and not self.transformed:
            after.normed = batch_normed(y, norm)
        self.calls.append(after)
        if not self.compiling:
            self.pending[id(y)] = after
            call.release()

    def activate(self, call: LayerCall, phi: Nonlinearity, a: Tensor | None) -> Tensor:
        original = call.z
        needed = self.grad and not original.requires_grad and call.weight.requires_grad
        # Under torch.func, requires_grad does not say whether there is a gradient.
        if needed and not transforms_active():
            raise without_gradient(call)
        if original.dim() < 2:
            raise without_samples(call)
        call.used = True
        if call.function:
            call.use()
            self.functions = True
        in_place = a is None and phi.overwrites()
        if in_place:  # the penalty needs z, and the model expects that it is overwritten
            call.z = original.clone()
            call.version = call.version if self.compiling else call.z._version
        postponed = not self.attached and saved_tensor_hooks() is not None
        self.inside += 1  # a module may call other activations
        try:
            if a is None and (phi.fn is None or postponed):
                a = phi.value(call.z.clone() if in_place else call.z)
                call.check_unchanged()  # or the slope would be that of another z
            if postponed:
                # The recomputation by the checkpoint comes when the model is not watched any more,
                # and must do the same operations. So the term is computed after the model has run.
                self.postponed.append((call, phi))
                assert a is not None
            else:
                try:
                    a, term = self.statistic.at_layer(self, call, phi, a)
                finally:  # a checkpoint ends its recomputation by an exception
                    if not self.compiling:
                        call.release()
                # A recomputation makes the same operations, and its terms are not used.
                if self.task == -1:
                    self.terms.append(term)
                    if self.include_output:
                        self.activated.append(a)
            return original.copy_(a) if in_place else a
        finally:
            self.inside -= 1

    # ---- after the run

    def spent(self) -> bool:
        """Whether autograd can no longer go back through this pass."""
        if self.transformed or any(c.weight._version != c.weight_version for c in self.calls):
            return True
        try:
            for term in self.terms:
                # The raw tensors, since unpacking them would make a checkpoint recompute.
                _ = getattr(term.result.grad_fn, "_raw_saved_tensors", None)
        except RuntimeError:  # a backward has freed them
            return True
        return False

    def complete(self, statistic: LayerStatistic, output: Any) -> None:
        """Computes the terms that are missing, and notes which layers have none."""
        for call, phi in self.postponed:
            a, term = statistic.at_layer(self, call, phi, call.z)
            self.terms.append(term)
            if self.include_output:
                self.activated.append(a)
        if statistic.output is not None:
            output = part_of(output, statistic.output)
        outputs = [output] if isinstance(output, Tensor) else tree_leaves(output)
        sight = self.sight
        left_out, ran = self.left_out, self.ran
        ends: list[LayerCall] = []
        if self.follows:
            for call in self.calls:
                if call.parent is not None and not call.used and any(call.z is t for t in outputs):
                    ends.append(call)
                    call.use()
        for call in self.calls:
            if call.layer.module is not None:
                ran.add(call.layer.module)
            if call.used and not (ends and any(call is end for end in ends)):
                continue
            if self.compiling:
                refuse_unseen(call.z, call.name)
            if not any(call.z is t for t in outputs):
                if call.parent is None:
                    reason = NOT_FOLLOWED if call.norm is None else NOT_FOLLOWED_NORM
                    if call.taken:
                        reason = f"{reason}, but {call.taken}"
                    elif sight is not None and not self.looks:
                        known = sight.reasons.get(call.name)
                        if known is None:
                            sight.unknown.add(call.name)
                        reason = known or reason
                    left_out.append((call.name, reason + HIDDEN if self.hides else reason))
            elif self.include_output and call.norm is None:
                self.ends_in_layer = True
                self.terms.append(statistic.at_output(self, call))
            else:
                left_out.append((call.name, "output layer (include_output=False)"))
            if not self.compiling:
                call.release()
        if len(ran) < len(self.layers):
            missing = [name for module, name in self.layers.items() if module not in ran]
            left_out += [(name, NOT_CALLED) for name in missing]
        if any(a is t for a in self.activated for t in outputs):
            self.ends_in_layer = True
        self.activated = []
        if self.compiling:  # or these tensors would be outputs of the graph, which get gradients
            for call in self.calls:
                call.release()
        if sight is not None and self.looks:
            sight.looked(self)
        elif sight is not None:
            sight.blind += 1
            sight.looks = bool(sight.unknown)
            left_out += sight.of_functions

    def fits(self, call: LayerCall) -> bool:
        """Whether dimension 0 of the output is the samples, as far as this is known."""
        shape = call.shape
        if len(shape) < 2 or (self.batch is not None and shape[0] != self.batch):
            return False
        return call.layer.linear or call.moved is not None or len(shape) == call.weight.dim()

    def check_samples(self) -> int:
        """The number of samples, which must be dimension 0 of the output of each layer."""
        batch = self.batch
        if batch is None:
            raise RuntimeError(
                "the model was called without a tensor that has a dimension 0, so the number of "
                "samples is not known: pass a tensor whose dimension 0 is the samples"
            )
        for term in self.terms:
            call = term.call
            if call.version >= 0:
                call.check_unchanged()
            shape = call.shape
            fits = len(shape) >= 2  # as `fits`, without a call
            if not call.layer.linear and call.moved is None:
                fits = len(shape) == call.weight.dim()
            if shape[0] != batch or not fits:
                raise RuntimeError(
                    f"layer {call.name}: its output has shape {tuple(shape)} and x has batch size "
                    f"{batch}: dimension 0 must be the samples in the whole model (x is the first "
                    "tensor that the model was called with)"
                )
        return batch


def samples_of(args: Any, kwargs: Any) -> int | None:
    """Dimension 0 of the first tensor that has one; None without such a tensor."""
    if args and isinstance(args[0], Tensor) and args[0].dim() > 0:  # most models: 10 µs less
        return args[0].shape[0]
    for t in tree_leaves((args, kwargs)):
        if isinstance(t, Tensor) and t.dim() > 0:
            return t.shape[0]
    return None
