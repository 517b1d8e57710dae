"""Cases of tensor parallel weights; `test_distributed` runs them on several processes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from distributed_cases import (
    attached,
    batch,
    close,
    expected,
    gradients_of,
    net,
    own,
    raises,
    spectreg,
    stack_of,
    task,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastjac
from fastjac import reference

PLANS: dict[str, Any] = {
    "columns, rows": lambda: {"0": ColwiseParallel(), "2": RowwiseParallel()},
    "rows, columns": lambda: {
        "0": RowwiseParallel(input_layouts=Replicate()),
        "2": ColwiseParallel(),
        "4": RowwiseParallel(),
    },
    "columns, gathered": lambda: {"2": ColwiseParallel(output_layouts=Replicate())},
    "rows, scattered": lambda: {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(-1)),
        "2": RowwiseParallel(),
    },
    "DTensors": lambda: {
        "0": ColwiseParallel(use_local_output=False),
        "2": RowwiseParallel(),
    },
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"squared": False},
    {"over": "units", "layers": "mean"},
    {"over": "elements"},
    {"use_weight": False},
    {"include_output": True},
    {"include_output": True, "squared": False},
)


def mesh(world: int, device: Any) -> Any:
    return init_device_mesh(device.type, (world,))


def called(model: nn.Module, x: Tensor, kind: Any = fastjac.DREG, **options: Any) -> Any:
    return kind(**options)(model, x)


def plans(rank: int, world: int, device: Any) -> None:
    """Every process has the whole batch."""
    x, y, _w = (t.to(device) for t in batch(torch.float64))
    for name, plan in PLANS.items():
        width = 6 if name == "DTensors" else 8  # 6 units on 4 processes are 2, 2, 2 and none
        for i, options in enumerate(OPTIONS):
            call, with_task = (attached, called)[i % 2], i % 3 > 0
            model = net(torch.float64, width=width).to(device)
            model = parallelize_module(model, mesh(world, device), plan())
            output, value = call(model, x, **options)
            (value + task(output, y) if with_task else value).backward()
            alone = net(torch.float64, width=width)
            means = expected("dreg", with_task=with_task, model=alone, **options)
            close(gradients_of(model), means, f"{name} {options} task={with_task}")


def values(rank: int, world: int, device: Any) -> None:
    """The value is that of the whole layers in each process; per sample too, and the presets."""
    x, _y, _w = (t.to(device) for t in batch(torch.float64))
    for kind in ("dreg", "contractive", "gu_rigazio"):
        _output, stack = stack_of(net(torch.float64, width=8).to(device), x)
        expect = getattr(reference, kind)(stack)
        cls = {"dreg": fastjac.DREG, "contractive": fastjac.Contractive}.get(
            kind, fastjac.GuRigazio
        )
        model = parallelize_module(
            net(torch.float64, width=8).to(device), mesh(world, device), PLANS["columns, rows"]()
        )
        _output, value = called(model, x, cls, reduction="none")
        torch.testing.assert_close(value, expect, rtol=1e-12, atol=0)
        _output, value = called(model, x, cls)
        torch.testing.assert_close(value, expect.mean(), rtol=1e-12, atol=0)


class Tokens(nn.Module):
    """Linear layers on ``[N, T, C]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.act, self.down = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
        self.last, self.head = nn.Tanh(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.down(self.act(self.up(x)))))


def positions(rank: int, world: int, device: Any) -> None:
    """An output sharded over positions (sequence parallel), or not."""
    torch.manual_seed(1)
    x = torch.randn(3, 8, 4, dtype=torch.float64, device=device)
    for options in ({}, {"positions": "mean"}, {"squared": False}):
        alone = Tokens().double().to(device)
        _output, value = attached(alone, x, **options)
        value.backward()
        for layout in (Replicate(), Shard(1)):
            plan = {
                "up": ColwiseParallel(),
                "down": RowwiseParallel(output_layouts=layout),
                "head": ColwiseParallel(input_layouts=layout, output_layouts=Replicate()),
            }
            model = parallelize_module(Tokens().double().to(device), mesh(world, device), plan)
            _output, own_value = attached(model, x, **options)
            torch.testing.assert_close(own_value, value, rtol=1e-12, atol=0)
            own_value.backward()
            close(gradients_of(model), gradients_of(alone), f"{options} {layout}")


def with_fully_shard(rank: int, world: int, device: Any) -> None:
    """Two dimensions: batches over one, weights over both."""
    if world < 4:
        return  # there are not two dimensions
    two = init_device_mesh(device.type, (2, world // 2), mesh_dim_names=("dp", "tp"))
    share = rank // (world // 2)
    x, y, _w = own(batch(torch.float64), share, 2, device)
    for call in (attached, called):
        for with_task in (True, False):
            model = net(torch.float64).to(device)
            model = parallelize_module(model, two["tp"], PLANS["columns, rows"]())
            model = fully_shard(model, mesh=two["dp"])
            output, value = call(model, x)
            (value + task(output, y) if with_task else value).backward()
            close(gradients_of(model), expected("dreg", with_task=with_task), f"task={with_task}")


def refusals(rank: int, world: int, device: Any) -> None:
    x, _y, w = (t.to(device) for t in batch())

    def sharded(model: nn.Module, plan: Any = None) -> nn.Module:
        plan = PLANS["columns, rows"]() if plan is None else plan
        return parallelize_module(copy.deepcopy(model).to(device), mesh(world, device), plan)

    for engine in ("auto", "chain", "autograd", "compiled"):
        call = partial(spectreg, engine, sharded(net(width=8)), x, w)
        raises("loses the second derivative", call)

    def graph_form() -> None:
        t = x.clone().requires_grad_()
        fastjac.spectreg(t, sharded(net(width=8))(t), projection=w)

    raises("loses the second derivative", graph_form)
    raises("use DREG", lambda: called(sharded(net(width=8)), x, fastjac.AccumulatedDREG))

    normed = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    raises("put the norm elsewhere", lambda: called(sharded(normed, plan), x))
    fused = nn.Sequential(fastjac.nn.LinearAct(4, 8, "gelu"), nn.Linear(8, 3))
    raises("use an nn.Linear", lambda: called(sharded(fused, {"0": ColwiseParallel()}), x))
    plan = {"0": ColwiseParallel(output_layouts=Shard(0)), "4": ColwiseParallel()}
    raises("each sample's own numbers", lambda: called(sharded(net(width=8), plan), x))

    model = net(width=8).to(device)
    penalty = fastjac.DREG(model)
    parallelize_module(model, mesh(world, device), PLANS["columns, rows"]())
    raises("attach the penalty after parallelize_module", lambda: model(x))
    penalty.detach()
