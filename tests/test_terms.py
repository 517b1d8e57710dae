"""`PenaltyTerm` in a loop by hand: what the integrations rest on, without their libraries."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integration_cases import net, no_hooks
from penalty_cases import close, close_gradients, gradients
from torch import Tensor, nn

import fastjac
from fastjac import DREG, DataGrad, FrobReg, SpectReg, Warmup
from fastjac.integrations import PenaltyTerm, _timing
from fastjac.integrations._terms import Terms

pytestmark = pytest.mark.usefixtures("double")


class Tokens(nn.Module):
    """Integer inputs, keyword arguments, an output with logits in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(7, 4)
        self.act = nn.Tanh()
        self.top = nn.Linear(8, 3)

    def above(self, embedded: Tensor) -> Tensor:
        return self.top(self.act(embedded).flatten(1))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Any:
        return SimpleNamespace(logits=self.above(self.embed(tokens)))


TOKENS = torch.tensor([[1, 2], [3, 4], [5, 6]])
X = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)
Y = torch.tensor([0, 2, 1])


def run(
    term: PenaltyTerm, model: nn.Module, *args: Any, batch: Any = None, **kwargs: Any
) -> Tensor:
    with term.watch(model):
        model(*args, **kwargs)
    return term.value(batch)


def test_input_of_a_module() -> None:
    model = nn.ModuleDict({"net": net()})
    expected = fastjac.datagrad(model["net"], X, Y, weight=0.3)[1]
    inputs = list(model.parameters())
    term = PenaltyTerm(DataGrad(weight=0.3), module="net", targets=lambda batch: batch[1])
    for _ in range(2):
        with term.watch(model):
            with torch.no_grad():
                model["net"](X + 1)  # of a teacher: not the run that counts
            output = model["net"](X)
        value = term.value((X, Y))
        close(value, expected)
        close(output, model["net"](X))
        close_gradients(gradients(value, inputs), gradients(expected, inputs))
        assert no_hooks(model)
    whole = PenaltyTerm(FrobReg())  # the root itself, called by keyword
    close(run(whole, net(), input=X), fastjac.frobreg(net(), X)[1])


def test_attention_of_the_step() -> None:
    """By autograd, which needs the attention that is differentiable twice."""
    model = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    w, x = torch.randn(1, 2, 12), torch.randn(2, 3, 4)

    class Given(SpectReg):
        def per_sample(self, pull: Any, *targets: Any, **named: Any) -> Tensor:
            return super().per_sample(pull, projection=w)

    inputs = list(model.parameters())
    expected = SpectReg(engine="chain")(model, x, projection=w)[1]
    value = run(PenaltyTerm(Given()), model, x)
    close(value, expected)
    close_gradients(gradients(value, inputs), gradients(expected, inputs))


def test_x_that_requires_grad_stays_itself() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    value = run(PenaltyTerm(FrobReg()), net(), scale * X)
    assert torch.autograd.grad(value, scale)[0] != 0


@pytest.mark.parametrize("frozen", [False, True])
def test_at_an_embedding(frozen: bool) -> None:
    model = Tokens()
    model.embed.requires_grad_(not frozen)
    inputs = [p for p in model.parameters() if p.requires_grad]
    hidden = model.embed(TOKENS)
    hidden = hidden.detach().requires_grad_() if frozen else hidden
    expected = fastjac.frobreg(hidden, model.above(hidden))
    for term in (
        PenaltyTerm(FrobReg(output="logits"), at="embed"),
        PenaltyTerm(FrobReg(output=lambda out: out.logits), at="embed"),
    ):
        value = run(term, model, TOKENS, mask=torch.ones(3, 2))
        close(value, expected)
        close_gradients(gradients(value, inputs), gradients(expected, inputs))
    assert no_hooks(model)


