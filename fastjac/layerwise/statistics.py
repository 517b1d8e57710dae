"""The statistic of a layer, ``Σ_p Σ_c φ'(z_npc)² ‖W_c‖²``, in the cheapest way that a call allows.

The ways, the cheapest first: the layer and its activation as one autograd node (`layer_act`);
BatchNorm and activation as one node (`batch_norm_act`); the activation and the statistic in one
pass (`act_stats`); composed operations, if the table does not have the activation or the weight is
a DTensor. Small layers of an ``nn.Sequential`` do not come here (`sequence`).

If only the sum over the samples is needed, it is taken first: the pass that computes the activation
returns ``s_c = Σ_{n,p} φ'²``, and ``Σ_c s_c ‖W_c‖²`` is a product of two vectors, which `sums`
takes for all layers together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import IDS, get
from fastjac.distributed import is_dtensor
from fastjac.layerwise import sharded
from fastjac.layerwise.batch_norm import batch_norm_act
from fastjac.layerwise.layer_act import LayerActOptions, apply_layer_act, layer_act
from fastjac.layerwise.layers import LayerCall, Nonlinearity, Table, conv_options
from fastjac.layerwise.norms import Gain, norm_gain
from fastjac.layerwise.passes import Pass
from fastjac.layerwise.terms import NO_GAIN, Statistic, Wanted, positions
from fastjac.ops.act_stats import act_stats
from fastjac.ops.dispatch import OPS, accumulate_dtype
from fastjac.ops.registration import suffix_of
from fastjac.ops.row_sqnorm import or_auto, row_sqnorm, rows_in_memory, tapped
from fastjac.torch_private import saved_tensor_hooks

TAPPED = {"cuda"}
"""The types of devices on which one launch computes the row norms of all layers."""


def at_layer(
    seen: Pass, call: LayerCall, phi: Nonlinearity, a: Tensor | None
) -> tuple[Tensor, Statistic]:
    """``φ(z)``, which is a if that is given, and the statistic of the layer."""
    wanted, found = seen.wanted, None
    if seen.sharded:
        sharded.check_gathered(call)
    direct = call.norm is None and call.parent is None
    if a is None and direct and seen.grad and not seen.transformed:
        found = _one_node(seen, call, phi, wanted)
        if found is not None and not seen.sharded:
            return found
    if found is not None:
        a, term = found
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


def of_run(calls: list[LayerCall], total: Tensor, tables: list[Table]) -> list[Statistic]:
    """The statistics of the layers of a `sequence.Run`."""
    return [Statistic(call, total, table=t) for call, t in zip(calls, tables, strict=True)]


def at_output(seen: Pass, call: LayerCall) -> Statistic:
    """The statistic of the output layer, with ``φ' = 1``."""
    wanted = seen.wanted
    if seen.sharded:
        sharded.check_gathered(call)
    if is_dtensor(call.weight):
        return _output_of_shards(call, wanted)
    n, c = call.shape[0], call.shape[call.dim]
    gain = norm_gain(call) if wanted.use_weight else NO_GAIN
    scale = _scale(call, wanted)
    if gain.group is not None:
        s = gain.group * (scale * positions(call, call.shape))  # [N, C]
        return _of_units(call, s, gain, wanted)
    if gain.place is None:  # all positions have the same factor
        z, factor = call.z, scale * positions(call, call.shape)
        places = torch.full((n,), factor, dtype=accumulate_dtype(z.dtype), device=z.device)
    else:
        places = gain.place.flatten(1).sum(1) * scale
    if wanted.per_sample:
        rows = _rows(call, "auto", gain, wanted)
        value = places * (c if rows is None else rows.sum())
        return Statistic(call, value)
    return Statistic(call, places.sum().expand(c), by_channel=True, gain=gain)


# ---- row norms, and sums over channels


def identity(weight: Tensor) -> tuple[int, int, int]:
    """The id, the address and the version: equal if the tensor and its values are the same."""
    return id(weight), weight.data_ptr(), weight._version


