"""The rule of ``scaled_dot_product_attention``, whose second derivative torch does not have.

Torch chooses one of several kernels, each with a node of its own. None of them is differentiable
twice, but each computes a VJP in blocks, without a matrix of scores, and so does the push.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastjac.input_jacobian.chain.rules import Rule
from fastjac.ops.attention import composed
from fastjac.ops.dispatch import accumulate_dtype, why_not
from fastjac.ops.registration import raw
from fastjac.torch_private import below_autograd


@functools.cache
def has_kernel(device: str, dtype: torch.dtype) -> bool:
    return why_not("cpu", device, dtype) is None


class Attention(Rule):
    """``softmax(scale Q Kᵀ + mask) V``; see `fastjac.ops.attention` for the formulas.

    Args:
        mask: the name of the saved mask, which is added to the scores.
    """

    def __init__(self, mask: str | None = None) -> None:
        self.mask = None if mask is None else f"_saved_{mask}"

    def takes(self, node, inside):
        # A dropout inside the kernel draws numbers that nobody can see (on a CPU it is an operation
        # of its own). The gradient of a mask that is trained is not computed here.
        mask = None if self.mask is None else getattr(node, self.mask)
        return node._saved_dropout_p == 0 and (mask is None or not mask.requires_grad)

    def targets(self, node, inside):
        return node._saved_query, node._saved_key, node._saved_value

    def jvp(self, node, lead, us):
        return self._pushed(node, lead, us, None, True)[0]

    def push(self, node, lead, us, delta, wanted):
        return self._pushed(node, lead, us, delta, wanted)

    def _pushed(self, node: Any, lead: tuple[int, ...], us: Any, delta: Any, wanted: bool) -> Any:
        q, k, v = self.targets(node, ())
        tangents = [None if u is None else self._one_batch(u, lead) for u in us[:3]]
        delta = None if delta is None else self._one_batch(delta, lead)
        scale = node._saved_scale
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        mask = None if self.mask is None else getattr(node, self.mask)
        causal = node._saved_is_causal
        if has_kernel(q.device.type, q.dtype) and hasattr(node, "_saved_logsumexp"):
            if mask is not None:
                mask = mask.to(accumulate_dtype(q.dtype)).expand(*q.shape[:3], k.shape[2])
            with below_autograd():
                out, *extras = raw("attention_push")(
                    *(q, k, v, node._saved_logsumexp.unsqueeze(-1), mask),
                    *(*tangents, delta, causal, scale, wanted),
                )
        else:
            out, *extras = composed(q, k, v, mask, tangents, delta, causal, scale)
            out = out.to(q.dtype)
        if not wanted:
            out = None
        elif lead:
            out = out.unflatten(0, (*lead, -1))
        return out, extras

    @staticmethod
    def _one_batch(t: Tensor, lead: tuple[int, ...]) -> Tensor:
        return t.flatten(0, 1) if lead else t
