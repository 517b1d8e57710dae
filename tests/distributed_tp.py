"""Cases of tensor parallel weights; `test_distributed` runs them on several processes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import distributed_cases as cases
import torch
from distributed_cases import (
    attached,
    batch,
    called,
    close,
    expected,
    gradients_of,
    net,
    raises,
    spectreg,
    stack_of,
    task,
)
from distributed_run import Here
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastjac
from fastjac import reference
from fastjac.penalties import PENALTIES

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


def parallel(model: nn.Module, plan: Any, here: Here) -> nn.Module:
    mesh = init_device_mesh(here.device.type, (here.world,))
    return parallelize_module(model.to(here.device), mesh, plan)


def plans(here: Here) -> None:
    """Every process has the whole batch."""
    x, y, _w = here.all(batch(torch.float64))
    for name, plan in PLANS.items():
        width = 6 if name == "DTensors" else 8  # 6 units on 4 processes are 2, 2, 2 and none
        for i, options in enumerate(OPTIONS):
            call, with_task = (attached, called)[i % 2], i % 3 > 0
            model = parallel(net(torch.float64, width=width), plan(), here)
            output, value = call(model, x, **options)
            (value + task(output, y) if with_task else value).backward()
            alone = net(torch.float64, width=width)
            means = expected("dreg", with_task=with_task, model=alone, **options)
            close(gradients_of(model), means, f"{name} {options} task={with_task}")


def values(here: Here) -> None:
    """The value is that of the whole layers in each process; per sample too, and the presets."""
    x, _y, _w = here.all(batch(torch.float64))
    for kind in ("dreg", "contractive", "gu_rigazio"):
        _output, stack = stack_of(net(torch.float64, width=8).to(here.device), x)
        expect = getattr(reference, kind)(stack)
        cls = PENALTIES[kind].module
        model = parallel(net(torch.float64, width=8), PLANS["columns, rows"](), here)
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


def positions(here: Here) -> None:
    """An output sharded over positions (sequence parallel), or not."""
    torch.manual_seed(1)
    x = torch.randn(3, 8, 4, dtype=torch.float64, device=here.device)
    for options in ({}, {"positions": "mean"}, {"squared": False}):
        alone = Tokens().double().to(here.device)
        _output, value = attached(alone, x, **options)
        value.backward()
        for layout in (Replicate(), Shard(1)):
            plan = {
                "up": ColwiseParallel(),
                "down": RowwiseParallel(output_layouts=layout),
                "head": ColwiseParallel(input_layouts=layout, output_layouts=Replicate()),
            }
            model = parallel(Tokens().double(), plan, here)
            _output, own_value = attached(model, x, **options)
            torch.testing.assert_close(own_value, value, rtol=1e-12, atol=0)
            own_value.backward()
            close(gradients_of(model), gradients_of(alone), f"{options} {layout}")


def with_fully_shard(here: Here) -> None:
    """Two dimensions: batches over one, weights over both."""
    if here.world < 4:
        return  # there are not two dimensions
    two = init_device_mesh(here.device.type, (2, here.world // 2), mesh_dim_names=("dp", "tp"))
    share = here.rank // (here.world // 2)
    x, y, _w = (t.chunk(2)[share].to(here.device) for t in batch(torch.float64))
    for call in (attached, called):
        for with_task in (True, False):
            model = net(torch.float64).to(here.device)
            model = parallelize_module(model, two["tp"], PLANS["columns, rows"]())
            model = fully_shard(model, mesh=two["dp"])
            output, value = call(model, x)
            (value + task(output, y) if with_task else value).backward()
            close(gradients_of(model), expected("dreg", with_task=with_task), f"task={with_task}")


def refusals(here: Here) -> None:
    x, _y, w = here.all(batch())

    def sharded(model: nn.Module, plan: Any = None) -> nn.Module:
        return parallel(copy.deepcopy(model), plan or PLANS["columns, rows"](), here)

    for engine in ("auto", "chain", "autograd"):
        call = partial(spectreg, engine, sharded(net(width=8)), x, w)
        raises("cannot differentiate their redistribution twice", call)

    raises(
        "cannot differentiate their redistribution twice",
        lambda: cases.graph_form(sharded(net(width=8)), x, w),
    )
    raises("use DREG", lambda: called(sharded(net(width=8)), x, fastjac.AccumulatedDREG))

    normed = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    raises("put the norm elsewhere", lambda: called(sharded(normed, plan), x))
    fused = nn.Sequential(fastjac.nn.LinearAct(4, 8, "gelu"), nn.Linear(8, 3))
    raises("use an nn.Linear", lambda: called(sharded(fused, {"0": ColwiseParallel()}), x))
    plan = {"0": ColwiseParallel(output_layouts=Shard(0)), "4": ColwiseParallel()}
    raises("all samples in every process", lambda: called(sharded(net(width=8), plan), x))

    model = net(width=8)
    penalty = fastjac.DREG(model)
    model = parallel(model, PLANS["columns, rows"](), here)
    raises("attach the penalty after parallelize_module", lambda: model(x))
    penalty.detach()

    mesh = init_device_mesh(here.device.type, (here.world,))
    whole = distribute_tensor(x, mesh, [Replicate()]).requires_grad_()
    model = sharded(net(width=8), {"0": ColwiseParallel(use_local_output=False)})[0]
    raises(
        "cannot differentiate their redistribution twice",
        lambda: fastjac.spectreg(whole, model(whole)),
    )

    model = sharded(net(width=8))
    model[0].register_forward_hook(lambda module, args, output: output.clone())
    raises("call the activation directly after to_local", lambda: called(model, x))

    convolution = nn.Sequential(nn.Conv1d(4, 8, 1), nn.GELU()).to(here.device)
    for name, p in list(convolution[0].named_parameters()):
        setattr(convolution[0], name, nn.Parameter(distribute_tensor(p.data, mesh, [Replicate()])))
    positions = distribute_tensor(torch.ones(len(x), 4, 3, device=here.device), mesh, [Replicate()])
    raises("only Linear layers support that", lambda: called(convolution, positions))
