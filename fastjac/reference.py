"""The definition of every penalty in plain torch, which all tests compare with.

Each function returns the per-sample values ``R_n`` as a tensor ``[N]``, without weight and
reduction. The inputs are ``x`` ``[N, ...]`` and ``output`` ``[N, ...]`` of one autograd graph;
``output`` is flattened from dimension 1 to ``m`` columns (``[N]`` means ``m = 1``). The full
Jacobian ``J_n = d output_n / d x_n`` is computed, one output column at a time, which is slow.
Sample ``n`` of the output must depend only on sample ``n`` of the input (no BatchNorm in training
mode). Everything is computed in the dtype of the inputs and with ``create_graph=True``, so the
values are differentiable as often as the network is.

A random penalty draws its numbers in one documented call, so that with a generator of the same seed
the library draws the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
LayerTuple = tuple[Tensor, Tensor, Activation | None]


def flat(t: Tensor) -> Tensor:
    """``[N, ...]`` as ``[N, m]``."""
    return t.reshape(t.shape[0], math.prod(t.shape[1:]))


def jacobian(x: Tensor, output: Tensor) -> Tensor:
    """``J[n, i, :] = d output[n, i] / d x[n]``, as ``[N, m, D]``."""
    rows = []
    for column in flat(output).unbind(1):
        (row,) = torch.autograd.grad(column.sum(), x, create_graph=True)
        rows.append(flat(row))
    return torch.stack(rows, dim=1)


def measure(v: Tensor, norm: str) -> Tensor:
    """The norm of the rows of ``v`` ``[..., D]``."""
    if norm == "l2_squared":
        return (v * v).sum(-1)
    return torch.linalg.vector_norm(v, ord={"l1": 1, "l2": 2}[norm], dim=-1)


def projected(x: Tensor, output: Tensor, w: Tensor, norm: str) -> Tensor:
    """``‖J_nᵀ w_kn‖`` for cotangents ``w`` ``[K, N, m]``, as ``[K, N]``."""
    return measure(torch.einsum("nmd,knm->knd", jacobian(x, output), w), norm)


def one_hot(target: Tensor, logits: Tensor) -> Tensor:
    """Class indices ``[N]`` as rows ``[N, m]``; probabilities ``[N, m]`` are returned unchanged."""
    if target.is_floating_point():
        return flat(target).to(logits.dtype)
    return F.one_hot(target, logits.shape[1]).to(logits.dtype)


def spectreg(
    x: Tensor,
    output: Tensor,
    *,
    n_proj: int = 1,
    normalize: bool = False,
    scale: bool = True,
    shared: bool = False,
    distribution: str = "gaussian",
    norm: str = "l2_squared",
    projection: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``R_n = 1/K Σ_k ‖J_nᵀ w_kn‖²``, ``w = r/√m``, ``r = randn(K, N, m)``.

    ``distribution``: another distribution of ``r`` with ``E r rᵀ = I``: signs, points on the sphere
    of radius √m, or up to m points on the sphere that are orthogonal to each other.
    ``normalize``: ``w = r/‖r‖``; ``scale=False``: ``w = r``; ``shared``: ``r = randn(K, 1, m)``.
    ``n_proj=-1``: the expectation, ``‖J‖_F² / m`` (``‖J‖_F²`` without the scale).
    """
    n, m = flat(output).shape
    if n_proj == -1:
        return frobreg(x, output) / (m if scale else 1)
    if projection is not None:
        w = projection.reshape(-1, n, m)
    else:
        r = directions(distribution, n_proj, 1 if shared else n, m, x, generator)
        length = r.norm(dim=-1, keepdim=True) if normalize else math.sqrt(m) if scale else 1
        w = r / length
    return projected(x, output, w.expand(-1, n, m), norm).mean(0)


def drawn_by(generator: torch.Generator | None) -> dict[str, Any]:
    """The argument ``generator``, if there is one: with it torch refuses symbolic sizes."""
    return {} if generator is None else {"generator": generator}


def directions(
    distribution: str, k: int, n: int, m: int, x: Tensor, generator: torch.Generator | None
) -> Tensor:
    """``r``, ``[K, N, m]``, with ``E r rᵀ = I``."""
    options: Any = {"dtype": x.dtype, "device": x.device, **drawn_by(generator)}
    if distribution == "rademacher":
        return 2 * torch.randint(2, (k, n, m), **options) - 1
    if distribution == "orthogonal":
        size = min(k, m)
        groups = torch.randn(math.ceil(k / size), n, m, size, **options)
        columns = [torch.linalg.qr(g).Q.movedim(-1, 0) for g in groups]
        return torch.cat(columns)[:k] * math.sqrt(m)
    r = torch.randn(k, n, m, **options)
    if distribution == "spherical":
        return r * math.sqrt(m) / r.norm(dim=-1, keepdim=True)
    return r


