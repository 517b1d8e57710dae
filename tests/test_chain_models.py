"""Layers, activations and networks under the chain engine, each against autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import agrees, three_layers
from conftest import cpu_only
from layer_cases import Model
from torch import Tensor, nn

import fastjac
from fastjac.activations import TABLE

pytestmark = pytest.mark.usefixtures("double")

# Name: layers of a Sequential, shape of x. A Flatten is put behind.
LAYERS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...]]] = {
    "bilinear": (lambda: [Model(lambda m, x: m.b(x, x), b=nn.Bilinear(4, 4, 3))], (3, 4)),
    "conv2d same": (
        lambda: [nn.Conv2d(2, 3, 2, padding="same", dilation=2), nn.ELU(), nn.Conv2d(3, 2, 1)],
        (3, 2, 4, 4),
    ),
    "conv2d circular": (
        lambda: [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False), nn.Mish()],
        (3, 2, 4, 4),
    ),
    "max pool with indices": (
        lambda: [Model(lambda m, x: m.p(x)[0] * m.p(x)[0], p=nn.MaxPool2d(2, return_indices=True))],
        (3, 2, 4, 4),
    ),
    "adaptive pools": (
        lambda: [
            *(nn.AdaptiveAvgPool2d((5, None)), nn.Conv2d(2, 3, 2), nn.GELU()),
            *(nn.AdaptiveMaxPool2d(3), nn.AdaptiveAvgPool2d(1)),
        ],
        (3, 2, 7, 6),
    ),
    "dropout": (
        lambda: [
            nn.Linear(4, 6),
            nn.Dropout(0.4),
            nn.GELU(),
            nn.AlphaDropout(0.2),
            nn.Linear(6, 2),
        ],
        (3, 4),
    ),
    "random slopes": (lambda: [nn.Linear(4, 6), nn.RReLU(), nn.Linear(6, 2)], (3, 4)),
    "layer norm": (
        lambda: [nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.LayerNorm((2, 6), bias=False)],
        (3, 2, 4),
    ),
    "batch norm of sequences": (
        lambda: [nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3, momentum=None), nn.SiLU()],
        (4, 2, 5),
    ),
    "batch norm of images": (
        lambda: [nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.GELU(), nn.BatchNorm2d(3, affine=False)],
        (4, 2, 4, 4),
    ),
    "batch norm of one image": (
        lambda: [nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.GELU()],
        (1, 2, 5, 5),
    ),
    "batch norm without statistics": (
        lambda: [nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh()],
        (7, 4),
    ),
    "layer norm first": (lambda: [nn.LayerNorm(4), nn.Linear(4, 3), nn.GELU()], (3, 4)),
    "batch norm of volumes": (lambda: [nn.BatchNorm3d(2), nn.Conv3d(2, 2, 2)], (3, 2, 2, 2, 2)),
    "group norm": (lambda: [nn.Conv1d(2, 4, 2), nn.GroupNorm(1, 4), nn.GELU()], (3, 2, 5)),
    "recurrent cell": (
        lambda: [Model(lambda m, x: m.r(x[:, 1], m.r(x[:, 0])), r=nn.GRUCell(4, 3))],
        (3, 2, 4),
    ),
}


# A GPU has one operation for a recurrent cell, which has several outputs and no rule.
NAMES = [pytest.param(n, marks=cpu_only if "recurrent" in n else ()) for n in LAYERS]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_layer(name: str, training: bool) -> None:
    make, shape = LAYERS[name]
    x, model = torch.randn(shape), nn.Sequential(*make(), nn.Flatten()).train(training)
    agrees(model, x, n_proj=1)
    agrees(model, x)
    agrees(model, x, n_proj=3, chunk_size=2)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats(memory_format: torch.memory_format) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)),
        *(nn.SiLU(), nn.AvgPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(4, 3)),
    ).to(memory_format=torch.channels_last)
    agrees(model, torch.randn(2, 3, 6, 6).to(memory_format=memory_format))


# Torch cannot differentiate its Hardsigmoid twice: see test_chain_rows.
@pytest.mark.parametrize("name", [name for name in TABLE if name != "hardsigmoid"])
def test_activation_in_every_spelling(name: str) -> None:
    row = TABLE[name]
    params = {k: 0.5 for k in row.params}
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda z: row.torch_function_object()(z, **row.torch_kwargs),
        lambda z: row.torch_function_object()(input=z, **row.torch_kwargs),
        lambda z: row.torch_function_object()(z, **row.torch_kwargs, **params),
        lambda z: row.torch_function_object()(z, *params.values(), **row.torch_kwargs),
        fastjac.Act(name),
        fastjac.Act(name, **params),
        fastjac.Act(name, impl="reference", **params),
    ]
    if row.torch.startswith("fastjac."):  # ours, with another name for the argument
        del calls[1]
    if hasattr(torch, name):
        calls.append(getattr(torch, name))
    if hasattr(Tensor, name):
        calls.append(getattr(Tensor, name))
        calls.append(getattr(Tensor, f"{name}_"))
    for call in calls:
        agrees(three_layers(lambda m, x, call=call: m.c(call(m.a(x)))), torch.randn(3, 4))


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu", "selu", "celu", "silu", "mish"])
def test_in_place_activation(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = m.a(x)
        a = getattr(F, name)(z, inplace=True)
        assert a is z
        return m.c(z + m.b(a))

    agrees(three_layers(forward), torch.randn(3, 4))
    module = getattr(nn, TABLE[name].module)(inplace=True)
    agrees(nn.Sequential(nn.Linear(4, 5), module, nn.Linear(5, 3)), torch.randn(3, 4))
