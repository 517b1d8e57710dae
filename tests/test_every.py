"""`every=k` over copies, checkpoints and torch.compile; the schedules of the weight."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from penalty_cases import SPECS, Call, close, close_gradients, gradients
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac import DREG, Penalty, SpectReg, Warmup, WeightSchedule
from fastjac.penalties import PenaltySpec

X = torch.linspace(-1, 2, 15, dtype=torch.float64).view(5, 3)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def saved(state: Any) -> Any:
    """Through a file, as torch loads it by default: tensors and plain numbers alone."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def by_state_dict(penalty: Penalty, fresh: Penalty) -> Penalty:
    fresh.load_state_dict(saved(penalty.state_dict()))
    return fresh


COPIES = {
    "deepcopy": lambda penalty, fresh: copy.deepcopy(penalty),
    "pickle": lambda penalty, fresh: pickle.loads(pickle.dumps(penalty)),
    "state_dict": by_state_dict,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("spec", SPECS)
def test_the_count_survives(spec: PenaltySpec, way: str) -> None:
    call = Call(spec)
    options = {"every": 3, "reduction": "sum"}
    for before in range(4):
        penalty = spec.module(**call.options, **options)
        for _ in range(before):
            penalty(call.model, call.x, *call.targets)
        twin = COPIES[way](penalty, spec.module(**call.options, **options))
        computed = [bool(twin(call.model, call.x, *call.targets)[1] != 0) for _ in range(4)]
        assert computed == [(before + k) % 3 == 0 for k in range(4)]


def test_the_count_of_an_attached_penalty_survives() -> None:
    model = net()
    penalty = DREG(model, every=3)
    model(X), penalty()
    for way in COPIES:
        other = DREG(net(), every=3)
        twin = COPIES[way](penalty, other)
        its_model = twin._watch.model
        computed = []
        for _ in range(4):
            its_model(X)
            computed.append(bool(twin() != 0))
        assert computed == [False, False, True, False], way
        twin.detach()


def test_state_dict_of_a_model_with_penalties() -> None:
    model = nn.ModuleDict({"net": net(), "lazy": SpectReg(every=4), "plain": SpectReg()})
    model["lazy"](model["net"], X)
    state = saved(model.state_dict())
    assert [k for k in state if not k.startswith("net")] == ["lazy.calls"]
    assert state["lazy.calls"].item() == 1
    del state["lazy.calls"]
    with pytest.raises(RuntimeError, match='Missing key.*"lazy.calls"'):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).missing_keys == ["lazy.calls"]
    assert model["lazy"]._calls == 1
    # A checkpoint from when the penalty was lazy, and of another k.
    SpectReg().load_state_dict({"calls": torch.tensor(3)})
    shorter = SpectReg(every=2)
    shorter.load_state_dict({"calls": torch.tensor(3)})
    assert shorter._calls == 1


def compiled(step: Any, counts: list[int], fullgraph: bool = True) -> Any:
    def backend(graph: Any, inputs: Any) -> Any:
        counts[0] += 1
        return aot_eager(graph, inputs)

    return torch.compile(step, backend=backend, fullgraph=fullgraph)


@pytest.mark.usefixtures("no_stale_graphs")
@pytest.mark.parametrize("whole", [True, False])
def test_layer_wise_under_compile(whole: bool) -> None:
    """One graph for each of the k calls, and the right one at each call."""
    model, plain, counts = net(), net(), [0]
    penalty, other = DREG(model, every=3), DREG(plain, every=3)
    run = model if whole else compiled(model, counts)

    def step(x: Tensor) -> Tensor:
        return run(x).square().sum() + penalty()

    run_step = compiled(step, counts) if whole else step
    for _ in range(8):
        value, truth = run_step(X), plain(X).square().sum() + other()
        close(value, truth)
        close_gradients(
            gradients(value, list(model.parameters())), gradients(truth, list(plain.parameters()))
        )
    assert counts == [3]


@pytest.mark.usefixtures("no_stale_graphs")
def test_input_jacobian_under_compile() -> None:
    model, counts = net(), [0]
    penalty, other = (SpectReg(-1, every=3) for _ in range(2))

    def step(x: Tensor) -> Tensor:
        output, value = penalty(model, x)
        return output.square().sum() + value

    run_step = compiled(step, counts)
    parameters = list(model.parameters())
    for _ in range(8):
        value = run_step(X)
        output, truth = other(model, X)
        truth = output.square().sum() + truth
        close(value, truth)
        close_gradients(gradients(value, parameters), gradients(truth, parameters))
    assert counts == [3]


@pytest.mark.usefixtures("no_stale_graphs")
def test_more_calls_than_torch_compiles_are_right_or_refused() -> None:
    """Beyond recompile_limit torch runs the step uncompiled, or with fullgraph=True raises."""
    for fullgraph in (False, True):
        torch._dynamo.reset()
        model, plain = net(), net()
        penalty, other = DREG(model, every=4), DREG(plain, every=4)
        step = compiled(lambda x: model(x).sum() + penalty(), [0], fullgraph)  # noqa: B023
        with torch._dynamo.config.patch(recompile_limit=2):
            for k in range(9):
                if fullgraph and k == 2:
                    with pytest.raises(Exception, match="fullgraph=True"):
                        step(X)
                    break
                close(step(X), plain(X).sum() + other())


