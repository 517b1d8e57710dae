"""A weight that is a tensor, and what is refused while a CUDA graph is captured.

The graphs themselves are in test_gpu.py. Here the one function that says whether a graph is being
captured is replaced, which needs no GPU.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from penalty_cases import SPECS, Call, by_engine, close, close_gradients, gradients
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastjac
from fastjac import DREG, Penalty, SpectReg, Warmup, WeightSchedule, torch_private
from fastjac.penalties import PENALTIES, Contractive, PenaltySpec

X = torch.linspace(-1, 2, 15, dtype=torch.float64).view(5, 3)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def weight_of(number: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(number, dtype=dtype, requires_grad=True)


# ---- the same as a number


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("spec", "engine"), by_engine(SPECS))
def test_model_form(spec: PenaltySpec, engine: str | None, reduction: str) -> None:
    call = Call(spec, engine=engine)
    values = call.values(reduction=reduction)
    weight = weight_of(-2.5)
    found = call.values(reduction=reduction, weight=weight)
    truth = -call.values(reduction=reduction, weight=2.5)
    close(found, truth)
    *grads, of_weight = gradients(found, [*call.inputs, weight])
    close_gradients(grads, gradients(truth, call.inputs))
    close(of_weight, values.detach().sum())


GRAPH_FORM = [
    p
    for p in SPECS
    if p.values[0].kind != "layer-wise" and p.values[0].name != "finite_difference_datagrad"
]


@pytest.mark.parametrize("spec", GRAPH_FORM)
def test_graph_form(spec: PenaltySpec) -> None:
    found = []
    for weight in (weight_of(0.3), 0.3):
        call = Call(spec)
        penalty = spec.module(**call.options, **call.random(), weight=weight)
        value = penalty(call.x, call.model(call.x), *call.targets)
        found.append((value, *gradients(value, call.inputs)))
    close_gradients(*found)


ATTACHED = [DREG, Contractive, lambda model, **o: DREG(model, squared=False, **o)]


@pytest.mark.parametrize("kind", ATTACHED)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_attached(kind: Any, reduction: str, both_ways: str) -> None:
    found = []
    for weight in (weight_of(0.3), 0.3):
        model = net()
        penalty = kind(model, weight=weight, reduction=reduction, every=2)
        for _ in range(3):  # the row norms of all layers are taken at once from the second pass on
            loss = model(X).square().sum() + penalty().sum()
            found.append((loss, *gradients(loss, list(model.parameters()))))
    for tensor, number in zip(found[:3], found[3:], strict=True):
        close_gradients(tensor, number)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["spectreg", "dreg", "accumulated_dreg", "confidence_penalty"])
def test_its_dtype_is_not_that_of_the_value(name: str, dtype: torch.dtype) -> None:
    spec = PENALTIES[name]
    for reduction in ("mean", "none"):
        call = Call(spec, dtype=torch.float32)
        value = call.values(reduction=reduction, weight=weight_of(0.5, dtype))
        torch.testing.assert_close(value, call.values(reduction=reduction, weight=0.5))
        assert value.dtype == torch.float32


def test_it_is_read_at_each_call() -> None:
    weight, model = torch.tensor(1.0), net()
    whole = fastjac.spectreg(model, X, n_proj=-1)[1]
    penalty = SpectReg(-1, weight=weight)
    close(penalty(model, X)[1], whole)
    weight.fill_(0.25)
    close(penalty(model, X)[1], whole / 4)


# ---- copies, files, tracing


def test_copies_and_files() -> None:
    weight = torch.tensor(0.5)
    penalty = SpectReg(weight=weight)
    assert penalty.weight is weight and copy.copy(penalty).weight is weight
    assert penalty.state_dict() == {} and not [*penalty.parameters(), *penalty.buffers()]
    assert penalty.double().to("meta").weight is weight
    file = io.BytesIO()
    torch.save(penalty, file)
    file.seek(0)
    twins = [
        copy.deepcopy(penalty),
        pickle.loads(pickle.dumps(penalty)),
        torch.load(file, weights_only=False),
    ]
    weight.fill_(0.75)
    assert [float(twin.weight) for twin in twins] == [0.5] * 3
    weight.fill_(1.0)  # it is shown, although it is the default
    assert repr(penalty) == f"SpectReg(weight={weight!r})"


@pytest.mark.usefixtures("no_stale_graphs")
@pytest.mark.parametrize("attached", [True, False])
def test_under_compile(attached: bool) -> None:
    """One graph, which takes the tensor as an input."""
    weight, model, plain, graphs = torch.tensor(0.0), net(), net(), []
    penalty = DREG(model, weight=weight) if attached else SpectReg(-1, weight=weight)
    other = DREG(plain, weight=1.0) if attached else SpectReg(-1, engine="autograd")

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def step(penalty: Any, model: Any, x: Tensor) -> Tensor:
        if attached:
            return model(x).square().sum() + penalty()
        output = model(x)
        return output.square().sum() + penalty(x, output)

    run = torch.compile(step, backend=backend, fullgraph=True)
    x = X.clone().requires_grad_()
    for k in range(3):
        weight.fill_(k / 4)
        other.weight = k / 4
        value, truth = run(penalty, model, x), step(other, plain, x)
        close(value, truth)
        close_gradients(
            gradients(value, list(model.parameters())),
            gradients(truth, list(plain.parameters())),
        )
    assert len(graphs) == 1


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_under_make_fx(mode: str) -> None:
    """The graph reads the tensor when it runs."""
    weight, model = torch.tensor(0.5), net()
    penalty = SpectReg(weight=weight)

    def step(x: Tensor, w: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return penalty(x, model(x), projection=w)

    w = torch.ones(7, 2, dtype=torch.float64)
    x = torch.linspace(-1, 1, 21, dtype=torch.float64).view(7, 3)
    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(x, w)
    for number in (0.5, 2.0):
        weight.fill_(number)
        close(graph(x, w), step(x, w))


# ---- schedules


def test_a_schedule_fills_it_in_place() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        weight = weight_of(0.3, dtype)
        base = weight.item()
        penalty = SpectReg(weight=weight)
        schedule = WeightSchedule(penalty, Warmup(steps=10))
        assert penalty.weight is weight and weight.item() == 0 and weight.requires_grad
        schedule.set_step(3)
        torch.testing.assert_close(weight.detach(), torch.tensor(base * 0.3, dtype=dtype))
        # The base is found again, although the number was rounded.
        for same in (penalty, copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
            again = WeightSchedule(same, Warmup(steps=10))
            again.set_step(100)
            assert again.base == base and same.weight.item() == base
        with torch.no_grad():
            weight.fill_(0.5)  # the caller's own, from now on the base
        assert WeightSchedule(penalty, Warmup(steps=10)).base == 0.5


def test_a_schedule_does_not_wait_for_the_device() -> None:
    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            assert "local_scalar_dense" not in str(func)
            return func(*args, **(kwargs or {}))

    penalty, model = SpectReg(weight=torch.tensor(0.3)), net()
    schedule = WeightSchedule(penalty, Warmup(steps=10))
    state = schedule.state_dict()
    with NoReading():
        schedule.step()
        schedule.set_step(7)
        schedule.load_state_dict(state)
        penalty(model, X)[1].backward()


# ---- what is refused


def test_errors() -> None:
    for value, kind, message in [
        ("1", TypeError, "weight is '1': it must be a Python number, or a tensor without dim"),
        (torch.ones(3), ValueError, r"weight has shape \(3,\): it must be one number"),
        (torch.tensor(1), TypeError, "weight has dtype torch.int64: it must be floating point"),
        (float("inf"), ValueError, "weight is inf: it must be finite"),
    ]:
        with pytest.raises(kind, match=message):
            SpectReg(weight=value)
        penalty = DREG(net())
        with pytest.raises(kind, match=message):
            penalty.weight = value
        assert penalty.weight == 1.0
    with pytest.raises(TypeError, match="weight is an nn.Parameter"):
        SpectReg(weight=nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(TypeError, match="gamma is tensor"):
        fastjac.presets.r1(torch.tensor(1.0))  # type: ignore[arg-type]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``capture(f)`` calls f as if a CUDA graph were captured."""

    def call(f: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch_private, "capturing_now", lambda: True)
            return f()

    yield call


