"""Where torch differentiates wrongly or not at all: the right numbers, or an error that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import Straight, close, run, same, spectreg, three_layers
from conftest import cpu_only
from torch import Tensor, nn

from fastjac import InputPenalty
from fastjac.input_jacobian.chain import rules
from fastjac.input_jacobian.pullback import Pullback
from fastjac.penalties import FrobReg, TangentProp

pytestmark = pytest.mark.usefixtures("double")


def normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3))


NORMS = {
    "layer_norm": lambda: nn.LayerNorm(6),
    "batch_norm": lambda: nn.BatchNorm1d(6),
    "instance_norm": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.InstanceNorm1d(2), nn.Flatten()
    ),
}


@pytest.mark.parametrize("shape", [(2, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("form", ["chain", "auto", "autograd", "graph"])
def test_several_cotangents_through_group_norm(form: str, shape: tuple[int, int]) -> None:
    """One cotangent at a time is right in torch; the batched pass over them is not."""
    groups, channels = shape
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv1d(3, channels, 1), nn.GroupNorm(groups, channels), nn.SiLU(), nn.Flatten()),
        nn.Linear(2 * channels, 2),
    )
    x = torch.randn(2, 3, 2)
    expected = run(model, x, FrobReg(engine="autograd", chunk_size=1))
    if form != "graph":
        same(run(model, x, FrobReg(engine=form)), expected)
        return
    x.requires_grad_()
    value = FrobReg()(x, model(x))
    close(value, expected.value)
    # `run` weights the samples of a value; of the mean there is one.
    output = model(x)
    found = torch.autograd.grad(
        output.square().sum() + 0.5 * FrobReg()(x, output), list(model.parameters())
    )
    close(list(found), [expected.gradients[name] for name, _ in model.named_parameters()])


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_of_a_jvp_through_a_norm(norm: str) -> None:
    """Right in the model form (`test_chain`). By autograd the value is, and its gradient raises."""
    model, x, t = normed(NORMS[norm]()), torch.randn(5, 4), torch.randn(5, 4)
    truth = TangentProp()(model, x, t)[1]
    x.requires_grad_()
    for value, reason in (
        (TangentProp()(x, model(x), t), "use the model form"),
        (TangentProp(engine="autograd")(model, x, t)[1], "engine='autograd' is set"),
    ):
        close(value, truth)
        with pytest.raises(RuntimeError, match=f"JVP through .*{norm}.*{reason}"):
            value.backward()
    evaluated = model.eval()
    if norm == "batch_norm":  # with constants for mean and variance
        TangentProp()(x, evaluated(x), t).backward()


@pytest.mark.parametrize("norm", NORMS)
def test_third_derivative_of_a_norm(norm: str) -> None:
    model, x = normed(NORMS[norm]()), torch.randn(5, 4, requires_grad=True)
    for value in (spectreg("autograd")(model, x)[1], spectreg("auto")(x, model(x))):
        torch.autograd.grad(value, x, retain_graph=True)
        with pytest.raises(RuntimeError, match="needs the third derivative of .*norm"):
            torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.parametrize("form", ["chain", "auto", "autograd", "graph"])
def test_model_that_computes_a_gradient_through_a_norm(form: str) -> None:
    norm = nn.LayerNorm(5)

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        (g,) = torch.autograd.grad(norm(h).sin().sum(), h, create_graph=True)
        return m.c(g)

    model, x = three_layers(forward), torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="itself computes a gradient through layer_norm"):
        penalty = spectreg(form if form != "graph" else "auto")
        value = penalty(x, model(x)) if form == "graph" else penalty(model, x)[1]
        value.backward()


def test_operation_without_a_second_derivative() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    model = nn.Sequential(nn.Linear(4, 5), nn.Hardsigmoid(), nn.Linear(5, 3))
    value = spectreg("auto", n_proj=1)(x, model(x))
    with pytest.raises(RuntimeError, match="second derivative of Hardsigmoid.*use the model form"):
        value.backward()
    spectreg("auto", n_proj=1)(model, x)[1].backward()


@cpu_only
def test_attention_without_a_second_derivative() -> None:
    x = torch.randn(2, 2, 3, 4, requires_grad=True)
    attention = three_layers(
        lambda m, x: F.scaled_dot_product_attention(m.a(x), m.b(m.a(x)), m.a(x))
    )
    value = spectreg("auto", n_proj=1)(x, attention(x))
    with pytest.raises(RuntimeError, match="second derivative of Scaled.*use the model form.*MATH"):
        value.backward()
    for engine in ("auto", "chain", "autograd"):
        spectreg(engine, n_proj=1)(attention, x)[1].backward()


def test_error_inside_a_rule_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise RuntimeError("The size of tensor a (4) must match the size of tensor b (3)")

    monkeypatch.setattr(rules.Matmul, "push", failing)
    model, x = three_layers(lambda m, x: m.c(F.gelu(m.a(x)))), torch.randn(3, 4)
    value = spectreg("chain")(model, x)[1]
    with pytest.raises(
        RuntimeError, match="its rule for Addmm.*use engine='autograd'.*The size of"
    ):
        value.backward()


def test_advice_is_followed_by_success() -> None:
    """What an error of ``engine="chain"`` recommends has been tried here."""
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="calls Straight.*Use engine='autograd'"):
        spectreg("chain")(three_layers(lambda m, x: m.c(Straight.apply(m.a(x)))), x)


class OwnJvp(InputPenalty):
    """A penalty of a user, who does not know that torch is wrong."""

    def per_sample(self, pull: Pullback, *targets: Any, **named: Any) -> Tensor:
        return pull.jvp(torch.ones_like(pull.x)[None]).square().sum((0, 2))


def test_own_penalty_that_uses_a_jvp() -> None:
    model, x = normed(nn.LayerNorm(6)), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="JVP through layer_norm.*uses_jvp = True"):
        OwnJvp()(model, x)[1].backward()

    class Right(OwnJvp):
        uses_jvp = True

    same(run(model, x, Right()), run(model, x, TangentProp(), torch.ones(5, 4)))