def datagrad(
    x: Tensor,
    output: Tensor,
    target: Tensor,
    *,
    norm: str = "l2_squared",
    bound: float | None = None,
) -> Tensor:
    """``R_n = ‖J_nᵀ (softmax(g_n) − y_n)‖²``, from the input gradient of the cross-entropy.

    With ``bound``, and a weight of 1, multiplied by ``min(1, bound / ℓ²)`` with the mean
    cross-entropy ℓ of the batch, a constant.
    """
    logits = flat(output)
    w = logits.softmax(1) - one_hot(target, logits)
    values = projected(x, output, w[None], norm)[0]
    if bound is None:
        return values
    loss = F.cross_entropy(logits, one_hot(target, logits)).detach()
    return values * (bound / loss.square()).clamp(max=1)


def igpen(
    x: Tensor,
    output: Tensor,
    *targets: Any,
    loss_fn: Callable[..., Tensor] | None = None,
    norm: str = "l2_squared",
) -> Tensor:
    """``R_n = ‖∂ℓ_n/∂x_n‖²`` of a per-sample loss ``ℓ = loss_fn(output, *targets)`` ``[N]``."""
    if loss_fn is None:
        loss_fn = partial(F.cross_entropy, reduction="none")
    loss = loss_fn(output, *targets)
    return measure(jacobian(x, loss)[:, 0], norm)


def frobreg(x: Tensor, output: Tensor, *, norm: str = "l2_squared") -> Tensor:
    """``R_n = ‖J_n‖_F²``; with another norm, the sum of the norms of the rows."""
    return measure(jacobian(x, output), norm).sum(1)


def jacreg(x: Tensor, output: Tensor, *, norm: str = "l2_squared") -> Tensor:
    """``R_n = ‖∂ softmax(g_n)/∂x_n‖_F²``."""
    return frobreg(x, flat(output).softmax(1), norm=norm)


def onehot(x: Tensor, output: Tensor, target: Tensor, *, norm: str = "l2_squared") -> Tensor:
    """``R_n = ‖J_nᵀ y_n‖²``."""
    return projected(x, output, one_hot(target, flat(output))[None], norm)[0]