def steps() -> list[Any]:
    """Functions that make ``(penalty, step)`` from the options of the penalty."""

    def attached(**options: Any) -> tuple[Penalty, Any]:
        model = net()
        penalty = DREG(model, **options)
        return penalty, lambda: (model(X), penalty())

    def called(**options: Any) -> tuple[Penalty, Any]:
        model, penalty = net(), DREG(**options)
        return penalty, lambda: penalty(model, X)

    def graph(**options: Any) -> tuple[Penalty, Any]:
        model, penalty = net(), SpectReg(**options)
        x = X.clone().requires_grad_()
        return penalty, lambda: penalty(x, model(x))

    def of_model(**options: Any) -> tuple[Penalty, Any]:
        model, penalty = net(), SpectReg(**options)
        return penalty, lambda: penalty(model, X)

    return [attached, called, graph, of_model]


@pytest.mark.parametrize("make", steps())
def test_every_is_refused_in_a_capture(make: Any, capture: Any) -> None:
    penalty, step = make(every=2)
    step()
    for _ in range(2):  # whether this call is due or not
        with pytest.raises(RuntimeError, match="every > 1 and .* CUDA graph .*capture two graphs"):
            capture(step)
        step()
    capture(make(every=1)[1])
    penalty, step = make(every=2)
    penalty.eval()  # in eval mode every call computes the value
    if make.__name__ != "attached":  # which needs the training mode of its model
        capture(step)


