"""`fastjac.bench_model`: every way is timed on a user's model, no wrong one, in true words."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_cases import FAST, named, planted, without_second_order
from torch import Tensor, nn

import fastjac
from fastjac.bench import gate, steps
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.model import ModelBench, run
from fastjac.bench.own_model import OwnModel
from fastjac.bench.plain_dreg import PlainDreg

pytestmark = pytest.mark.filterwarnings("ignore:Other work is running")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))


class Everything(nn.Module):
    """Modules, functions, norms, dropout, a dict as output, and a part that DREG cannot see."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.second, self.drop = nn.Conv2d(4, 4, 3, groups=2), nn.Dropout(0.3)
        self.third, self.layer_norm = nn.Linear(16, 8), nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.drop(F.relu(self.norm(self.conv(x))))
        a = F.gelu(self.group(self.second(a)), approximate="tanh").flatten(1)
        a = torch.sin(self.layer_norm(self.third(a)))
        return {"logits": self.head(torch.logsumexp(a.unsqueeze(-1), -1))}


class Words(nn.Module):
    """Token indices, an embedding, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.embedding(tokens)).mean(1))


def own(kind: str) -> OwnModel:
    torch.manual_seed(0)
    y = torch.randint(3, (5,))
    if kind == "mlp":
        return OwnModel(mlp(), torch.randn(5, 6), y)
    if kind == "everything":
        return OwnModel(Everything(), torch.randn(5, 2, 4, 4), y, output="logits")
    if kind == "words":
        return OwnModel(Words(), torch.randint(11, (5, 4)), y, at="embedding")
    if kind == "gru":  # with a tuple as output, and a loss without a target
        return OwnModel(nn.GRU(6, 4, batch_first=True), torch.randn(5, 3, 6), output=0)
    assert kind == "critic"
    critic = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))
    return OwnModel(critic, torch.randn(5, 6), torch.randn(5, 1))


def measured(mine: OwnModel, *penalties: str, ways: tuple[str, ...] = ("eager",)) -> ModelBench:
    return run(mine, penalties, FAST, named(*ways, "fastjac"))


KINDS = {
    "mlp": ("spectreg", "datagrad", "frobreg", "jacreg", "dreg"),
    "everything": ("spectreg", "datagrad", "dreg"),
    "words": ("spectreg", "dreg"),
    "gru": ("spectreg",),
    "critic": ("gradient-penalty", "dreg"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_agrees_with_float64(kind: str) -> None:
    result = measured(own(kind), *KINDS[kind])
    assert not result.bad and not result.errors
    found = {(r.penalty, r.contestant) for r in result.records if r.status == "ok"}
    ways = ("plain", "eager", "fastjac")
    assert found == {(penalty, way) for penalty in KINDS[kind] for way in ways}
    for r in result.records:
        assert r.rel_err is not None and r.rel_err < 1e-5, r
    text = str(result)
    for penalty in KINDS[kind]:
        assert f"{IDIOMS[penalty].ours}: a step without the penalty takes" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_ways_agree_with_float64(kind: str) -> None:
    penalties = KINDS[kind][:1] + KINDS[kind][-1:]
    result = measured(own(kind), *penalties, ways=("plain-compiled", "compiled", "fastjac+compile"))
    assert not result.bad
    for r in result.records:
        # PyTorch does not compile the idiom in a network with an RNN.
        assert r.status == "ok" or (kind == "gru" and r.contestant == "compiled"), r
    split = {r.penalty for r in result.records if r.contestant == "compiled"}
    assert (penalties[0] in split) == (kind != "words")  # with at= it would have to split the model


@pytest.mark.parametrize("kind", ["mlp", "everything", "words"])
@pytest.mark.parametrize("attached", [True, False])
def test_plain_dreg_is_dreg(kind: str, attached: bool) -> None:
    mine = own(kind)
    problem = mine.problem("dreg").double()

    def gradients(cls: Any) -> list[Tensor]:
        model = copy.deepcopy(problem.model)
        if attached:
            penalty = cls(model, output=mine.output)
            output, value = model(problem.x), penalty()
        else:
            output, value = cls(output=mine.output)(model, problem.x)
        (problem.task_loss(output) + value).backward()
        return [value.detach(), *(p.grad for p in model.parameters())]

    with gate.InDouble():
        for ours, plain in zip(gradients(fastjac.DREG), gradients(PlainDreg), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "everything"])
def test_a_missing_second_order_term_is_not_timed(kind: str) -> None:
    def of_half_the_weight(problem: Any) -> Any:
        return steps.eager(replace(problem, weight=problem.weight / 2)).gradients()

    wrong = without_second_order if kind == "mlp" else of_half_the_weight
    result = run(own(kind), ["spectreg"], FAST, [*named("eager"), planted("fastjac", wrong)])
    (bad,) = [r for r in result.records if r.contestant == "fastjac"]
    assert bad.status == "wrong" and bad.median_ms is None and result.bad
    text = " ".join(str(result).split())
    assert "Not timed: fastjac, because the relative error of its gradients" in text


def relus() -> OwnModel:
    """A network that has units within rounding of 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 300), *[nn.ReLU(), nn.Linear(300, 300)] * 6)
    return OwnModel(model, torch.randn(300, 30))


