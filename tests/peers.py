"""The algorithms of other libraries and papers, written in plain torch.

Nothing of fastjac is used here. Each returns what its original adds to the loss, and draws as it
does, so that one seed gives both sides the same random vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def grad(output: Tensor, x: Tensor, v: Tensor | None = None) -> Tensor:
    """``Jᵀv`` in the graph; ``v`` is a tensor of ones by default."""
    (g,) = torch.autograd.grad(
        output, x, torch.ones_like(output) if v is None else v, create_graph=True
    )
    return g


class JacobianReg:
    """facebookresearch/jacobian_regularizer: ``1/2 Σ_k C ‖Jᵀv_k‖² / (K B)``, k one by one."""

    def __init__(self, n: int = 1) -> None:
        self.n = n

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        batch, classes = y.shape
        rounds = classes if self.n == -1 else self.n
        total = torch.zeros(())
        for k in range(rounds):
            if self.n == -1:
                v = torch.zeros(batch, classes)
                v[:, k] = 1
            else:
                v = torch.randn(batch, classes)
                v = v / v.norm(dim=1, keepdim=True)
            total = total + classes * grad(y, x, v).norm() ** 2 / (rounds * batch)
        return total / 2


def double_backprop(x: Tensor, output: Tensor, target: Tensor) -> Tensor:
    """Drucker & LeCun: for each pattern by itself ``E = ½ Σ (d − o)²``, then ``½ Σ (∂E/∂x)²``."""
    total = torch.zeros(())
    for o, d in zip(output, target, strict=True):
        energy = ((d - o) ** 2).sum() / 2
        total = total + (grad(energy, x) ** 2).sum() / 2
    return total / len(x)


def r1_loss(logits: Tensor, images: Tensor, gamma: float) -> Tensor:
    """StyleGAN2's R1 (and R2, at generated images)."""
    squares = grad(logits.sum(), images).square()
    return (squares.flatten(1).sum(1) * (gamma / 2)).mean()


def wgan_gp_loss(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, lam: float
) -> Tensor:
    """Algorithm 1 of Gulrajani et al.: sample by sample, as it is printed."""
    epsilon = torch.rand(len(real))
    points = torch.stack(
        [e * x + (1 - e) * y for e, x, y in zip(epsilon, real.data, fake.data, strict=True)]
    ).requires_grad_()
    slopes = grad(critic(points).sum(), points).flatten(1).norm(2, dim=1)
    return lam * ((slopes - 1) ** 2).mean()


def igr_loss(points: Tensor, sdf: Tensor, lam: float = 0.1) -> Tensor:
    """Implicit geometric regularisation: the eikonal term."""
    return lam * ((grad(sdf, points).norm(2, dim=-1) - 1) ** 2).mean()


def rnode_terms(z: Tensor, dz: Tensor, noise: list[Tensor]) -> tuple[Tensor, Tensor]:
    """RNODE's integrands: quadratic cost, and the squared Jacobian norm with the divergence's e."""
    kinetic = 0.5 * dz.flatten(1).pow(2).mean(1)
    norms = [grad(dz, z, e).flatten(1).pow(2).mean(1, keepdim=True) for e in noise]
    return kinetic, torch.cat(norms, 1).mean(1)


def jac_loss_estimate(f0: Tensor, z0: Tensor, vecs: int = 2) -> Tensor:
    """locuslab/deq: Hutchinson's estimate over all elements of the batch."""
    total = torch.zeros(())
    for _ in range(vecs):
        total = total + grad(f0, z0, torch.randn(z0.shape)).norm() ** 2
    return total / vecs / z0.numel()
