"""Bases of the projection penalties: a subclass defines the cotangents and their scaling."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments
from fastjac.input_jacobian import slips
from fastjac.input_jacobian.penalty import InputOptions, InputPenalty
from fastjac.input_jacobian.pullback import Pullback
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.per_sample import NORMS, attached_zeros, measure, rows
from fastjac.signatures import parameters_of, undefined


class ProjectionOptions(InputOptions, total=False):
    norm: str


class RandomOptions(ProjectionOptions, total=False):
    generator: torch.Generator | None
    chunk_size: int | None


class ProjectionPenalty(InputPenalty):
    """``R_n = scale * Σ_k ‖J_nᵀ w_kn‖``, with ``(w, scale)`` from :meth:`cotangents`.

    ``norm`` is the norm of each projection: ``"l2_squared"`` (default), ``"l2"`` or ``"l1"``. The K
    projections are computed as one batched VJP, in pieces of ``chunk_size``.
    """

    chunk_size: int | None = None

    def __init__(self, *, norm: str = "l2_squared", **options: Unpack[InputOptions]) -> None:
        super().__init__(**options)
        self.norm = arguments.choice("norm", norm, NORMS)

    def cotangents(self, logits: Tensor, *targets: Any, **named: Any) -> tuple[Tensor, float]:
        """``w`` ``[K, N, m]`` for an output ``[N, m]``, and the factor of the sum over K."""
        what = "cotangents(self, logits, *targets), which returns (w, scale), or per_sample"
        raise undefined(self, "cotangents", what)

    @classmethod
    def call_parameters(cls) -> list[inspect.Parameter]:
        # A subclass may define per_sample itself, with arguments of its own.
        several = any(p.kind is p.VAR_POSITIONAL for p in parameters_of(cls.per_sample))
        return cls._with_targets(cls.cotangents if several else cls.per_sample)

    def per_sample(self, pull: Pullback, *targets: Any, **named: Any) -> Tensor:
        logits = rows(pull.output)
        found = self.cotangents(logits, *targets, **named)
        w, scale = slips.cotangents(self, found, logits) if self._outside else found
        return self.projected(pull, w, scale)

    def projected(self, pull: Pullback, w: Tensor, scale: float) -> Tensor:
        """``scale * Σ_k ‖J_nᵀ w_kn‖``, as ``[N]``."""
        if pull.output.shape[0] == 0:
            return attached_zeros(pull.output)
        if w.shape[1:] != pull.output.shape:
            w = w.reshape(w.shape[0], *pull.output.shape)
        if self.norm == "l2_squared":
            sums = pull.squared_norms(w, self.chunk_size)
        else:
            sums = measure(pull.vjp(w, self.chunk_size), self.norm).sum(0)
        return sums if scale == 1 else scale * sums


class ExactPenalty(ProjectionPenalty):
    """Base of the projections on a full set of rows; adds ``chunk_size``."""

    def __init__(
        self, *, chunk_size: int | None = None, **options: Unpack[ProjectionOptions]
    ) -> None:
        super().__init__(**options)
        self.chunk_size = arguments.chunk_size(chunk_size)


class RandomPenalty(ProjectionPenalty):
    """Base of the random projections; adds ``n_proj``, ``generator`` and ``chunk_size``.

    A subclass defines how to :meth:`draw` and the factors, :meth:`scales`.
    """

    def __init__(
        self,
        n_proj: int = 1,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        **options: Unpack[ProjectionOptions],
    ) -> None:
        super().__init__(**options)
        if isinstance(n_proj, float):
            raise TypeError(
                f"n_proj is {n_proj}: it must be an integer; the weight is passed by name, "
                f"weight={n_proj}"
            )
        self.n_proj = arguments.count("n_proj", n_proj, exact=True)
        if self.n_proj == -1 and self.norm != "l2_squared":
            raise ValueError(
                f"norm is {self.norm!r} and n_proj is -1: the exact value exists for 'l2_squared' "
                "only; use n_proj >= 1, or norm='l2_squared'"
            )
        self.generator = arguments.generator(generator)
        self.chunk_size = arguments.chunk_size(chunk_size)

    def draw(self, k: int, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """``w`` in ``dtype``: ``[k, N, m]``, or ``[k, 1, m]`` if the samples share it."""
        what = "draw(self, k, logits, dtype), which returns the vectors w, a tensor [k, N, m]"
        raise undefined(self, "draw", what)

    def scales(self, m: int) -> tuple[float, float]:
        """The factors of the mean over the projections and of the exact ``‖J‖_F²``."""
        return 1.0, 1.0

    def cotangents(
        self, logits: Tensor, *, projection: Tensor | None = None
    ) -> tuple[Tensor, float]:
        n, m = logits.shape
        found = self.scales(m)
        of_mean, of_exact = slips.scales(self, found) if self._outside else found
        if projection is not None:
            w = self._given(projection, logits)
        elif self.n_proj == -1:
            return unit_rows(logits), of_exact
        else:
            arguments.generator_device(self.generator, logits.device)
            # In float32, since half precision would bias the norms of the draws.
            drawn = self.draw(self.n_proj, logits, accumulate_dtype(logits.dtype))
            if self._outside:
                slips.draw(self, drawn, self.n_proj, logits)
            w = drawn.to(logits.dtype).expand(self.n_proj, n, m)
        return w, of_mean / w.shape[0]

    def _given(self, projection: Any, logits: Tensor) -> Tensor:
        if self.n_proj == -1:
            raise ValueError(
                "projection is given and n_proj is -1, which uses no projections: drop one of them"
            )
        n, m = logits.shape
        projection = arguments.tensor("projection", projection)
        arguments.like("projection", projection, "output", logits)
        w = projection.unsqueeze(0) if projection.dim() == 2 else projection
        if w.dim() != 3 or w.shape[1:] != (n, m) or w.shape[0] == 0:
            raise ValueError(
                f"projection has shape {tuple(projection.shape)}: it must be [K, N, m] or [N, m] "
                f"with N = {n}, m = {m}"
            )
        return w


def unit_rows(logits: Tensor) -> Tensor:
    """All unit vectors for all samples, ``[m, N, m]``, expanded from ``[m, 1, m]``."""
    n, m = logits.shape
    eye = torch.eye(m, dtype=logits.dtype, device=logits.device)
    return eye.unsqueeze(1).expand(m, n, m)
