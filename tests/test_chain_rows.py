"""Each row of the chain engine's table: value, VJP, JVP and their gradients against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import run, same, spectreg
from layer_cases import Model
from torch import Tensor, nn

from fastjac.activations import TABLE
from fastjac.functional import FUNCTIONS
from fastjac.input_jacobian.chain import links, rules
from fastjac.input_jacobian.chain.tape import record
from fastjac.penalties import FrobReg, Sobolev, TangentProp

pytestmark = pytest.mark.usefixtures("double")

Call = Callable[[Any, Tensor], Tensor]

# A hidden tensor [N, 4, 6, 6] goes in; m has parameters p [6], q [4, 1, 1], w [6, 3], constants
# c [6, 6], d [N, 4, 6, 6], and layers.
ROWS: dict[str, list[Call]] = {
    "view": [lambda m, h: h.view(3, 24, 6), lambda m, h: h.view([-1, 4, 36])],
    "reshape": [lambda m, h: h.reshape(3, -1), lambda m, h: torch.reshape(h, (3, 12, 12))],
    "flatten.using_ints": [lambda m, h: h.flatten(1), lambda m, h: torch.flatten(h, 1, 2)],
    "unflatten.int": [lambda m, h: h.unflatten(1, (2, 2))],
    "squeeze": [lambda m, h: h[:, :1].squeeze()],
    "squeeze.dim": [lambda m, h: h[:, :1].squeeze(1), lambda m, h: h.squeeze(2)],
    "squeeze.dims": [lambda m, h: h[:, :1, :, :1].squeeze((1, 3))],
    "unsqueeze": [lambda m, h: h.unsqueeze(-1), lambda m, h: torch.unsqueeze(h, 1)],
    "contiguous": [lambda m, h: h.contiguous()],
    "clone": [lambda m, h: h.clone()],
    "add.Scalar": [lambda m, h: 1 + h, lambda m, h: torch.add(h, 2.0, alpha=3)],
    "sub.Scalar": [lambda m, h: h - 0.5],
    "neg": [lambda m, h: -h],
    "rsub.Scalar": [lambda m, h: 1 - h],
    "mul.Scalar": [lambda m, h: 2 * h, lambda m, h: torch.mul(h, 0.5)],
    "div.Scalar": [lambda m, h: h / 3],
    "transpose.int": [lambda m, h: h.transpose(1, 3), lambda m, h: torch.transpose(h, -1, 1)],
    "swapaxes": [lambda m, h: h.swapaxes(1, 2)],
    "permute": [lambda m, h: h.permute(0, 3, 1, 2), lambda m, h: torch.permute(h, (0, -1, 2, 1))],
    "flip": [lambda m, h: h.flip(1, 2), lambda m, h: torch.flip(h, [-1])],
    "roll": [lambda m, h: h.roll(2, 3), lambda m, h: h.roll((1, -1), (1, 2))],
    "expand": [lambda m, h: h[:, :1].expand(3, 5, 6, 6), lambda m, h: h.expand(-1, -1, 6, 6)],
    "narrow": [lambda m, h: h.narrow(2, 1, 3)],
    "select.int": [lambda m, h: h.select(2, -1)],
    "pad": [lambda m, h: F.pad(h, (1, 2, -1, 0)), lambda m, h: F.pad(h, (1, 1, 1, 1, 0, 1))],
    "pixel_shuffle": [lambda m, h: F.pixel_shuffle(h, 2)],
    "sum.dim_IntList": [
        *(lambda m, h: h.sum(1), lambda m, h: h.sum((-1, 1)), lambda m, h: h.sum(dim=3)),
        lambda m, h: torch.sum(h, (2, 3), keepdim=True),
    ],
    "mean.dim": [lambda m, h: h.mean((2, 3)), lambda m, h: torch.mean(h, 1, True)],
    "avg_pool2d": [
        lambda m, h: F.avg_pool2d(h, 2),
        lambda m, h: F.avg_pool2d(h, (3, 2), 2, (1, 0), True, False),
        lambda m, h: F.avg_pool2d(h, 2, divisor_override=3),
    ],
    "avg_pool3d": [lambda m, h: F.avg_pool3d(h.unsqueeze(1), 2)],
    "adaptive_avg_pool2d": [lambda m, h: F.adaptive_avg_pool2d(h, (4, 1))],
    "max_pool2d": [
        lambda m, h: F.max_pool2d(h, 2),
        lambda m, h: F.max_pool2d(h, 3, 2, 1, ceil_mode=True),
        lambda m, h: torch.max_pool2d(h, 2, 1, 0, 2),
    ],
    "__getitem__": [
        lambda m, h: h[:, 1:, ::2, 3],
        lambda m, h: h[..., -1],
        lambda m, h: h[:, None, ..., 0],
    ],
    "add.Tensor": [
        *(lambda m, h: h + h.sin(), lambda m, h: h + h, lambda m, h: h + m.p, lambda m, h: m.q + h),
        *(lambda m, h: h[:, :1] + h[..., :1], lambda m, h: torch.add(h, m.d, alpha=2)),
    ],
    "sub.Tensor": [lambda m, h: h - h.mean(1, True), lambda m, h: m.p - h],
    "rsub.Tensor": [lambda m, h: torch.rsub(h, m.p, alpha=2)],
    "cat": [
        lambda m, h: torch.cat([h, h.sin(), m.d], 1),
        lambda m, h: torch.cat((h[..., :2], h), -1),
    ],
    "concat": [lambda m, h: torch.concat([h, h], 2)],
    "concatenate": [lambda m, h: torch.concatenate([h, h], 2)],
    "mul.Tensor": [
        *(lambda m, h: h * h, lambda m, h: h * h.sin(), lambda m, h: h * m.p, lambda m, h: m.q * h),
        *(lambda m, h: h[:, :1] * h[..., :1], lambda m, h: h * m.d, lambda m, h: h * (m.d > 0)),
    ],
    "div.Tensor": [lambda m, h: h / m.c, lambda m, h: h / m.d],
    "matmul": [
        *(lambda m, h: h @ m.w, lambda m, h: h.matmul(h.sin()), lambda m, h: m.c @ h),
        *(lambda m, h: h @ m.d, lambda m, h: h @ h.transpose(2, 3), lambda m, h: m.w.t() @ h),
        lambda m, h: h.flatten(1)[:, :6] @ m.w,
    ],
    "bmm": [lambda m, h: torch.bmm(h[:, 0], h[:, 1]), lambda m, h: torch.bmm(h[:, 0], m.d[:, 1])],
    "linear": [
        *(lambda m, h: m.linear(h), lambda m, h: F.linear(h.flatten(1)[:, :6], m.w.t())),
        lambda m, h: F.linear(input=h, weight=m.c),
    ],
    "conv1d": [lambda m, h: m.conv1d(h[..., 0]), lambda m, h: F.conv1d(h[..., 0], m.k, padding=1)],
    "conv2d": [
        *(lambda m, h: m.conv2d(h), lambda m, h: m.strided(h), lambda m, h: m.grouped(h)),
        lambda m, h: m.wide(h),
    ],
    "conv3d": [lambda m, h: m.conv3d(h.unsqueeze(2))],
    "conv_transpose1d": [lambda m, h: m.back1d(h[..., 0])],
    "conv_transpose2d.input": [lambda m, h: m.back2d(h)],
    "conv_transpose3d.input": [lambda m, h: m.back3d(h.unsqueeze(2))],
    "batch_norm": [lambda m, h: m.batch_norm(h)],
    "layer_norm": [lambda m, h: m.layer_norm(h), lambda m, h: F.layer_norm(h, [6, 6])],
}
ROWS |= {fn: [lambda m, h, fn=fn: getattr(F, fn, FUNCTIONS[fn])(h)] for fn in TABLE}
ROWS["hardsigmoid"] = [lambda m, h: FUNCTIONS["hardsigmoid"](h)]  # torch's has no second derivative


def model_of(call: Call) -> nn.Module:
    """The operation between curved ones, whose output has no samples that are alike."""
    model = Model(
        lambda m, x: call(m, F.gelu(m.a(x)).view(3, 4, 6, 6)).flatten(1).sin(),
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
    )
    shapes = {"p": (6,), "q": (4, 1, 1), "w": (6, 3), "k": (2, 4, 3)}
    for name, shape in shapes.items():
        setattr(model, name, nn.Parameter(torch.randn(shape)))
    model.register_buffer("c", torch.randn(6, 6))
    model.register_buffer("d", torch.randn(3, 4, 6, 6))
    return model


CASES = [
    pytest.param(name, call, id=f"{name}-{i}")
    for name, calls in ROWS.items()
    for i, call in enumerate(calls)
]


def test_every_row_has_an_example() -> None:
    assert {row.name for row in rules.ROWS} == ROWS.keys()


@pytest.mark.parametrize(("name", "call"), CASES)
def test_row(name: str, call: Call) -> None:
    model, x = model_of(call), torch.randn(3, 5)
    described = [link.describe() for link in record(model, x)[0].links]
    assert name.partition(".")[0] in described
    for k in (1, 3):
        steps = [spectreg(engine, n_proj=k, reduction="none") for engine in ("chain", "autograd")]
        same(*[run(model, x, penalty) for penalty in steps])
        if name.endswith("norm"):  # torch takes mean and variance for constants in a JVP
            continue
        t = torch.randn(k, 3, 5)
        steps = [TangentProp(engine=e, reduction="none") for e in ("chain", "autograd")]
        same(*[run(model, x, penalty, t) for penalty in steps])


FAULTS: dict[str, tuple[type, str, str]] = {
    "transpose": (links.Map, "vjp", "narrow"),
    "map": (links.Map, "jvp", "expand"),
    "transpose of a sum": (links.Linear, "into", "cat"),
    "map of a sum": (links.Linear, "jvp", "cat"),
    "transpose of a product": (links.Product, "into", "conv2d"),
    "map of a product": (links.Product, "jvp", "mul.Tensor"),
    "second order": (links.Product, "push", "matmul"),
    "slope": (links.Elementwise, "jvp", "relu"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_number_of_a_kind_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, method, name = FAULTS[fault]
    right = getattr(kind, method)

    def wrong(link: Any, *args: Any, **kwargs: Any) -> Any:
        found = right(link, *args, **kwargs)
        if method == "push":
            link.extras = [None] * len(link.extras)
            return found
        if type(found) is tuple:
            return tuple([1.001 * t for t in found])
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
        steps = [make(engine=engine, reduction="none") for engine in ("chain", "autograd")]
        same(*[run(model, x, penalty, *targets) for penalty in steps])


def test_bmm_of_matrices_raises() -> None:
    with pytest.raises(RuntimeError, match="must be a 3D tensor"):
        FrobReg(engine="chain")(OddModel(lambda m, h: torch.bmm(h, m.w)), torch.randn(4, 4))