def test_several_terms_and_the_schedule() -> None:
    model = net()
    terms = Terms(
        [
            DREG(model, weight=2.0),
            PenaltyTerm(FrobReg(weight=3.0), name="frob", schedule=Warmup(steps=4)),
            PenaltyTerm(DataGrad(), targets=lambda y: (y,)),
        ],
        measure_every=0,
    )
    for step in (0, 1, 9):
        terms.set_step(step)
        with terms.watch(model):
            loss = model(X).sum()
        values = terms.values(Y, loss)
        close(values["DREG"], fastjac.dreg(net(), X, weight=2.0)[1])
        close(values["frob"], 3 * min(step / 4, 1) * fastjac.frobreg(net(), X)[1])
        close(values["DataGrad"], fastjac.datagrad(net(), X, Y)[1])
        sum(values.values(), loss).backward()


def test_state_of_terms() -> None:
    model = net()
    terms = Terms([PenaltyTerm(FrobReg(every=3)), PenaltyTerm(SpectReg(every=2))], 0)
    with terms.watch(model):
        terms.values(None, model(X).sum())
    state = terms.state_dict()
    assert state == {"FrobReg": {"calls": torch.tensor(1)}, "SpectReg": {"calls": torch.tensor(1)}}
    resumed = Terms([PenaltyTerm(FrobReg(every=3)), PenaltyTerm(DataGrad(every=2))], 0)
    resumed.load_state_dict(state)  # one of them is new
    assert [t.penalty._calls for t in resumed.terms] == [1, 0]
    resumed.load_state_dict({})  # nothing is known: also what has counted starts anew
    assert [t.penalty._calls for t in resumed.terms] == [0, 0]


def test_no_step_leaves_its_graph_behind() -> None:
    model = net()
    layer_wise, by_input = DREG(model), PenaltyTerm(FrobReg())
    other = PenaltyTerm(FrobReg(), name="other")
    terms = Terms([layer_wise, by_input, other], 0)

    def empty() -> bool:
        assert layer_wise._watch is not None
        return not (layer_wise._watch.passes or other._inputs or other._outputs)

    with terms.watch(model):
        model(X)
    assert not empty()
    terms.clear()  # a skipped step
    assert empty()
    with pytest.raises(ArithmeticError), terms.watch(model):
        model(X)
        raise ArithmeticError
    assert empty() and no_hooks(model)
    with terms.watch(model):
        output = model(X)
    by_input._outputs.clear()  # so that this one raises, and the next is not reached
    with pytest.raises(RuntimeError, match="ran 0 times"):
        terms.values(None, output.sum())
    assert empty()


