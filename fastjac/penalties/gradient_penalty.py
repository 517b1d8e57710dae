"""GradientPenalty and Eikonal: the distance of an input gradient's norm from a given length."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, reference
from fastjac.input_jacobian.penalty import InputOptions, InputPenalty
from fastjac.input_jacobian.pullback import Pullback
from fastjac.model_output import Part
from fastjac.penalties.registry import PenaltySpec, critic_example
from fastjac.per_sample import attached_zeros, measure


class GradientPenalty(InputPenalty):
    """``R_n = (‖∇_x f_n‖ − c)²``, or one-sided ``max(0, ‖∇_x f_n‖ − c)²``, of a critic ``f``.

    ``f_n`` is the output of a sample. Of a map ``[N, 1, ...]`` (one output for each patch, as a
    PatchGAN has) it is the sum, as with ``grad_outputs=torch.ones_like(output)`` in training
    programs.

    ``c = 1`` is the penalty of WGAN-GP, whose ``x`` are points between real and generated samples
    (`fastjac.presets.wgan_gp` makes them). ``c = 0`` is the zero-centred penalty R1, computed
    without a square root. The derivative of the norm at a zero gradient is defined as 0.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N]``, ``[N, 1]`` or a map
        ``[N, 1, ...]``.

    Options:
        center: ``c >= 0``.
        one_sided: penalises only gradients longer than ``c``.
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Squares of half precision are summed in float32. The value can be differentiated once; for
    gradients of gradients use ``engine="autograd"``.

    Source: Gulrajani et al. 2017, arXiv 1704.00028; one-sided: Petzka et al. 2018,
    arXiv 1709.08894; c = 0: Mescheder, Geiger, Nowozin 2018, arXiv 1801.04406.

    Example:

        >>> critic, x = nn.Linear(3, 1), torch.randn(4, 3)
        >>> output, value = fastjac.GradientPenalty()(critic, x)
        >>> torch.allclose(value, (critic.weight.norm() - 1).square())
        True
    """

    max_dim: int | None = None

    def __init__(
        self, center: float = 1.0, *, one_sided: bool = False, **options: Unpack[InputOptions]
    ) -> None:
        super().__init__(**options)
        self.center = arguments.number("center", center)
        if self.center < 0:
            raise ValueError(f"center is {center}: it must be at least 0, as norms are")
        self.one_sided = arguments.flag("one_sided", one_sided)

    def per_sample(self, pull: Pullback) -> Tensor:
        output = pull.output
        if output.dim() > (self.max_dim or output.dim()) or output.shape[1:2] not in ((), (1,)):
            shapes = "[N] or [N, 1]" if self.max_dim else "[N], [N, 1] or a map [N, 1, ...]"
            raise ValueError(
                f"output has shape {tuple(output.shape)}: {type(self).__name__} needs one output "
                f"for a sample, {shapes}; for more columns use FrobReg or SpectReg"
            )
        if output.shape[0] == 0:
            return attached_zeros(output)
        ones = torch.ones_like(output).unsqueeze(0)
        if self.center == 0:
            return pull.squared_norms(ones)
        excess = measure(pull.vjp(ones), "l2")[0] - self.center
        return (excess.clamp(min=0) if self.one_sided else excess).square()


class Eikonal(GradientPenalty):
    """``R_n = (‖∇_x f_n‖ − 1)²``: the eikonal term of a signed distance function.

    This is `GradientPenalty` with ``center=1``, and its notes apply, but for maps.

    Arguments:
        x: ``[N, ...]`` floating point, requires grad. output: ``[N]`` or ``[N, 1]``.

    Options:
        weight, reduction, every, output, at, engine: see ``help(fastjac.InputPenalty)``.

    Source: Gropp et al. 2020, arXiv 2002.10099.

    Example:

        >>> sdf, x = nn.Linear(3, 1), torch.randn(4, 3)
        >>> output, value = fastjac.Eikonal()(sdf, x)
        >>> torch.allclose(value, (sdf.weight.norm() - 1).square())
        True
    """

    max_dim = 2  # a map would be the distances of several points

    def __init__(
        self,
        *,
        at: str | None = None,
        engine: str = "auto",
        weight: float | Tensor = 1.0,
        reduction: str = "mean",
        every: int = 1,
        output: Part = None,
    ) -> None:
        super().__init__(
            1.0,
            at=at,
            engine=engine,
            weight=weight,
            reduction=reduction,
            every=every,
            output=output,
        )


GRADIENT_PENALTY = PenaltySpec.of(
    GradientPenalty,
    reference.gradient_penalty,
    source="Gulrajani et al. 2017, arXiv 1704.00028",
    example=critic_example,
    cases=({"center": 0.0}, {"center": 0.27, "one_sided": True}),
)
EIKONAL = PenaltySpec.of(
    Eikonal,
    reference.eikonal,
    source="Gropp et al. 2020, arXiv 2002.10099",
    example=critic_example,
)
