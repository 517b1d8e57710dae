"""`output=`: models that return a dict, a tuple or an object, in every form of a penalty."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from penalty_cases import SPECS, Call, by_engine, close, close_gradients, gradients, takes
from torch import Tensor, nn

import fastjac
from fastjac import DREG, SpectReg
from fastjac.bench.measure import launches
from fastjac.penalties import PenaltySpec

pytestmark = pytest.mark.usefixtures("double")

Pair = namedtuple("Pair", ["hidden", "logits"])


@dataclass
class Result:
    hidden: Tensor
    logits: Tensor


class ModelOutput(OrderedDict):
    """As in transformers: a mapping that has indices and attributes too."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


def pair(hidden: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return hidden, logits


def of_logits(whole: Any) -> Tensor:
    return whole["logits"]


RETURNS: dict[str, tuple[Callable[..., Any], Any]] = {
    "dict, key": (dict, "logits"),
    "dict, function": (dict, of_logits),
    "tuple, index": (pair, 1),
    "tuple with None": (lambda hidden, logits: (hidden, logits, None), 1),
    "tuple, last": (pair, -1),
    "namedtuple, name": (Pair, "logits"),
    "dataclass": (Result, "logits"),
    "namespace": (SimpleNamespace, "logits"),
    "ModelOutput, key": (ModelOutput, "logits"),
    "ModelOutput, index": (ModelOutput, 1),
}


class Net(nn.Module):
    """Returns a hidden tensor and logits in a container."""

    def __init__(self, returns: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh())
        self.above = nn.Linear(5, 3)
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        hidden = self.below(x)
        return self.returns(hidden=hidden, logits=self.above(hidden))


def parts(whole: Any) -> tuple[Tensor, Tensor]:
    """The hidden tensor and the logits in any of the containers."""
    if isinstance(whole, dict):
        return whole["hidden"], whole["logits"]
    return whole[:2] if type(whole) is tuple else (whole.hidden, whole.logits)


X = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4).sin()
W = torch.linspace(2, -1, 9, dtype=torch.float64).view(3, 3)


def eager(model: Net, x: Tensor) -> tuple[Any, Tensor]:
    whole = model(x)
    (v,) = torch.autograd.grad(parts(whole)[1], x, W, create_graph=True)
    return whole, v.square().sum() / len(x)


def loss_of(whole: Any, value: Tensor) -> Tensor:
    hidden, logits = parts(whole)
    return logits.exp().sum() + hidden.pow(3).sum() + value


@pytest.mark.parametrize("engine", ["autograd", "chain", "auto"])
@pytest.mark.parametrize("returns", RETURNS)
def test_gradients_are_those_of_the_eager_idiom(returns: str, engine: str) -> None:
    """The loss uses the named part and another one; the third call is the steady state."""
    make, output = RETURNS[returns]
    model, x = Net(make), X.clone().requires_grad_()
    inputs = [x, *model.parameters()]
    expected = gradients(loss_of(*eager(model, x)), inputs)
    penalty = SpectReg(output=output, engine=engine)
    for _ in range(4):
        whole, value = penalty(model, x, projection=W)
        assert type(whole) is type(model(x))
        close_gradients(gradients(loss_of(whole, value), inputs), expected)


@pytest.mark.slow
def test_output_of_transformers() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def make(hidden: Tensor, logits: Tensor) -> Any:
        return outputs.SequenceClassifierOutput(logits=logits, hidden_states=(hidden,))

    model, x = Net(make), X.clone().requires_grad_()
    inputs = [x, *model.parameters()]
    for output in ("logits", 0):
        plain = Net(pair)
        plain.load_state_dict(model.state_dict())
        expected = gradients(loss_of(*eager(plain, x)), [x, *plain.parameters()])
        for _ in range(3):
            whole, value = SpectReg(output=output, engine="chain")(model, x, projection=W)
            assert type(whole) is outputs.SequenceClassifierOutput
            found = loss_of((whole.hidden_states[0], whole.logits), value)
            close_gradients(gradients(found, inputs), expected)


