"""JacobianReg: the preset that equals facebookresearch/jacobian_regularizer."""

from __future__ import annotations

import torch
from torch import Tensor

from fastjac import reference
from fastjac.input_jacobian.projections import RandomPenalty
from fastjac.model_output import Part
from fastjac.penalties.registry import PenaltySpec, logits_example
from fastjac.per_sample import normal


class JacobianReg(RandomPenalty):
    """``R_n = m/(2K) Σ_k ‖J_nᵀ v_kn‖²``, ``v`` uniform on the unit sphere.

    An unbiased estimate of ``½ ‖J_n‖_F²``. With ``reduction="mean"`` it equals
    ``jacobian.JacobianReg(n)(x, y)`` of facebookresearch/jacobian_regularizer, computed by one
    batched VJP, for outputs of any rank and dtype, with a generator.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N, ...]``, flattened to
        ``[N, m]``. projection: the ``v`` themselves, ``[K, N, m]`` or ``[N, m]``, which should be
        unit vectors.

    Options:
        n_proj: K, or -1 for the exact ``½ ‖J_n‖_F²``.
        generator: a generator on the device of ``output``. It draws ``r = torch.randn(K, N, m)``
            for ``v = r/‖r‖``.
        chunk_size: the number of cotangents per batched pass; 1 does not use vmap.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once; for
    gradients of gradients use ``engine="autograd"``.

    Source: Hoffman, Roberts, Yaida 2019, arXiv 1908.02729, algorithm 1.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> w = model.weight
        >>> output, value = fastjac.JacobianReg(n_proj=-1)(model, x)
        >>> torch.allclose(value, w.square().sum() / 2)
        True
    """

    def __init__(
        self,
        n_proj: int = 1,
        *,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        at: str | None = None,
        engine: str = "auto",
        weight: float | Tensor = 1.0,
        reduction: str = "mean",
        every: int = 1,
        output: Part = None,
    ) -> None:
        super().__init__(
            n_proj,
            generator=generator,
            chunk_size=chunk_size,
            at=at,
            engine=engine,
            weight=weight,
            reduction=reduction,
            every=every,
            output=output,
        )

    def draw(self, k: int, logits: Tensor, dtype: torch.dtype) -> Tensor:
        r = normal((k, *logits.shape), self.generator, dtype=dtype, device=logits.device)
        return r / torch.linalg.vector_norm(r, dim=-1, keepdim=True)

    def scales(self, m: int) -> tuple[float, float]:
        return m / 2, 1 / 2


SPEC = PenaltySpec.of(
    JacobianReg,
    reference.jacobian_reg,
    source="Hoffman, Roberts, Yaida 2019, arXiv 1908.02729, algorithm 1",
    example=logits_example,
    cases=({"n_proj": 3}, {"n_proj": -1}),
)
