"""The statistic of a layer, ``Σ_p Σ_c φ'(z_npc)² ‖W_c‖²``, by the cheapest way that a call allows.

From the best: the layer and its activation as one node (`layer_act`), BatchNorm and activation as
one (`batch_norm_act`), the activation's pass with the statistic (`act_stats`), composed operations
for an activation that the table does not have or a weight that is a DTensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import IDS, get
from fastjac.distributed import is_dtensor
from fastjac.layerwise import sharded
from fastjac.layerwise.batch_norm import batch_norm_act
from fastjac.layerwise.layer_act import Layer, apply_layer_act, layer_act
from fastjac.layerwise.layers import (
    Call,
    Gain,
    Phi,
    conv_options,
    norm_gain,
    saved_tensor_hooks,
)
from fastjac.layerwise.penalty import LayerPenalty
from fastjac.layerwise.watch import Pass
from fastjac.ops import act_stats, row_sqnorm
from fastjac.ops.dispatch import OPS, accumulate_dtype
from fastjac.ops.registration import suffix_of
from fastjac.ops.row_sqnorm import rows_in_memory, tapped

NO_GAIN = Gain()


def identity(weight: Tensor) -> tuple[int, int, int]:
    """The tensor, its memory and what was written to it."""
    return id(weight), weight.data_ptr(), weight._version


@dataclass(slots=True)
class Term:
    """One layer's share, before the division by ``divisor``."""

    call: Call
    divisor: float
    value: Tensor | None = None  # per sample [N], or summed over them; None: Σ_c s_c r_c to come
    s: Tensor | None = None  # Σ_{n,p} φ'² per channel
    r: Tensor | None = None  # ‖W_c‖², where it is known
    gain: Gain = NO_GAIN  # of the norm, for the r to come
    impl: str = "auto"  # for the r to come
    post: Tensor | None = None  # the output of the activation