def test_time_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by one second at each reading."""
    clock = iter(range(1000))
    monkeypatch.setattr(_timing, "perf_counter", lambda: float(next(clock)))
    model = net()
    terms = Terms([PenaltyTerm(SpectReg(every=2))], measure_every=3)
    shares = []
    for _ in range(6):
        terms.timer.begin(None)
        with terms.watch(model):
            loss = model(X).square().sum()
        values = terms.values(None, loss)
        sum(values.values(), loss).backward()
        shares.append(terms.timer.end())
    # Steps 2 and 3, then 5 and 6 are timed: of every=2 one computes and one does not.
    assert [set(s) for s in shares] == [set(), set(), {"SpectReg"}] * 2
    # Each reading is a second, so an interval with n readings inside takes n + 1. In a call there
    # are none, nor in a node: the share is (2 calls + own nodes) over all intervals.
    for share in (shares[2]["SpectReg"], shares[5]["SpectReg"]):
        assert 0 < share < 0.6


def test_time_of_the_double_backward_is_the_penaltys() -> None:
    """Its own nodes, and none that the loss has too."""
    model, x = net(), X.clone().requires_grad_()
    loss = model(x).square().sum()
    timer = _timing.StepTimer(1, 1)
    timer.begin(None)
    value = fastjac.frobreg(x, model(x))  # a run of its own: no node is shared but the weights'
    timer.backward("other", value, loss)
    (loss + value).backward()
    both = timer.end()["other"]
    timer.begin(None)
    loss = model(x).square().sum()
    timer.backward("same", loss * 1, loss)
    loss.backward()
    assert timer.end().get("same", 0.0) == 0.0 < both < 1.0


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_without_the_library(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"fastjac.integrations.{library}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install fastjac\[{library}\]"):
        importlib.import_module(f"fastjac.integrations.{library}")


def test_what_is_refused() -> None:
    model = net()
    with pytest.raises(TypeError, match="penalty is Sequential"):
        PenaltyTerm(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction='none'"):
        PenaltyTerm(FrobReg(reduction="none"))
    with pytest.raises(ValueError, match=r"is not attached to a model: pass DREG\(model\)"):
        PenaltyTerm(DREG())
    with pytest.raises(ValueError, match="module, at and targets are for"):
        PenaltyTerm(DREG(model), module="0")
    for penalty in (fastjac.FiniteDifferenceDataGrad(), fastjac.presets.wgan_gp()):
        with pytest.raises(TypeError, match="runs the model itself: call it in the training step"):
            PenaltyTerm(penalty)
    with pytest.raises(ValueError, match="penalty has at='0': pass at to PenaltyTerm"):
        PenaltyTerm(FrobReg(at="0"))
    with pytest.raises(ValueError, match="measure_every is -1: it must be at least 0"):
        Terms([PenaltyTerm(FrobReg())], -1)
    with pytest.raises(ValueError, match="penalties is empty"):
        Terms([], 0)
    with pytest.raises(ValueError, match="they must differ"):
        Terms([PenaltyTerm(FrobReg()), PenaltyTerm(FrobReg())], 0)


def test_runs_that_are_refused() -> None:
    model = nn.ModuleDict({"net": net(), "idle": net()})
    twice, idle = PenaltyTerm(FrobReg(), module="net"), PenaltyTerm(FrobReg(), module="idle")
    with twice.watch(model), idle.watch(model):
        model["net"](X), model["net"](X)
    with pytest.raises(RuntimeError, match="module='net' ran 2 times"):
        twice.value(None)
    with pytest.raises(RuntimeError, match="module='idle' ran 0 times"):
        idle.value(None)
    with pytest.raises(RuntimeError, match="called with 0 floating-point tensors: .*at="):
        run(PenaltyTerm(FrobReg()), Tokens(), TOKENS)
    with pytest.raises(ValueError, match="at='emb' is not the name of a submodule"):
        run(PenaltyTerm(FrobReg(), at="emb"), Tokens(), TOKENS)
    with pytest.raises(
        ValueError, match="module='nett' is not the name of a submodule of ModuleDict"
    ):
        run(PenaltyTerm(FrobReg(), module="nett"), model)
    with pytest.raises(TypeError, match="compiled, and torch cannot differentiate"):
        run(PenaltyTerm(FrobReg()), torch.compile(net()), X)
    with pytest.raises(TypeError, match="output is tuple: .*output=0"):
        run(PenaltyTerm(FrobReg()), Pair(), X)
    assert no_hooks(model)


def test_output_that_the_step_changes_in_place_is_refused() -> None:
    model = nn.ModuleDict({"net": net()})
    for pick in (None, lambda out: out[:, :2]):
        term = PenaltyTerm(FrobReg(output=pick), module="net")
        with term.watch(model):
            output = model["net"](X)
            output *= 10
        with pytest.raises(RuntimeError, match="output of module='net' was changed in place"):
            term.value(None)


def test_what_the_step_replaces_in_a_dict_is_not_penalised() -> None:
    class Dict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(x)}

    model, term = Dict(), PenaltyTerm(FrobReg(output="logits"))
    with term.watch(model):
        output = model(X)
        output["logits"] = 10 * output["logits"]
    close(term.value(None), fastjac.frobreg(model.net, X)[1])


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x
