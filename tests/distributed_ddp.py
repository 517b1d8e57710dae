"""Cases of DistributedDataParallel; `test_distributed` runs them on several processes."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import distributed_cases as cases
import torch
from distributed_cases import FORMS, batch, close, expected, gradients_of, net, raises, task
from distributed_run import Here
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastjac

ddp = DistributedDataParallel


def attached_inside(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    penalty = fastjac.DREG(model.module)
    output = model(x)
    value = penalty()
    penalty.detach()
    return output, value


ALL: dict[str, Any] = {
    **FORMS,
    "dreg attached inside": lambda model, x, w: attached_inside(model, x),
    "graph form": cases.graph_form,
    "function": lambda model, x, w: cases.spectreg("auto", lambda x: model(x), x, w),
    "part of a model": lambda model, x, w: cases.spectreg("auto", nn.Sequential(model), x, w),
}


def without(*names: str) -> dict[str, Any]:
    return {name: form for name, form in ALL.items() if name not in names}


def few(here: Here) -> None:
    cases.check(ddp, {name: ALL[name] for name in ("chain", "dreg attached")}, here)


def forms(here: Here) -> None:
    cases.check(ddp, ALL, here)


def parts(here: Here) -> None:
    cases.check(lambda model: ddp(cases.InDict(model)), cases.PARTS, here)


def find_unused(here: Here) -> None:
    wrap = partial(ddp, find_unused_parameters=True)
    cases.check(wrap, without("function", "part of a model"), here)


def static_graph(here: Here) -> None:
    wrap = partial(ddp, static_graph=True)
    cases.check(wrap, without("graph form", "function", "part of a model"), here)
    x, _y, w = here.own(batch())
    model = wrap(net().to(here.device))
    for form in ("graph form", "function"):
        raises("static_graph=True", lambda form=form: ALL[form](model, x, w))


def registry(here: Here) -> None:
    cases.check_registry(ddp, here)


def registry_find_unused(here: Here) -> None:
    cases.check_registry(partial(ddp, find_unused_parameters=True), here)


def compiled(here: Here) -> None:
    cases.check_compiled(ddp, here)


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


def unused(here: Here) -> None:
    """A parameter that the model does not use, and one that only the penalty does."""
    whole = batch()
    x, y, w = here.own(whole)
    for runs in (False, True):
        for form in ("chain", "autograd", "dreg called"):
            alone = TwoHeads(runs)
            output, value = FORMS[form](alone, whole[0], whole[2])
            (task(output, whole[1]) + value).backward()
            model = ddp(TwoHeads(runs).to(here.device), find_unused_parameters=True)
            for _ in range(2):
                model.zero_grad()
                output, value = FORMS[form](model, x, w)
                (task(output, y) + value).backward()
                close(gradients_of(model), gradients_of(alone), f"{form} {runs}")
    # The value of the attached form does not go through DDP's outputs, and torch sees that late.
    model = ddp(TwoHeads(True).to(here.device), find_unused_parameters=True)
    output, value = cases.attached(model, x)
    raises("marked as ready twice", (task(output, y) + value).backward)


def accumulation(here: Here) -> None:
    def only_add(model: ddp, wanted: bool) -> Any:
        return model.no_sync() if wanted else contextlib.nullcontext()

    cases.check_accumulation(ddp, only_add, here)


def sums(here: Here) -> None:
    """DDP takes the mean over processes: of sums, the whole sum divided by their number."""
    x, _y, w = here.own(batch())
    model = ddp(net().to(here.device))
    _output, value = fastjac.SpectReg(reduction="sum")(model, x, projection=w)
    value.backward()
    means = expected("spectreg", with_task=False)
    close(gradients_of(model), [len(batch()[0]) / here.world * g for g in means])


def every(here: Here) -> None:
    """A call that does not compute is a zero that still reduces."""
    x, _y, w = here.own(batch())
    model = ddp(net().to(here.device))
    penalty = fastjac.SpectReg(every=2)
    means = expected("spectreg", with_task=False)
    for factor in (2, 0, 2):
        model.zero_grad()
        _output, value = penalty(model, x, projection=w)
        value.backward()
        if factor:
            close(gradients_of(model), [factor * g for g in means])
        else:
            assert all(not g.any() for g in gradients_of(model))


def hidden(here: Here) -> None:
    cases.check_hidden(ddp, ["1"], here)


def batch_norm(here: Here) -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(0)
        layers = (nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
        return nn.Sequential(*layers).double()

    cases.check_own_statistics(make, ddp, here)


def refusals(here: Here) -> None:
    x, _y, w = here.own(batch())
    model = ddp(net().to(here.device))
    model.register_forward_hook(lambda *_: None)
    raises("forward hooks", lambda: cases.spectreg("auto", model, x, w))
    model = ddp(net().to(here.device))
    module = model.module
    raises("must be", lambda: fastjac.SpectReg()(model, x, projection=w[:, :2]))
    assert model.module is module  # back in its place after an error