@pytest.mark.usefixtures("no_stale_graphs")
def test_schedule_under_compile() -> None:
    """A weight that changes is a number of the graph, not a reason for another graph."""
    model, plain, counts = net(), net(), [0]
    penalty, other = DREG(model), DREG(plain)
    schedules = [WeightSchedule(p, Warmup(steps=20)) for p in (penalty, other)]
    step = compiled(lambda x: model(x).square().sum() + penalty(), counts)
    for _ in range(12):
        value, truth = step(X), plain(X).square().sum() + other()
        close(value, truth)
        close_gradients(
            gradients(value, list(model.parameters())), gradients(truth, list(plain.parameters()))
        )
        for schedule in schedules:
            schedule.step()
    assert counts == [1]


def test_warmup() -> None:
    linear, cosine = Warmup("linear", steps=4, start=2), Warmup("cosine", steps=4, start=2)
    assert [linear(k) for k in range(8)] == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [linear(k) == cosine(k) for k in (0, 2, 6, 100)] == [True] * 4
    assert math.isclose(cosine(3), (1 - math.cos(math.pi / 4)) / 2)
    assert math.isclose(cosine(4), 0.5)
    assert [Warmup("constant", start=2)(k) for k in range(4)] == [0, 0, 1, 1]
    assert Warmup("constant")(0) == 1


def test_schedule_of_the_weight() -> None:
    model = net()
    penalty = DREG(model, weight=0.5)
    whole = DREG(weight=0.5)(net(), X)[1]
    schedule = WeightSchedule(penalty, Warmup("linear", steps=4))
    for k in range(6):
        assert schedule.last_step == k
        model(X)
        close(penalty(), whole * min(k / 4, 1))
        if k == 2:
            state = saved(schedule.state_dict())
        schedule.step()
    resumed = WeightSchedule(SpectReg(weight=7.0), Warmup("linear", steps=4))
    assert resumed.penalty.weight == 0
    resumed.load_state_dict(state)
    assert resumed.last_step == 2 and resumed.penalty.weight == 0.25
    resumed.step()
    assert resumed.penalty.weight == 0.375
    resumed.set_step(1)
    assert resumed.penalty.weight == 0.125
    twin = pickle.loads(pickle.dumps(resumed))
    twin.step()
    assert twin.penalty.weight == 0.25 and resumed.penalty.weight == 0.125


def test_a_second_schedule_has_the_base_of_the_first() -> None:
    penalty = SpectReg(weight=0.5)
    WeightSchedule(penalty, Warmup(steps=10)).set_step(3)
    for same in (penalty, copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        schedule = WeightSchedule(same, Warmup(steps=10))
        assert same.weight == 0
        schedule.set_step(100)
        assert schedule.base == same.weight == 0.5
    penalty.weight = 3.0  # the caller's own, from now on the base
    assert WeightSchedule(penalty, Warmup(steps=10)).base == 3.0


def test_schedule_by_a_function_of_ones_own_with_every() -> None:
    penalty, model = SpectReg(-1, weight=2.0, every=2), net()
    schedule = WeightSchedule(penalty, lambda step: 1 / (1 + step))
    values = []
    for _ in range(3):
        values.append(penalty(model, X)[1])
        schedule.step()
    exact = fastjac.spectreg(model, X, n_proj=-1)[1]
    close(torch.stack(values), torch.stack([4 * exact, 0 * exact, 4 / 3 * exact]))


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_a_recomputed_call_is_refused(use_reentrant: bool) -> None:
    """It would be counted twice, and the recomputation would be another call than the forward."""
    penalty, model = fastjac.ConfidencePenalty(every=2), net()
    x = X.clone().requires_grad_()
    value = checkpoint(lambda z: penalty(model, z)[1], x, use_reentrant=use_reentrant)
    with pytest.raises(
        RuntimeError, match="every > 1 and was called inside a checkpointed function"
    ):
        value.backward()


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'square'"):
        Warmup("square", steps=3)
    with pytest.raises(ValueError, match="steps is 0 and kind is 'linear'"):
        Warmup()
    with pytest.raises(ValueError, match="steps is 3 and kind is 'constant'"):
        Warmup("constant", steps=3)
    with pytest.raises(ValueError, match="start is -1: it must be at least 0"):
        Warmup("constant", start=-1)
    with pytest.raises(TypeError, match="steps is 2.5"):
        Warmup("cosine", steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="penalty is Sequential"):
        WeightSchedule(net(), Warmup("constant"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="factor is float: .*Warmup"):
        WeightSchedule(SpectReg(), 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the value of factor at step 0 is nan"):
        WeightSchedule(SpectReg(), lambda step: float("nan"))
