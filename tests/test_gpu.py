"""Whole steps on a GPU: CUDA graphs, streams, other devices, and no waiting for the device.

Each test has one body. Without a GPU a graph is a plain call (`captured`), so that every line runs;
what only a GPU can say is marked ``gpu``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor, nn

import fastjac
from fastjac import DREG, SpectReg, Warmup, WeightSchedule
from fastjac.ops.dispatch import OPS

CUDA = DEVICE == "cuda"


# ---- how a step runs


def on_a_stream(run: Callable[[], Any]) -> Any:
    """The result of a call on a stream of its own."""
    if not CUDA:
        return run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def captured(
    run: Callable[[], list[Tensor]], *generators: torch.Generator
) -> Callable[[], list[Tensor]]:
    """A function that replays the graph of a call, after three calls to warm up."""
    on_a_stream(lambda: [run() for _ in range(3)])
    if not CUDA:
        return run
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raises if Python waits for the device."""
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    elif DEVICE == "pretend":
        import pretend

        with pretend.strict():
            yield
    else:
        yield


# ---- the steps


class Batch(NamedTuple):
    """What a step reads, in memory that stays."""

    x: Tensor  # [N, ...]
    y: Tensor  # class indices, [N]
    w: Tensor  # cotangents, [K, N, m]

    def fill(self, seed: int) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            self.x.normal_()
            self.w.normal_()
            self.y.random_(0, self.w.shape[-1])


Form = Callable[[Any, nn.Module, Batch], tuple[Tensor, Tensor]]


def attached(penalty: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return model(batch.x), penalty()


def called(penalty: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return penalty(model, batch.x)


def projected(penalty: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return penalty(model, batch.x, projection=batch.w)


def on_graph(penalty: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    output = model(batch.x)
    return output, penalty(batch.x, output, projection=batch.w)


def with_target(penalty: Any, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    return penalty(model, batch.x, batch.y)


STEPS: dict[str, tuple[Callable[..., Any], Form]] = {
    "DREG attached": (DREG, attached),
    "DREG attached, per sample": (
        lambda model, **options: DREG(model, squared=False, **options),
        attached,
    ),
    "DREG called": (lambda model, **options: DREG(**options), called),
    "AccumulatedDREG called": (
        lambda model, **options: fastjac.AccumulatedDREG(
            generator=torch.Generator(DEVICE).manual_seed(1), **options
        ),
        called,
    ),
    **{
        f"SpectReg {engine}": (
            lambda model, engine=engine, **options: SpectReg(engine=engine, **options),
            projected,
        )
        for engine in ("chain", "autograd", "auto")
    },
    "SpectReg graph": (lambda model, **options: SpectReg(**options), on_graph),
    "DataGrad chain": (
        lambda model, **options: fastjac.DataGrad(engine="chain", **options),
        with_target,
    ),
    "DataGrad autograd": (
        lambda model, **options: fastjac.DataGrad(engine="autograd", **options),
        with_target,
    ),
}
# A graph needs to know a generator, so AccumulatedDREG has a test of its own.
GRAPHED = [name for name in STEPS if not name.startswith("Accumulated")]


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 5), nn.Tanh()),
        *(nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3)),
    )


def convnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.GELU(), nn.Conv2d(3, 4, 2), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(16, 3)),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (6, 4)),
    "convnet": (convnet, (6, 2, 4, 4)),
}


class Case:
    """A penalty on a fused net."""

    def __init__(self, name: str, net: str = "mlp", dtype: Any = torch.float64, **options: Any):
        make, shape = NETS[net]
        torch.manual_seed(0)
        penalty, self.form = STEPS[name]
        self.model = fastjac.fuse(make().to(dtype))
        self.penalty = penalty(self.model, **options)
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        w = torch.zeros(2, shape[0], 3, dtype=dtype)
        self.batch = Batch(x, torch.zeros(shape[0], dtype=torch.int64), w)
        self.batch.fill(1)

    def loss(self) -> Tensor:
        output, value = self.form(self.penalty, self.model, self.batch)
        return F.cross_entropy(output, self.batch.y) + value

    def gradients(self) -> list[Tensor]:
        inputs = [self.batch.x, *self.model.parameters()]
        return list(torch.autograd.grad(self.loss(), inputs, materialize_grads=True))


