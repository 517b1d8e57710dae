"""The ways in which the matrix runs each thing. A way is a function that checks the gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from matrix_things import Cell, Ours, Thing, backward, convnet, gradients_of, same
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Way:
    """``check`` runs a thing in this way; ``gpu`` says that it needs a GPU."""

    key: str
    name: str
    group: str
    check: Callable[[Thing], None]
    gpu: bool = False


WAYS: list[Way] = []


def way(group: str, name: str, gpu: bool = False) -> Callable[[Any], Any]:
    """Registers a way, whose key is the name of the function."""

    def register(check: Callable[[Thing], None]) -> Callable[[Thing], None]:
        WAYS.append(Way(check.__name__, name, group, check, gpu))
        return check

    return register


# ---- eager


@way("eager", "float64")
def eager(thing: Thing) -> None:
    Cell(thing).agrees()


def lower(thing: Thing, wrap: Callable[[Any], Any], train: Any = backward) -> None:
    """With float32 parameters the error is at most twice that of plain torch."""
    cell = Cell(thing)
    truth = cell.expected()
    cell.x = cell.x.float()
    # A user's own penalty is compared with itself on the plain net.
    peer = Ours(thing, cell.plain, None) if thing.group == "fused" else cell.truth
    errors = []
    for loss, model in ((cell.ours, cell.model), (peer, cell.plain)):
        found = gradients_of(wrap(loss), model.float(), cell.x, cell.y, train)
        parts = [(a.double() - b).norm() for a, b in zip(found, truth, strict=True)]
        errors.append(float(torch.stack(parts).norm()))
    assert errors[0] <= 2 * errors[1], f"not close: {errors}"


@way("eager", "float32")
def float32(thing: Thing) -> None:
    lower(thing, lambda loss: loss)


def value_under(mode: AbstractContextManager[Any], thing: Thing) -> None:
    cell = Cell(thing)
    value = cell.truth(cell.x.requires_grad_(), cell.y)
    with mode:
        same([cell.ours(cell.x, cell.y)], [value])


@way("eager", "`no_grad`")
def no_grad(thing: Thing) -> None:
    value_under(torch.no_grad(), thing)


@way("eager", "inference mode")
def inference_mode(thing: Thing) -> None:
    value_under(torch.inference_mode(), thing)


@way("eager", "deterministic algorithms")
def deterministic(thing: Thing) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        first, second = Cell(thing).found(), Cell(thing).found()
        same(first, Cell(thing).expected())
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@way("eager", "channels_last")
def channels_last(thing: Thing) -> None:
    cell = Cell(thing, convnet)
    cell.x = cell.x.to(memory_format=torch.channels_last)
    cell.model.to(memory_format=torch.channels_last)
    cell.agrees()


@way("eager", "x is not a leaf")
def non_leaf(thing: Thing) -> None:
    def train(loss: Any, model: Any, x: Tensor, y: Tensor) -> None:
        loss(x.sin() * 2, y).backward()

    Cell(thing).agrees(train)


# ---- training


@way("training", "gradient accumulation")
def accumulation(thing: Thing) -> None:
    def train(loss: Any, model: Any, x: Tensor, y: Tensor) -> None:
        for part in (slice(0, 2), slice(2, 6)):
            (loss(x[part], y[part]) / 2).backward()

    Cell(thing).agrees(train)


@way("training", "gradient clipping")
def clipping(thing: Thing) -> None:
    def train(loss: Any, model: Any, x: Tensor, y: Tensor) -> None:
        loss(x, y).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 0.01) > 0.01

    Cell(thing).agrees(train)


@way("training", "three optimizer steps")
def optimiser(thing: Thing) -> None:
    def train(loss: Any, model: Any, x: Tensor, y: Tensor) -> None:
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            opt.zero_grad()
            x.grad = None
            loss(x, y).backward()
            opt.step()

    Cell(thing).agrees(train)


def autocast(dtype: torch.dtype) -> Callable[[Any], Any]:
    def wrap(loss: Any) -> Any:
        def run(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype):
                return loss(x, y)

        return run

    return wrap


@way("training", "autocast bfloat16")
def autocast_bf16(thing: Thing) -> None:
    lower(thing, autocast(torch.bfloat16))


@way("training", "autocast float16, `GradScaler`")
def autocast_fp16(thing: Thing) -> None:
    def train(loss: Any, model: Any, x: Tensor, y: Tensor) -> None:
        opt = torch.optim.SGD([x, *model.parameters()], lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        scaler.scale(loss(x, y)).backward()
        scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 128.0

    lower(thing, autocast(torch.float16), train)


# ---- parameters


def changed(key: str, name: str, change: Callable[[Any], Any]) -> None:
    """Registers a way that changes the parameters of the model first."""
    WAYS.append(Way(key, name, "parameters", lambda thing: Cell(thing, change=change).agrees()))


def freeze_weights(model: Any) -> None:
    for module in model[::2]:
        module.weight.requires_grad_(False)


def share(model: Any) -> None:
    model[4].weight = model[2].weight


changed("spectral_norm", "`spectral_norm`", lambda m: parametrizations.spectral_norm(m[2]))
changed("weight_norm", "`weight_norm`", lambda m: parametrizations.weight_norm(m[2]))
changed("frozen_layer", "frozen layer", lambda m: m[2].requires_grad_(False))
changed("frozen_weights", "frozen weights, free biases", freeze_weights)
changed("shared", "shared weights", share)


@way("parameters", "`functional_call`")
def through_functional_call(thing: Thing) -> None:
    cell = Cell(thing)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        # The parameters are not leaves, as in meta-learning.
        params = {name: 2 * p for name, p in cell.model.named_parameters()}
        return cell.ours(x, y, lambda x: functional_call(cell.model, params, (x,)))

    found = cell.found(loss=loss)
    with torch.no_grad():
        for p in cell.plain.parameters():
            p.mul_(2)
    first, *rest = cell.expected()
    same(found, [first, *(2 * g for g in rest)])


# ---- checkpoints


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@way("checkpoint", "`use_reentrant=False`")
def checkpointed(thing: Thing) -> None:
    Cell(thing, wrap=lambda model: Checkpointed(model, False)).agrees()


@way("checkpoint", "`use_reentrant=True`")
def reentrant(thing: Thing) -> None:
    Cell(thing, wrap=lambda model: Checkpointed(model, True)).agrees()
