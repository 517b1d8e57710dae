"""How the layer-wise penalties find the layers of a model, and what they refuse."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import Model
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fastjac import reference
from fastjac.layerwise.layers import ACTIVATIONS, nonlinearity_of
from fastjac.penalties import DREG, AccumulatedDREG, Contractive, GuRigazio, dreg

pytestmark = pytest.mark.usefixtures("double")
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14)
PENALTIES = [DREG, AccumulatedDREG, Contractive, GuRigazio]


def found(model: nn.Module, x: Tensor, **options: Any) -> tuple[list[str], dict[str, str], Tensor]:
    penalty = DREG(reduction="none", **options)
    value = penalty(model, x)[1]
    return penalty.layers_found, dict(penalty.layers_left_out), value


def test_names_and_reasons() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        a = m.act(m.plain(x))
        a = m.act(m.norm(m.normed(a)))
        a = m.act(m.viewed(a).view(-1, 4))
        a = m.act(m.added(a) + x)
        a = m.act(m.mixed(a).flatten().view(-1, 4))
        a = F.relu(m.functional(a))
        skip = m.written(a)
        skip += x
        a = m.act(skip)
        return m.head(a)

    seen = ["plain", "normed", "viewed", "functional"]
    names = (*seen, "added", "mixed", "written", "head", "unused")
    modules = {name: nn.Linear(4, 4) for name in names}
    model = Model(forward, act=nn.Tanh(), norm=nn.LayerNorm(4), **modules)
    layers, left_out, value = found(model, torch.randn(3, 4))
    assert layers == seen
    assert set(left_out) == set(names) - set(seen)
    for name, function in {"added": "add", "mixed": "flatten", "written": "add_"}.items():
        reason = f"no activation that fastjac sees follows it, but torch.Tensor.{function}"
        assert left_out[name] == reason
    assert left_out["head"] == "output layer (include_output=False)"
    assert left_out["unused"] == "was not called as a module"
    assert value.shape == (3,)
    layers, left_out, _ = found(model, torch.randn(3, 4), include_output=True)
    assert layers == [*seen, "head"]
    assert "head" not in left_out


def test_activation_around_an_activation_counts_once() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Sigmoid()

        def forward(self, z: Tensor) -> Tensor:
            return z * self.gate(z)

        def fastjac_activation(self, z: Tensor) -> Tensor:
            return z * torch.sigmoid(z)

    model, x = nn.Sequential(nn.Linear(4, 5), Swish()), torch.randn(3, 4)
    layers, _, value = found(model, x)
    assert layers == ["0"]
    close(value, reference.dreg([(model[0](x), model[0].weight, F.silu)]))


def test_fastjac_activation_must_be_elementwise() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Softmax(1))
    model[1].fastjac_activation = lambda z: z.sum(1)
    with pytest.raises(ValueError, match="fastjac_activation of Softmax"):
        dreg(model, torch.randn(3, 4))


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_derivative_of_every_activation(kind: type[nn.Module]) -> None:
    module = kind(0.1, 0.2) if kind is nn.Threshold else kind()
    # torch cannot differentiate hardsigmoid twice, and its slope is float32's 1/6 in float64 too.
    phi = (lambda t: F.relu6(t + 3) / 6) if kind is nn.Hardsigmoid else module.forward
    z = torch.linspace(-8, 8, 97).reshape(1, 97, 1) + 0.01  # off the kinks; [N, C, 1] for PReLU
    z.requires_grad_()
    slopes = [nonlinearity_of(module).derivative(z), reference.derivative(phi, z)]
    close(*slopes)
    close(*[torch.autograd.grad(slope.sum(), z)[0] for slope in slopes])


@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU, nn.ELU, nn.Hardtanh, nn.LeakyReLU])
def test_in_place_activations(kind: type[nn.Module]) -> None:
    plain = nn.Sequential(nn.Linear(4, 5), kind(), nn.Linear(5, 5), kind(), nn.Linear(5, 2))
    written = nn.Sequential(*plain)
    written[1], written[3] = kind(inplace=True), kind(inplace=True)
    x = torch.randn(6, 4)
    for penalty in PENALTIES:
        results = []
        for model in (plain, written):
            torch.manual_seed(1)
            output, value = penalty()(model, x)
            grads = torch.autograd.grad(value + output.sum(), list(plain.parameters()))
            results.append((output, value, *grads))
        close(*results)


def test_learned_activation_gets_its_gradient() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.PReLU(5)), torch.randn(30, 4)
    (gradient,) = torch.autograd.grad(dreg(model, x, reduction="sum")[1], model[1].weight)
    negative = (model[0](x) < 0).double()
    close(gradient, 2 * model[1].weight * negative.sum(0) * model[0].weight.square().sum(1))


def test_spectral_norm_makes_one_power_iteration_a_call() -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh()))
    x = torch.randn(3, 4)
    models[0](x)
    dreg(models[1], x)
    for ours, plain in zip(models[1].buffers(), models[0].buffers(), strict=True):
        assert torch.equal(ours, plain)


def test_token_inputs_and_positions() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.GELU())
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    stack = [(model[1](model[0](tokens)), model[1].weight, F.gelu)]
    for options in ({}, {"positions": "mean"}, {"over": "elements"}, {"squared": False}):
        close(found(model, tokens, **options)[2], reference.dreg(stack, **options))


@pytest.mark.parametrize(
    "options",
    [{}, {"positions": "mean"}, {"over": "units"}, {"over": "elements"}, {"use_weight": False}],
    ids=str,
)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, (3, 2), padding=1, groups=2),
        nn.Conv1d(4, 3, 3, stride=2),
        nn.Conv3d(4, 2, 2),
    ],
    ids=["2d", "1d", "3d"],
)
def test_convolutions(conv: nn.Module, options: dict[str, Any]) -> None:
    conv = conv.double()
    model, x = nn.Sequential(conv, nn.Tanh()), torch.randn(2, 4, *[6] * len(conv.kernel_size))
    expected = reference.dreg([(conv(x), conv.weight, torch.tanh)], **options)
    close(found(model, x, **options)[2], expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution_has_its_rows_in_dimension_one(groups: int) -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, groups=groups)
    model, x = nn.Sequential(conv, nn.Tanh()), torch.randn(2, 4, 5, 5)
    per_group = conv.weight.unflatten(0, (groups, 4 // groups))
    rows = torch.cat([w.transpose(0, 1) for w in per_group])  # [C_out, C_in/groups, 3, 3]
    for options in ({}, {"over": "elements"}):
        expected = reference.dreg([(conv(x), rows, torch.tanh)], **options)
        close(found(model, x, **options)[2], expected)


def test_output_that_ends_in_an_activation_is_a_layer_like_the_rest() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh()), torch.randn(3, 4)
    close(found(model, x, include_output=True)[2], found(model, x)[2])


def test_square_root_of_a_dead_layer_has_gradient_zero() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(3, 4)
    with torch.no_grad():
        model[0].bias.fill_(-100)
    value = dreg(model, x, squared=False)[1]
    (gradient,) = torch.autograd.grad(value, model[0].weight)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_model_is_as_it_was_even_after_an_error(penalty: type[DREG]) -> None:
    def fail(m: Model, x: Tensor) -> Tensor:
        m.act(m.fc(x))
        raise KeyError("in forward")

    broken = Model(fail, fc=nn.Linear(4, 5), act=nn.Tanh())
    whole = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    penalty()(whole, torch.randn(3, 4))
    with pytest.raises(KeyError):
        penalty()(broken, torch.randn(3, 4))
    for module in (*whole.modules(), *broken.modules()):
        assert "forward" not in vars(module)


def test_value_without_gradient() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(3, 4)
    u = torch.randn(3, 4)
    for penalty in (DREG(), Contractive(), GuRigazio(), partial(AccumulatedDREG(), tangent=u)):
        value = penalty(model, x)[1]
        with torch.no_grad():
            close(penalty(model, x)[1], value)


def sequential(*modules: nn.Module) -> Model:
    return Model(lambda m, x: m.net(x), net=nn.Sequential(*modules))


def overwritten(m: Model, x: Tensor) -> Tensor:
    z = m.fc(x)
    a = m.act(z)
    z.mul_(2)
    a.mul_(2)
    return m.head(a) + z.sum()


def fc(forward: Any, **modules: nn.Module) -> Model:
    return Model(forward, fc=nn.Linear(4, 4), act=nn.Sigmoid(), head=nn.Linear(4, 2), **modules)


class HiddenWrite(nn.Module):
    """In place without the attribute that says so."""

    def forward(self, z: Tensor) -> Tensor:
        return z.tanh_()

    fastjac_activation = staticmethod(torch.tanh)


REFUSED = {
    "hidden-write": (
        lambda: sequential(nn.Linear(4, 5), HiddenWrite(), nn.Linear(5, 2)),
        "layer net.0: .* modified in place after",
    ),
    "no-layer": (lambda: sequential(nn.Linear(4, 2)), "model has no layer to penalise.*net.0"),
    "no-linear": (lambda: sequential(nn.Tanh()), "model has no layer to penalise.*none at all"),
    "folded-batch": (
        lambda: fc(lambda m, x: m.head(m.act(m.fc(x.repeat(2, 1))))[:3]),
        r"layer fc: its output has shape \(6, 4\) and x has batch size 3",
    ),
    "no-grad-inside": (
        lambda: fc(lambda m, x: m.head(m.act(torch.no_grad()(m.fc)(x)))),
        "layer fc: its pre-activation was computed with gradients off",
    ),
    "reentrant-checkpoint": (
        lambda: fc(
            lambda m, x: m.head(checkpoint(lambda t: m.act(m.fc(t)), x, use_reentrant=True))
        ),
        "layer fc: its pre-activation was computed with gradients off",
    ),
    "overwritten": (lambda: fc(overwritten), "layer fc: .* modified in place after"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("penalty", [DREG, AccumulatedDREG])
def test_refused(penalty: type[nn.Module], case: str) -> None:
    make, message = REFUSED[case]
    if (penalty, case) == (DREG, "overwritten"):  # the value was taken before: autograd refuses
        message = "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=message):
        penalty()(make(), torch.randn(3, 4).requires_grad_())[1].backward()


def test_checkpoint_without_reentry_is_exact() -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        return m.head(checkpoint(lambda t: m.act(m.fc(t)), x, use_reentrant=False))

    model = fc(forward)
    x = torch.randn(3, 4)
    plain = fc(lambda m, x: m.head(m.act(m.fc(x))))
    plain.load_state_dict(model.state_dict())
    results = []
    for m in (model, plain):
        output, value = dreg(m, x)
        results.append(torch.autograd.grad(value + output.sum(), list(m.parameters())))
    close(*results)


def test_include_output_needs_an_output_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2), nn.Flatten(0))
    with pytest.raises(RuntimeError, match="include_output is True"):
        dreg(model, torch.randn(3, 4), include_output=True)


def test_layer_weights_must_be_one_per_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(
        ValueError, match="layer_weights has 2 numbers, but the model has 1 layer.s., 0"
    ):
        dreg(model, torch.randn(3, 4), layer_weights=[1.0, 2.0])


def test_hidden_layer_cut_off_from_x() -> None:
    model = fc(lambda m, x: m.head(m.act(m.fc(x.detach()))))
    with pytest.raises(RuntimeError, match="layer fc does not depend on x"):
        AccumulatedDREG()(model, torch.randn(3, 4))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_inference_mode(penalty: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode"):
        penalty()(model, torch.randn(3, 4))


def test_a_layer_that_another_layer_follows_names_no_op() -> None:
    second = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh())
    model = Model(lambda m, x: m.second(m.first(x)), first=nn.Linear(4, 5), second=second)
    penalty = DREG(model)
    for _ in range(2):
        model(torch.randn(6, 4))
        penalty()
        reason = dict(penalty.layers_left_out)["first"]
        assert reason == "no activation that fastjac sees follows it, but another layer"
