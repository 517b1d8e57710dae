"""Networks of the suite ``networks``, as people write them: own modules with functional calls.

Each returns ``[N, 10]``, or ``[N, 1]``, and has no dropout, because the gate compares gradients.
The sizes are such that a plain step takes 0.5 to 20 ms on one core.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def heads_of(x: Tensor, heads: int) -> Tensor:
    """``[N, T, d]`` as ``[N, heads, T, d / heads]``."""
    n, t, d = x.shape
    return x.view(n, t, heads, d // heads).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of ``[N, heads, T, d]``, as ``[N, T, heads * d]``."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


class BertBlock(nn.Module):
    """Attention and feed-forward block, each followed by the sum and LayerNorm (post-norm)."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads_of(f(x), self.heads) for f in (self.query, self.key, self.value))
        x = self.norm1(x + self.out(attend(q, k, v)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Bert(nn.Module):
    """A stack of BERT blocks on embeddings ``[N, T, d]``, with the pooler of BERT."""

    def __init__(self, d: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(BertBlock(d, heads) for _ in range(layers))
        self.pool, self.head = nn.Linear(d, d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.pool(x[:, 0])))


class RootMeanSquare(nn.Module):
    """RMSNorm, written out as in Llama."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


class LlamaBlock(nn.Module):
    """RMSNorm, causal attention with rotary embedding, SwiGLU."""

    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(self, d: int, heads: int, t: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(d, 2 * d, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * d, d, bias=False)
        self.norm1, self.norm2 = RootMeanSquare(d), RootMeanSquare(d)
        half = d // heads // 2
        angle = torch.arange(t)[:, None] * 10000.0 ** -(torch.arange(half) / half)
        angle = torch.cat([angle, angle], dim=-1)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        self.register_buffer("mask", torch.full((t, t), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (heads_of(f(h), self.heads) for f in (self.query, self.key, self.value))
        q, k = rotated(q, self.cos, self.sin), rotated(k, self.cos, self.sin)
        x = x + self.out(attend(q, k, v, self.mask))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Llama blocks on embeddings ``[N, T, d]``; the last position is classified."""

    def __init__(self, d: int = 128, heads: int = 4, t: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(LlamaBlock(d, heads, t) for _ in range(layers)))
        self.norm, self.head = RootMeanSquare(d), nn.Linear(d, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x))[:, -1])


