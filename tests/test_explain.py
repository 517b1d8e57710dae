"""`fastjac.explain`: what a penalty is, how it runs on a model, and what an op runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac


def cnn() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))


X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", fastjac.penalties.PENALTIES)
def test_every_penalty_by_name_class_and_object(name: str) -> None:
    spec = fastjac.penalties.PENALTIES[name]
    text = fastjac.explain(name)
    assert text == fastjac.explain(spec.module.__name__) == fastjac.explain(spec.module)
    assert text == fastjac.explain(spec.functional) == fastjac.explain(spec.module())
    assert text.startswith(f"{spec.module.__name__}: ") and "``" not in text
    for words in ("called    penalty(", "weight=1.0", spec.source, f"reference.{name}"):
        assert words in text, text
    assert "weight=0.25" in fastjac.explain(spec.module(weight=0.25))


def test_an_input_penalty_on_a_model() -> None:
    model = cnn()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    text = fastjac.explain("SpectReg", model, X)
    assert "engine: chain\n   Convolution\n   NativeBatchNorm" in text
    named = fastjac.SpectReg(engine="autograd")
    assert "engine: autograd\n   not chain: engine='autograd' is set" in named.explain(model, X)
    assert named.explain(model, X) in fastjac.explain(named, model, X)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_layer_wise_penalty_on_a_model_and_attached() -> None:
    model = cnn()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    text = fastjac.explain("DREG", model, X)
    assert "DREG penalises 2 of 3 layers:\n   0  " in text
    assert "or attached, penalty = DREG(model) and then penalty()" in text
    assert "It does not penalise:\n   7  output layer (include_output=False)" in text
    shares = [float(line.split()[-1].rstrip("%")) for line in text.split("\n") if "%" in line]
    assert len(shares) == 2 and sum(shares) == pytest.approx(100, abs=0.2)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    # With the options of the penalty, which itself has seen nothing.
    penalty = fastjac.DREG(include_output=True)
    assert "penalises 3 of 3 layers" in penalty.explain(model, X)
    with pytest.raises(RuntimeError, match="DREG has not seen a run of a model: call it first"):
        penalty.explain()
    attached = fastjac.DREG(model)
    with pytest.raises(RuntimeError, match="has not seen a run"):
        fastjac.explain(attached)
    torch.manual_seed(0)
    output = model(X)
    value = attached()
    assert "penalises 2 of 3 layers" in fastjac.explain(attached)
    # A run for an explanation is no pass of the attached penalty.
    torch.manual_seed(0)
    output = model(X)
    assert "penalises 3 of 3 layers" in fastjac.DREG(include_output=True).explain(model, X)
    assert "penalises 2 of 3 layers" in attached.explain(model, X)
    torch.testing.assert_close(attached(), value)
    assert output.requires_grad


def test_a_penalty_of_the_user() -> None:
    class Mine(fastjac.InputPenalty):
        """The squared norm of the gradient of the sum of the outputs."""

        def per_sample(self, pull: fastjac.Pullback) -> Tensor:
            return pull.squared_norms(torch.ones_like(pull.output).unsqueeze(0))

    text = fastjac.explain(Mine, nn.Linear(3, 2), torch.ones(4, 3))
    assert text.startswith("Mine: The squared norm of the gradient") and "engine: " in text
    assert "source" not in text


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            ("SpektReg",),
            ValueError,
            "'SpektReg' is not a penalty or a fused op: did you mean 'Spec",
        ),
        ((3,), ValueError, "3 is not a penalty or a fused op: choose from AccumulatedDREG"),
        (
            ("act", 3),
            TypeError,
            "after the name of an op, 'act', explain takes a tensor or nothing",
        ),
        (("act", X, X), TypeError, "explain takes a tensor or nothing"),
        (("DREG", X), TypeError, "after a penalty, explain takes a model and a batch, without"),
        (("ConfidencePenalty", cnn(), X), TypeError, "has no engines and no layers to explain"),
    ],
)
def test_errors(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fastjac.explain(*arguments)


def test_a_value_of_zero_has_no_shares() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.layer(x) - 100)

    assert "   layer           0\n" in fastjac.DREG().explain(Dead(), torch.ones(4, 3)) + "\n"