def random_onehot(
    x: Tensor,
    output: Tensor,
    *,
    n_proj: int = 1,
    norm: str = "l2_squared",
    projection: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``R_n = 1/K Σ_k ‖J_nᵀ √m e_i‖²``, ``i = randint(m, (K, N))``; ``n_proj=-1``: ``‖J‖_F²``."""
    n, m = flat(output).shape
    if n_proj == -1:
        return frobreg(x, output)
    if projection is not None:
        w = projection.reshape(-1, n, m)
    else:
        index = torch.randint(m, (n_proj, n), device=x.device, **drawn_by(generator))
        w = math.sqrt(m) * F.one_hot(index, m).to(x.dtype)
    return projected(x, output, w, norm).mean(0)


def jacobian_reg(
    x: Tensor,
    output: Tensor,
    *,
    n_proj: int = 1,
    projection: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``R_n = m/(2K) Σ_k ‖J_nᵀ v_kn‖²``, ``v`` uniform on the sphere.

    ``n_proj=-1``: the expectation ``½‖J‖_F²``.
    """
    if n_proj == -1:
        return frobreg(x, output) / 2
    m = flat(output).shape[1]
    return (
        m
        / 2
        * spectreg(
            x, output, n_proj=n_proj, normalize=True, projection=projection, generator=generator
        )
    )


def gradient_penalty(
    x: Tensor, output: Tensor, *, center: float = 1.0, one_sided: bool = False
) -> Tensor:
    """``R_n = (‖∇_x f_n‖ − c)²`` one-sided ``max(0, ‖∇_x f_n‖ − c)²``.

    ``f_n`` is the sum of the outputs of sample n.
    """
    gradient = jacobian(x, output).sum(1)
    if center == 0:
        return measure(gradient, "l2_squared")
    excess = measure(gradient, "l2") - center
    return (excess.clamp(min=0) if one_sided else excess) ** 2


def eikonal(x: Tensor, output: Tensor) -> Tensor:
    """``R_n = (‖∇_x f_n‖ − 1)²``."""
    return gradient_penalty(x, output, center=1.0)


def tangentprop(x: Tensor, output: Tensor, tangents: Tensor) -> Tensor:
    """``R_n = 1/K Σ_k ‖J_n t_kn‖²`` for directions ``t`` shaped like ``x`` or ``[K, *x.shape]``."""
    t = tangents.reshape(-1, *flat(x).shape)
    return measure(torch.einsum("nmd,knd->knm", jacobian(x, output), t), "l2_squared").mean(0)


def sobolev(x: Tensor, output: Tensor, target_grad: Tensor) -> Tensor:
    """``R_n = ‖J_n − T_n‖_F²`` for given Jacobians ``T`` ``[N, m, *x.shape[1:]]``."""
    j = jacobian(x, output)
    return (j - target_grad.reshape(j.shape)).square().sum((1, 2))


def finite_difference_datagrad(
    model: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, *, eps: float = 1e-2
) -> Tensor:
    """``R_n = ((ℓ_n(x + ε v/‖v‖) − ℓ_n(x)) / ε)²``; ``v = ∂ℓ_n/∂x_n`` is a constant.

    ``ℓ`` is the cross-entropy per sample. ``R_n`` is 0 for a sample with ``v = 0``.
    """

    def loss(inputs: Tensor) -> Tensor:
        logits = flat(model(inputs))
        return -(one_hot(target, logits) * logits.log_softmax(1)).sum(1)

    leaf = x.detach().requires_grad_()
    (v,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    length = flat(v).norm(dim=1)
    direction = flat(v) / torch.where(length > 0, length, 1)[:, None]
    slope = (loss(x + eps * direction.reshape(x.shape)) - loss(x)) / eps
    return torch.where(length > 0, slope**2, 0)


def confidence_penalty(x: Tensor, output: Tensor) -> Tensor:
    """``R_n = Σ_i p_i log p_i``, ``p = softmax(g_n)``: minus the entropy. ``x`` is not used."""
    log_p = flat(output).log_softmax(1)
    return torch.special.xlogy(log_p.exp(), log_p.exp()).sum(1)


def derivative(activation: Activation, z: Tensor) -> Tensor:
    """``φ'(z)`` of an elementwise ``φ``, computed by autograd."""
    slope = torch.func.vmap(torch.func.grad(activation))
    return slope(z.reshape(-1)).reshape(z.shape)


def dreg(
    stack: Sequence[LayerTuple],
    *,
    over: str = "sum",
    layers: str = "sum",
    positions: str = "sum",
    include_output: bool = False,
    use_weight: bool = True,
    squared: bool = True,
    layer_weights: Sequence[float] | None = None,
) -> Tensor:
    """``R_n = Σ_l Σ_i φ'(z_lni)² ‖W_l[i, :]‖²``: the squared norms of ``diag φ'(z) W``.

    ``stack`` contains ``(z, W, φ)`` of each layer, with ``φ = None`` for the output layer
    (``φ' = 1``). The rows of ``W``, one for each unit or output channel, are in dimension 0. If
    ``W`` is a matrix, ``z`` is ``[N, ..., units]``; if it is the weight of a convolution, ``z`` is
    ``[N, channels, ...]``. Each position adds a row to the Jacobian of the layer.
    """
    terms = []
    for z, weight, activation in stack:
        if activation is None and not include_output:
            continue
        slope = torch.ones_like(z) if activation is None else derivative(activation, z)
        units = weight.shape[0]
        if weight.dim() > 2:
            slope = slope.movedim(1, -1)
        slope = slope.reshape(z.shape[0], -1, units)
        row = weight.flatten(1).square().sum(1) if use_weight else weight.new_ones(units)
        term = (slope.square() * row).sum((1, 2))
        term = term / {"sum": 1, "units": units, "elements": weight.numel()}[over]
        term = term / {"sum": 1, "mean": slope.shape[1]}[positions]
        terms.append(term if squared else term.sqrt())
    if layer_weights is not None:
        terms = [c * term for c, term in zip(layer_weights, terms, strict=True)]
    total = torch.stack(terms).sum(0)
    return total / len(terms) if layers == "mean" else total


def contractive(stack: Sequence[LayerTuple]) -> Tensor:
    """``R_n = ‖diag φ'(z_1n) W_1‖_F²``: the first hidden layer only."""
    return dreg(stack[:1])


def gu_rigazio(
    stack: Sequence[LayerTuple], *, layer_weights: Sequence[float] | None = None
) -> Tensor:
    """``R_n = Σ_l ‖diag φ'(z_ln) W_l‖_F``, unsquared, the output layer included."""
    return dreg(stack, squared=False, include_output=True, layer_weights=layer_weights)


def accumulated_dreg(
    activations: Callable[[Tensor], Sequence[Tensor]],
    x: Tensor,
    *,
    include_output: bool = False,
    tangent: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``R_n = Σ_l ‖J_ln ⋯ J_1n u_n‖²``, ``u = randn(x.shape)``; ``J_l`` includes the activation.

    ``activations(x)`` returns ``a_1, …, a_{L-1}`` and then the output.
    """
    if tangent is None:
        tangent = torch.randn(x.shape, dtype=x.dtype, device=x.device, **drawn_by(generator))
    pushed = torch.func.jvp(lambda inputs: tuple(activations(inputs)), (x,), (tangent,))[1]
    counted = pushed if include_output else pushed[:-1]
    return torch.stack([flat(t).square().sum(1) for t in counted]).sum(0)
