"""The functions of the sweep, as expressions of ``a``, one on each line.

They are listed by the shape of ``a`` without its first dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def numbers(*shape: int) -> Tensor:
    """Constants between -1 and 1."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


def points(a: Tensor) -> Tensor:
    """A grid for ``F.grid_sample``, with points outside of the image."""
    return (numbers(a.shape[0], 3, 4, 2) * 7).sin() * 1.2


def grouped_attention(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, k.sin(), enable_gqa=True)


FUNCTIONS: dict[tuple[int, ...], str] = {
    (6,): """
        F.normalize(a, dim=1)
        F.normalize(a, p=1, dim=1)
        F.normalize(a, p=3, dim=1)
        F.normalize(a, dim=0)
        a.softmax(1)
        a.log_softmax(0)
        F.softmax(a, 1) @ a.mT
        F.gumbel_softmax(a, dim=1)
        F.cosine_similarity(a, a.flip(1) + 1)
        F.cosine_similarity(a[:, None], numbers(3, 6), dim=2)
        F.pairwise_distance(a, a.roll(1, 1))
        torch.cdist(a.view(-1, 3, 2), a.view(-1, 3, 2).flip(1) + 2)
        torch.einsum("ni,nj->nij", a, a.sin())
        torch.einsum("ni,nj,nk->ni", a, a.sin(), a)
        torch.where(a > 0, a.exp(), a.sin())
        torch.where(a > 0, a, 0.5)
        torch.where(a > 0, 0.1, a)
        a.cumsum(1)
        a.cumprod(1)
        a.cummax(1).values
        a.logcumsumexp(1)
        a.logsumexp(1)
        a.logsumexp(1, keepdim=True) * a
        torch.logaddexp(a, a.flip(1))
        torch.logaddexp2(a, a.flip(1))
        a.sort(1).values
        a.argsort(1) * a
        a.topk(3, 1).values
        a.kthvalue(2, 1).values
        a.median(1).values
        a.nanmedian(1, keepdim=True).values
        a.mode(1).values
        a.quantile(0.3, 1)
        a.gather(1, a.argsort(1)[:, :4])
        a.index_select(1, torch.tensor([0, 2, 2]))
        a[:, [0, 2, 2]]
        a[:, 1:5:2]
        a[:, -1:]
        a[..., None, 2]
        a[:, torch.tensor([True, False, True, True, False, True])]
        a.masked_select(torch.tensor([True, False, True, True, False, True])).view(-1, 4)
        a.take(torch.arange(a.numel()).flip(0)).view(a.shape)
        a.take_along_dim(a.argsort(1), 1)
        a.norm(dim=1)
        a.norm(p=1, dim=1)
        a.norm(p=3, dim=1, keepdim=True) * a
        a.norm(p=float("inf"), dim=1)
        torch.linalg.vector_norm(a, dim=1)
        torch.linalg.vector_norm(a, 1.5, dim=1)
        torch.linalg.norm(a.view(-1, 2, 3), dim=(1, 2))
        a.std(1)
        a.var(1, unbiased=False)
        a.var(1, keepdim=True).sqrt() * a
        torch.var_mean(a, 1)[0]
        (a - a.mean(1, keepdim=True)) / (a.var(1, keepdim=True) + 1e-5).sqrt()
        a * (a.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        a.max(1).values
        a.min(1).values
        a.amax(1)
        a.amin(1)
        a.amax(1, keepdim=True) * a
        torch.aminmax(a, dim=1)[1]
        a.clamp(-0.3, 0.4)
        a.clamp(min=-0.2)
        a.clamp(max=0.3)
        a.clamp(min=a.flip(1))
        torch.clamp_max(a, 0.2)
        torch.maximum(a, a.flip(1))
        torch.minimum(a, a.flip(1) * 0.5)
        torch.fmax(a, a.flip(1))
        a.prod(1)
        a.prod(1, keepdim=True) + a
        a @ numbers(6, 3)
        numbers(3, 6) @ a.mT @ a
        a @ a.mT
        a @ numbers(6)
        torch.dot(a[0], a[-1]) * a
        torch.outer(a[:, 0], a[:, 1]) @ a
        torch.addmm(a[:, :3], a, numbers(6, 3), beta=0.5, alpha=2)
        torch.addmv(a[:, 0], a, numbers(6))
        torch.addcmul(a, a, a.sin(), value=0.5)
        torch.addcdiv(a, a, a.exp(), value=0.5)
        torch.lerp(a, a.flip(1), 0.3)
        torch.lerp(a, a.flip(1), a.sin())
        torch.cross(a[:, :3], a[:, 3:], dim=1)
        torch.kron(a, torch.ones(1, 2))
        torch.tensordot(a, numbers(3, 6), ([1], [1]))
        F.bilinear(a, a.sin(), numbers(2, 6, 6))
        F.linear(a, a)
        a.chunk(2, 1)[0] * a.chunk(2, 1)[1].sigmoid()
        a.split([2, 4], 1)[1] * a.split([2, 4], 1)[1]
        a.split(4, 1)[0]
        torch.stack(a.unbind(1)[:3], 1)
        a.unbind(1)[0][:, None] * a
        torch.cat([a, a.sin(), a[:, :1]], 1)
        torch.cat([a, torch.ones(a.shape[0], 1), a], 1)
        torch.stack([a, a.sin()], 2)
        torch.hstack([a, a.cos()])
        a.roll(2, 1)
        a.flip(1)
        torch.tril(a.view(-1, 2, 3))
        a.view(-1, 2, 3).triu(1)
        torch.diag_embed(a) @ a[..., None]
        a.view(-1, 2, 3).diagonal(dim1=1, dim2=2)
        a.masked_fill(a > 0.1, 0.3)
        a.masked_fill(a > 0.1, float(2)) * a
        a.scatter(1, a.argsort(1)[:, :2], 0.5)
        a.scatter_add(1, a.argsort(1), a.sin())
        a.scatter(1, a.argsort(1)[:, :2], a[:, :2].sin())
        a.scatter_reduce(1, a.argsort(1), a.sin(), "sum")
        a.scatter_reduce(1, a.argsort(1) // 2, a.sin(), "amax")
        a.scatter_reduce(1, a.argsort(1) // 2, a.exp(), "prod")
        a.index_add(1, torch.tensor([0, 2]), a[:, :2].sin())
        a.index_copy(1, torch.tensor([0, 2]), a[:, :2].sin())
        a.index_fill(1, torch.tensor([0, 2]), 0.5)
        a.index_put((torch.arange(a.shape[0]), torch.tensor([1])), a[:, 0].sin())
        torch.slice_scatter(a, a[:, :2].sin(), 1, 2, 4)
        torch.select_scatter(a, a[:, 0].sin(), 1, 2)
        a.repeat(1, 2) * a.repeat(1, 2)
        a.repeat_interleave(2, 1)
        a[:, None].expand(-1, 2, -1) * a[:, None]
        a.tile(2)
        a.unfold(1, 3, 2)
        a.as_strided((a.shape[0], 3), (6, 2))
        a.abs()
        a.sign() * a
        a.square() * a.pow(3)
        2**a
        a.exp() - a.expm1()
        (a.square() + 1).log()
        a.exp().log1p() + a.exp().log2() + a.exp().log10()
        a.exp().sqrt() * a.exp().rsqrt()
        1 / (a.square() + 1)
        a / a.exp()
        a.exp().reciprocal()
        a.sin() * a.cos() + a.tan()
        a.asin() + a.acos() + a.atan()
        a.sinh() + a.cosh() + a.asinh() + a.atanh()
        (a.exp() + 1).acosh()
        torch.atan2(a, a.flip(1) + 2)
        torch.hypot(a, a.flip(1))
        torch.erf(a) + torch.erfc(a) + torch.erfinv(a)
        torch.lgamma(a.exp()) + torch.digamma(a.exp())
        torch.special.xlogy(a.exp(), a.exp() + 1) + torch.special.entr(a.exp())
        torch.special.i0(a) + torch.special.i0e(a) + torch.special.i1(a)
        torch.special.ndtr(a) + torch.special.log_ndtr(a)
        torch.logit(a.sigmoid() * 0.8 + 0.1)
        torch.sinc(a)
        torch.xlogy(a.exp(), 2.0)
        torch.frac(a) + torch.fmod(a, 0.3) + torch.remainder(a, 0.3)
        a.round() * a + a.floor()
        torch.nan_to_num(a)
        torch.copysign(a, a.flip(1))
        torch.dist(a, a.flip(1)) * a
        torch.renorm(a, 2, 0, 0.5)
        torch.trapezoid(a, dim=1)
        torch.cumulative_trapezoid(a, dim=1)
        torch.diff(a, dim=1)
        torch.gradient(a, dim=1)[0]
        torch.cov(a.mT) @ a.mT @ a
        F.pad(a, (1, 2))
        F.pad(a, (-1, -1))
        F.pad(a, (1, 1), value=0.5)
        F.layer_norm(a, (6,))
        F.rms_norm(a, (6,))
        F.group_norm(a, 2)
        F.batch_norm(a, None, None, training=True)
        F.glu(a)
        F.softsign(a)
        F.logsigmoid(a)
        F.softmin(a, 1)
        F.rrelu(a)
        F.mse_loss(a, a.flip(1), reduction="none")
        F.smooth_l1_loss(a, a.flip(1), reduction="none", beta=0.3)
        F.huber_loss(a, a.flip(1), reduction="none", delta=0.3)
        F.l1_loss(a, a.flip(1), reduction="none")
        F.kl_div(a, a.flip(1).softmax(1), reduction="none")
        F.kl_div(a, a.flip(1), reduction="none", log_target=True)
        F.binary_cross_entropy(a.sigmoid(), torch.full_like(a, 0.3), reduction="none")
        F.binary_cross_entropy_with_logits(a, a.flip(1).sigmoid(), reduction="none")
        F.cross_entropy(a, a.flip(1).softmax(1), reduction="none")
        F.cross_entropy(a, torch.zeros(a.shape[0], dtype=torch.long), reduction="none")
        F.nll_loss(a.log_softmax(1), torch.ones(a.shape[0], dtype=torch.long), reduction="none")
        F.poisson_nll_loss(a, torch.full_like(a, 2), reduction="none")
        F.gaussian_nll_loss(a, a.flip(1), a.exp(), reduction="none")
        F.soft_margin_loss(a, a.detach().sign(), reduction="none")
        F.hinge_embedding_loss(a, a.detach().sign(), reduction="none")
        F.triplet_margin_loss(a, a.roll(1, 1), a.flip(1), reduction="none")
        F.cosine_embedding_loss(a, a.flip(1), torch.ones(a.shape[0]), reduction="none")
        F.margin_ranking_loss(a, a.flip(1), a.detach().sign(), reduction="none")
        F.multi_margin_loss(a, torch.ones(a.shape[0], dtype=torch.long), reduction="none")
        F.multilabel_soft_margin_loss(a, (a > 0).double(), reduction="none")
        a.mean(1, keepdim=True) * a.sum(0)
        a.mean() * a
        a.sum() + a
        a.nansum(1) + a.nanmean(1)
        a.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)
        a.view(-1, 2, 3).permute(0, 2, 1).contiguous()
        a.movedim(0, 1).mT
        a.reshape(a.shape[0], 1, -1).squeeze()
        a.squeeze(1).unsqueeze(2)
        a.to(torch.float64).clone()
        a * a.detach().sign() + a.sigmoid()
        a - a.flip(1) * 2
        torch.sub(a, a.sin(), alpha=0.5)
        torch.rsub(a, a.sin(), alpha=2)
        -a
        a * torch.tensor(2.0)
        a * 3 / 2
    """,
    (3, 4): """
        F.scaled_dot_product_attention(a, a.sin(), a)
        F.scaled_dot_product_attention(a[:, None], a[:, None], a[:, None], is_causal=True)
        F.scaled_dot_product_attention(a[:, None], a.sin()[:, None], a[:, None], numbers(3, 3) > 0)
        F.scaled_dot_product_attention(a[:, None], a[:, None], a.sin()[:, None], numbers(3, 3))
        F.scaled_dot_product_attention(a[:, None], *[numbers(1, 5, 4).expand(len(a), 1, 5, 4)] * 2)
        F.scaled_dot_product_attention(a[:, None], a[:, None], a[:, None], dropout_p=0.3)
        grouped_attention(a.view(-1, 2, 3, 2), a[:, None, :, :2])
        torch.bmm(a, a.mT)
        a @ a.mT @ a
        torch.matmul(a, numbers(4, 2))
        torch.baddbmm(a, a @ a.mT, a, beta=0.5)
        torch.baddbmm(a, a @ a.mT, a)
        torch.addbmm(a[0], a @ a.mT, a)
        torch.einsum("nij,nkj->nik", a, a.sin())
        torch.einsum("nij,kj->nik", a, numbers(2, 4))
        torch.linalg.det(a @ a.mT + torch.eye(3))
        torch.logdet(a @ a.mT + torch.eye(3))
        torch.linalg.slogdet(a @ a.mT + torch.eye(3)).logabsdet
        torch.linalg.inv(a @ a.mT + torch.eye(3))
        torch.linalg.solve(a @ a.mT + torch.eye(3), a)
        torch.linalg.cholesky(a @ a.mT + torch.eye(3))
        torch.linalg.eigvalsh(a @ a.mT)
        torch.linalg.svdvals(a)
        torch.linalg.qr(a.mT).R
        torch.linalg.matrix_norm(a)
        torch.linalg.matrix_norm(a, "nuc")
        torch.linalg.pinv(a)
        torch.matrix_exp(a @ a.mT)
        torch.linalg.matrix_power(a @ a.mT, 3)
        torch.linalg.solve_triangular((a @ a.mT).tril() + torch.eye(3), a, upper=False)
        torch.trace(a[0, :, :3]) * a
        a.cumsum(1).cumsum(2)
        a.logsumexp((1, 2))
        a.std((1, 2))
        a.amax((1, 2))
        a.norm(dim=(1, 2))
        a.flatten(1).sort(1, descending=True).values
        a.rot90(1, (1, 2))
        a.mean((0, 2))[None, :, None] * a
        F.adaptive_avg_pool1d(a, 2)
        F.max_pool1d(a, 2)
        F.pad(a, (1, 1), mode="reflect")
        F.pad(a, (1, 1), mode="circular")
        F.pad(a, (1, 1), mode="replicate")
        F.instance_norm(a)
        F.interpolate(a, size=6)
        F.interpolate(a, size=6, mode="linear")
        F.interpolate(a, scale_factor=1.7, mode="linear", recompute_scale_factor=True)
        F.interpolate(a, size=3, mode="area")
        F.embedding_bag(torch.arange(3)[None].expand(a.shape[0], 3), a[0]) + a[:, 0]
    """,
    (2, 4, 4): """
        F.interpolate(a, size=(3, 5))
        F.interpolate(a, size=(3, 5), mode="bilinear")
        F.interpolate(a, size=(3, 5), mode="bicubic")
        F.interpolate(a, size=(3, 3), mode="bilinear", antialias=True)
        F.interpolate(a, size=(3, 5), mode="bicubic", antialias=True)
        F.interpolate(a, size=(3, 5), mode="area")
        F.grid_sample(a, a[:, :, :3].movedim(1, 3) * 0.8, align_corners=False)
        F.grid_sample(a, points(a), align_corners=True)
        F.grid_sample(numbers(*a.shape), a[:, :, :3].movedim(1, 3), align_corners=True)
        F.grid_sample(a, points(a), "nearest", align_corners=True)
        F.grid_sample(a, points(a), "bicubic", align_corners=True)
        F.grid_sample(a, a[:, :, :3].movedim(1, 3) * 2, padding_mode="border", align_corners=False)
        F.affine_grid(a[:, 0, :2, :3], (a.shape[0], 1, 2, 2), align_corners=False)
        F.unfold(a, 2)
        F.fold(F.unfold(a, 2), (4, 4), 2)
        F.pixel_unshuffle(a, 2)
        F.avg_pool2d(a, 2)
        F.max_pool2d(a, 2)
        F.lp_pool2d(a, 2, 2)
        F.local_response_norm(a, 2)
        F.conv2d(a[:, :1], numbers(1, 1, 2, 2))
        F.pad(a, (1, 1, 1, 1), mode="reflect")
        F.pad(a, (1, 2, 0, 1), mode="circular")
        F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2)
        F.dropout(a, 0.3)
        F.dropout2d(a, 0.3)
    """,
    (4,): """
        torch.fft.fft(a).abs()
        torch.view_as_real(torch.fft.fft(a))
        torch.fft.fft(a).real + torch.fft.fft(a).imag
        torch.fft.rfft(a).abs()
        torch.fft.irfft(torch.fft.rfft(a) * torch.view_as_complex(torch.ones(3, 2)))
        torch.fft.fft(a)[:, 1:].angle()
        torch.complex(a, a.sin()).abs()
        torch.polar(a.exp(), a).real
        (torch.complex(a, a.sin()) * torch.complex(a, a.cos())).imag
        torch.complex(a, a.sin()).exp().real
        torch.view_as_real(torch.view_as_complex(a.view(-1, 2, 2)) ** 2)
        torch.view_as_complex(a.view(-1, 2, 2)).abs()
        (a + 0j).conj().real
        torch.stft(a.repeat(1, 2), 4, window=torch.ones(4), return_complex=True).abs()
    """,
}


NAMES = {
    "F": F,
    "torch": torch,
    "numbers": numbers,
    "points": points,
    "grouped_attention": grouped_attention,
}


def function(text: str) -> Callable[[Tensor], Tensor]:
    found: Callable[[Tensor], Tensor] = eval("lambda a: " + text, NAMES)
    return found
