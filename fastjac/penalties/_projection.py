"""Base of the projection penalties: a subclass states its cotangents and their scaling."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastjac.penalties import _autograd, _checks
from fastjac.penalties._base import InputOptions, InputPenalty, ProjectionOptions, parameters_of


class ProjectionPenalty(InputPenalty):
    """``R_n = scale * Σ_k ‖J_nᵀ w_kn‖``, with ``(w, scale)`` from :meth:`cotangents`.

    ``norm``: ``"l2_squared"`` (default), ``"l2"`` or ``"l1"``, taken of each projection. The K
    projections are one batched VJP, in pieces of ``chunk_size``.
    """

    chunk_size: int | None = None

    chain_ready = True

    def __init__(self, *, norm: str = "l2_squared", **options: Unpack[InputOptions]) -> None:
        super().__init__(**options)
        self.norm = _checks.choice("norm", norm, _autograd.NORMS)

    def cotangents(self, logits: Tensor, *targets: Any, **named: Any) -> tuple[Tensor, float]:
        """``w`` ``[K, N, m]`` and the factor of the sum over K, for an output ``[N, m]``."""
        raise TypeError(f"{type(self).__name__} does not define cotangents")

    @classmethod
    def call_parameters(cls) -> list[inspect.Parameter]:
        return parameters_of(ProjectionPenalty.per_sample)[:2] + parameters_of(cls.cotangents)[1:]

    def per_sample(self, x: Tensor, output: Tensor, *targets: Any, **named: Any) -> Tensor:
        w, scale = self.cotangents(_autograd.rows(output), *targets, **named)
        return self.projected(x, output, w, scale)

    def projected(self, x: Tensor, output: Tensor, w: Tensor, scale: float) -> Tensor:
        """``scale * Σ_k ‖J_nᵀ w_kn‖``, as ``[N]``."""
        if len(x) == 0:
            return _autograd.attached_zeros(output)
        w = w.reshape(len(w), *output.shape)
        chain = _autograd.chain_of(x, output)
        if chain is not None and self.norm == "l2_squared":
            return chain.squared_norms(w, self.chunk_size, scale)
        pieces = _autograd.vjp(output, x, w, self.chunk_size)
        total = _autograd.total(_autograd.measure(v, self.norm) for v in pieces)
        return total if scale == 1 else scale * total


class ExactPenalty(ProjectionPenalty):
    """Base of the projections on a full set of rows: adds ``chunk_size``."""

    def __init__(
        self, *, chunk_size: int | None = None, **options: Unpack[ProjectionOptions]
    ) -> None:
        super().__init__(**options)
        self.chunk_size = _checks.chunk_size(chunk_size)


class RandomPenalty(ProjectionPenalty):
    """Base of the random projections: adds ``n_proj``, ``generator`` and ``chunk_size``.

    A subclass says how to :meth:`draw` and, by :meth:`scales`, what to multiply by.
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
        self.n_proj = _checks.count("n_proj", n_proj, exact=True)
        if self.n_proj == -1 and self.norm != "l2_squared":
            raise ValueError(
                f"norm is {self.norm!r} and n_proj -1: the exact value exists for 'l2_squared' "
                "alone; draw projections (n_proj >= 1) or keep the norm"
            )
        self.generator = _checks.generator(generator)
        self.chunk_size = _checks.chunk_size(chunk_size)

    def draw(self, k: int, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """``w`` ``[k, N, m]`` (or ``[k, 1, m]`` for all samples) in ``dtype``."""
        raise TypeError(f"{type(self).__name__} does not define draw")

    def scales(self, m: int) -> tuple[float, float]:
        """Factors of the mean over the projections and of the exact ``‖J‖_F²``."""
        return 1.0, 1.0

    def cotangents(
        self, logits: Tensor, *, projection: Tensor | None = None
    ) -> tuple[Tensor, float]:
        n, m = logits.shape
        of_mean, of_exact = self.scales(m)
        if projection is not None:
            w = self._given(projection, logits)
        elif self.n_proj == -1:
            return unit_rows(logits), of_exact
        else:
            _checks.generator_device(self.generator, logits.device)
            # Half precision would bias the norms of the draws, so they are made in float32.
            drawn = self.draw(self.n_proj, logits, _autograd.accumulate_dtype(logits.dtype))
            w = drawn.to(logits.dtype).expand(self.n_proj, n, m)
        return w, of_mean / len(w)

    def _given(self, projection: Any, logits: Tensor) -> Tensor:
        if self.n_proj == -1:
            raise ValueError("projection is given and n_proj is -1, which draws none: drop one")
        n, m = logits.shape
        projection = _checks.tensor("projection", projection)
        _checks.like("projection", projection, "output", logits)
        w = projection.unsqueeze(0) if projection.dim() == 2 else projection
        if w.dim() != 3 or w.shape[1:] != (n, m) or len(w) == 0:
            raise ValueError(
                f"projection has shape {tuple(projection.shape)}: it must be [K, N, m] or [N, m] "
                f"with N = {n}, m = {m}"
            )
        return w


def unit_rows(logits: Tensor) -> Tensor:
    """All unit vectors for all samples, ``[m, N, m]``, without the memory of it."""
    n, m = logits.shape
    eye = torch.eye(m, dtype=logits.dtype, device=logits.device)
    return eye.unsqueeze(1).expand(m, n, m)