class Scaled(Net):
    """Its hidden tensor is saved by no node of the graph."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.above(self.below(x)) + 1
        return self.returns(hidden=hidden, logits=3 * hidden)


@pytest.mark.parametrize("engine", ["autograd", "chain", "auto"])
@pytest.mark.parametrize("kind", [Net, Scaled])
def test_gradient_with_respect_to_another_part(kind: Any, engine: str) -> None:
    model, x = kind(dict), X.clone().requires_grad_()
    whole, value = eager(model, x)
    expected = gradients(loss_of(whole, value), [whole["hidden"]])
    penalty = SpectReg(output="logits", engine=engine)
    for _ in range(4):
        whole, value = penalty(model, x, projection=W)
        close_gradients(gradients(loss_of(whole, value), [whole["hidden"]]), expected)


@pytest.mark.parametrize("engine", ["autograd", "chain", "auto"])
def test_part_that_is_alone(engine: str) -> None:
    """No other tensor of the output has a graph: the chain engine then returns its own tensor."""
    model, x = Net(lambda hidden, logits: {"logits": logits, "n": 3, "x": X}), X.clone()
    inputs = [x.requires_grad_(), *model.parameters()]
    plain = model(x)["logits"]
    value = fastjac.spectreg(x, plain, projection=W)
    expected = gradients(plain.exp().sum() + value, inputs)
    penalty = SpectReg(output="logits", engine=engine)
    for _ in range(4):
        whole, value = penalty(model, x, projection=W)
        assert list(whole) == ["logits", "n", "x"]
        assert whole["n"] == 3
        assert whole["x"] is X
        close_gradients(gradients(whole["logits"].exp().sum() + value, inputs), expected)


def test_steady_state_is_the_chain_engine() -> None:
    """And it costs the launches of a model that returns the tensor itself."""
    assert "engine: chain" in SpectReg(output="logits").explain(Net(dict), X)
    model, found = Net(dict), []
    model.below = nn.Sequential(*model.below, nn.Dropout(0.0))  # not swept in C++
    for output in ("logits", None):
        penalty = SpectReg(output=output)

        def step(output: Any = output, penalty: SpectReg = penalty) -> None:
            def run(x: Tensor) -> Any:
                logits = model.above(model.below(x).sin())
                return logits if output is None else {"logits": logits}

            whole, value = penalty(run, X)
            (value + (whole if output is None else whole["logits"]).square().sum()).backward()

        for _ in range(4):
            step()
        found.append(launches(step))
    assert found[0] <= found[1]


@pytest.mark.parametrize("engine", ["autograd", "chain", "auto"])
def test_function_that_computes(engine: str) -> None:
    """What the function computes belongs to the model: here a part of the logits, times 3."""
    model, x = Net(dict), X.clone().requires_grad_()
    inputs = [x, *model.parameters()]
    whole = model(x)
    (v,) = torch.autograd.grad(3 * whole["logits"][:, :2], x, W[:, :2], create_graph=True)
    expected = gradients(loss_of(whole, v.square().sum() / len(x)), inputs)
    penalty = SpectReg(output=lambda whole: 3 * whole["logits"][:, :2], engine=engine)
    for _ in range(4):
        whole, value = penalty(model, x, projection=W[:, :2])
        close_gradients(gradients(loss_of(whole, value), inputs), expected)


@pytest.mark.parametrize("engine", ["autograd", "chain", "auto"])
def test_function_of_a_tensor(engine: str) -> None:
    """Of a Sequential too, which otherwise runs in C++ as a whole."""
    model, x = Net(dict).below[:3], X.clone().requires_grad_()
    inputs = [x, *model.parameters()]
    expected = fastjac.spectreg(x, model(x)[:, :3], projection=W)
    penalty = SpectReg(output=lambda y: y[:, :3], engine=engine)
    for _ in range(4):
        whole, value = penalty(model, x, projection=W)
        close(whole, model(x))
        close_gradients(gradients(value, inputs), gradients(expected, inputs))


def test_gradcheck() -> None:
    model = Net(dict)

    def of_x(x: Tensor) -> Any:
        whole, value = SpectReg(output="logits", engine="autograd")(model, x, projection=W)
        return whole["logits"], whole["hidden"], value

    x = X.clone().requires_grad_()
    assert torch.autograd.gradcheck(of_x, x)
    assert torch.autograd.gradgradcheck(of_x, x)


class InDict(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.model(x)
        return {"twice": 2 * y, "logits": y}


@pytest.mark.parametrize(("spec", "engine"), by_engine(SPECS))
def test_every_penalty_in_the_model_form(spec: PenaltySpec, engine: str | None) -> None:
    call = Call(spec, engine=engine)
    found, expected = [], []
    for model, option, into in (
        (call.model, None, expected),
        (InDict(call.model), "logits", found),
    ):
        penalty = call.module(output=option)
        for _ in range(3):
            if takes(spec, "generator"):
                penalty.generator.manual_seed(7)
            output, value = penalty(model, call.x, *call.targets)
        y = output if option is None else output["logits"]
        into += [value, *gradients(value + y.square().sum(), call.inputs)]
    close_gradients(found, expected)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.values[0].kind != "layer-wise"])
def test_every_penalty_in_the_graph_form(spec: PenaltySpec) -> None:
    """It takes what the model returned."""
    if not takes(spec, "x_or_output"):
        pytest.skip("no graph form")
    call = Call(spec)
    y = call.model(call.x)
    value = call.module(output="logits")(call.x, {"logits": y}, *call.targets)
    close(value, call.module()(call.x, y, *call.targets))


@pytest.mark.parametrize("graph", [False, True])
def test_call_that_is_not_due(graph: bool) -> None:
    model, x = Net(dict), X.clone().requires_grad_()
    penalty = SpectReg(output="logits", every=2)
    for due in (True, False):
        if graph:
            value = penalty(x, model(x))
        else:
            whole, value = penalty(model, x)
            assert list(whole) == ["hidden", "logits"]
        assert bool(value != 0) is due
        assert value.requires_grad


def test_function_form_and_presets() -> None:
    model = Net(dict)
    _, value = fastjac.spectreg(model, X, output="logits", projection=W)
    close(value, SpectReg()(lambda x: model(x)["logits"], X, projection=W)[1])
    critic = InDict(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)))
    epsilon = torch.tensor([0.2, 0.5, 0.9])
    whole, value = fastjac.presets.wgan_gp(output="logits")(critic, X, X.cos(), epsilon=epsilon)
    assert list(whole) == ["twice", "logits"]
    close(value, fastjac.presets.wgan_gp()(critic.model, X, X.cos(), epsilon=epsilon)[1])
    for preset in (fastjac.presets.r1, fastjac.presets.igr):
        close(preset(output="logits")(critic, X)[1], preset()(critic.model, X)[1])


# ---- layer-wise penalties


class Heads(nn.Module):
    """Two output layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.GELU())
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(x)
        return {"first": self.first(hidden), "second": self.second(hidden)}