def norms_of_rows_at_once(seen: Pass) -> None:
    """Computes the row norms of several weights in one launch, before the model runs.

    These are the weights of the layers that the last pass computed by `layer_act`. Each layer then
    computes with a view of its weight; one node behind all views adds the gradients of the norms.
    """
    if seen.compiling or not seen.grad or seen.transformed:
        return
    if seen.sharded:  # some weights are freed
        return
    first = seen.whole_before[0].module.weight
    if first.device.type not in TAPPED or seen.wanted.per_sample or not seen.wanted.use_weight:
        return
    weights = {layer: layer.module.weight for layer in seen.whole_before}
    kind = (first.dtype, first.device)
    weights = {
        layer: w
        for layer, w in weights.items()
        # A weight that is not a leaf (pruning, weight norm) is computed again in each run.
        if w.is_leaf and (w.dtype, w.device) == kind and rows_in_memory(w)
    }
    if not weights:
        return
    impl = OPS["row_sqnorm"].select("auto", first.device, first.dtype)
    rows, views = tapped(list(weights.values()), impl)
    seen.taps = {
        layer: (identity(w), view, r)
        for (layer, w), view, r in zip(weights.items(), views, rows, strict=True)
    }


def totals(terms: Sequence[Statistic], wanted: Wanted) -> list[Tensor]:
    """``Σ_l Σ_c s r`` of terms by channel, in as many operations as for one layer.

    Returns one number for each dtype of the weights and each implementation. The ``result`` of each
    term becomes the detached product ``s r``, whose sum is the share of the layer.
    """
    found = []
    for kind in {(t.call.weight.dtype, t.impl): None for t in terms}:
        group = [t for t in terms if (t.call.weight.dtype, t.impl) == kind]
        sizes = [t.result.shape[0] for t in group]
        product = torch.cat([t.result for t in group])
        if wanted.use_weight:
            missing = [t for t in group if t.r is None]
            impl = or_auto(kind[1])
            rows = row_sqnorm([t.call.rows for t in missing], impl=impl) if missing else []
            for t, r in zip(missing, rows, strict=True):
                t.r = r
            product = product * torch.cat([t.r for t in group if t.r is not None])
            gammas = _flat([t.gain.gamma for t in group], sizes, product)
            inverses = _flat([t.gain.inverse for t in group], sizes, product)
            product = product if gammas is None else product * gammas.square()
            product = product if inverses is None else product * inverses
        for t, share in zip(group, product.detach().split(sizes), strict=True):
            t.result = share
        found.append(product.sum())
    return found


def _flat(parts: list[Tensor | None], sizes: list[int], like: Tensor) -> Tensor | None:
    """The concatenated parts, with ones for a part that is None; None if all are."""
    if all(p is None for p in parts):
        return None
    return torch.cat(
        [like.new_ones(n) if p is None else p for p, n in zip(parts, sizes, strict=True)]
    )


def _rows(call: LayerCall, impl: str, gain: Gain, wanted: Wanted) -> Tensor | None:
    """``k² ‖W_c‖²`` of each channel; None for 1."""
    if not wanted.use_weight:
        return None
    (rows,) = row_sqnorm([call.rows], impl=or_auto(impl))
    rows = rows.to(accumulate_dtype(call.z.dtype))
    factor = gain.channel()
    return rows if factor is None else rows * factor


def _scale(call: LayerCall, wanted: Wanted) -> float:
    """The factor of all squares of the slopes, if z is a multiple of ``W x + b``."""
    return call.factor * call.factor if wanted.use_weight else 1.0


def _of_units(call: LayerCall, s: Tensor, gain: Gain, wanted: Wanted, impl: str = "auto") -> Any:
    """The statistic, given the factors of the row norms for each sample and unit, ``[N, C]``."""
    if not wanted.per_sample:
        return Statistic(call, s.sum(0), by_channel=True, gain=gain, impl=impl)
    rows = _rows(call, impl, gain, wanted)
    return Statistic(call, (s if rows is None else s * rows).sum(1))


# ---- the ways to compute the statistic


