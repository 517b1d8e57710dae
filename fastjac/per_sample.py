"""Quantities per sample: rows, their norms and sums, random numbers, zeros in an autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.ops.dispatch import accumulate_dtype

NORMS = ("l2_squared", "l2", "l1")


def rows(t: Tensor, lead: int = 1) -> Tensor:
    """Flatten all dimensions after the first ``lead`` into one."""
    return t.unsqueeze(-1) if t.dim() == lead else t.flatten(lead)


def measure(v: Tensor, norm: str, lead: int = 2) -> Tensor:
    """The norm over all but the first ``lead`` dimensions, accumulated in float32 for 16-bit types.

    At ``v = 0`` the gradient of ``"l2"`` and ``"l1"`` is the subgradient 0.
    """
    v = rows(v.to(accumulate_dtype(v.dtype)), lead)
    if norm == "l2_squared":
        return v.square().sum(-1)
    return torch.linalg.vector_norm(v, ord=1 if norm == "l1" else 2, dim=-1)


def total(pieces: Iterable[Tensor]) -> Tensor:
    """The sum over K of pieces ``[k, N]``, as ``[N]``; for a single row this is a view."""
    sums = [piece.sum(0) if piece.shape[0] > 1 else piece.squeeze(0) for piece in pieces]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _refuse_compiled() -> None:
    """Raises inside ``torch.compile``, which cannot trace a ``torch.Generator``."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "generator is given, and torch.compile cannot trace a torch.Generator: drop generator "
            "(torch.manual_seed sets torch's own), or draw before the compiled function and pass "
            "the numbers"
        )


def normal(shape: Sequence[int], generator: torch.Generator | None, **options: Any) -> Tensor:
    """``torch.randn(shape, generator=generator)``, also for sizes that are symbols.

    Torch's functions with the argument ``generator`` raise for the symbolic sizes of ``make_fx``,
    so the numbers are filled in, which draws the same ones.
    """
    if generator is None:
        return torch.randn(shape, **options)
    _refuse_compiled()
    return torch.empty(shape, **options).normal_(generator=generator)


def integers(
    high: int, shape: Sequence[int], generator: torch.Generator | None, **options: Any
) -> Tensor:
    """``torch.randint(high, shape, generator=generator)``; see `normal`."""
    if generator is None:
        return torch.randint(high, shape, **options)
    _refuse_compiled()
    options.setdefault("dtype", torch.int64)
    return torch.empty(shape, **options).random_(high, generator=generator)


def uniform(shape: Sequence[int], generator: torch.Generator | None, **options: Any) -> Tensor:
    """``torch.rand(shape, generator=generator)``; see `normal`."""
    if generator is None:
        return torch.rand(shape, **options)
    _refuse_compiled()
    return torch.empty(shape, **options).uniform_(generator=generator)


def attached_zeros(output: Tensor) -> Tensor:
    """Zeros ``[N]`` in the graph of ``output``."""
    return attached_zero(output, accumulate_dtype(output.dtype)).expand(output.shape[0])


def attached_zero(t: Tensor, dtype: torch.dtype) -> Tensor:
    """A 0-dim zero in the graph of ``t``.

    It is the sum of an empty slice, because ``0 * t.sum()`` is NaN if ``t`` contains NaN or
    infinities.
    """
    return (t if t.dim() else t.reshape(1))[:0].sum(dtype=dtype)
