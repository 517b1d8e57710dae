"""The functions and modules of the sweep that take more than one line."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


def slice_written(a: Tensor) -> Tensor:
    """Writes into a part of a tensor."""
    b = torch.zeros_like(a)
    b[:, 1:] = a[:, :-1].sin()
    return b + a


def half_written(a: Tensor) -> Tensor:
    b = a.clone()
    b[:, :2] = b[:, 2:4].clone() * 2
    return b


def index_written(a: Tensor) -> Tensor:
    b = a * 1
    b[:, [0, 2]] = 0.5
    return b * a


def mask_written(a: Tensor) -> Tensor:
    b = a * 1
    b[b > 0.1] = 0.3
    return b


def in_place(a: Tensor) -> Tensor:
    return (a * 1).mul_(2).add_(a.sin()).neg_().sigmoid_()


def in_place_of_view(a: Tensor) -> Tensor:
    b = a * 1
    b[:, :3].mul_(2)
    b.select(1, 0).sin_()
    return b


def add_in_place(a: Tensor) -> Tensor:
    b = a.sin()
    b += a
    b *= 2
    return b


def masked_fill_in_place(a: Tensor) -> Tensor:
    return (a * 1).masked_fill_(a > 0.1, -1.0).tanh_()


def many_steps(a: Tensor) -> Tensor:
    """A loop of Python, with a branch on numbers."""
    for i in range(3):
        a = a.tanh() * (1 + i) if a.mean() > 0 else a.sin() + a.square()
    return a


def two_branches(a: Tensor) -> Tensor:
    return a.sin() * a.cos().flip(1) + F.layer_norm(a, a.shape[1:]) * a.mean(0)


def max_pool_and_back(a: Tensor) -> Tensor:
    pooled, where = F.max_pool1d(a[:, None], 2, return_indices=True)
    return F.max_unpool1d(pooled, where, 2)


def own_gradient(a: Tensor) -> Tensor:
    """A model that computes a gradient itself."""
    energy = (a.tanh().pow(3) * a.flip(1)).sum()
    return torch.autograd.grad(energy, a, create_graph=True)[0]


def gradient_of_norm(norm: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    return torch.autograd.grad(norm(a).sin().sum(), a, create_graph=True)[0]


def gradient_of_layer_norm(a: Tensor) -> Tensor:
    return gradient_of_norm(lambda a: F.layer_norm(a, a.shape[1:], eps=0.1), a)


def gradient_of_group_norm(a: Tensor) -> Tensor:
    return gradient_of_norm(lambda a: F.group_norm(a, 2, eps=0.1), a)


def gradient_of_batch_norm(a: Tensor) -> Tensor:
    return gradient_of_norm(lambda a: F.batch_norm(a, None, None, None, None, True, eps=0.1), a)


def gradient_of_batch_norm_eval(a: Tensor) -> Tensor:
    mean, var = torch.linspace(-1, 1, a.shape[1]), torch.linspace(0.5, 2, a.shape[1])
    return gradient_of_norm(lambda a: F.batch_norm(a, mean, var), a)


def gradient_of_rms_norm(a: Tensor) -> Tensor:
    return gradient_of_norm(lambda a: F.rms_norm(a, a.shape[1:], eps=0.1), a)


class Call(nn.Module):
    """Calls a function of a module (or of None) and ``a``."""

    def __init__(self, function: Callable[..., Tensor], net: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.net = function, net

    def forward(self, a: Tensor) -> Tensor:
        return self.function(a) if self.net is None else self.function(self.net, a)


def first(net: nn.Module, a: Tensor) -> Tensor:
    return net(a)[0]


def joined(net: nn.Module, a: Tensor) -> Tensor:
    return torch.cat(net(a), 1)


def of_two(net: nn.Module, a: Tensor) -> Tensor:
    return net(a, a.flip(1).sin())


def attention(net: nn.Module, a: Tensor) -> Tensor:
    return net(a, a, a.sin(), need_weights=False)[0]


def attention_with_weights(net: nn.Module, a: Tensor) -> Tensor:
    return torch.cat(net(a, a, a.sin()), 2)


def twice(net: nn.Module, a: Tensor) -> Tensor:
    return net(net(a) - 0.3)


def with_math(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention by matrix products, which torch can differentiate twice."""

    def call(net: nn.Module, a: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return f(net, a)

    return call


def call(net: nn.Module, a: Tensor) -> Tensor:
    return net(a)


def encoder(*args: float | str, **options: bool) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(4, 2, 5, *args, batch_first=True, **options)


Made = tuple[tuple[int, ...], Callable[..., Tensor], Callable[[], nn.Module]]
ROWS, VECTOR = (3, 4), (6,)
NETS: dict[str, Made] = {
    "RNN": (ROWS, first, lambda: nn.RNN(4, 3, batch_first=True)),
    "RNN of relu, two layers": (ROWS, first, lambda: nn.RNN(4, 3, 2, "relu", batch_first=True)),
    "LSTM": (ROWS, first, lambda: nn.LSTM(4, 3, batch_first=True, bidirectional=True)),
    "LSTM with projections": (ROWS, first, lambda: nn.LSTM(4, 3, batch_first=True, proj_size=2)),
    "GRU": (ROWS, first, lambda: nn.GRU(4, 3, batch_first=True)),
    "LSTMCell": (VECTOR, joined, lambda: nn.LSTMCell(6, 4)),
    "Bilinear": (VECTOR, of_two, lambda: nn.Bilinear(6, 6, 3)),
    "Bilinear twice": (VECTOR, lambda net, a: net(net(a, a), a), lambda: nn.Bilinear(6, 6, 6)),
    "CosineSimilarity": (VECTOR, of_two, lambda: nn.CosineSimilarity()),
    "PairwiseDistance": (VECTOR, of_two, lambda: nn.PairwiseDistance()),
    "PReLU twice": (VECTOR, twice, lambda: nn.PReLU(6)),
    "LayerNorm twice": (VECTOR, twice, lambda: nn.LayerNorm(6)),
    "BatchNorm1d twice": (VECTOR, twice, lambda: nn.BatchNorm1d(6)),
    "RMSNorm twice": (VECTOR, twice, lambda: nn.RMSNorm(6)),
    "Linear twice": (VECTOR, twice, lambda: nn.Linear(6, 6)),
    "MultiheadAttention with weights": (
        *(ROWS, attention_with_weights),
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    **{
        f"{name}{by}": (ROWS, wrap(function), make)
        for by, wrap in ((", SDPBackend.MATH", with_math), ("", lambda f: f))
        for name, function, make in (
            (
                "MultiheadAttention",
                attention,
                lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            ),
            ("TransformerEncoderLayer", call, encoder(0.0)),
            (
                "TransformerEncoderLayer of gelu, norm_first",
                call,
                encoder(0.3, "gelu", norm_first=True),
            ),
            (
                *("TransformerDecoderLayer", of_two),
                lambda: nn.TransformerDecoderLayer(4, 2, 5, 0.0, batch_first=True),
            ),
        )
    },
}
"""The shape of ``a``, how the module is called, and the module."""

WRITTEN: tuple[Callable[[Tensor], Tensor], ...] = (
    slice_written, half_written, index_written, mask_written, in_place, in_place_of_view,
    add_in_place, masked_fill_in_place, many_steps, two_branches, max_pool_and_back, own_gradient,
    gradient_of_layer_norm, gradient_of_group_norm, gradient_of_batch_norm,
    gradient_of_batch_norm_eval, gradient_of_rms_norm,
)  # fmt: skip
