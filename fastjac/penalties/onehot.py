"""OneHot and RandomOneHot: one row of the input Jacobian."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastjac import arguments, reference
from fastjac.input_jacobian.projections import ProjectionPenalty, RandomPenalty
from fastjac.penalties.registry import PenaltySpec, classifier_example, logits_example
from fastjac.per_sample import integers


class OneHot(ProjectionPenalty):
    """True-label projection: ``R_n = ‖J_nᵀ y_n‖²``, the gradient of the true label's logit.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N, ...]``, flattened to
        ``[N, m]``. target: class indices ``[N]`` int64, or any weights ``[N, m]``.

    Options:
        norm: ``"l2_squared"``, ``"l2"`` or ``"l1"``.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once; for
    gradients of gradients use ``engine="autograd"``.

    Source: Varga, Csiszárik, Zombori 2017, arXiv 1712.09936, section 5.1.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> w = model.weight
        >>> y = torch.tensor([0, 1, 1, 0])
        >>> output, value = fastjac.OneHot()(model, x, y)
        >>> torch.allclose(value, w[y].square().sum(1).mean())
        True
    """

    def cotangents(self, logits: Tensor, target: Any) -> tuple[Tensor, float]:
        return arguments.class_rows(target, logits).unsqueeze(0), 1.0


class RandomOneHot(RandomPenalty):
    """Random row: ``R_n = 1/K Σ_k ‖J_nᵀ w_kn‖²``, ``w = √m e_i``, ``i`` uniform.

    An unbiased estimate of ``‖J_n‖_F²``.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N, ...]``, flattened to
        ``[N, m]``. projection: the ``w`` themselves, ``[K, N, m]`` or ``[N, m]``.

    Options:
        n_proj: K, or -1 for the exact ``‖J_n‖_F²``.
        norm: ``"l2_squared"``, ``"l2"`` or ``"l1"``.
        generator: a generator on the device of ``output``. It draws ``torch.randint(m, (K, N))``.
        chunk_size: the number of cotangents per batched pass; 1 does not use vmap.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once; for
    gradients of gradients use ``engine="autograd"``.

    Source: Varga, Csiszárik, Zombori 2017, arXiv 1712.09936, section 5.1.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> w = model.weight
        >>> output, value = fastjac.RandomOneHot(n_proj=-1)(model, x)  # every row once
        >>> torch.allclose(value, w.square().sum())
        True
    """

    def draw(self, k: int, logits: Tensor, dtype: torch.dtype) -> Tensor:
        n, m = logits.shape
        index = integers(m, (k, n, 1), self.generator, device=logits.device)
        w = torch.zeros(k, n, m, dtype=dtype, device=logits.device)
        return w.scatter_(2, index, math.sqrt(m))


ONEHOT = PenaltySpec.of(
    OneHot,
    reference.onehot,
    source="Varga, Csiszárik, Zombori 2017, arXiv 1712.09936, section 5.1",
    example=classifier_example,
    cases=({"norm": "l2"}, {"norm": "l1"}),
)
RANDOM_ONEHOT = PenaltySpec.of(
    RandomOneHot,
    reference.random_onehot,
    source="Varga, Csiszárik, Zombori 2017, arXiv 1712.09936, section 5.1",
    example=logits_example,
    cases=({"n_proj": 4}, {"n_proj": -1}, {"n_proj": 2, "norm": "l2"}, {"norm": "l1"}),
)