class WindowBlock(nn.Module):
    """Attention in windows with a relative position bias, shifted by a roll; no mask."""

    index: Tensor

    def __init__(self, d: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.bias = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        at = torch.stack(torch.meshgrid(2 * [torch.arange(window)], indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None, :] + window - 1
        self.register_buffer("index", apart[0] * (2 * window - 1) + apart[1])

    def forward(self, x: Tensor) -> Tensor:
        n, side, _, d = x.shape
        w, count = self.window, x.shape[1] // self.window
        h = torch.roll(self.norm1(x), (-self.shift, -self.shift), dims=(1, 2))
        h = h.view(n, count, w, count, w, d).transpose(2, 3).reshape(-1, w * w, d)
        q, k, v = (heads_of(part, self.heads) for part in self.qkv(h).chunk(3, dim=-1))
        h = self.out(attend(q, k, v, self.bias[self.index].permute(2, 0, 1)))
        h = h.view(n, count, count, w, w, d).transpose(2, 3).reshape(n, side, side, d)
        x = x + torch.roll(h, (self.shift, self.shift), dims=(1, 2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Swin(nn.Module):
    """Patches, a pair of window blocks, mean, head; for ``[N, 3, 32, 32]``."""

    def __init__(self, d: int = 64, heads: int = 4, window: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, 4, stride=4)
        self.blocks = nn.Sequential(
            *(WindowBlock(d, heads, window, shift) for shift in (0, window // 2))
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


class MixerBlock(nn.Module):
    """A feed-forward block over the positions, and one over the channels."""

    def __init__(self, t: int, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.across = nn.ModuleList([nn.Linear(t, 2 * t), nn.Linear(2 * t, t)])
        self.within = nn.ModuleList([nn.Linear(d, 4 * d), nn.Linear(4 * d, d)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x).transpose(1, 2)
        x = x + self.across[1](F.gelu(self.across[0](h))).transpose(1, 2)
        return x + self.within[1](F.gelu(self.within[0](self.norm2(x))))


class Mixer(nn.Module):
    """MLP-Mixer for ``[N, 3, 32, 32]``."""

    def __init__(self, d: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, 8, stride=8)
        self.blocks = nn.Sequential(*(MixerBlock(16, d) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))


class Siren(nn.Module):
    """``sin(30 (W x + b))`` with the initialisation of SIREN; a signal of two coordinates."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        sizes = [2, *[width] * layers]
        sines = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        for i, layer in enumerate(sines):
            bound = 1 / 2 if i == 0 else (6 / width) ** 0.5 / 30
            nn.init.uniform_(layer.weight, -bound, bound)
        self.layers, self.head = nn.ModuleList(sines), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(30 * layer(x))
        return self.head(x)


class Gated(nn.Module):
    """Residual layers with a sigmoid gate, whose sums are clamped."""

    def __init__(self, width: int = 64, layers: int = 4) -> None:
        super().__init__()
        self.values = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for value, gate in zip(self.values, self.gates, strict=True):
            g = torch.sigmoid(gate(x)).clamp(min=0.1)
            x = (g * torch.tanh(value(x)) + (1 - g) * x).clamp(-2, 2)
        return self.head(x)


class Pinn(nn.Module):
    """A tanh network u(x, t), as in physics-informed networks."""

    def __init__(self, width: int = 64, layers: int = 5) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, width), nn.Linear(width, 1)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


class DeepSdf(nn.Module):
    """A signed distance with softplus; the coordinates are concatenated again in the middle."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.before = nn.ModuleList([nn.Linear(3, width), nn.Linear(width, width)])
        self.after = nn.ModuleList([nn.Linear(width + 3, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.before:
            h = F.softplus(layer(h), beta=100)
        h = torch.cat([h, x], dim=-1)
        for layer in self.after:
            h = F.softplus(layer(h), beta=100)
        return self.head(h)


class GruClassifier(nn.Module):
    """A GRU on ``[N, T, d]``, whose last state is classified."""

    def __init__(self, d: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(d, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        return self.head(states[:, -1])


class UNet(nn.Module):
    """One level of a U-Net with GroupNorm and SiLU, for ``[N, 3, 16, 16]``."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.start = nn.Conv2d(3, c, 3, padding=1)
        self.norm1, self.down = nn.GroupNorm(4, c), nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
        self.norm2, self.middle = nn.GroupNorm(4, 2 * c), nn.Conv2d(2 * c, 2 * c, 3, padding=1)
        self.norm3, self.up = nn.GroupNorm(4, 2 * c), nn.Conv2d(2 * c, c, 3, padding=1)
        self.norm4, self.join = nn.GroupNorm(4, 2 * c), nn.Conv2d(2 * c, c, 3, padding=1)
        self.head = nn.Linear(c, 10)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.start(x)
        h = self.down(F.silu(self.norm1(skip)))
        h = h + self.middle(F.silu(self.norm2(h)))
        h = self.up(F.interpolate(F.silu(self.norm3(h)), scale_factor=2, mode="nearest"))
        h = self.join(F.silu(self.norm4(torch.cat([h, skip], dim=1))))
        return self.head(h.mean((2, 3)))


class Discriminator(nn.Module):
    """DCGAN's discriminator for ``[N, 3, 32, 32]``: strided convolutions, BatchNorm, LeakyReLU."""

    def __init__(self, c: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, c, 4, 2, 1, bias=False)
        self.conv2 = nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False)
        self.conv3 = nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=False)
        self.norm2, self.norm3 = nn.BatchNorm2d(2 * c), nn.BatchNorm2d(4 * c)
        self.head = nn.Conv2d(4 * c, 1, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2, inplace=True)
        x = F.leaky_relu(self.norm2(self.conv2(x)), 0.2, inplace=True)
        x = F.leaky_relu(self.norm3(self.conv3(x)), 0.2, inplace=True)
        return self.head(x).flatten(1)


class Residual(nn.Module):
    """Residual feed-forward layers with LayerNorm in front."""

    def __init__(self, inputs: int = 64, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.start, self.head = nn.Linear(inputs, width), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(x)
