"""The models of `test_sweep.py`: modules of torch.nn, and functions, between two layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sweep_functions import FUNCTIONS, function
from sweep_written import NETS, WRITTEN, Call
from torch import Tensor, nn

MODULES: dict[tuple[int, ...], str] = {
    (6,): """
        CELU(0.7) ELU(0.7) GELU() GELU("tanh") Hardshrink(0.2) Hardsigmoid() Hardswish()
        Hardtanh(-0.4,0.5) LeakyReLU(0.1) LogSigmoid() Mish() PReLU() PReLU(6) ReLU() ReLU6()
        RReLU() SELU() SiLU() Sigmoid() Softplus(2.0) Softshrink(0.2) Softsign() Tanh()
        Tanhshrink() Threshold(0.1,0.3) GLU() Identity()
        ELU(inplace=True) ReLU(inplace=True) LeakyReLU(inplace=True) Hardswish(inplace=True)
        SiLU(inplace=True) Mish(inplace=True) CELU(inplace=True) Hardtanh(inplace=True)
        Softmax(1) Softmin(1) LogSoftmax(1)
        Linear(6,5) Linear(6,5,bias=False) LayerNorm(6) LayerNorm(6,elementwise_affine=False)
        LayerNorm(6,bias=False) RMSNorm(6) RMSNorm(6,elementwise_affine=False)
        BatchNorm1d(6) BatchNorm1d(6,affine=False) BatchNorm1d(6,track_running_stats=False)
        GroupNorm(1,6) GroupNorm(2,6) GroupNorm(3,6) GroupNorm(3,6,affine=False)
        Dropout(0.4) AlphaDropout(0.4) Unflatten(1,(2,3))
        GRUCell(6,4) RNNCell(6,4) RNNCell(6,4,nonlinearity="relu")
    """,
    (6, 5): """
        Linear(5,4) Conv1d(6,4,3) Conv1d(6,4,3,groups=2,padding=1,stride=2,dilation=2)
        Conv1d(6,4,3,padding="same",padding_mode="reflect") Conv1d(6,4,3,bias=False)
        Conv1d(6,4,3,padding=1,padding_mode="circular")
        Conv1d(6,4,3,padding=1,padding_mode="replicate")
        ConvTranspose1d(6,4,3,stride=2,output_padding=1) ConvTranspose1d(6,4,3,groups=2)
        MaxPool1d(2) AvgPool1d(2) AdaptiveAvgPool1d(2) AdaptiveMaxPool1d(2) LPPool1d(2,2)
        ReflectionPad1d(1) ReplicationPad1d(1) CircularPad1d(1) ZeroPad1d(1)
        ConstantPad1d(1,0.3) ReflectionPad1d(2)
        LayerNorm(5) LayerNorm((6,5)) RMSNorm((6,5)) RMSNorm(5) GroupNorm(1,6) GroupNorm(2,6)
        GroupNorm(3,6) GroupNorm(6,6) GroupNorm(3,6,affine=False)
        InstanceNorm1d(6) InstanceNorm1d(6,affine=True)
        InstanceNorm1d(6,affine=True,track_running_stats=True) BatchNorm1d(6)
        BatchNorm1d(6,affine=False) BatchNorm1d(6,track_running_stats=False,affine=False)
        SyncBatchNorm(6) LocalResponseNorm(3)
        Dropout1d(0.4) FeatureAlphaDropout(0.4) ChannelShuffle(2) Flatten() Softmax(2)
        LogSoftmax(1) GLU(1) PReLU(6) Upsample(scale_factor=2)
        Upsample(scale_factor=2,mode="linear") Upsample(7,mode="linear",align_corners=True)
    """,
    (4, 3): """
        GroupNorm(2,4) GroupNorm(1,4) GroupNorm(4,4) InstanceNorm1d(4,affine=True) BatchNorm1d(4)
        LayerNorm(3) RMSNorm(3)
    """,
    (
        3,
        3,
    ): "GroupNorm(1,3) GroupNorm(3,3) InstanceNorm1d(3,affine=True) BatchNorm1d(3) LayerNorm(3)",
    (4, 4, 3): """
        Conv2d(4,3,2) Conv2d(4,2,3,padding=1,stride=2,groups=2) Conv2d(4,3,3,dilation=2,padding=2)
        Conv2d(4,3,3,padding=1,padding_mode="reflect")
        Conv2d(4,3,3,padding=1,padding_mode="replicate")
        Conv2d(4,3,3,padding=1,padding_mode="circular")
        ConvTranspose2d(4,3,2,stride=2) ConvTranspose2d(4,2,3,padding=1,groups=2)
        MaxPool2d(2) MaxPool2d(2,stride=1,padding=1) AvgPool2d(2) AvgPool2d(3,1,1)
        AvgPool2d(2,ceil_mode=True,count_include_pad=False,divisor_override=3)
        AdaptiveAvgPool2d(2) AdaptiveAvgPool2d((None,1)) AdaptiveAvgPool2d(1)
        AdaptiveMaxPool2d(2) FractionalMaxPool2d(2,output_size=2) LPPool2d(2,2)
        ReflectionPad2d(1) ReplicationPad2d(1) CircularPad2d(1) ZeroPad2d(1) ConstantPad2d(1,0.3)
        BatchNorm2d(4) BatchNorm2d(4,affine=False) BatchNorm2d(4,track_running_stats=False)
        InstanceNorm2d(4) InstanceNorm2d(4,affine=True)
        InstanceNorm2d(4,affine=True,track_running_stats=True) GroupNorm(2,4) GroupNorm(4,4)
        GroupNorm(2,4,affine=False) LayerNorm((4,4,3)) LocalResponseNorm(2)
        Dropout2d(0.4) PixelShuffle(2) Softmax2d() ChannelShuffle(2)
        Upsample(scale_factor=2) Upsample(scale_factor=2,mode="bilinear")
        Upsample(scale_factor=2,mode="bicubic") Upsample(5,mode="bilinear",align_corners=True)
        UpsamplingBilinear2d(scale_factor=2) UpsamplingNearest2d(scale_factor=2)
        Upsample(scale_factor=2,mode="nearest-exact") Unfold(2) PReLU(4)
    """,
    (1, 4, 4): "PixelUnshuffle(2)",
    (4, 6): "Fold((3,4),2)",
    (2, 2, 3, 2): """
        Conv3d(2,2,2) Conv3d(2,2,(1,3,1),padding=(0,1,0),padding_mode="circular")
        ConvTranspose3d(2,2,2) MaxPool3d((2,2,1)) AvgPool3d((2,2,1)) AdaptiveAvgPool3d((1,2,2))
        AdaptiveMaxPool3d((1,2,2)) FractionalMaxPool3d((1,2,1),output_size=(1,1,1)) LPPool3d(2,2)
        ReflectionPad3d(1) ReplicationPad3d(1) CircularPad3d(1) ZeroPad3d(1) ConstantPad3d(1,0.3)
        BatchNorm3d(2) InstanceNorm3d(2) InstanceNorm3d(2,affine=True) GroupNorm(2,2)
        Dropout3d(0.4) Upsample(scale_factor=2) Upsample(scale_factor=2,mode="trilinear")
    """,
}
"""Constructors in ``torch.nn``, by the shape of a sample of what the module is given."""


_NO_LAYERS = """
    Module Container Sequential ModuleList ModuleDict ParameterList ParameterDict DataParallel
    RNNBase RNNCellBase Transformer TransformerEncoder TransformerDecoder