@pytest.mark.parametrize("form", ["called", "attached", "compiled"])
def test_output_layer_is_that_of_the_named_part(form: str) -> None:
    found = {}
    for name in ("first", "second"):
        model = Heads()
        if form == "called":
            penalty = DREG(include_output=True, output=name)
            whole, value = penalty(model, X)
        else:
            penalty = DREG(model, include_output=True, output=name)
            run = torch.compile(model, backend="eager") if form == "compiled" else model
            whole, value = run(X), penalty()
        assert list(whole) == ["first", "second"]
        assert penalty.layers_found == ["body.0", name]
        found[name] = value
        (value + whole["first"].sum() + whole["second"].sum()).backward()
        weight = getattr(model, name).weight
        close(weight.grad - model.body(X).sum(0), 2 * weight)  # ‖W‖² of the output layer
    assert found["first"] != found["second"]


def test_attached_penalty_without_output_layer_takes_any_output() -> None:
    model = Heads()
    penalty = DREG(model)
    model(X)
    close(penalty(), DREG(output="first")(model, X)[1])


@pytest.mark.parametrize("form", ["called", "attached"])
def test_function_of_a_tensor_is_no_output_layer(form: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
    options = {"include_output": True, "output": lambda y: y[:, :2]}
    with pytest.raises(RuntimeError, match="include_output is True, but the output of the model"):
        if form == "called":
            DREG(**options)(model, X)
        else:
            penalty = DREG(model, **options)
            model(X)
            penalty()


# ---- errors


@pytest.mark.parametrize(
    ("output", "returns", "error", "message"),
    [
        (None, pair, TypeError, "output is tuple: .*output='logits'.*output=0"),
        ("logit", dict, ValueError, "output='logit' is not a part of the dict.*'hidden', 'logits'"),
        ("logit", Result, ValueError, "output='logit' is not.* Result .*attributes hidden, logits"),
        (2, pair, ValueError, "output=2 is not a part of the tuple .*has 2 values"),
        (1, dict, ValueError, "output=1 is not a part of the dict.*'hidden', 'logits'"),
        ("logits", lambda hidden, logits: logits, TypeError, "it returned a Tensor: leave output"),
        (len, dict, TypeError, "of the dict that the model returned is int: it must name a torch"),
    ],
)
@pytest.mark.parametrize("kind", [SpectReg, DREG])
def test_errors(kind: Any, output: Any, returns: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        kind(output=output)(Net(returns), X)


@pytest.mark.parametrize("output", [True, 1.5, ("logits",)])
def test_option_is_checked(output: Any) -> None:
    with pytest.raises(TypeError, match="output is .*: it must be a key such as 'logits', an ind"):
        SpectReg(output=output)


def test_module_as_a_function_is_no_part_of_the_penalty() -> None:
    penalty = SpectReg(output=nn.Linear(3, 2))
    assert not list(penalty.parameters())
    assert not penalty.state_dict()
