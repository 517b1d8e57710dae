"""The statistic of a layer, ``Σ_p Σ_c φ'(z_npc)² ‖W_c‖²``, by the cheapest way that a call allows.

From the cheapest to the dearest: the layer and its activation as one autograd node (`layer_act`);
BatchNorm and activation as one node (`batch_norm_act`); the activation with the statistic in one
pass (`act_stats`); composed operations, for an activation that the table does not have or a weight
that is a DTensor.

Where the sum over the samples is all that is wanted, it is taken first: ``s_c = Σ_{n,p} φ'²`` comes
out of the pass that computes the activation, and ``Σ_c s_c ‖W_c‖²`` is a product of two vectors,
which `sums` takes for all layers together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjac.activations import IDS, get
from fastjac.distributed import is_dtensor
from fastjac.layerwise import sharded
from fastjac.layerwise.batch_norm import batch_norm_act
from fastjac.layerwise.layer_act import LayerActOptions, apply_layer_act, layer_act
from fastjac.layerwise.layers import LayerCall, Nonlinearity, conv_options
from fastjac.layerwise.norms import Gain, norm_gain
from fastjac.layerwise.passes import Pass, Term
from fastjac.ops import act_stats, row_sqnorm
from fastjac.ops.dispatch import OPS, accumulate_dtype
from fastjac.ops.registration import suffix_of
from fastjac.ops.row_sqnorm import rows_in_memory, tapped
from fastjac.torch_private import saved_tensor_hooks

NO_GAIN = Gain()
TAPPED = {"cuda"}
"""Types of devices where launches count, so that all row norms come from one."""


class Wanted(NamedTuple):
    """What a penalty wants of each layer."""

    per_sample: bool  # the statistic of each sample, not its sum over the samples
    use_weight: bool  # False: without ``‖W_c‖²`` and the gain of a norm


@dataclass(slots=True)
class Statistic(Term):
    """The term of a layer.

    ``result`` is the statistic, per sample ``[N]`` or summed over the samples. If ``by_channel``,
    it is ``s`` instead, ``[C]``, whose product with the row norms ``r = ‖W_c‖²`` is to be taken.
    """

    by_channel: bool = False
    r: Tensor | None = None  # the row norms, where they are known
    gain: Gain = NO_GAIN  # of the norm: the r that is to be computed is multiplied by it
    impl: str = "auto"  # by which the r is to be computed
    whole_shape: Any = None  # of the whole z, where the call has a part of it
    share: Tensor | None = None  # of the value, detached: its sum counts

    @property
    def shape(self) -> Any:
        return self.call.shape if self.whole_shape is None else self.whole_shape

    @property
    def units(self) -> int:
        """The number of units, or output channels, of the layer."""
        return self.shape[-1] if self.call.layer.linear else self.shape[1]

    @property
    def positions(self) -> int:
        """The number of output positions of each sample."""
        return positions(self.call, self.shape)

    @property
    def elements(self) -> int:
        """The number of elements of the weight."""
        return self.call.weight.numel()


def positions(call: LayerCall, shape: Sequence[int]) -> int:
    return math.prod(shape[1:-1] if call.layer.linear else shape[2:])


def at_layer(
    seen: Pass, call: LayerCall, phi: Nonlinearity, a: Tensor | None
) -> tuple[Tensor, Statistic]:
    """``φ(z)`` (a, where that is given), and the statistic of the layer."""
    wanted, options = seen.wanted, None
    if seen.sharded:
        sharded.check_gathered(call)
    if a is None and call.norm is None and seen.grad and not seen.transformed:
        options = _one_node(call, phi, seen.compiling, wanted)
    if options is not None:
        weight, r = call.weight, None
        tap = seen.taps.get(call.layer) if seen.taps else None
        # Of this very weight, and not in a checkpoint, which would have to recompute it.
        if tap is not None and tap[0] == identity(weight) and saved_tensor_hooks() is None:
            weight, r = tap[1:]
            options = options._replace(rows=False)
        run = layer_act if seen.compiling else apply_layer_act
        a, v = run(call.x, weight, call.layer.module.bias, call.z.detach(), options)
        seen.whole.append(call.layer)
        term = Statistic(call, v) if r is None else Statistic(call, v, by_channel=True, r=r)
    elif call.layer.hooked and is_dtensor(call.weight):
        a, term = _of_shards(call, phi, a, wanted)
    elif a is None and _after_batch_norm(seen, call, phi, wanted):
        a, term = _norm_node(call, phi, wanted)
    else:
        a, term = (_composed if phi.fn is None else _fused)(call, phi, a, wanted)
    if seen.sharded:
        if term.by_channel:
            (term.result,), term.by_channel = totals([term], wanted), False
        a, term.result = sharded.tied(a, term.result, call)
    return a, term


def at_output(seen: Pass, call: LayerCall) -> Statistic:
    """The statistic of the output layer, with ``φ' = 1``."""
    wanted = seen.wanted
    if seen.sharded:
        sharded.check_gathered(call)
    if is_dtensor(call.weight):
        return _output_of_shards(call, wanted)
    n, c = call.shape[0], call.shape[call.dim]
    gain = norm_gain(call) if wanted.use_weight else NO_GAIN
    if gain.place is None:  # every position counts alike
        z, factor = call.z, float(positions(call, call.shape))
        places = torch.full((n,), factor, dtype=accumulate_dtype(z.dtype), device=z.device)
    else:
        places = gain.place.flatten(1).sum(1)
    if wanted.per_sample:
        rows = _rows(call, "auto", gain, wanted)
        value = places * (c if rows is None else rows.sum())
        return Statistic(call, value, post=call.z)
    return Statistic(call, places.sum().expand(c), post=call.z, by_channel=True, gain=gain)