def _one_node(
    seen: Pass, call: LayerCall, phi: Nonlinearity, wanted: Wanted
) -> tuple[Tensor, Statistic] | None:
    """``φ(z)`` and the statistic by `layer_act`; None if it cannot compute this call."""
    z, x, layer, weight = call.z, call.x, call.layer, call.weight
    if seen.compiling:
        options = _layer_act_options(call, phi, wanted)
    # Hooks on z would see no gradient, and the weight's gradient needs the x of the forward.
    elif x is None or z._backward_hooks or z.retains_grad or x._version != call.x_version:
        return None
    else:
        # Everything that the options depend on, beside the module.
        conv = None if layer.linear else _conv(call)
        kinds = z.dtype, z.device, weight.dtype, weight.stride()
        key = (phi.fn, phi.impl, phi.params, wanted, kinds, conv)
        memo = layer.memo
        if memo is None or memo[0] != key:
            key = (*key[:2], dict(phi.params), *key[3:])  # the module may change its own params
            memo = layer.memo = key, _layer_act_options(call, phi, wanted)
        options = memo[1]
    if options is None:
        return None
    if layer.module is None:
        bias = call.bias
    else:
        bias = layer.module._parameters.get("bias")
        if bias is None:  # none, or a property
            bias = layer.module.bias
    if seen.compiling:
        a, v = layer_act(x, weight, bias, z.detach(), options._replace(traced=True))
        return a, Statistic(call, v)
    if seen.running and options.impl == options.rows == "cpu":
        kept: list[Tensor] = []
        totals, dtype = seen.totals, z.dtype
        a, total = apply_layer_act(x, weight, bias, z.detach(), totals.get(dtype), options, kept)
        totals[dtype] = total
        seen.added += 1
        return a, Statistic(call, total, table=Table(kept[0], 0, weight.shape[0]))
    if layer.module is not None:
        seen.whole.append(layer)
    tap = seen.taps.get(layer)
    # Only for the same weight, and not in a checkpoint, which would have to recompute the tap.
    if tap is not None and tap[0] == identity(weight) and saved_tensor_hooks() is None:
        weight, r = tap[1:]
        options = options._replace(rows="")
        a, s = apply_layer_act(x, weight, bias, z.detach(), None, options, None)
        return a, Statistic(call, s, by_channel=True, r=r)
    a, v = apply_layer_act(x, weight, bias, z.detach(), None, options, None)
    return a, Statistic(call, v)


def _layer_act_options(
    call: LayerCall, phi: Nonlinearity, wanted: Wanted
) -> LayerActOptions | None:
    if wanted.per_sample or not wanted.use_weight or not call.layer.plain or call.layer.hooked:
        return None
    if phi.fn is None or not rows_in_memory(call.weight):
        return None
    impl = OPS["act_stats"].select(phi.impl, call.z.device, call.z.dtype)
    if impl == "reference":
        return None
    params = get(phi.fn).param_values(phi.params)
    conv = None if call.layer.linear else _conv(call)
    weight = call.weight
    rows = OPS["row_sqnorm"].select(or_auto(phi.impl), weight.device, weight.dtype)
    return LayerActOptions(conv, 1.0, IDS[phi.fn], params, suffix_of(impl), impl, rows)


def _conv(call: LayerCall) -> Any:
    """The options of a convolution."""
    module = call.layer.module
    return call.conv if module is None else conv_options(module)


def _after_batch_norm(seen: Pass, call: LayerCall, phi: Nonlinearity, wanted: Wanted) -> bool:
    """Whether `batch_norm_act` can compute the activation and the norm before it."""
    if call.normed is None or phi.fn is None or wanted.per_sample or not wanted.use_weight:
        return False
    y = call.normed.y  # call.z is a copy if the activation writes in place
    if not seen.grad or saved_tensor_hooks() is not None or y._backward_hooks or y.retains_grad:
        return False
    bias = None if call.norm is None else call.norm.bias
    if bias is not None and bias._version != call.normed.bias_version:
        return False
    impl = OPS["act_stats"].select(phi.impl, y.device, y.dtype)
    return impl == "cpu" and call.normed.mean.dtype == accumulate_dtype(y.dtype)