def test_kinks_do_not_look_like_faults() -> None:
    result = measured(relus(), "spectreg", "dreg")
    assert not result.bad, str(result)


@pytest.mark.parametrize(
    ("errors", "status"), [((0.1, 0.1, 0.0), "ok"), ((0.1, 0.1, 2e-4), "wrong"), ((5e-5,), "ok")]
)
def test_one_of_three_problems_nearby_is_enough(errors: tuple[float, ...], status: str) -> None:
    left = list(errors)

    def setup(problem: Any) -> Any:
        prepared, error = steps.eager(problem), left.pop(0)
        wrong = [g * (1 + error) for g in prepared.gradients()]
        return replace(prepared, gradients=lambda: wrong)

    contestant = replace(named("fastjac")[-1], setup=setup)
    (found,) = [
        r
        for r in run(own("mlp"), ["dreg"], FAST, [*named("eager"), contestant]).records
        if r.contestant == "fastjac"
    ]
    assert found.status == status and not left
    assert found.rel_err == pytest.approx(min(errors), rel=0.05, abs=1e-6)


class ConstantSlope(torch.autograd.Function):
    """tanh(z), whose derivative is a constant for the second derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (z,) = ctx.saved_tensors
        return grad * (1 - z.detach().tanh().square())


@pytest.mark.parametrize("layer", [0, 9, 19])
def test_a_fault_in_one_layer_of_a_deep_network_is_seen(layer: int) -> None:
    # In float32 the error is 2e-3 in the last layer.
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(16, 64), nn.Tanh()]
    for _ in range(19):
        layers += [nn.Linear(64, 64), nn.Tanh()]
    mine = OwnModel(nn.Sequential(*layers, nn.Linear(64, 3)), torch.randn(32, 16))

    def setup(problem: Any) -> Any:
        model = copy.deepcopy(problem.model)
        model[2 * layer + 1].forward = ConstantSlope.apply
        return steps.eager(replace(problem, model=model))

    wrong = replace(named("fastjac")[-1], setup=setup)
    result = run(mine, ["spectreg"], FAST, [*named("eager"), wrong])
    (found,) = [r for r in result.records if r.contestant == "fastjac"]
    assert found.status == "wrong" and found.rel_err is not None and found.rel_err > 1e-3


def test_what_rounding_hides_is_not_timed() -> None:
    class Rough(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e7 - 1e7

    result = measured(
        OwnModel(nn.Sequential(Rough(6, 8), nn.Tanh(), nn.Linear(8, 3)), X + 1), "spectreg"
    )
    text = " ".join(str(result).split())
    assert "differ from those in float64 by" in text and "could not be told from rounding" in text
    assert result.bad and not [r for r in result.records if r.median_ms is not None]


def test_the_given_model_is_not_changed_and_dropout_is_said() -> None:
    torch.manual_seed(0)
    model = Everything().eval()
    before = copy.deepcopy(model.state_dict())
    mine = OwnModel(model, torch.randn(5, 2, 4, 4), torch.randint(3, (5,)), output="logits")
    result = measured(mine, "spectreg", "dreg")
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    text = " ".join(str(result).split())
    assert "It was run without them" in text
    assert "The model draws random numbers" not in str(measured(own("mlp"), "spectreg"))
    # What fastjac did with it.
    assert "autograd, which is right but slower: Logsumexp." in text
    assert "It penalises 3 of 4 layers: conv, second, third." in text
    assert "Not penalised: head (output layer" in text


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + torch.randn_like(x))


X = torch.zeros(5, 6)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((F.relu, X), TypeError, "model is function: it must be an nn.Module"),
        ((nn.ReLU(), X), ValueError, "model has no parameter that requires grad"),
        ((mlp(), [1.0]), TypeError, "x is list: it must be a torch.Tensor"),
        ((nn.GRU(6, 4), X), TypeError, "output is tuple"),
        ((Noise(), X), ValueError, "model draws random numbers in eval mode too"),
    ],
)
def test_wrong_models(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fastjac.bench_model(*arguments)


def test_wrong_penalties() -> None:
    with pytest.raises(ValueError, match="The penalty 'spectrag' does not exist. Did you mean spe"):
        fastjac.bench_model(mlp(), X, penalties=["spectrag"])
    with pytest.raises(ValueError, match=r"datagrad needs class indices \[5\] as target"):
        fastjac.bench_model(mlp(), X, penalties=["datagrad"])
    with pytest.raises(TypeError, match="x has dtype torch.int64, which cannot have a gradient"):
        fastjac.bench_model(Words(), torch.zeros(5, 4, dtype=torch.int64), penalties=["spectreg"])
    result = measured(OwnModel(nn.Linear(6, 3), X), "dreg", "gradient-penalty")
    assert result.bad and not [r for r in result.records if r.penalty == "dreg"]
    assert "fastjac cannot run dreg on this model: model has no layer to penalise" in str(result)
