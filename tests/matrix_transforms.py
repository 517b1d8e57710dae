"""The ways of the matrix that transform, compile, copy or export; `WAYS` has all ways."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from conftest import DEVICE
from matrix_things import Cell, Ours, Thing, gradients_of, same
from matrix_ways import WAYS, Way, way
from torch import Tensor
from torch.func import functional_call

import fastjac

__all__ = ["WAYS", "Way"]
BACKEND = "aot_eager"


# ---- torch.func, with respect to the parameters


def by_params(thing: Thing) -> tuple[Cell, Any, dict[str, Tensor]]:
    """The cell, its loss as a function of the parameters, and the parameters."""
    cell = Cell(thing)

    def loss(params: Any, x: Tensor = cell.x, y: Tensor = cell.y) -> Tensor:
        return cell.ours(x, y, lambda x: functional_call(cell.model, params, (x,)))

    cell.x.requires_grad_()
    return cell, loss, {name: p.detach() for name, p in cell.model.named_parameters()}


@way("torch.func", "`grad`")
def func_grad(thing: Thing) -> None:
    cell, loss, params = by_params(thing)
    same(torch.func.grad(loss)(params).values(), cell.expected()[1:])


@way("torch.func", "`vjp`")
def func_vjp(thing: Thing) -> None:
    cell, loss, params = by_params(thing)
    value, pull = torch.func.vjp(loss, params)
    same(pull(torch.ones_like(value))[0].values(), cell.expected()[1:])


@way("torch.func", "`jvp`")
def func_jvp(thing: Thing) -> None:
    cell, loss, params = by_params(thing)
    tangents = {name: p.cos() for name, p in params.items()}
    found = torch.func.jvp(loss, (params,), (tangents,))[1]
    parts = [(g * t).sum() for g, t in zip(cell.expected()[1:], tangents.values(), strict=True)]
    same([found], [torch.stack(parts).sum()])


@way("torch.func", "`jacrev`")
def func_jacrev(thing: Thing) -> None:
    cell, loss, params = by_params(thing)
    rows = torch.func.jacrev(lambda p: torch.stack([loss(p), -loss(p)]))(params)
    same(rows.values(), [torch.stack([g, -g]) for g in cell.expected()[1:]])


@way("torch.func", "`vmap` of `grad` (per-sample)")
def func_vmap(thing: Thing) -> None:
    cell, loss, params = by_params(thing)
    one = torch.func.grad(lambda p, x, y: loss(p, x.unsqueeze(0), y.unsqueeze(0)))
    found = torch.func.vmap(one, in_dims=(None, 0, 0))(params, cell.x.detach(), cell.y)
    for n in range(len(cell.x)):
        piece = slice(n, n + 1)
        truth = gradients_of(cell.truth, cell.plain, cell.x[piece], cell.y[piece])
        same([g[n] for g in found.values()], truth[1:])


# ---- torch.compile


def compiled_step(cell: Cell, **options: Any) -> Any:
    ours = cell.ours
    options = {"backend": BACKEND, "fullgraph": True, **options}
    return torch.compile(lambda x, y: ours(x, y), **options)


@way("torch.compile", "the model")
def compiled_model(thing: Thing) -> None:
    cell = Cell(thing)
    run = torch.compile(cell.model, backend=BACKEND, fullgraph=True)
    cell.agrees(loss=lambda x, y: cell.ours(x, y, run))


@way("torch.compile", "the step")
def step(thing: Thing) -> None:
    cell = Cell(thing)
    cell.agrees(loss=compiled_step(cell))


@way("torch.compile", "the step, graph breaks allowed")
def broken_step(thing: Thing) -> None:
    cell = Cell(thing)
    cell.agrees(loss=compiled_step(cell, fullgraph=False))


@way("torch.compile", "`fastjac.compile` of the step")
def fastjac_step(thing: Thing) -> None:
    cell = Cell(thing)
    ours = cell.ours
    cell.agrees(loss=fastjac.compile(lambda x, y: ours(x, y), backend=BACKEND))


@way("torch.compile", "`fastjac.compile` of the step and its backward")
def whole_step(thing: Thing) -> None:
    cell = Cell(thing)
    ours = cell.ours
    run = fastjac.compile(lambda x, y: ours(x, y).backward(), backend=BACKEND)
    same(cell.found(lambda loss, model, x, y: run(x, y)), cell.expected())


def one_graph(thing: Thing, dynamic: bool | None, sizes: tuple[int, ...]) -> None:
    """Torch raises at a graph break, and if it compiles the same code a second time."""
    cell = Cell(thing)
    with torch._dynamo.config.patch(error_on_recompile=True):
        loss = compiled_step(cell, dynamic=dynamic)
        for n in sizes:
            x, y = cell.x[:n].clone(), cell.y[:n].clone()
            same(gradients_of(loss, cell.model, x, y), gradients_of(cell.truth, cell.plain, x, y))


@way("torch.compile", "three steps: no graph break, no recompilation")
def three_steps(thing: Thing) -> None:
    one_graph(thing, None, (6, 6, 6))


@way("torch.compile", "three batch sizes, `dynamic=True`: no graph break, no recompilation")
def dynamic_shapes(thing: Thing) -> None:
    one_graph(thing, True, (6, 5, 3))


# ---- copies and files


def copied(thing: Thing, by: Callable[[Any], Any]) -> None:
    cell = Cell(thing)
    cell.ours = Ours(thing, *by((cell.model, cell.ours.penalty)))
    cell.agrees()


@way("copies", "`copy.deepcopy`")
def deepcopied(thing: Thing) -> None:
    copied(thing, copy.deepcopy)


@way("copies", "`pickle`")
def pickled(thing: Thing) -> None:
    copied(thing, lambda both: pickle.loads(pickle.dumps(both)))


@way("copies", "`state_dict`")
def state_dict(thing: Thing) -> None:
    cell = Cell(thing)
    state = cell.plain.state_dict()
    assert list(cell.model.state_dict()) == list(state)
    assert cell.ours.penalty is None or not cell.ours.penalty.state_dict()
    for p in cell.model.parameters():
        p.data.zero_()
    cell.model.load_state_dict(state)
    cell.agrees()


@way("copies", "`torch.export`, then the penalty")
def exported(thing: Thing) -> None:
    cell = Cell(thing)
    run = torch.export.export(cell.model, (cell.x,)).module()
    cell.agrees(loss=lambda x, y: cell.ours(x, y, run))


# ---- on a GPU


def on_gpu(thing: Thing) -> tuple[Cell, Tensor, Callable[[], list[Tensor]]]:
    """A cell, its x on the GPU, and a function that returns the gradients."""
    cell = Cell(thing, wrap=lambda model: model.to(DEVICE))  # before it is fused
    model, x, y = cell.model, cell.x.to(DEVICE).requires_grad_(), cell.y.to(DEVICE)

    def gradients() -> list[Tensor]:
        inputs = [x, *model.parameters()]
        return list(torch.autograd.grad(cell.ours(x, y), inputs, materialize_grads=True))

    return cell, x, gradients


def on_a_stream(run: Callable[[], Any]) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


@way("GPU", "a separate stream", gpu=True)
def side_stream(thing: Thing) -> None:
    cell, _x, gradients = on_gpu(thing)
    same([g.cpu() for g in on_a_stream(gradients)], cell.expected())


@way("GPU", "CUDA graph", gpu=True)
def cuda_graph(thing: Thing) -> None:
    cell, x, gradients = on_gpu(thing)
    on_a_stream(lambda: [gradients() for _ in range(3)])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    cell.x = cell.x.cos()  # other numbers than those in the capture
    with torch.no_grad():
        x.copy_(cell.x)
    graph.replay()
    same([g.cpu() for g in found], cell.expected())