def same(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    # The same kernels on the same numbers. cuBLAS and cuDNN may take other algorithms.
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


every_step = pytest.mark.parametrize("name", STEPS)
every_net = pytest.mark.parametrize("net", NETS)


# ---- the tests


@every_net
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", GRAPHED)
def test_replays_are_the_eager_step(name: str, net: str, dtype: torch.dtype) -> None:
    """With other numbers in the same memory; BatchNorm's buffers do not enter in training."""
    case, eager = Case(name, net, dtype), Case(name, net, dtype)
    replay = captured(case.gradients)
    for seed in (2, 3, 4):
        case.batch.fill(seed)
        eager.batch.fill(seed)
        same(replay(), eager.gradients(), dtype)


@pytest.mark.parametrize("name", GRAPHED)
def test_a_graph_trains_with_a_scheduled_weight(name: str) -> None:
    """The optimiser's step is in the graph; the weight is a tensor, of the eager step a number."""
    runs = []
    for weight in (torch.tensor(0.5, dtype=torch.float64), 0.5):
        case = Case(name, weight=weight)
        optimizer = torch.optim.SGD(case.model.parameters(), lr=0.05)

        def step(case: Case = case, optimizer: Any = optimizer) -> list[Tensor]:
            optimizer.zero_grad()
            case.batch.x.grad = None
            loss = case.loss()
            loss.backward()
            optimizer.step()
            return [loss]

        before = copy.deepcopy(case.model.state_dict())
        run = captured(step) if isinstance(weight, Tensor) else step
        case.model.load_state_dict(before)  # without the steps of the warm-up
        schedule = WeightSchedule(case.penalty, Warmup(steps=4))
        for seed in range(6):
            case.batch.fill(seed)
            run()
            schedule.step()
        runs.append([p.detach() for p in case.model.parameters()])
    same(*runs)


@pytest.mark.parametrize("own", [False, True], ids=["global", "registered"])
@pytest.mark.parametrize("name", ["SpectReg chain", "SpectReg autograd", "AccumulatedDREG called"])
def test_each_replay_draws_anew(name: str, own: bool) -> None:
    replayed, eager = Case(name), Case(name)
    for case in (replayed, eager):
        case.form, case.penalty.generator = called, torch.Generator(DEVICE) if own else None
    replay = captured(replayed.gradients, *([replayed.penalty.generator] if own else []))
    (replayed.penalty.generator or torch).manual_seed(3)
    found = [[g.clone() for g in replay()] for _ in range(2)]
    (eager.penalty.generator or torch).manual_seed(3)
    for grads in found:
        same(grads, eager.gradients())
    assert not torch.equal(found[0][0], found[1][0])


@every_net
@every_step
def test_on_a_stream_of_its_own(name: str, net: str) -> None:
    case, eager = Case(name, net), Case(name, net)
    for _ in range(3):
        same(on_a_stream(case.gradients), eager.gradients())


@every_net
@every_step
def test_a_step_does_not_wait_for_the_device(name: str, net: str) -> None:
    case = Case(name, net, weight=torch.tensor(0.5))
    schedule = WeightSchedule(case.penalty, Warmup(steps=4))
    for _ in range(2):  # the first calls load kernels
        case.gradients()
    with no_waiting():
        for _ in range(2):
            case.gradients()
            schedule.step()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ops_in_a_graph(op: str, dtype: torch.dtype) -> None:
    for example in OPS[op].examples():
        inputs = example.to(DEVICE, dtype)

        def call(example: Any = example, inputs: Any = inputs) -> list[Tensor]:
            return list(example.call(inputs, "auto").values())

        replay = captured(call)
        for t in inputs.values():
            if t.is_floating_point():
                with torch.no_grad():
                    t.mul_(0.5)
        torch.testing.assert_close(replay(), call(), equal_nan=True)


@pytest.mark.gpu
@every_step
def test_on_a_device_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    if name.startswith("Accumulated"):
        pytest.skip("its generator is on the current device")
    expected = [g.cpu() for g in Case(name).gradients()]
    with torch.device("cuda:1"):
        case = Case(name)
        for ours, batch in zip(case.batch, Case(name).batch, strict=True):
            ours.data.copy_(batch.data)
    assert torch.cuda.current_device() == 0
    same([g.cpu() for g in case.gradients()], expected)


@pytest.mark.gpu
def test_what_a_capture_refuses() -> None:
    """The checks of test_weight.py, with graphs."""
    case = Case("DREG attached", weight=0.5)
    captured(case.gradients)
    with pytest.raises(RuntimeError, match="weight was set from 0.5"):
        case.penalty.weight = 0.25
    case = Case("DREG attached", weight=torch.tensor(0.5, device="cpu"))
    with pytest.raises(RuntimeError, match="weight is a tensor on cpu"):
        captured(case.gradients)
    case = Case("SpectReg chain", every=2)
    with pytest.raises(RuntimeError, match="every > 1 .*CUDA graph"):
        captured(case.gradients)


@pytest.mark.gpu
@pytest.mark.slow
def test_graphs_of_inductor_see_a_number() -> None:
    """``mode="reduce-overhead"`` compares the weight in each call, so a number is right there."""
    model = mlp().double()
    plain = copy.deepcopy(model)
    penalty, other = DREG(model), DREG(plain)
    step = torch.compile(lambda x: model(x).square().sum() + penalty(), mode="reduce-overhead")
    x = torch.randn(6, 4, dtype=torch.float64)
    for weight in (1.0, 1.0, 1.0, 0.5, 0.25, 0.125):
        penalty.weight = other.weight = weight
        torch.compiler.cudagraph_mark_step_begin()
        found = torch.autograd.grad(step(x), list(model.parameters()))
        truth = plain(x).square().sum() + other()
        same(list(found), list(torch.autograd.grad(truth, list(plain.parameters()))))


# ---- kernels of torch that are differentiable once


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention(dtype: torch.dtype, causal: bool) -> None:
    """The chain engine is as exact as autograd with the matrix of scores, against float64."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv, self.out = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.q(x), *self.kv(x).chunk(2, -1)
            q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
            a = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            return self.out(a.transpose(1, 2).flatten(2).mean(1))

    torch.manual_seed(0)
    model, x = Attend(), torch.randn(3, 7, 32)
    w = torch.randn(2, 3, 5)

    def gradients(engine: str, dtype: torch.dtype) -> list[Tensor]:
        mine = copy.deepcopy(model).to(DEVICE, dtype)
        penalty = SpectReg(engine=engine)
        for _ in range(3):
            value = penalty(mine, x.to(DEVICE, dtype), projection=w.to(DEVICE, dtype))[1]
            found = torch.autograd.grad(value, [mine.q.weight, mine.kv.weight, mine.out.weight])
        return [g.double() for g in found]

    truth = gradients("autograd", torch.float64)

    def error(engine: str) -> float:
        pairs = zip(gradients(engine, dtype), truth, strict=True)
        return float(sum((a - b).square().sum() / b.square().sum() for a, b in pairs)) ** 0.5

    assert error("auto") <= 1.5 * error("autograd")
