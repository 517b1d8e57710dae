"""SpectReg: random projections of the input Jacobian."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, reference
from fastjac.input_jacobian.projections import RandomOptions, RandomPenalty
from fastjac.penalties.registry import PenaltySpec, logits_example
from fastjac.per_sample import integers, normal

DISTRIBUTIONS = ("gaussian", "rademacher", "spherical", "orthogonal")


class SpectReg(RandomPenalty):
    """Spectral regularisation: ``R_n = 1/K Σ_k ‖J_nᵀ w_kn‖²``, ``w = r/√m``, ``r ~ N(0, I_m)``.

    An unbiased estimate of ``‖J_n‖_F² / m`` by one VJP. ``J_n`` is the Jacobian of ``output_n``
    with respect to ``x_n``.

    The paper gives several variants: section 3 and figure 1 have no ``1/√m``, figure 1 draws one
    ``r`` for the batch, section 5.1 does not square the norm. The options cover all of them.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N, ...]``, flattened to
        ``[N, m]``. projection: the ``w`` themselves, ``[K, N, m]`` or ``[N, m]`` in the dtype of
        ``output``; ``n_proj``, ``normalize``, ``scale`` and ``shared`` are then ignored.

    Options:
        n_proj: K, or -1 for the exact expectation over ``r`` (m cotangents, no random numbers).
        normalize: uses ``w = r/‖r‖``; then ``‖Jᵀw‖`` is a lower bound of the spectral norm.
        scale: False for ``w = r``, which estimates ``‖J_n‖_F²``. Excludes ``normalize``.
        distribution: the distribution of ``r``, with ``E r rᵀ = I``: ``"gaussian"``;
            ``"rademacher"`` (signs); ``"spherical"`` (uniform on the sphere of radius √m);
            ``"orthogonal"`` (spherical, and orthogonal within groups of up to m projections of a
            sample, which lowers the variance for K > 1 and removes it for K = m).
        shared: uses one ``r`` for the whole batch.
        norm: ``"l2_squared"``, ``"l2"`` or ``"l1"``.
        generator: a generator on the device of ``output``. It draws ``torch.randn(K, N, m)``
            (``(K, 1, m)`` if shared), ``torch.randint(2, ...)`` for signs, or
            ``torch.randn(groups, N, m, k)`` followed by a QR decomposition for orthogonal ones.
        chunk_size: the number of cotangents per batched pass; 1 does not use vmap.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once, with
    respect to the parameters, ``x`` and ``projection``; for gradients of gradients use
    ``engine="autograd"``.

    Source: Varga, Csiszárik, Zombori 2017, arXiv 1712.09936, section 5.1.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> w = model.weight
        >>> output, value = fastjac.SpectReg(n_proj=-1)(model, x)  # exact: ‖J‖²/m
        >>> torch.allclose(value, w.square().sum() / 2)
        True
    """

    def __init__(
        self,
        n_proj: int = 1,
        *,
        normalize: bool = False,
        scale: bool = True,
        shared: bool = False,
        distribution: str = "gaussian",
        **options: Unpack[RandomOptions],
    ) -> None:
        super().__init__(n_proj, **options)
        self.normalize = arguments.flag("normalize", normalize)
        self.scale = arguments.flag("scale", scale)
        self.shared = arguments.flag("shared", shared)
        self.distribution = arguments.choice("distribution", distribution, DISTRIBUTIONS)
        if self.normalize and not self.scale:
            raise ValueError(
                "scale is False and normalize is True: w = r/‖r‖ has no factor 1/√m, so set only "
                "one of them"
            )

    def draw(self, k: int, logits: Tensor, dtype: torch.dtype) -> Tensor:
        n, m = logits.shape
        r = self._draw(k, 1 if self.shared else n, m, dtype, logits.device)
        if self.normalize:
            return r / torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        return r / math.sqrt(m) if self.scale else r

    def _draw(self, k: int, n: int, m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        options: Any = {"generator": self.generator, "dtype": dtype, "device": device}
        if self.distribution == "rademacher":
            return integers(2, (k, n, m), **options).mul_(2).sub_(1)
        if self.distribution == "orthogonal":
            group = min(k, m)
            # The signs of Q's columns are not uniform, but norms do not depend on them.
            q = torch.linalg.qr(normal((-(-k // group), n, m, group), **options)).Q
            return q.permute(0, 3, 1, 2).flatten(0, 1)[:k] * math.sqrt(m)
        r = normal((k, n, m), **options)
        if self.distribution == "spherical":
            r = r * (math.sqrt(m) / torch.linalg.vector_norm(r, dim=-1, keepdim=True))
        return r

    def scales(self, m: int) -> tuple[float, float]:
        return 1.0, 1 / m if self.scale else 1.0


SPEC = PenaltySpec.of(
    SpectReg,
    reference.spectreg,
    source="Varga, Csiszárik, Zombori 2017, arXiv 1712.09936, section 5.1",
    example=logits_example,
    cases=(
        {"n_proj": 3},
        {"n_proj": -1},
        {"n_proj": -1, "scale": False},
        {"n_proj": -1, "normalize": True},
        {"n_proj": 2, "normalize": True},
        {"n_proj": 2, "scale": False},
        {"n_proj": 2, "shared": True},
        {"n_proj": 2, "shared": True, "normalize": True},
        {"n_proj": 2, "distribution": "rademacher"},
        {"n_proj": 2, "distribution": "spherical", "shared": True},
        {"n_proj": 2, "distribution": "orthogonal", "scale": False},
        {"n_proj": 4, "distribution": "orthogonal"},
        {"n_proj": 2, "norm": "l2"},
        {"n_proj": 2, "norm": "l1"},
    ),
)
