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
from fastjac.bench import gate, steps, verdict
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.model import ModelBench, run
from fastjac.bench.own_model import OwnModel
from fastjac.bench.plain_dreg import PlainDreg
from fastjac.bench.records import Record


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
    assert ("spectreg" in split) == (kind != "words")  # with at= it would have to split the model


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


def test_kinks_do_not_look_like_faults() -> None:
    # A ReLU network of this size has units within rounding of 0.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 300), *[nn.ReLU(), nn.Linear(300, 300)] * 6)
    result = measured(OwnModel(model, torch.randn(300, 30)), "spectreg", "dreg")
    assert not result.bad, str(result)


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
        ((torch.compile(mlp()), X), TypeError, "model is compiled: pass the module before"),
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


# ---- the words


def record(way: str, ms: float, **values: Any) -> Record:
    return Record(
        *("case", values.pop("penalty", "spectreg"), "step", "own", "", "", way, "ok"),
        *("cpu", "float32", 2),
        **{"median_ms": ms, "overhead": ms, "ratio": ms, "ratio_se": 0.001, "peak_mb": 10 * ms},
        **values,
    )


def said(*records: Record) -> str:
    return verdict.of_case(records) + " " + " ".join(verdict.advice(records))


BASE = (record("plain", 1.0), record("eager", 3.0), record("compiled", 2.0, compile_s=9.0))


def test_fastjac_compiled_is_the_fastest() -> None:
    text = said(*BASE, record("fastjac", 1.5), record("fastjac+compile", 1.0, compile_s=5.0))
    assert "With it, fastjac inside fastjac.compile is the fastest: 1.00 ms, 1.00 times" in text
    assert "Without compiling, the fastest is fastjac: 1.50 ms, 1.50 times the plain step." in text
    assert "needs 15.0 MB at its peak (10.0 MB compiled), and one of the PyTorch idiom 30.0" in text
    assert "fastjac.compile took 5.00 s; that pays after about 10,000 steps." in text
    assert "Write this, 3.00 times as fast as the PyTorch idiom:" in text
    assert "@fastjac.compile" in text


def test_equal_times_are_called_equal_and_need_no_compiling() -> None:
    text = said(*BASE, record("fastjac", 1.01), record("fastjac+compile", 1.0, compile_s=5.0))
    assert "fastjac inside fastjac.compile and fastjac are equally fast: 1.00 ms" in text
    assert "saves no time here" in text and "@fastjac.compile" not in text


def test_pytorch_is_the_fastest() -> None:
    text = said(*BASE, record("fastjac", 2.5))
    assert "With it, the PyTorch idiom under torch.compile is the fastest: 2.00 ms" in text
    keep = "For speed, keep the PyTorch idiom under torch.compile: it is 1.25 times as fast as"
    assert f"{keep} fastjac here." in text and "penalty =" not in text


def test_what_was_not_timed_is_said_once() -> None:
    bad = [record("fastjac", 1.0), record("compiled", 1.0)]
    for r in bad:
        r.status, r.message, r.median_ms = "failed", "no memory", None
    text = said(*BASE[:2], *bad)
    both = "fastjac and the PyTorch idiom under torch.compile"
    assert f"Not timed: {both}, because no memory." in text
    assert "nothing to replace" in text


@pytest.mark.parametrize("penalty", IDIOMS)
@pytest.mark.parametrize("way", ["eager", pytest.param("compile", marks=pytest.mark.slow)])
def test_the_advised_code_runs(penalty: str, way: str) -> None:
    outputs = 1 if penalty == "gradient-penalty" else 3
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, outputs))
    y = torch.randint(outputs, (5,))
    criterion = F.cross_entropy
    code = verdict.code(penalty, way == "compile").replace("...", "0.1")
    if way == "compile":
        code += "\nstep(x, y)"
    names = {"fastjac": fastjac, "model": model, "x": X, "y": y, "criterion": criterion}
    exec(code, names)
    assert all(p.grad is not None for p in model.parameters())


def test_the_advised_code_names_output_and_at() -> None:
    code = verdict.code("spectreg", False, "logits", "embedding")
    assert "SpectReg(weight=..., at='embedding', output='logits')" in code
    assert "criterion(output['logits'], y)" in code


def test_machine() -> None:
    records = [
        *(*BASE, record("fastjac", 1.5)),
        *(record("plain", 1.0, penalty="dreg"), record("eager", 1.2, penalty="dreg")),
        record("fastjac", 1.3, penalty="dreg"),
    ]
    for r in records[5:] + records[4:5]:
        r.case = "other"
    text = verdict.of_machine(records)
    assert "in 1 of 2 training steps" in text and "takes 0.92 to 2.00 times as long" in text