"""
_OF_INDICES = "Embedding EmbeddingBag MaxUnpool1d MaxUnpool2d MaxUnpool3d"
_WRONG = "CrossMapLRN2d"  # its first derivative, see test_torch_wrong.py
NOT_A_CASE = {
    *(_NO_LAYERS + _OF_INDICES + " " + _WRONG).split(),
    # Losses are among the functions.
    *(name for name in vars(nn) if "Loss" in name or name.startswith("Lazy")),
}
"""Modules that are not from floating-point numbers to floating-point numbers, and wrappers."""


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]  # of a sample of what the module is given
    make: Callable[[], nn.Module]
    training: bool = True


MODAL = ("BatchNorm", "track_running", "ropout", "RReLU", "Transformer")  # eval differs


def cases() -> list[Case]:
    found = []
    for shape, text in MODULES.items():
        for name in text.split():
            full = f"{name} on {'×'.join(map(str, shape))}"
            found.append(Case(full, shape, maker("nn." + name)))
    found += [Case(name, shape, of(f, net)) for name, (shape, f, net) in NETS.items()]
    for shape, text in FUNCTIONS.items():
        for line in text.strip().split("\n"):
            found.append(Case(line.strip(), shape, of(function(line.strip()))))
    found += [Case(f.__name__, (6,), of(f)) for f in WRITTEN]
    for case in tuple(found):
        if any(word in case.name for word in MODAL):
            found.append(case._replace(name=f"{case.name}, eval", training=False))
    return found


def maker(text: str) -> Callable[[], nn.Module]:
    return lambda: eval(text)


def of(f: Callable[..., Tensor], net: Callable[[], nn.Module] | None = None) -> Any:
    return lambda: Call(f) if net is None else Call(f, net())


class Between(nn.Module):
    """A Linear layer, the module of a case, and a Linear layer with m outputs.

    So its cotangent and its input depend on parameters, and its second derivative matters.
    """

    def __init__(self, case: Case, n: int, m: int, d: int) -> None:
        super().__init__()
        self.shape = case.shape
        self.before = nn.Linear(d, torch.Size(case.shape).numel())
        self.inner = case.make()
        with torch.no_grad():  # the parameters of norms are 1 and 0
            for p in self.inner.parameters():
                p.copy_(torch.randn_like(p) * 0.5 + 0.3)
        width = self.inside(torch.randn(n, d)).shape[1]  # sets running statistics, too
        self.after = nn.Linear(width, m)
        self.train(case.training)

    def inside(self, x: Tensor) -> Tensor:
        a = self.before(x).tanh() * 1.2  # in-place modules may write to it
        if len(self.shape) > 1:
            a = a.unflatten(1, self.shape)
        return self.inner(a).reshape(len(x), -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inside(x))