@pytest.mark.parametrize("make", steps())
def test_a_number_that_a_graph_keeps_cannot_be_changed(make: Any, capture: Any) -> None:
    penalty, step = make(weight=0.5)
    schedule = WeightSchedule(penalty, Warmup(steps=4))
    schedule.set_step(2)
    step()
    schedule.set_step(3)  # nothing is captured yet
    capture(step)
    penalty.weight = 0.375  # the same number
    schedule.set_step(3)
    for change in (schedule.step, lambda: setattr(penalty, "weight", 0.5)):
        with pytest.raises(RuntimeError, match="weight was set from 0.375 .*torch.tensor"):
            change()
    assert penalty.weight == 0.375 and schedule.last_step == 3
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        twin.weight = 0.5  # no graph has captured the copy
    penalty.weight = torch.tensor(0.375)  # as the error says, and then
    schedule.step()
    capture(step)
    schedule.set_step(2)
    assert float(penalty.weight) == 0.25


@pytest.mark.parametrize("make", steps())
def test_a_tensor_that_a_graph_reads_cannot_be_replaced(make: Any, capture: Any) -> None:
    penalty, step = make(weight=torch.tensor(0.5))
    penalty.weight = weight = torch.tensor(0.75)
    capture(step)
    penalty.weight = weight
    weight.fill_(0.25)
    for value in (0.25, torch.tensor(0.25)):
        with pytest.raises(RuntimeError, match=r"reads the tensor .*penalty.weight.fill_"):
            penalty.weight = value
    assert penalty.weight is weight


def test_a_tensor_on_the_cpu_is_refused_in_a_capture_on_a_gpu(capture: Any) -> None:
    """Torch reads it when the product is launched, so the graph would keep the number."""
    model = nn.Linear(3, 2, device="meta")
    x = torch.zeros(4, 3, device="meta", requires_grad=True)
    penalty = SpectReg(weight=torch.tensor(0.5, device="cpu"))
    penalty(x, model(x))
    with pytest.raises(RuntimeError, match=r"weight is a tensor on cpu .*on meta.*would keep"):
        capture(lambda: penalty(x, model(x)))
    penalty.weight = torch.tensor(0.5, device="meta")
    capture(lambda: penalty(x, model(x)))


def test_capturing_without_a_gpu() -> None:
    if not torch.cuda.is_available():
        assert not torch_private.capturing()
