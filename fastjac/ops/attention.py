"""``attention_push``: the push of tangents through softmax attention, with its second-order terms.

The attention is ``O = P V`` with ``P = softmax(S)`` and ``S = scale Q Kᵀ + mask``, for each sample
and head; ``lse`` is the logarithm of the sums of ``exp S``. For K tangents of Q, K and V (None for
zero) and cotangents Δ of O, whose first dimension is K times the batch,

    attention_push(q, k, v, lse, mask, q_t, k_t, v_t, delta, causal, scale, wanted)

returns ``(out, dq, dk, dv)``: the tangents of O, empty unless ``wanted``, and the gradients of
``Σ ⟨Δ, Ȯ⟩`` with respect to Q, K and V, empty if ``delta`` is None. With

    Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ)    r = Σ_j P Ṡ          A = P ∘ (Ṡ − r)
    G = Δ Vᵀ    H = Δ V̇ᵀ        g = Σ_j P G          B = P ∘ (G − g)
    M = (Ṡ − r) ∘ G − g Ṡ + H                        C = P ∘ (M − Σ_j P M)

they are

    Ȯ  = A V + P V̇                  ∂Q = scale (C K + B K̇)
    ∂V = Aᵀ Δ                       ∂K = scale (Cᵀ Q + Bᵀ Q̇)

Shapes: Q ``[B, H, T, D]``, K ``[B, H', S, D]`` and V ``[B, H', S, E]``, where H is a multiple of
H'; a head of K belongs to H / H' heads of Q, one after the other. The mask is ``[B, H, T, S]`` and
lse ``[B, H, T, 1]``, both of the compute type. With ``causal``, query i attends to the keys 0 to i.

The CPU kernel takes all dtypes and computes in float32, or in float64 if they are. It goes through
tiles of S, so it needs memory for some rows of S, never for all. `composed` is the same formula in
operations of torch, by blocks of queries, for other devices. Neither is differentiable.
`fastjac.input_jacobian.chain` calls them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.ops.dispatch import accumulate_dtype
from fastjac.ops.registration import register

register(
    "attention_push(Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? mask, Tensor? q_t,"
    " Tensor? k_t, Tensor? v_t, Tensor? delta, bool causal, float scale, bool wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    derivative="use a penalty with engine='chain'",
)


SCORES = 1 << 24
"""Elements of S in a block of `composed`, of which there are about ten temporary tensors."""


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tangents: Sequence[Tensor | None],
    delta: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Any, Any, Any, Any]:
    """The results of ``attention_push`` in operations of torch, and in its compute type.

    ``tangents`` are those of q, k and v. The mask is any that broadcasts with S. Without ``delta``
    the gradients are None. A block is some queries of all samples and heads.
    """
    dtype = accumulate_dtype(q.dtype)
    parts = next(len(t) for t in tangents if t is not None) // len(q)
    length, keys = q.shape[2], k.shape[2]

    def split(t: Tensor | None, tangent: bool = False) -> Any:
        """``[K, B, H', H / H' or 1, length, width]``, where K is 1 for what is no tangent."""
        if t is None:
            return None
        t = t.to(dtype).unflatten(0, (parts if tangent else 1, -1))
        return t.unflatten(2, (k.shape[1], -1))

    mask = None if mask is None else mask.expand(*q.shape[:3], keys)
    queries, keys_in, values = split(q), split(k), split(v)
    of_q, of_k, of_v = (split(t, True) for t in tangents)
    cotangents = split(delta, True)
    outs, dqs, dks, dvs = [], [], 0, 0
    rows = max(SCORES // max(parts * q.shape[0] * q.shape[1] * keys, 1), 1)
    for first in range(0, length, rows):
        block = (..., slice(first, min(first + rows, length)), slice(None))
        q_here = queries[block]
        s = scale * (q_here @ keys_in.mT)
        if mask is not None:
            s = s + split(mask[block])
        if causal:
            row = torch.arange(first, first + s.shape[-2], device=s.device).unsqueeze(1)
            s = s.masked_fill(torch.arange(keys, device=s.device) > row, -math.inf)
        p = s.softmax(-1)
        p = torch.where(s.amax(-1, keepdim=True) == -math.inf, 0, p)  # that attend to no key
        s_t = torch.zeros_like(p) if of_q is None else scale * (of_q[block] @ keys_in.mT)
        if of_k is not None:
            s_t = s_t + scale * (q_here @ of_k.mT)
        ps_t = p * s_t
        a = ps_t - p * ps_t.sum(-1, keepdim=True)
        out = a @ values if of_v is None else a @ values + p @ of_v
        outs.append(out.flatten(2, 3).flatten(0, 1))
        if delta is None:
            continue
        d_here = cotangents[block]
        g = d_here @ values.mT
        sums = (p * g).sum(-1, keepdim=True)
        b = p * (g - sums)
        c = a * g - sums * ps_t  # P ∘ M, since A = P ∘ (Ṡ − r)
        if of_v is not None:
            c = c + p * (d_here @ of_v.mT)
        c = c - p * c.sum(-1, keepdim=True)
        dq, dk = c @ keys_in, c.mT @ q_here
        if of_k is not None:
            dq = dq + b @ of_k
        if of_q is not None:
            dk = dk + b.mT @ of_q[block]
        dqs.append(scale * dq.sum(0).flatten(1, 2))
        # Over the tangents, and the heads of q that share one of k.
        dks = dks + scale * dk.sum((0, 3))
        dvs = dvs + (a.mT @ d_here).sum((0, 3))
    if delta is None:
        return torch.cat(outs, 2), None, None, None
    return torch.cat(outs, 2), torch.cat(dqs, 2), dks, dvs
