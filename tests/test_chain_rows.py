"""Each row of the chain engine's table: value, VJP, JVP and their gradients against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import run, same, spectreg
from conftest import cpu_only
from layer_cases import Model
from torch import Tensor, nn

import fastjac
from fastjac.activations import TABLE
from fastjac.input_jacobian.chain import activations, rules
from fastjac.input_jacobian.chain.by_autograd import ByAutograd
from fastjac.input_jacobian.chain.record import Record
from fastjac.input_jacobian.chain.rules import RULES
from fastjac.ops.act import _Act
from fastjac.penalties import FrobReg, Sobolev, TangentProp

pytestmark = pytest.mark.usefixtures("double")

Call = Callable[[Any, Tensor], Tensor]

# By the node of the row. A hidden tensor [N, 4, 6, 6] goes in; m has parameters p [6], q [4, 1, 1],
# w [6, 3], constants c [6, 6], d [N, 4, 6, 6], and layers.
ROWS: dict[str, list[Call]] = {
    "View": [lambda m, h: h.view(3, 24, 6), lambda m, h: h.flatten(1, 2).unflatten(1, (4, 6))],
    "UnsafeView": [lambda m, h: h @ m.w],
    "ReshapeAlias": [lambda m, h: torch.ops.aten._reshape_alias(h, [3, 24, 6], [144, 6, 1])],
    "Squeeze": [lambda m, h: h[:, :1].squeeze()],
    "Squeeze.1": [lambda m, h: h[:, :1].squeeze(1), lambda m, h: h.squeeze(2)],
    "Squeeze.2": [lambda m, h: h[:, :1, :, :1].squeeze((1, 3))],
    "Unsqueeze": [lambda m, h: h.unsqueeze(-1), lambda m, h: torch.unsqueeze(h, 1)],
    "Alias": [lambda m, h: torch.ops.aten.alias(h)],
    "Clone": [lambda m, h: h.clone(), lambda m, h: h.transpose(1, 2).contiguous()],
    "Add.1": [lambda m, h: torch.ops.aten.add.Scalar(h, 2, 3)],
    "Sub.1": [lambda m, h: torch.ops.aten.sub.Scalar(h, 0.5)],
    "Mul.1": [lambda m, h: torch.ops.aten.mul.Scalar(h, 2.5)],
    "Div.1": [lambda m, h: torch.ops.aten.div.Scalar(h, 2.5)],
    "Rsub.1": [lambda m, h: 1 - h, lambda m, h: torch.rsub(h, 1.0, alpha=2)],
    "Neg": [lambda m, h: -h],
    "ToCopy": [lambda m, h: h.float().double()],
    "T": [lambda m, h: h.flatten(1).t().roll(1, 0).t()],
    "Transpose": [lambda m, h: h.transpose(1, 3), lambda m, h: torch.transpose(h, -1, 1)],
    "Transpose.1": [lambda m, h: h.transpose_(1, -1) * 1],
    "Permute": [lambda m, h: h.permute(0, 3, 1, 2), lambda m, h: torch.permute(h, (0, -1, 2, 1))],
    "Expand": [lambda m, h: h[:, :1].expand(3, 5, 6, 6), lambda m, h: h.expand(2, -1, -1, 6, 6)],
    "Repeat": [lambda m, h: h.repeat(1, 2, 1, 1), lambda m, h: h.repeat(2, 1, 1, 1, 1)],
    "Flip": [lambda m, h: h.flip(1, 2), lambda m, h: torch.flip(h, [-1])],
    "Roll": [lambda m, h: h.roll(2, 3), lambda m, h: h.roll((1, -1), (1, 2))],
    "Select": [lambda m, h: h.select(2, -1), lambda m, h: h[..., 3]],
    "Slice": [lambda m, h: h[:, 1:, ::2], lambda m, h: h.narrow(-1, -2, 2), lambda m, h: h[1:]],
    "Index": [
        *(lambda m, h: h[:, [0, 2, 0]], lambda m, h: h[[0, 2]][..., [1, 1]]),
        lambda m, h: h[:, [0, 1], :, [2, 3]],
    ],
    "IndexSelect": [lambda m, h: h.index_select(-1, torch.tensor([0, 3, 3]))],
    "Gather": [lambda m, h: h.gather(1, h.argsort(1))],
    "ConstantPadNd": [lambda m, h: F.pad(h, (1, 2, -1, 0)), lambda m, h: F.pad(h, (1, 1), value=3)],
    "ReflectionPad1D": [lambda m, h: F.pad(h[:, 0], (1, 2), "reflect")],
    "ReflectionPad2D": [lambda m, h: F.pad(h, (1, 2, 0, 1), "reflect")],
    "ReflectionPad3D": [lambda m, h: F.pad(h.unsqueeze(1), (1, 2, 0, 1, 1, 1), "reflect")],
    "ReplicationPad1D": [lambda m, h: F.pad(h[:, 0], (1, 2), "replicate")],
    "ReplicationPad2D": [lambda m, h: F.pad(h, (1, 2, 0, 1), "replicate")],
    "ReplicationPad3D": [lambda m, h: F.pad(h.unsqueeze(1), (1, 2, 0, 1, 1, 1), "replicate")],
    "Sum": [lambda m, h: h * h.sum()],
    "Mean": [lambda m, h: h * h.mean()],
    "Sum.1": [
        *(lambda m, h: h.sum(1), lambda m, h: h.sum((-1, 1)), lambda m, h: h.sum(dim=3)),
        *(lambda m, h: torch.sum(h, (2, 3), keepdim=True), lambda m, h: h * h.sum(0)),
    ],
    "Mean.1": [lambda m, h: h.mean((2, 3)), lambda m, h: torch.mean(h, 1, True)],
    "Cumsum": [lambda m, h: h.cumsum(-1)],
    "Diagonal": [lambda m, h: h.diagonal(1, -2, -1), lambda m, h: h.diagonal(0, 3, 2)],
    "Tril": [lambda m, h: h.tril(-1)],
    "Triu": [lambda m, h: h.triu(1)],
    "MaskedFill": [lambda m, h: h.masked_fill(m.d > 0, 2.0), lambda m, h: h.masked_fill(h > 0, 0)],
    "Split": [lambda m, h: h.split(2, 1)[0] * h.split(2, 1)[1], lambda m, h: h.chunk(3, -1)[1]],
    "UnsafeSplit": [lambda m, h: torch.unsafe_chunk(h, 2, -1)[1]],
    "SplitWithSizes": [lambda m, h: h.split([1, 3], 1)[1]],
    "Unbind": [lambda m, h: h.unbind(1)[0] * h.unbind(1)[2]],
    "Sort": [lambda m, h: h.sort(-1)[0]],
    "Topk": [lambda m, h: h.topk(2, 1)[0]],
    "Max": [lambda m, h: h.max(1)[0], lambda m, h: h.max(-1, keepdim=True).values],
    "Min": [lambda m, h: h.min(1)[0]],
    "Kthvalue": [lambda m, h: h.kthvalue(2, 1)[0]],
    "Median.1": [lambda m, h: h.median(1)[0]],
    "Cummax": [lambda m, h: h.cummax(1)[0]],
    "Cummin": [lambda m, h: h.cummin(1)[0]],
    "MaxPool2DWithIndices": [
        *(lambda m, h: F.max_pool2d(h, 2), lambda m, h: F.max_pool1d(h[:, 0], 2)),
        *(
            lambda m, h: F.max_pool2d(h, 3, 2, 1, ceil_mode=True),
            lambda m, h: F.max_pool2d(h[0], 2),
        ),
        lambda m, h: torch.max_pool2d(h, 2, 1, 0, 2),
    ],
    "MaxPool3DWithIndices": [lambda m, h: F.max_pool3d(h.unsqueeze(1), 2)],
    "AdaptiveMaxPool2D": [lambda m, h: F.adaptive_max_pool2d(h, 4)],
    "AdaptiveMaxPool3D": [lambda m, h: F.adaptive_max_pool3d(h.unsqueeze(1), 2)],
    "AvgPool2D": [
        *(lambda m, h: F.avg_pool2d(h, 2), lambda m, h: F.avg_pool1d(h[:, 0], 2)),
        lambda m, h: F.avg_pool2d(h, (3, 2), 2, (1, 0), True, False),
        lambda m, h: F.avg_pool2d(h, 2, divisor_override=3),
    ],
    "AvgPool3D": [lambda m, h: F.avg_pool3d(h.unsqueeze(1), 2)],
    "AdaptiveAvgPool2D": [lambda m, h: F.adaptive_avg_pool2d(h, (4, 2))],
    "AdaptiveAvgPool3D": [lambda m, h: F.adaptive_avg_pool3d(h.unsqueeze(1), (2, 4, 3))],
    "UpsampleNearest1D": [lambda m, h: F.interpolate(h[:, 0], scale_factor=1.5)],
    "UpsampleNearest2D": [lambda m, h: F.interpolate(h, size=(9, 5))],
    "UpsampleBilinear2D": [lambda m, h: F.interpolate(h, scale_factor=1.5, mode="bilinear")],
    "PixelShuffle": [lambda m, h: F.pixel_shuffle(h, 2)],
    "PixelUnshuffle": [lambda m, h: F.pixel_unshuffle(h, 2)],
    "Im2Col": [lambda m, h: F.unfold(h, 3, 1, 1, 2)],
    "NativeDropout": [lambda m, h: torch.native_dropout(h, 0.4, True)[0]],
    "Add": [
        *(lambda m, h: h + h.sin(), lambda m, h: h + h, lambda m, h: h + m.p, lambda m, h: m.q + h),
        *(lambda m, h: h[:, :1] + h[..., :1], lambda m, h: torch.add(h, m.d, alpha=2)),
        lambda m, h: h + h.mean(),
    ],
    "Sub": [lambda m, h: h - h.mean(1, True), lambda m, h: m.p - h, lambda m, h: h[0, 0] - h],
    "Rsub": [lambda m, h: torch.rsub(h, m.p, alpha=2)],
    "Stack": [lambda m, h: torch.stack([h, h.sin()], 1), lambda m, h: torch.stack([m.d, h], -1)],
    "Cat": [
        lambda m, h: torch.cat([h, h.sin(), m.d], 1),
        lambda m, h: torch.cat([m.d, m.d[:, :1], h, m.q.expand(3, 4, 6, 6)], 1),
        lambda m, h: torch.cat((h[..., :2], h), -1),
    ],
    "Where": [
        *(lambda m, h: torch.where(h > 0, h, h.sin()), lambda m, h: torch.where(h > 0, m.p, h)),
        lambda m, h: torch.where(m.d > 0, h, 2.0),
        lambda m, h: torch.where(m.d > 0, h[:, :1], h.mean()),
    ],
    "Mul": [
        *(lambda m, h: h * h, lambda m, h: h * h.sin(), lambda m, h: h * m.p, lambda m, h: m.q * h),
        *(lambda m, h: h[:, :1] * h[..., :1], lambda m, h: h * m.d, lambda m, h: h * (m.d > 0)),
        lambda m, h: h[0, 0] * h,
    ],
    "Div": [
        *(lambda m, h: h / m.c, lambda m, h: h / m.d, lambda m, h: h / (2 + m.p**2)),
        *(lambda m, h: m.p / (2 + h * h), lambda m, h: h[:, :1] / (1 + h[0, 0] ** 2)),
    ],
    "Mm": [lambda m, h: h @ m.w, lambda m, h: m.w.t() @ h.flatten(1)[:, :6].t()],
    "Bmm": [
        *(lambda m, h: torch.bmm(h[:, 0], h[:, 1]), lambda m, h: torch.bmm(h[:, 0], m.d[:, 1])),
        *(lambda m, h: h.matmul(h.sin()), lambda m, h: m.c @ h, lambda m, h: h @ h.transpose(2, 3)),
    ],
    "Addmm": [lambda m, h: m.linear(h), lambda m, h: torch.addmm(h[0, 0], h[1, 1], h[2, 2].sin())],
    "Baddbmm": [lambda m, h: torch.baddbmm(h[:, 0], h[:, 1], m.d[:, 1])],
    "Convolution": [
        *(lambda m, h: m.conv1d(h[..., 0]), lambda m, h: F.conv1d(h[..., 0], m.k, padding=1)),
        *(lambda m, h: m.conv2d(h), lambda m, h: m.strided(h), lambda m, h: m.grouped(h)),
        *(lambda m, h: m.wide(h), lambda m, h: m.conv3d(h.unsqueeze(2))),
        *(lambda m, h: m.back1d(h[..., 0]), lambda m, h: m.back2d(h)),
        lambda m, h: m.back3d(h.unsqueeze(2)),
    ],
    "Relu": [lambda m, h: h.relu(), lambda m, h: F.relu(h * 1, inplace=True)],
    "LeakyRelu": [lambda m, h: F.leaky_relu(h, 0.3)],
    "LeakyRelu.1": [lambda m, h: F.leaky_relu(h * 1, 0.3, inplace=True)],
    "Hardtanh": [lambda m, h: F.relu6(3 * h), lambda m, h: F.hardtanh(h)],
    "Clamp.1": [lambda m, h: h.clamp(-0.5, 0.5), lambda m, h: h.clamp(max=0.2)],
    "ClampMin": [lambda m, h: h.clamp_min(0.1)],
    "ClampMax": [lambda m, h: h.clamp_max(0.1)],
    "Abs": [lambda m, h: h.abs()],
    "Tanh": [lambda m, h: h.tanh()],
    "Sigmoid": [lambda m, h: h.sigmoid()],
    "Exp": [lambda m, h: h.exp()],
    "Log": [lambda m, h: (2 + h).log()],
    "Sqrt": [lambda m, h: (2 + h).sqrt()],
    "Rsqrt": [lambda m, h: (2 + h).rsqrt()],
    "Reciprocal": [lambda m, h: (2 + h).reciprocal()],
    "Cos": [lambda m, h: h.cos()],
    "Pow": [lambda m, h: h**2, lambda m, h: (2 + h) ** -1.5, lambda m, h: h.pow(1)],
    "Gelu": [lambda m, h: F.gelu(h), lambda m, h: F.gelu(h, approximate="tanh")],
    "Silu": [lambda m, h: F.silu(h)],
    "Mish": [lambda m, h: F.mish(h)],
    "Softplus": [lambda m, h: F.softplus(h, 2.0, 1.0)],
    "Elu": [lambda m, h: F.elu(h, 0.7), lambda m, h: F.selu(h)],
    "Celu": [lambda m, h: F.celu(h, 0.5)],
    "Hardswish": [lambda m, h: F.hardswish(4 * h)],
    "Sin": [lambda m, h: h.sin()],
    "AsStrided.1": [
        lambda m, h: F.adaptive_avg_pool2d(h.contiguous(memory_format=torch.channels_last), 1)
    ],
    "ScaledDotProductFlashAttentionForCpu": [  # see test_attention.py
        lambda m, h: F.scaled_dot_product_attention(h, h.sin(), h)
    ],
    "Softmax": [lambda m, h: h.softmax(1), lambda m, h: F.softmin(h, -1)],
    "SafeSoftmax": [lambda m, h: torch._safe_softmax(h, -1)],
    "LogSoftmax": [lambda m, h: h.log_softmax(2)],
    "NativeLayerNorm": [lambda m, h: m.layer_norm(h), lambda m, h: F.layer_norm(h, [6, 6])],
    "NativeBatchNorm": [
        *(lambda m, h: m.batch_norm(h), lambda m, h: m.batch_norm.eval()(h)),
        *(lambda m, h: F.instance_norm(h), lambda m, h: F.batch_norm(h, m.u, m.v)),
    ],
    "NativeGroupNorm": [lambda m, h: m.group_norm(h), lambda m, h: F.group_norm(h, 4)],
}
ACTIVATIONS: list[Call] = [lambda m, h, fn=fn: fastjac.act(h, fn=fn) for fn in TABLE]
# Nodes of other devices, which those of a CPU stand for, and one that torch cannot compare with.
ELSEWHERE = {"CudnnBatchNorm", "CopyBackwards", "Hardsigmoid"} | {
    f"ScaledDotProduct{kind}Attention"
    for kind in ("Flash", "Efficient", "Cudnn")  # of a GPU
}


def rows(t: Tensor) -> Tensor:
    """``[3, ...]`` of any tensor; what an operation did to the samples does not matter."""
    return t.reshape(3, -1) if t.numel() % 3 == 0 else t.reshape(1, -1).expand(3, -1)


def model_of(call: Call) -> nn.Module:
    """The operation between curved ones, whose output has no samples that are alike."""
    model = Model(
        lambda m, x: rows(call(m, F.gelu(m.a(x)).view(3, 4, 6, 6))).sin(),
        a=nn.Linear(5, 144),
        linear=nn.Linear(6, 2),
        conv1d=nn.Conv1d(4, 3, 2),
        conv2d=nn.Conv2d(4, 3, 3, padding=1),
        strided=nn.Conv2d(4, 2, (3, 2), 2, (1, 0)),
        grouped=nn.Conv2d(4, 4, 2, dilation=2, groups=2, bias=False),
        wide=nn.Conv2d(4, 16, 2),
        conv3d=nn.Conv3d(4, 2, (1, 2, 2)),
        back1d=nn.ConvTranspose1d(4, 3, 2, 2),
        back2d=nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1, groups=2),
        back3d=nn.ConvTranspose3d(4, 2, (1, 2, 2)),
        batch_norm=nn.BatchNorm2d(4),
        layer_norm=nn.LayerNorm(6),
        group_norm=nn.GroupNorm(2, 4),
    )
    shapes = {"p": (6,), "q": (4, 1, 1), "w": (6, 3), "k": (2, 4, 3)}
    for name, shape in shapes.items():
        setattr(model, name, nn.Parameter(torch.randn(shape)))
    model.register_buffer("u", torch.rand(4))
    model.register_buffer("v", torch.rand(4) + 0.5)
    model.register_buffer("c", torch.randn(6, 6))
    model.register_buffer("d", torch.randn(3, 4, 6, 6))
    return model


CASES = [
    pytest.param(name, call, id=f"{name}-{i}", marks=cpu_only if "ForCpu" in name else ())
    for name, calls in {**ROWS, "own": ACTIVATIONS}.items()
    for i, call in enumerate(calls)
]


def test_every_row_has_an_example() -> None:
    names = {name if name in ELSEWHERE else node_of(name) for name in (*ROWS, *ELSEWHERE)}
    names |= {node_of(name) for name in ELSEWHERE}
    assert {name for name in RULES if isinstance(name, str)} <= names
    assert [name for name in RULES if not isinstance(name, str)] == [_Act]


def node_of(name: str) -> str:
    stem, _, overload = name.partition(".")
    return f"{stem}Backward{overload or 0}"


def recorded(model: nn.Module, x: Tensor) -> list[Any]:
    x = x.detach().requires_grad_()
    return Record(x, model(x)).steps


@pytest.mark.parametrize(("name", "call"), CASES)
def test_row(name: str, call: Call) -> None:
    torch.manual_seed(0)
    model, x = model_of(call), torch.randn(3, 5)
    steps = recorded(model, x)
    wanted = "_ActBackward" if name == "own" else node_of(name)
    assert any(wanted in type(step.node).__name__ for step in steps)
    if name not in ("own", "SafeSoftmax"):
        assert not any(isinstance(step.rule, ByAutograd) for step in steps)
    for k in (1, 3):
        penalties = [spectreg(e, n_proj=k, reduction="none") for e in ("chain", "autograd")]
        if name == "NativeGroupNorm":  # torch is wrong about several cotangents at once
            penalties[1].chunk_size = 1
        same(*[run(model, x, penalty) for penalty in penalties])
        if name.endswith("Norm"):  # torch takes mean and variance for constants in a JVP
            continue
        t = torch.randn(k, 3, 5)
        penalties = [TangentProp(engine=e, reduction="none") for e in ("chain", "autograd")]
        same(*[run(model, x, penalty, t) for penalty in penalties])


@pytest.mark.parametrize("k", [1, 3])
def test_hardsigmoid(k: int) -> None:
    """Torch has no second derivative of it: the truth is written with another function."""
    found = []
    for engine, call in (
        ("auto", lambda m, h: F.hardsigmoid(5 * h)),
        ("autograd", lambda m, h: F.hardtanh(5 * h / 6 + 0.5, 0, 1)),
    ):
        torch.manual_seed(0)
        model, x, t = model_of(call), torch.randn(3, 5), torch.randn(k, 3, 5)
        found.append(
            (
                run(model, x, spectreg(engine, n_proj=k)),
                run(model, x, TangentProp(engine=engine), t),
            )
        )
    for step, truth in zip(*found, strict=True):
        assert step.gradients.keys() == truth.gradients.keys()
        for g, t in zip(step.gradients.values(), truth.gradients.values(), strict=True):
            # Torch's own kernel rounds 1/6 to float32.
            torch.testing.assert_close(g, t, rtol=2e-7, atol=1e-8)


BY_AUTOGRAD: dict[str, Call] = {
    "cumprod": lambda m, h: h.cumprod(1),
    "logsumexp": lambda m, h: h.logsumexp(1),
    "prod": lambda m, h: h.prod(2),
    "norm": lambda m, h: F.normalize(h, dim=1),
    "var": lambda m, h: h.var((2, 3)),
    "amax": lambda m, h: h.amax(1),
    "prelu": lambda m, h: F.prelu(h, m.p[:1]),
    "bilinear": lambda m, h: F.bilinear(h[:, 0], m.d[:, 1], m.w.expand(6, 6, 3).transpose(0, 2)),
    "grid_sample": lambda m, h: F.grid_sample(h, m.d[..., :2].tanh(), align_corners=False),
    "erf": lambda m, h: h.erf(),
    "atan": lambda m, h: h.atan(),
    "weight of a layer": lambda m, h: F.conv2d(m.d, h[:2, :, :2, :2]),
}


@pytest.mark.parametrize("name", BY_AUTOGRAD)
def test_operation_without_a_row(name: str) -> None:
    torch.manual_seed(0)
    model, x = model_of(BY_AUTOGRAD[name]), torch.randn(3, 5)
    assert any(isinstance(step.rule, ByAutograd) for step in recorded(model, x))
    for k in (1, 3):
        same(*[run(model, x, spectreg(e, n_proj=k)) for e in ("chain", "autograd")])
        t = torch.randn(k, 3, 5)
        same(*[run(model, x, TangentProp(engine=e), t) for e in ("chain", "autograd")])


FAULTS: dict[str, tuple[type, str, str]] = {
    "map": (rules.Linear, "jvp", "Expand"),
    "map of a sum": (rules.Sum, "jvp", "Add"),
    "map of joined": (rules.Joined, "jvp", "Cat"),
    "map of a product": (rules.Mul, "jvp", "Mul"),
    "second order of a product": (rules.Mul, "push", "Mul"),
    "second order of a matrix product": (rules.Matmul, "push", "Mm"),
    "second order of a convolution": (rules.Convolution, "push", "Convolution"),
    "second order of a quotient": (rules.Div, "push", "Div"),
    "slope": (rules.Pointwise, "jvp", "Relu"),
    "bend": (rules.Pointwise, "push", "Exp"),
    "kernel": (activations.Kernel, "push", "Gelu"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_number_of_a_kind_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, method, name = FAULTS[fault]
    right = getattr(kind, method)

    def wrong(rule: Any, *args: Any) -> Any:
        found = right(rule, *args)
        if method == "push":
            return found[0], tuple([None] * len(found[1]))
        return found if found is None else 1.001 * found

    monkeypatch.setattr(kind, method, wrong)
    with pytest.raises(AssertionError):
        test_row(name, ROWS[name][-1])


def complex_of(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.reshape(len(h), -1, 2))


# Calls that look like a row and are none, or whose sizes coincide: of h [4, 4], N = C = K = 4.
ODD: dict[str, Call] = {
    "complex times constant": lambda m, h: torch.view_as_real(
        complex_of(h) * torch.polar(torch.ones(2), torch.tensor([0.3, 1.0]))
    ).flatten(1),
    "complex square": lambda m, h: torch.view_as_real(complex_of(h) * complex_of(h)).flatten(1),
    "complex quotient": lambda m, h: torch.fft.irfft(torch.fft.rfft(h) / (1 + 2j), 4),
    "complex matmul": lambda m, h: torch.view_as_real(complex_of(h) @ m.z).flatten(1),
    "complex linear": lambda m, h: torch.view_as_real(F.linear(complex_of(h), m.z)).flatten(1),
    "narrow from the end": lambda m, h: h + h.narrow(1, -1, 1),
    "narrow two from the end": lambda m, h: h.narrow(1, -2, 2),
    "swapaxes of samples": lambda m, h: h.swapaxes(0, 1).roll(1, 1).swapaxes(0, 1),
    "transpose of samples": lambda m, h: h.T.flip(1).T * h,
    "sum over samples": lambda m, h: h - h.mean(0, keepdim=True),
    "one sample": lambda m, h: h[:1] + h,
    "legacy empty tensor": lambda m, h: torch.cat([torch.empty(0), h], 1),
    "bias for each sample": lambda m, h: F.linear(h, m.w, m.b),
    "outer product of samples": lambda m, h: (h[None] * h[:, None]).sum(0),
}


class OddModel(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.call, self.z = nn.Linear(4, 4), call, torch.randn(2, 2, dtype=torch.complex128)
        self.w, self.b = (nn.Parameter(torch.randn(4, 4)) for _ in "wb")

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, torch.tanh(self.a(x))).sin()


@pytest.mark.parametrize("name", ODD)
def test_calls_that_are_no_row(name: str) -> None:
    model, x = OddModel(ODD[name]), torch.randn(4, 4)
    for make, targets in (
        (FrobReg, ()),
        (Sobolev, (torch.randn(4, model(x).shape[1], 4),)),
        (TangentProp, (torch.randn(4, 4),)),
        (TangentProp, (torch.randn(3, 4, 4),)),
    ):
        engines = "auto", "autograd"
        if not name.startswith("complex"):  # refused
            engines = "chain", "autograd"
        steps = [make(engine=engine, reduction="none") for engine in engines]
        same(*[run(model, x, penalty, *targets) for penalty in steps])
