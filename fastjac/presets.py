"""Penalties with the conventions of the papers and programs in which they were published.

Each preset is a penalty of `fastjac.penalties` with its factors set, so that value and gradient are
those of the original for the same inputs and random vectors. ``JacobianReg``, ``DataGrad`` and
``Contractive`` follow their originals and need no preset.

Dtypes, gradient orders and errors of a preset are those of the penalty that it returns or uses.
``reduction``, ``every``, ``output``, ``at`` and ``engine`` are the options of that penalty.
``gamma`` of `r1` and `r2` and the weight of `double_backprop` are halved and must be Python
numbers. If a CUDA graph needs a tensor, assign it to ``penalty.weight``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments
from fastjac.model_output import Part
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.penalties import Eikonal, GradientPenalty, IGPen, SpectReg
from fastjac.per_sample import rows, uniform
from fastjac.signatures import no_option, parameters_of

__all__ = ["WGANGP", "deq", "double_backprop", "igr", "r1", "r2", "rnode", "wgan_gp"]


class PresetOptions(TypedDict, total=False):
    reduction: str
    every: int
    output: Part
    at: str | None
    engine: str


def _known(preset: Callable[..., Any], options: PresetOptions) -> PresetOptions:
    """The options of a preset; raises for one that it does not have."""
    own = [p.name for p in inspect.signature(preset).parameters.values() if p.name != "options"]
    known = [*own, *PresetOptions.__annotations__]
    for name in options:
        if name not in known:
            raise no_option(preset.__name__, name, known)
    return options


def half_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """``E_n = ½ ‖g_n − d_n‖²``, ``[N]``."""
    arguments.batch("target", target, "output", output.shape[0])
    if output.shape == (output.shape[0], 1) and target.dim() == 1:
        target = target[:, None]
    if target.shape != output.shape:  # torch would broadcast them
        raise ValueError(
            f"target has shape {tuple(target.shape)}: it must have the shape of output, "
            f"{tuple(output.shape)}"
        )
    return F.mse_loss(output, target, reduction="none").reshape(output.shape[0], -1).sum(1) / 2


def double_backprop(weight: float = 1.0, **options: Unpack[PresetOptions]) -> IGPen:
    """Double backpropagation as first published: ``½ ‖∂E_n/∂x_n‖²``, ``E_n = ½ ‖g_n − d_n‖²``.

    Called with ``(x, output, target)`` or ``(model, x, target)``. ``target`` has the shape of
    ``output``; it may be ``[N]`` if that is ``[N, 1]``. Use `fastjac.DataGrad`, which has no factor
    ½, for the cross-entropy, and `fastjac.IGPen` for any other loss.

    Source: Drucker & LeCun 1992, "Improving generalization performance using double
    backpropagation".

    Example:

        >>> model, x, t = nn.Linear(3, 1), torch.randn(4, 3), torch.randn(4, 1)
        >>> output, value = fastjac.presets.double_backprop()(model, x, t)
        >>> truth = ((output - t) @ model.weight).square().sum(1).mean() / 2
        >>> torch.allclose(value, truth)
        True
    """
    return IGPen(
        half_squared_error,
        weight=arguments.factor("weight", weight) / 2,
        **_known(double_backprop, options),
    )


def r1(gamma: float = 10.0, **options: Unpack[PresetOptions]) -> GradientPenalty:
    """R1 of a discriminator: ``γ/2 ‖∇D(x_n)‖²`` at real samples.

    Called with ``(x, output)`` or ``(D, x)``; ``output`` is ``[N]``, ``[N, 1]`` or a map
    ``[N, 1, ...]``, whose sum is ``D(x_n)``. ``every=16`` is the lazy regularisation of StyleGAN2:
    the penalty of every 16th call, times 16.

    Source: Mescheder, Geiger, Nowozin 2018, arXiv 1801.04406; Karras et al. 2020, arXiv 1912.04958.

    Example:

        >>> D, x = nn.Linear(3, 1), torch.randn(4, 3)
        >>> output, value = fastjac.presets.r1(10.0)(D, x)
        >>> torch.allclose(value, 5 * D.weight.square().sum())
        True
    """
    return GradientPenalty(0.0, weight=arguments.factor("gamma", gamma) / 2, **_known(r1, options))


def r2(gamma: float = 10.0, **options: Unpack[PresetOptions]) -> GradientPenalty:
    """R2 of a discriminator: ``γ/2 ‖∇D(x_n)‖²`` at generated samples, which must be detached.

    It is `r1` at other points.

    Source: Mescheder, Geiger, Nowozin 2018, arXiv 1801.04406.
    """
    return r1(gamma, **_known(r2, options))


class WGANGP(GradientPenalty):
    """``R_n = (‖∇D(x̂_n)‖ − 1)²`` at ``x̂_n = ε_n x_n + (1 − ε_n) x̃_n``, ``ε_n ~ U[0, 1]``.

    Called with ``(critic, real, fake)``; returns the output of the critic at ``x̂`` and the value.
    ``x̂`` is detached from ``real`` and ``fake``, so the penalty has a gradient only with respect to
    the parameters of the critic.

    Arguments:
        critic: returns ``[N]``, ``[N, 1]`` or a map ``[N, 1, ...]``, whose sum is ``D``.
        real, fake: ``[N, ...]``, of the same shape and dtype. epsilon: ``[N]``, used instead of
        random numbers.

    Options:
        generator: on the device of ``real``, for ``torch.rand(N)``. weight, reduction, every,
        output, at, engine: see ``help(fastjac.InputPenalty)``.

    Source: Gulrajani et al. 2017, arXiv 1704.00028, algorithm 1.

    Example:

        >>> critic, real, fake = nn.Linear(3, 1), torch.randn(4, 3), torch.randn(4, 3)
        >>> output, value = fastjac.presets.WGANGP()(critic, real, fake)
        >>> torch.allclose(value, (critic.weight.norm() - 1).square())
        True
    """

    def __init__(
        self,
        *,
        generator: torch.Generator | None = None,
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
        self.generator = arguments.generator(generator)

    def _called(
        self, critic: Any, real: Any, fake: Any, *, epsilon: Tensor | None = None
    ) -> tuple[Any, Tensor]:
        if isinstance(critic, Tensor):
            raise TypeError(
                "critic is a Tensor: it must be a callable, because this penalty computes the "
                "points between real and fake itself. Pass (critic, real, fake), or use "
                "GradientPenalty with your own points"
            )
        output, value = super()._called(critic, self.between(real, fake, epsilon))
        return output, value

    @classmethod
    def call_parameters(cls) -> list[inspect.Parameter]:
        return parameters_of(cls._called)

    def between(self, real: Tensor, fake: Tensor, epsilon: Tensor | None = None) -> Tensor:
        """``ε real + (1 − ε) fake``, detached."""
        real, fake = arguments.floating("real", real).detach(), arguments.floating("fake", fake)
        arguments.like("fake", fake, "real", real)
        if fake.shape != real.shape:
            raise ValueError(
                f"fake has shape {tuple(fake.shape)} and real has {tuple(real.shape)}: they must "
                "be the same, because each generated sample is paired with a real one"
            )
        n = real.shape[0]
        if epsilon is None:
            arguments.generator_device(self.generator, real.device)
            epsilon = uniform((n,), self.generator, dtype=real.dtype, device=real.device)
        elif not isinstance(epsilon, Tensor) or epsilon.shape != (n,):
            shape = getattr(epsilon, "shape", type(epsilon).__name__)
            raise ValueError(
                f"epsilon is {shape}: it must be a tensor [{n}], one number for each sample"
            )
        arguments.like("epsilon", epsilon, "real", real)
        return torch.lerp(fake.detach(), real, epsilon.detach().reshape(n, *[1] * (real.dim() - 1)))


def wgan_gp(
    weight: float | Tensor = 10.0,
    *,
    generator: torch.Generator | None = None,
    **options: Unpack[PresetOptions],
) -> WGANGP:
    """``λ (‖∇D(x̂_n)‖ − 1)²`` between real and generated samples; λ is ``weight``. See `WGANGP`.

    Source: Gulrajani et al. 2017, arXiv 1704.00028, algorithm 1.
    """
    return WGANGP(weight=weight, generator=generator, **_known(wgan_gp, options))


def igr(weight: float | Tensor = 0.1, **options: Unpack[PresetOptions]) -> Eikonal:
    """The eikonal term of implicit geometric regularisation: ``λ (‖∇f(x_n)‖ − 1)²``.

    Called with ``(x, output)`` or ``(f, x)``, where ``x`` ``[N, D]`` contains the points.

    Source: Gropp, Yariv, Haim, Atzmon, Lipman 2020, arXiv 2002.10099; λ = 0.1 there.

    Example:

        >>> f, x = nn.Linear(3, 1), torch.randn(4, 3)
        >>> output, value = fastjac.presets.igr(0.1)(f, x)
        >>> torch.allclose(value, 0.1 * (f.weight.norm() - 1).square())
        True
    """
    return Eikonal(weight=weight, **_known(igr, options))


def deq(
    vecs: int = 2,
    *,
    weight: float | Tensor = 1.0,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
    **options: Unpack[PresetOptions],
) -> SpectReg:
    """Jacobian regularisation of a fixed-point map: ``1/(K d) Σ_k ‖J_nᵀ v_k‖²``, ``v ~ N(0, I)``.

    Called with ``(z, f_z)``, where ``z`` ``[N, ...]`` is the fixed point, which requires grad, and
    ``f_z`` one more application of ``f`` to it. ``d`` is the number of elements of a sample of
    ``f_z``, and ``vecs`` is K. The value is an unbiased estimate of ``‖J_n‖_F² / d``. Pass
    ``projection=v / √d`` to use given vectors instead of random ones.

    Source: Bai, Koltun, Kolter 2021, arXiv 2106.14342; ``vecs`` is 2 in their code.

    Example:

        >>> f, z = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
        >>> v = torch.randn(1, 4, 3)
        >>> value = fastjac.presets.deq(1)(z, f(z), projection=v / 3**0.5)
        >>> torch.allclose(value, (v[0] @ f.weight).square().mean())
        True
    """
    return SpectReg(
        vecs, weight=weight, generator=generator, chunk_size=chunk_size, **_known(deq, options)
    )


def rnode(z: Tensor, dz: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The two integrands of RNODE for a vector field: kinetic energy and Jacobian norm, each [N].

    ``kinetic_n = ½ mean_i dz_ni²``, ``jacobian_n = 1/(K d) Σ_k ‖J_nᵀ e_kn‖²`` with ``J = ∂dz/∂z``.
    Add both to the states that the solver integrates, and ``λ`` times their means to the loss. The
    code of the authors has means over the ``d`` elements of a sample, as here; the paper has sums.

    Arguments:
        z: ``[N, ...]``, requires grad. dz: the field at ``z``, of the same shape, in its graph.
        noise: ``e``, of shape ``z.shape`` or ``[K, *z.shape]``, standard normal or signs, drawn
        once for the whole solve.

    Source: Finlay, Jacobsen, Nurbekyan, Oberman 2020, arXiv 2002.02798.

    Example:

        >>> field, z = nn.Linear(3, 3), torch.randn(4, 3, requires_grad=True)
        >>> e, dz = torch.randn(4, 3), field(z)
        >>> kinetic, jacobian = fastjac.presets.rnode(z, dz, e)
        >>> torch.allclose(kinetic, dz.square().mean(1) / 2)
        True
        >>> torch.allclose(jacobian, (e @ field.weight).square().mean(1))
        True
    """
    z, dz = arguments.floating("z", z), arguments.floating("dz", dz)
    arguments.like("noise", arguments.tensor("noise", noise), "dz", dz)
    if dz.shape != z.shape or noise.shape not in (z.shape, (noise.shape[0], *z.shape)):
        raise ValueError(
            f"z, dz and noise have shapes {tuple(z.shape)}, {tuple(dz.shape)} and "
            f"{tuple(noise.shape)}: dz must have the shape of z, and noise that shape or "
            "[K, *z.shape]"
        )
    e = noise.reshape(-1, *rows(dz).shape)
    jacobian = SpectReg(reduction="none")(z, dz, projection=e / e.shape[-1] ** 0.5)
    kinetic = rows(dz.to(accumulate_dtype(dz.dtype))).square().mean(1) / 2
    return kinetic, jacobian