# ---- row norms, and sums over channels


def identity(weight: Tensor) -> tuple[int, int, int]:
    """What tells whether two uses of a weight found the same tensor with the same numbers in it:
    its id, where its memory is, and how often it was written to."""
    return id(weight), weight.data_ptr(), weight._version


def norms_of_rows_at_once(seen: Pass) -> None:
    """Compute the row norms of several weights in one launch, before the model runs.

    These are the weights of the layers that the last pass took whole (`layer_act`). Each layer then
    computes with a view of its weight, behind which one node adds all the gradients of the norms.
    """
    if seen.compiling or not seen.whole_before or not seen.grad or seen.transformed:
        return
    if seen.sharded:  # the weights are not all there
        return
    weights = {layer: layer.module.weight for layer in seen.whole_before}
    first = next(iter(weights.values()))
    if first.device.type not in TAPPED or seen.wanted.per_sample or not seen.wanted.use_weight:
        return
    kind = (first.dtype, first.device)
    weights = {
        layer: w
        for layer, w in weights.items()
        # What is not a leaf (pruning, weight norm) is made anew while the model runs.
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


def totals(terms: Sequence[Statistic], wanted: Wanted) -> list[Tensor]:
    """``Σ_l Σ_c s r`` of terms by channel, in as many operations as one layer takes.

    One number for each dtype of the weights and each implementation. Notes each layer's share.
    """
    found = []
    for kind in {(t.call.weight.dtype, t.impl): None for t in terms}:
        group = [t for t in terms if (t.call.weight.dtype, t.impl) == kind]
        sizes = [len(t.result) for t in group]
        product = torch.cat([t.result for t in group])
        if wanted.use_weight:
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
            t.share = share
        found.append(product.sum())
    return found


def _flat(parts: list[Tensor | None], sizes: list[int], like: Tensor) -> Tensor | None:
    """One vector of all parts, ones where there is none; None if there are none at all."""
    if all(p is None for p in parts):
        return None
    return torch.cat(
        [like.new_ones(n) if p is None else p for p, n in zip(parts, sizes, strict=True)]
    )


def _rows(call: LayerCall, impl: str, gain: Gain, wanted: Wanted) -> Tensor | None:
    """``k² ‖W_c‖²`` of each channel; None for 1."""
    if not wanted.use_weight:
        return None
    (rows,) = row_sqnorm([call.rows], impl=impl)
    rows = rows.to(accumulate_dtype(call.z.dtype))
    factor = gain.channel()
    return rows if factor is None else rows * factor


# ---- the ways to compute it


def _one_node(
    call: LayerCall, phi: Nonlinearity, compiling: bool, wanted: Wanted
) -> LayerActOptions | None:
    """What `layer_act` needs to do this layer whole; None where it cannot."""
    if compiling:
        return _plan(call, phi, wanted)
    # Hooks on z would see no gradient, and x must be what the layer computed with.
    z, x, layer = call.z, call.x, call.layer
    if x is None or z._backward_hooks or z.retains_grad or x._version != call.x_version:
        return None
    # All that decides it beside the layer and the activation.
    state = (
        wanted, z.dtype, z.device, call.weight.stride(),
        None if layer.linear else conv_options(layer.module),
    )  # fmt: skip
    memo = layer.memo.get(phi)
    if len(layer.memo) > 16:  # a parameter that is another number in each step
        layer.memo.clear()
    if memo is None or memo[0] != state:
        memo = layer.memo[phi] = state, _plan(call, phi, wanted)
    return memo[1]


def _plan(call: LayerCall, phi: Nonlinearity, wanted: Wanted) -> LayerActOptions | None:
    if wanted.per_sample or not wanted.use_weight or not call.layer.plain or call.layer.hooked:
        return None
    if phi.fn is None or not rows_in_memory(call.weight):
        return None
    impl = OPS["act_stats"].select(phi.impl, call.z.device, call.z.dtype)
    if impl == "reference":
        return None
    params = get(phi.fn).param_values(phi.params)
    options = conv_options(call.layer.module)
    return LayerActOptions(options, 1.0, IDS[phi.fn], params, suffix_of(impl), impl)


def _after_batch_norm(seen: Pass, call: LayerCall, phi: Nonlinearity, wanted: Wanted) -> bool:
    """Whether `batch_norm_act` can do the activation and the norm before it."""
    if call.normed is None or phi.fn is None or wanted.per_sample or not wanted.use_weight:
        return False
    y = call.z
    if not seen.grad or saved_tensor_hooks() is not None or y._backward_hooks or y.retains_grad:
        return False
    bias = call.norm.bias
    if bias is not None and bias._version != call.normed.bias_version:
        return False
    impl = OPS["act_stats"].select(phi.impl, y.device, y.dtype)
    return impl == "cpu" and call.normed.mean.dtype == accumulate_dtype(y.dtype)


def _norm_node(call: LayerCall, phi: Nonlinearity, wanted: Wanted) -> tuple[Tensor, Statistic]:
    assert phi.fn is not None and call.normed is not None
    node, norm, dtype = call.z.grad_fn, call.norm, call.normed.mean.dtype
    # What the norm computed with: torch raises here if one was written to since.
    z, gamma = node._saved_input, node._saved_weight
    gamma, beta = (None if t is None else t.to(dtype) for t in (gamma, norm.bias))
    options = (1.0, IDS[phi.fn], get(phi.fn).param_values(phi.params))
    a, s = batch_norm_act(z, gamma, beta, call.normed, *options)
    return a, Statistic(call, s, by_channel=True, gain=Gain(gamma), impl=phi.impl)


def _fused(
    call: LayerCall, phi: Nonlinearity, a: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Statistic]:
    assert phi.fn is not None
    z, dim = call.z, call.dim
    gain = norm_gain(call) if wanted.use_weight else NO_GAIN
    place = gain.place
    options = dict(scale=1.0, impl=phi.impl, **phi.params)
    if place is not None:  # each position is a sample of its own
        z, dim, place = z.flatten(0, -2), -1, place.flatten()
    if not wanted.per_sample:
        computed, s = act_stats(z, phi.fn, dim=dim, weights=place, **options)
        term = Statistic(call, s, by_channel=True, gain=gain, impl=phi.impl)
        return computed.view_as(call.z) if a is None else a, term
    rows = _rows(call, phi.impl, gain, wanted)
    computed, t = act_stats(z, phi.fn, dim=dim, per="sample", weights=rows, **options)
    if place is not None:
        t = (t * place).view(call.shape[0], positions(call, call.shape)).sum(1)
    return computed.view_as(call.z) if a is None else a, Statistic(call, t)


def _composed(
    call: LayerCall, phi: Nonlinearity, a: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Statistic]:
    """The same for an activation that the table does not have."""
    assert a is not None
    dtype = accumulate_dtype(call.z.dtype)
    squares = phi.derivative(call.z).to(dtype).square().movedim(call.dim, -1)
    gain = norm_gain(call) if wanted.use_weight else NO_GAIN
    if gain.place is not None:
        squares = squares * gain.place.unsqueeze(-1)
    s = squares.flatten(1, -2).sum(1) if squares.dim() > 2 else squares  # [N, C]
    if not wanted.per_sample:
        return a, Statistic(call, s.sum(0), by_channel=True, gain=gain)
    rows = _rows(call, phi.impl, gain, wanted)
    return a, Statistic(call, (s if rows is None else s * rows).sum(1))


def _of_shards(
    call: LayerCall, phi: Nonlinearity, a: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Statistic]:
    """The same for a weight that is a DTensor."""
    s, shape = sharded.units_squared(call, phi)
    if a is None:
        a = phi.run(call.z.clone() if getattr(phi.module, "inplace", False) else call.z)
    product = s if wanted.per_sample else s.sum(0)
    product = product * sharded.row_norms(call, phi.impl) if wanted.use_weight else product
    return a, Statistic(call, sharded.whole(product.sum(-1)), whole_shape=shape)


def _output_of_shards(call: LayerCall, wanted: Wanted) -> Statistic:
    n, *places, c = shape = sharded.layout_of(call).shape
    total = torch.ones((), dtype=accumulate_dtype(call.z.dtype)) * c
    if wanted.use_weight:
        total = sharded.whole(sharded.row_norms(call).sum())
    total = total * math.prod(places)
    value = total.expand(n) if wanted.per_sample else total * n
    return Statistic(call, value, post=call.z, whole_shape=shape)
