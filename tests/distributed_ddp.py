"""Cases of DistributedDataParallel; `test_distributed` runs them on several processes."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from distributed_cases import (
    attached,
    batch,
    check_hidden,
    check_registry,
    close,
    expected,
    gradients_of,
    net,
    own,
    raises,
    spectreg,
    task,
)
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastjac
from fastjac.input_jacobian.compiled import backend


def ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)


def graph_form(model: nn.Module, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    return output, fastjac.spectreg(x, output, projection=w)


FORMS: dict[str, Any] = {
    "chain": partial(spectreg, "chain"),
    "autograd": partial(spectreg, "autograd"),
    "graph form": graph_form,
    "function": lambda model, x, w: spectreg("auto", lambda x: model(x), x, w),
    "part of a model": lambda model, x, w: spectreg("auto", nn.Sequential(model), x, w),
    "dreg called": lambda model, x, w: fastjac.DREG()(model, x),
    "dreg attached": lambda model, x, w: attached(model, x),
    "dreg attached inside": lambda model, x, w: attached_inside(model, x),
}


def attached_inside(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    penalty = fastjac.DREG(model.module)
    output = model(x)
    value = penalty()
    penalty.detach()
    return output, value


def check(forms: list[str], rank: int, world: int, device: Any, **wrapping: Any) -> None:
    x, y, w = own(batch(), rank, world, device)
    for form in forms:
        for with_task in (True, False):
            model = ddp(net().to(device), **wrapping)
            kind = "dreg" if "dreg" in form else "spectreg"
            means = expected(kind, with_task=with_task)
            for _ in range(3):  # what goes unsynchronised is seen late by torch, if at all
                model.zero_grad()
                output, value = FORMS[form](model, x, w)
                (value + task(output, y) if with_task else value).backward()
                close(gradients_of(model), means, f"{form} task={with_task} {wrapping}")


def few(rank: int, world: int, device: Any) -> None:
    check(["chain", "dreg attached"], rank, world, device)


def forms(rank: int, world: int, device: Any) -> None:
    check(list(FORMS), rank, world, device)


def find_unused(rank: int, world: int, device: Any) -> None:
    able = [form for form in FORMS if form not in ("function", "part of a model")]
    check(able, rank, world, device, find_unused_parameters=True)


def static_graph(rank: int, world: int, device: Any) -> None:
    able = [form for form in FORMS if form not in ("graph form", "function", "part of a model")]
    check(able, rank, world, device, static_graph=True)
    x, _y, w = own(batch(), rank, world, device)
    model = ddp(net().to(device), static_graph=True)
    for form in ("graph form", "function"):
        raises("static_graph=True", lambda form=form: FORMS[form](model, x, w))


def registry(rank: int, world: int, device: Any) -> None:
    check_registry(ddp, rank, world, device)


def registry_find_unused(rank: int, world: int, device: Any) -> None:
    check_registry(partial(ddp, find_unused_parameters=True), rank, world, device)


def compiled(rank: int, world: int, device: Any) -> None:
    backend.NAME = "aot_eager"
    FORMS["compiled"] = partial(spectreg, "compiled")
    check(["compiled"], rank, world, device, bucket_cap_mb=1e-5)  # by these torch would cut graphs
    part = nn.Sequential(ddp(net().to(device)))
    x, _y, w = own(batch(), rank, world, device)
    raises("wrap the whole model", lambda: spectreg("compiled", part, x, w))


class TwoHeads(nn.Module):
    """``used`` of them goes to the output; the other one runs all the same, or does not."""

    def __init__(self, runs: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.runs = runs
        self.body = nn.Sequential(nn.Linear(4, 6), nn.GELU())
        self.side = nn.Sequential(nn.Linear(6, 6), nn.GELU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.body(x)
        if self.runs:
            self.side(a)
        return self.head(a)


def unused(rank: int, world: int, device: Any) -> None:
    """A parameter that the model does not use, and one that only the penalty does."""
    whole = batch()
    x, y, w = own(whole, rank, world, device)
    for runs in (False, True):
        for form in ("chain", "autograd", "dreg called"):
            alone = TwoHeads(runs)
            output, value = FORMS[form](alone, whole[0], whole[2])
            (task(output, whole[1]) + value).backward()
            model = ddp(TwoHeads(runs).to(device), find_unused_parameters=True)
            for _ in range(2):
                model.zero_grad()
                output, value = FORMS[form](model, x, w)
                (task(output, y) + value).backward()
                close(gradients_of(model), gradients_of(alone), f"{form} {runs}")
    # The value of the attached form does not go through DDP's outputs, and torch sees that late.
    model = ddp(TwoHeads(True).to(device), find_unused_parameters=True)
    output, value = attached(model, x)
    raises("marked as ready twice", (task(output, y) + value).backward)


def accumulation(rank: int, world: int, device: Any) -> None:
    """Two half batches, the first of them without a reduction."""
    whole = batch()
    parts = [own(t, rank, world, device) for t in ([h[:4] for h in whole], [h[4:] for h in whole])]
    for form in ("chain", "autograd", "dreg called", "dreg attached"):
        model = ddp(net().to(device))
        for last, (x, y, w) in enumerate(parts):
            with contextlib.nullcontext() if last else model.no_sync():
                output, value = FORMS[form](model, x, w)
                ((task(output, y) + value) / 2).backward()
        kind = "dreg" if "dreg" in form else "spectreg"
        close(gradients_of(model), expected(kind, with_task=True), form)


def sums(rank: int, world: int, device: Any) -> None:
    """DDP takes the mean over processes: of sums, the whole sum divided by their number."""
    x, _y, w = own(batch(), rank, world, device)
    model = ddp(net().to(device))
    _output, value = fastjac.SpectReg(reduction="sum")(model, x, projection=w)
    value.backward()
    means = expected("spectreg", with_task=False)
    close(gradients_of(model), [len(batch()[0]) / world * g for g in means])


def every(rank: int, world: int, device: Any) -> None:
    """A call that does not compute is a zero that still reduces."""
    x, _y, w = own(batch(), rank, world, device)
    model = ddp(net().to(device))
    penalty = fastjac.SpectReg(every=2)
    for factor in (2, 0, 2):
        model.zero_grad()
        _output, value = penalty(model, x, projection=w)
        value.backward()
        means = [factor * g for g in expected("spectreg", with_task=False)]
        if factor:
            close(gradients_of(model), means)
        else:
            assert all(not g.any() for g in gradients_of(model))


def hidden(rank: int, world: int, device: Any) -> None:
    check_hidden(ddp, ["1"], rank, world, device)


def batch_norm(rank: int, world: int, device: Any) -> None:
    """Statistics are each process's own."""

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        return nn.Sequential(*layers).double()

    whole = batch(torch.float64)
    for form in ("chain", "autograd", "dreg called", "dreg attached"):
        alone = model()
        for r in range(world):
            x, y, w = own(whole, r, world, "cpu")
            output, value = FORMS[form](alone, x, w)
            ((task(output, y) + value) / world).backward()
        wrapped = ddp(model().to(device))
        x, y, w = own(whole, rank, world, device)
        output, value = FORMS[form](wrapped, x, w)
        (task(output, y) + value).backward()
        close(gradients_of(wrapped), gradients_of(alone), form)


def refusals(rank: int, world: int, device: Any) -> None:
    x, _y, w = own(batch(), rank, world, device)
    model = ddp(net().to(device))
    model.register_forward_hook(lambda *_: None)
    raises("forward hooks", lambda: spectreg("auto", model, x, w))
    model = ddp(net().to(device))
    module = model.module
    raises("must be", lambda: fastjac.SpectReg()(model, x, projection=w[:, :2]))
    assert model.module is module  # back in its place after an error
