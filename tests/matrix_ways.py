"""How the matrix runs each thing: one function a way, which passes if the gradients are exact."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matrix_things import Cell, Ours, Thing, backward, convnet, gradients_of, same
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

BACKEND = "aot_eager"


@dataclass(frozen=True)
class Way:
    """``key`` is the name of the function; ``gpu``: it needs one."""

    name: str
    group: str
    check: Callable[[Thing], None]
    gpu: bool = False

    @property
    def key(self) -> str:
        return self.check.__name__


WAYS: list[Way] = []


def way(group: str, name: str, gpu: bool = False) -> Callable[[Any], Any]:
    def register(check: Callable[[Thing], None]) -> Callable[[Thing], None]:
        WAYS.append(Way(name, group, check, gpu))
        return check

    return register


# ---- eager


@way("eager", "float64")
def eager(thing: Thing) -> None:
    Cell(thing).agrees()


def lower(thing: Thing, wrap: Callable[[Any], Any], train: Any = backward) -> None:
    """float32 parameters: at most twice as far from the float64 gradients as plain torch is."""
    cell = Cell(thing)
    truth = cell.expected()
    cell.x = cell.x.float()
    # Somebody's own penalty is compared with itself on the plain net, not with the full Jacobian.
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


@way("eager", "`no_grad`")
def no_grad(thing: Thing) -> None:
    cell = Cell(thing)
    value = cell.truth(cell.x.requires_grad_(), cell.y)
    with torch.no_grad():
        same([cell.ours(cell.x, cell.y)], [value])


@way("eager", "inference mode")
def inference_mode(thing: Thing) -> None:
    cell = Cell(thing)
    value = cell.truth(cell.x.requires_grad_(), cell.y)
    with torch.inference_mode():
        same([cell.ours(cell.x, cell.y)], [value])


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


@way("eager", "x is no leaf")
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


@way("training", "steps of an optimiser")
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


@way("parameters", "`spectral_norm`")
def spectral_norm(thing: Thing) -> None:
    def change(model: Any) -> None:
        parametrizations.spectral_norm(model[2])

    Cell(thing, change=change).agrees()


@way("parameters", "`weight_norm`")
def weight_norm(thing: Thing) -> None:
    def change(model: Any) -> None:
        parametrizations.weight_norm(model[2])

    Cell(thing, change=change).agrees()


@way("parameters", "frozen layer")
def frozen_layer(thing: Thing) -> None:
    def change(model: Any) -> None:
        model[2].requires_grad_(False)

    Cell(thing, change=change).agrees()


@way("parameters", "frozen weights, free biases")
def frozen_weights(thing: Thing) -> None:
    def change(model: Any) -> None:
        for module in model[::2]:
            module.weight.requires_grad_(False)

    Cell(thing, change=change).agrees()


@way("parameters", "shared weights")
def shared(thing: Thing) -> None:
    def change(model: Any) -> None:
        model[4].weight = model[2].weight

    Cell(thing, change=change).agrees()


@way("parameters", "`functional_call`")
def through_functional_call(thing: Thing) -> None:
    cell = Cell(thing)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        # No leaves, as in meta-learning.
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


# ---- torch.func, by the parameters


def by_params(cell: Cell) -> tuple[Any, dict[str, Tensor]]:
    """The loss as a function of the parameters, and the parameters."""

    def loss(params: Any, x: Tensor = cell.x, y: Tensor = cell.y) -> Tensor:
        return cell.ours(x, y, lambda x: functional_call(cell.model, params, (x,)))

    cell.x.requires_grad_()
    return loss, {name: p.detach() for name, p in cell.model.named_parameters()}


@way("torch.func", "`grad`")
def func_grad(thing: Thing) -> None:
    cell = Cell(thing)
    loss, params = by_params(cell)
    same(list(torch.func.grad(loss)(params).values()), cell.expected()[1:])


@way("torch.func", "`vjp`")
def func_vjp(thing: Thing) -> None:
    cell = Cell(thing)
    loss, params = by_params(cell)
    value, pull = torch.func.vjp(loss, params)
    same(list(pull(torch.ones_like(value))[0].values()), cell.expected()[1:])


@way("torch.func", "`jvp`")
def func_jvp(thing: Thing) -> None:
    cell = Cell(thing)
    loss, params = by_params(cell)
    tangents = {name: p.cos() for name, p in params.items()}
    found = torch.func.jvp(loss, (params,), (tangents,))[1]
    parts = [(g * t).sum() for g, t in zip(cell.expected()[1:], tangents.values(), strict=True)]
    same([found], [torch.stack(parts).sum()])


@way("torch.func", "`jacrev`")
def func_jacrev(thing: Thing) -> None:
    cell = Cell(thing)
    loss, params = by_params(cell)
    rows = torch.func.jacrev(lambda p: torch.stack([loss(p), -loss(p)]))(params)
    truth = cell.expected()[1:]
    same([r[0] for r in rows.values()], truth)
    same([-r[1] for r in rows.values()], truth)


@way("torch.func", "`vmap` of `grad` (per-sample)")
def func_vmap(thing: Thing) -> None:
    cell = Cell(thing)
    loss, params = by_params(cell)
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


@way("torch.compile", "the step, `trace_autograd_ops`")
def traced_step(thing: Thing) -> None:
    cell = Cell(thing)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        cell.agrees(loss=compiled_step(cell))


def one_graph(thing: Thing, dynamic: bool | None, sizes: tuple[int, ...]) -> None:
    """Torch raises at a graph break (fullgraph), and at a second graph for the same code."""
    cell = Cell(thing)
    with torch._dynamo.config.patch(trace_autograd_ops=True, error_on_recompile=True):
        loss = compiled_step(cell, dynamic=dynamic)
        for n in sizes:
            x, y = cell.x[:n].clone(), cell.y[:n].clone()
            same(gradients_of(loss, cell.model, x, y), gradients_of(cell.truth, cell.plain, x, y))


@way("torch.compile", "three steps: no graph break, no recompilation")
def three_steps(thing: Thing) -> None:
    one_graph(thing, None, (6, 6, 6))


@way("torch.compile", "three batch sizes, `dynamic=True`: likewise")
def dynamic_shapes(thing: Thing) -> None:
    one_graph(thing, True, (6, 5, 3))


# ---- copies and files


@way("copies", "`copy.deepcopy`")
def deepcopied(thing: Thing) -> None:
    cell = Cell(thing)
    model, penalty = copy.deepcopy((cell.model, cell.ours.penalty))
    cell.ours = Ours(thing, model, penalty)
    cell.agrees()


@way("copies", "`pickle`")
def pickled(thing: Thing) -> None:
    cell = Cell(thing)
    model, penalty = pickle.loads(pickle.dumps((cell.model, cell.ours.penalty)))
    cell.ours = Ours(thing, model, penalty)
    cell.agrees()


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


def on_gpu(thing: Thing) -> tuple[Cell, Tensor, Tensor, Callable[[], list[Tensor]]]:
    """A cell, its x and y on the GPU, and a function that returns the gradients."""
    cell = Cell(thing)
    model, x, y = cell.model.cuda(), cell.x.cuda().requires_grad_(), cell.y.cuda()

    def gradients() -> list[Tensor]:
        inputs = [x, *model.parameters()]
        return list(torch.autograd.grad(cell.ours(x, y), inputs, materialize_grads=True))

    return cell, x, y, gradients


@way("GPU", "a stream of its own", gpu=True)
def side_stream(thing: Thing) -> None:
    cell, _, _, gradients = on_gpu(thing)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = gradients()
    torch.cuda.current_stream().wait_stream(stream)
    same([g.cpu() for g in found], cell.expected())


@way("GPU", "CUDA graph", gpu=True)
def cuda_graph(thing: Thing) -> None:
    cell, x, _, gradients = on_gpu(thing)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    cell.x = cell.x.cos()  # other numbers than those it was captured with
    with torch.no_grad():
        x.copy_(cell.x)
    graph.replay()
    same([g.cpu() for g in found], cell.expected())