class LayerStatistics(LayerPenalty):
    """Base of the penalties that are sums of the statistic over layers."""

    over: str  # options of the subclass
    positions: str
    use_weight: bool
    squared: bool

    _tap_on_cpu = False  # for tests: what a GPU would do

    @property
    def per_sample_wanted(self) -> bool:
        """Whether the sum over samples comes last: else it is taken in the pass over z."""
        return not self.squared or self.reduction == "none"

    def on_layer(self, seen: Pass, call: Call, phi: Phi, a: Tensor | None) -> Tensor:
        if seen.sharded:
            sharded.check_gathered(call)
        a, term = self._statistic(seen, call, phi, a)
        if seen.sharded:
            if term.value is None:
                term.value = self.dots([term], {})[0]
            a, term.value = sharded.tied(a, term.value, call)
        if not seen.dry:
            term.post = a if self.include_output else None
            seen.terms.append(term)
        return a

    def _statistic(self, seen: Pass, call: Call, phi: Phi, a: Tensor | None) -> tuple[Tensor, Term]:
        if is_dtensor(call.weight):
            return self._of_shards(call, phi, a)
        layer = None
        if a is None and call.norm is None and seen.grad and not seen.transformed:
            layer = self._one_node(call, phi, seen.compiling)
        if layer is not None:
            weight, r = call.weight, None
            tap = seen.taps.get(call.layer) if seen.taps else None
            # Of this very weight, and not in a checkpoint, which would have to recompute it.
            if tap is not None and tap[0] == identity(weight) and not saved_tensor_hooks():
                weight, r = tap[1:]
                layer = layer._replace(rows=False)
            z, divisor = call.z.detach(), self._divisor(call)
            run = layer_act if seen.compiling else apply_layer_act
            a, v = run(call.x, weight, call.layer.module.bias, z, layer)
            term = Term(call, divisor, v) if r is None else Term(call, divisor, s=v, r=r)
            seen.whole.append(call.layer)
        elif a is None and self._after_batch_norm(seen, call, phi):
            a, term = self._norm_node(call, phi)
        else:
            statistic = self._composed if phi.fn is None else self._fused
            term, computed = statistic(call, phi, a)
            a = computed if a is None else a
        return a, term

    def before_pass(self, seen: Pass) -> None:
        """On a GPU, where launches count: the row norms of all layers from one.

        The layers are those that the last pass took whole (`layer_act`), each with one weight.
        """
        assert self._watch is not None
        if seen.compiling or not self._watch.whole or not seen.grad or seen.transformed:
            return
        if seen.sharded:  # the weights are not all there
            return
        weights = {layer: layer.module.weight for layer in self._watch.whole}
        first = next(iter(weights.values()))
        if not (first.is_cuda or self._tap_on_cpu) or self.per_sample_wanted or not self.use_weight:
            return
        kind = (first.dtype, first.device)
        weights = {
            layer: w
            for layer, w in weights.items()
            # What is no leaf (pruning, weight norm) is made anew while the model runs.
            if w.is_leaf and (w.dtype, w.device) == kind and rows_in_memory(w)
        }
        if not weights:
            return
        suffix = suffix_of(OPS["row_sqnorm"].select("auto", *reversed(kind)))
        rows, views = tapped(list(weights.values()), suffix)
        seen.taps = {
            layer: (identity(w), view, r)
            for (layer, w), view, r in zip(weights.items(), views, rows, strict=True)
        }

    def _one_node(self, call: Call, phi: Phi, compiling: bool) -> Layer | None:
        """What `layer_act` needs to do this layer whole; None where it cannot."""
        if compiling:
            return self._plan(call, phi)
        # Hooks on z would see no gradient, and x must be what the layer computed with.
        z, x = call.z, call.x
        if x is None or z._backward_hooks or z.retains_grad or x._version != call.x_version:
            return None
        # All that decides it beside the layer and the activation.
        state = (
            self.reduction, self.squared, self.use_weight,
            call.z.dtype, call.z.device, call.weight.stride(),
            None if call.layer.linear else conv_options(call.layer.module),
        )  # fmt: skip
        memo = call.layer.memo.get(phi)
        if len(call.layer.memo) > 16:  # a parameter that is another number in each step
            call.layer.memo.clear()
        if memo is None or memo[0] != state:
            memo = call.layer.memo[phi] = state, self._plan(call, phi)
        return memo[1]

    def _plan(self, call: Call, phi: Phi) -> Layer | None:
        if self.per_sample_wanted or not self.use_weight or not call.layer.plain_layer:
            return None
        if phi.fn is None or not rows_in_memory(call.weight):
            return None
        impl = OPS["act_stats"].select(phi.impl, call.z.device, call.z.dtype)
        if impl == "reference":
            return None
        params = get(phi.fn).param_values(phi.params)
        options = conv_options(call.layer.module)
        return Layer(options, 1.0, IDS[phi.fn], params, suffix_of(impl), impl)

    def _after_batch_norm(self, seen: Pass, call: Call, phi: Phi) -> bool:
        """Whether `batch_norm_act` can do the activation and the norm before it."""
        if call.normed is None or phi.fn is None or self.per_sample_wanted or not self.use_weight:
            return False
        y = call.z
        if not seen.grad or saved_tensor_hooks() or y._backward_hooks or y.retains_grad:
            return False
        bias = call.norm.bias
        if bias is not None and bias._version != call.normed.bias_version:
            return False
        impl = OPS["act_stats"].select(phi.impl, y.device, y.dtype)
        return impl == "cpu" and call.normed.mean.dtype == accumulate_dtype(y.dtype)

    def _norm_node(self, call: Call, phi: Phi) -> tuple[Tensor, Term]:
        assert phi.fn is not None and call.normed is not None
        node, norm, dtype = call.z.grad_fn, call.norm, call.normed.mean.dtype
        # What the norm computed with: torch raises here if one was written to since.
        z, gamma = node._saved_input, node._saved_weight
        gamma, beta = (None if t is None else t.to(dtype) for t in (gamma, norm.bias))
        params = get(phi.fn).param_values(phi.params)
        a, s = batch_norm_act(z, gamma, beta, call.normed, 1.0, IDS[phi.fn], params)
        return a, Term(call, self._divisor(call), s=s, gain=Gain(gamma), impl=phi.impl)

    def _fused(self, call: Call, phi: Phi, a: Tensor | None) -> tuple[Term, Tensor]:
        assert phi.fn is not None
        z, divisor = call.z, self._divisor(call)
        gain = norm_gain(call) if self.use_weight else NO_GAIN
        place = gain.place
        options = dict(scale=1.0, impl=phi.impl, **phi.params)
        dim = call.dim
        if place is not None:  # each position is a sample of its own
            z, dim, place = z.flatten(0, -2), -1, place.flatten()
        if not self.per_sample_wanted:
            computed, s = act_stats(z, phi.fn, dim=dim, weights=place, **options)
            return Term(call, divisor, s=s, gain=gain, impl=phi.impl), computed.view_as(call.z)
        rows = self._rows(call, phi, gain)
        computed, t = act_stats(z, phi.fn, dim=dim, per="sample", weights=rows, **options)
        if place is not None:
            t = (t * place).view(call.z.shape[0], call.positions).sum(1)
        return Term(call, divisor, t), computed.view_as(call.z)

    def _composed(self, call: Call, phi: Phi, a: Tensor | None) -> tuple[Term, Tensor]:
        """The same for an activation that the table does not have."""
        assert a is not None
        dtype = accumulate_dtype(call.z.dtype)
        squares = phi.derivative(call.z).to(dtype).square().movedim(call.dim, -1)
        gain = norm_gain(call) if self.use_weight else NO_GAIN
        if gain.place is not None:
            squares = squares * gain.place.unsqueeze(-1)
        s = squares.flatten(1, -2).sum(1) if squares.dim() > 2 else squares  # [N, C]
        if not self.per_sample_wanted:
            return Term(call, self._divisor(call), s=s.sum(0), gain=gain), a
        rows = self._rows(call, phi, gain)
        t = (s if rows is None else s * rows).sum(1)
        return Term(call, self._divisor(call), t), a

    def _of_shards(self, call: Call, phi: Phi, a: Tensor | None) -> tuple[Tensor, Term]:
        """The same for a weight that is a DTensor."""
        s, shape = sharded.units_squared(call, phi)
        if a is None:
            a = phi.run(call.z.clone() if getattr(phi.module, "inplace", False) else call.z)
        product = s if self.per_sample_wanted else s.sum(0)
        product = product * sharded.row_norms(call, phi.impl) if self.use_weight else product
        return a, Term(call, self._divisor(call, shape), sharded.whole(product.sum(-1)))

    def output_term(self, seen: Pass, call: Call) -> None:
        if seen.sharded:
            sharded.check_gathered(call)
        if is_dtensor(call.weight):
            self._output_of_shards(seen, call)
            return
        n, c = call.z.shape[0], call.z.shape[call.dim]
        gain = norm_gain(call) if self.use_weight else NO_GAIN
        dtype = accumulate_dtype(call.z.dtype)
        if gain.place is None:  # φ' = 1: every position counts alike
            places = torch.full((n,), float(call.positions), dtype=dtype, device=call.z.device)
        else:
            places = gain.place.flatten(1).sum(1)
        term = Term(call, self._divisor(call), gain=gain, post=call.z)
        if self.per_sample_wanted:
            rows = self._rows(call, None, gain)
            term.value = places * (c if rows is None else rows.sum())
        else:
            term.s = places.sum().expand(c)
        seen.terms.append(term)

    def _output_of_shards(self, seen: Pass, call: Call) -> None:
        n, *positions, c = shape = sharded.layout_of(call).shape
        total = torch.ones((), dtype=accumulate_dtype(call.z.dtype)) * c
        if self.use_weight:
            total = sharded.whole(sharded.row_norms(call).sum())
        total = total * math.prod(positions)
        value = total.expand(n) if self.per_sample_wanted else total * n
        seen.terms.append(Term(call, self._divisor(call, shape), value, post=call.z))

    def _divisor(self, call: Call, shape: Any = None) -> float:
        """``shape``: of the whole z, where the call has a part of it."""
        if self.over == self.positions == "sum":
            return 1.0
        shape = call.z.shape if shape is None else shape
        units, positions = shape[call.dim], call.positions
        if shape != call.z.shape:
            positions = math.prod(shape[1:-1])
        count = {"sum": 1, "units": units, "elements": call.weight.numel()}
        return float(count[self.over] * (positions if self.positions == "mean" else 1))

    def _rows(self, call: Call, phi: Phi | None, gain: Gain) -> Tensor | None:
        if not self.use_weight:
            return None
        (rows,) = row_sqnorm([call.rows], impl="auto" if phi is None else phi.impl)
        rows = rows.to(accumulate_dtype(call.z.dtype))
        factor = gain.channel()
        return rows if factor is None else rows * factor

    def dots(self, terms: list[Term], shares: dict[int, Tensor]) -> list[Tensor]:
        """``Σ_l Σ_c s r``, in as many operations as one layer takes, for each dtype and impl.

        Puts each layer's products into ``shares``.
        """
        totals = []
        for kind in {(t.call.weight.dtype, t.impl): None for t in terms}:
            group = [t for t in terms if (t.call.weight.dtype, t.impl) == kind]
            parts = [t.s for t in group if t.s is not None]
            sizes = [len(s) for s in parts]
            product = torch.cat(parts)
            if self.use_weight:
                missing = [t for t in group if t.r is None]
                rows = row_sqnorm([t.call.rows for t in missing], impl=kind[1]) if missing else []
                for t, r in zip(missing, rows, strict=True):
                    t.r = r
                product = product * torch.cat([t.r for t in group if t.r is not None])
                gammas = _flat([t.gain.gamma for t in group], sizes, product)
                inverses = _flat([t.gain.inverse for t in group], sizes, product)
                product = product if gammas is None else product * gammas.square()
                product = product if inverses is None else product * inverses
            for t, share in zip(group, product.detach().split(sizes), strict=True):
                shares[id(t)] = share
            totals.append(product.sum())
        return totals


def _flat(parts: list[Tensor | None], sizes: list[int], like: Tensor) -> Tensor | None:
    """One vector of all parts, ones where there is none; None if there are none at all."""
    if all(p is None for p in parts):
        return None
    return torch.cat(
        [like.new_ones(n) if p is None else p for p, n in zip(parts, sizes, strict=True)]
    )