def _norm_node(call: LayerCall, phi: Nonlinearity, wanted: Wanted) -> tuple[Tensor, Statistic]:
    assert phi.fn is not None and call.normed is not None and call.norm is not None
    node, norm, dtype = call.normed.node, call.norm, call.normed.mean.dtype
    # The tensors that the norm computed with. Torch raises here if one was written to since.
    z, gamma = node._saved_input, node._saved_weight
    gamma, beta = (None if t is None else t.to(dtype) for t in (gamma, norm.bias))
    options = (_scale(call, wanted), IDS[phi.fn], get(phi.fn).param_values(phi.params))
    a, s = batch_norm_act(z, gamma, beta, call.normed, *options)
    return a, Statistic(call, s, by_channel=True, gain=Gain(gamma), impl=phi.impl)


def _fused(
    call: LayerCall, phi: Nonlinearity, a: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Statistic]:
    assert phi.fn is not None
    gain = norm_gain(call) if wanted.use_weight else NO_GAIN
    options = dict(scale=_scale(call, wanted), impl=phi.impl, **phi.params)
    z, dim = call.z, call.dim
    if gain.group is not None:  # the statistic of each sample and channel: rows of their positions
        moved = z.movedim(dim, 1)
        rows = moved.reshape(moved.shape[0] * moved.shape[1], -1)
        computed, t = act_stats(rows, phi.fn, per="sample", **options)
        s = t.view(moved.shape[:2]) * gain.group
        computed = computed.view(moved.shape).movedim(1, dim)
        return computed if a is None else a, _of_units(call, s, gain, wanted, phi.impl)
    place, shape = gain.place, None
    if dim not in (1, -1) or (place is not None and dim != -1):
        z, dim = z.movedim(dim, -1), -1
    if place is not None:  # treat each position as a sample
        shape = z.shape
        z, place = z.reshape(-1, shape[-1]), place.flatten()
    if not wanted.per_sample:
        computed, s = act_stats(z, phi.fn, dim=dim, weights=place, **options)
        term = Statistic(call, s, by_channel=True, gain=gain, impl=phi.impl)
    else:
        weights = _rows(call, phi.impl, gain, wanted)
        computed, t = act_stats(z, phi.fn, dim=dim, per="sample", weights=weights, **options)
        if place is not None:
            t = (t * place).view(call.z.shape[0], -1).sum(1)
        term = Statistic(call, t)
    if a is None:
        a = computed if shape is None else computed.view(shape)
        a = a if dim == call.dim else a.movedim(-1, call.dim)
    return a, term


def _composed(
    call: LayerCall, phi: Nonlinearity, a: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Statistic]:
    """As `_fused`, for an activation that the table does not have."""
    assert a is not None
    dtype, scale = accumulate_dtype(call.z.dtype), _scale(call, wanted)
    squares = phi.derivative(call.z).to(dtype).square().movedim(call.dim, -1)
    squares = squares if scale == 1 else squares * scale
    gain = norm_gain(call) if wanted.use_weight else NO_GAIN
    if gain.place is not None:
        squares = squares * gain.place.reshape(squares.shape[:-1]).unsqueeze(-1)
    s = squares.flatten(1, -2).sum(1) if squares.dim() > 2 else squares  # [N, C]
    s = s if gain.group is None else s * gain.group
    return a, _of_units(call, s, gain, wanted, phi.impl)


def _of_shards(
    call: LayerCall, phi: Nonlinearity, a: Tensor | None, wanted: Wanted
) -> tuple[Tensor, Statistic]:
    """As `_fused`, for a weight that is a DTensor."""
    s, shape = sharded.units_squared(call, phi)
    if a is None:
        a = phi.value(call.z.clone() if getattr(phi.module, "inplace", False) else call.z)
    product = (s if wanted.per_sample else s.sum(0)) * _scale(call, wanted)
    product = product * sharded.row_norms(call, phi.impl) if wanted.use_weight else product
    return a, Statistic(call, sharded.whole(product.sum(-1)), whole_shape=shape)


def _output_of_shards(call: LayerCall, wanted: Wanted) -> Statistic:
    n, *places, c = shape = sharded.layout_of(call).shape
    total = torch.full((), c, dtype=accumulate_dtype(call.z.dtype), device=call.z.device)
    if wanted.use_weight:
        total = sharded.whole(sharded.row_norms(call).sum())
    total = total * (math.prod(places) * _scale(call, wanted))
    value = total.expand(n) if wanted.per_sample else total * n
    return Statistic(call, value, whole_shape=shape)
