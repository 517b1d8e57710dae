"""The weight, the samples and the passes that a layer-wise penalty takes are those of the run."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dreg_cases import EqualLinear, standardised
from layer_cases import Model, check, close, mlp, one_layer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fastjac import reference
from fastjac.nn import LinearAct
from fastjac.penalties import DREG, AccumulatedDREG

pytestmark = pytest.mark.usefixtures("double")

# ---- the weight; `test_dreg_sweep.py` has the kinds of layers


def test_weight_of_a_checkpointed_subclass(both_ways: str) -> None:
    block = lambda m, x: m.act(m.fc(x))  # noqa: E731
    model = Model(
        lambda m, x: m.head(checkpoint(block, m, x, use_reentrant=False)),
        fc=EqualLinear(4, 5),
        act=nn.GELU(),
        head=nn.Linear(5, 2),
    )
    check(model, torch.randn(6, 4), {"fc": (F.gelu, EqualLinear.used)})


def test_weight_under_functional_call() -> None:
    model, x = one_layer(nn.GELU()), torch.randn(6, 4)
    model.fc = EqualLinear(4, 5)
    params = {name: p.detach().clone() * 2 for name, p in model.named_parameters()}
    penalty = DREG(model)
    output = torch.func.functional_call(model, params, (x,))
    z, w = F.linear(x, params["fc.weight"] * 0.3, params["fc.bias"]), params["fc.weight"] * 0.3
    close(penalty(), reference.dreg([(z, w, F.gelu)]).mean())
    assert output.shape == (6, 2)


def test_layer_act_with_another_weight() -> None:
    class Scaled(LinearAct):
        def pre_activation(self, x: Tensor) -> Tensor:
            return F.linear(x, 3 * self.weight, self.bias)

    class Other(LinearAct):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    x = torch.randn(6, 4)
    model = nn.Sequential(Scaled(4, 5, "gelu"), Other(5, 3, "tanh"))
    z, w = model[0].pre_activation(x), 3 * model[0].weight
    truth = model(x)
    penalty = DREG(reduction="none")
    output, value = penalty(model, x)
    close(output, truth)
    close(value, reference.dreg([(z, w, F.gelu)]))
    assert [name for name, _ in penalty.layers_left_out] == ["1"]
    assert "weight that it computed with is not known" in penalty.layers_left_out[0][1]


def test_only_layer_with_an_unknown_weight() -> None:
    class MatMul(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T

    with pytest.raises(RuntimeError, match="no layer to penalise.*0: the weight that it computed"):
        DREG()(nn.Sequential(MatMul(4, 5), nn.GELU()), torch.randn(3, 4))


def test_a_parametrized_layer_that_runs_twice_is_computed_twice() -> None:
    """Spectral norm makes a power iteration each time, also while the model is watched."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        fc = parametrizations.spectral_norm(nn.Linear(4, 4))
        models.append(Model(lambda m, x: m.act(m.fc(m.act(m.fc(x)))), fc=fc, act=nn.Tanh()))
    x = torch.randn(3, 4)
    penalty = DREG(models[1])
    close(models[1](x), models[0](x))
    penalty()
    for ours, plain in zip(models[1].buffers(), models[0].buffers(), strict=True):
        assert torch.equal(ours, plain)


# ---- the number of samples


def folded(**modules: nn.Module) -> Model:
    def forward(m: Model, x: Tensor) -> Tensor:
        b, p, d = x.shape
        return m.head(m.act(m.fc(x.reshape(b * p, d)))).reshape(b, p, -1)

    return Model(forward, fc=nn.Linear(4, 5), act=nn.GELU(), head=nn.Linear(5, 2))


@pytest.mark.parametrize("form", ["attached", "called"])
def test_samples_folded_with_positions_are_refused(form: str) -> None:
    model, x = folded(), torch.randn(3, 2, 4)
    penalty = DREG(model) if form == "attached" else DREG()
    with pytest.raises(RuntimeError, match=r"layer fc: .* shape \(6, 5\) and x has batch size 3"):
        if form == "attached":
            model(x)
            penalty()
        else:
            penalty(model, x)


def test_samples_of_models_with_several_inputs() -> None:
    net = mlp()
    model = Model(None, net=net)
    model.forward = lambda *a, **k: net(
        next(t for t in (*a, *k.values()) if torch.is_tensor(t) and t.dim() == 2)
    )
    x, t = torch.randn(6, 4), torch.tensor(0.5)
    plain = DREG(reduction="none")(net, x)[1]
    penalty = DREG(model, reduction="none")
    for args, kwargs in (((t, x), {}), ((x, torch.ones(3, 3)), {}), ((), {"t": t, "x": x})):
        model(*args, **kwargs)
        close(penalty(), plain)


def test_samples_that_cannot_be_told() -> None:
    class Batch:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    model = Model(lambda m, batch: m.net(batch.x), net=mlp())
    penalty = DREG(model)
    model(Batch(torch.randn(6, 4)))
    with pytest.raises(RuntimeError, match="the number of samples is not known: pass a tensor"):
        penalty()


# ---- the passes


def live(nodes: list[Any]) -> int:
    gc.collect()
    return sum(node() is not None for node in nodes)


@pytest.mark.parametrize("end", ["layer", "activation", "tuple"])
@pytest.mark.parametrize("how", ["dropped", "rebound", "detached"])
def test_passes_that_nobody_differentiates_are_freed(end: str, how: str) -> None:
    storages: list[Any] = []

    def forward(m: Model, x: Tensor) -> Any:
        z = m.fc(x)
        storages.append(weakref.ref(z.untyped_storage()))
        a = m.act(z)
        return a if end == "activation" else m.head(a) if end == "layer" else (m.head(a), x.sum())

    model = one_layer(nn.Tanh(), forward)
    penalty = DREG(model)
    output = None
    for _ in range(40):
        if how == "dropped":
            model(torch.randn(3, 4))
        elif how == "rebound":
            output = model(torch.randn(3, 4))
        else:
            y = model(torch.randn(3, 4))
            output = [t.detach() for t in (y if end == "tuple" else (y,))]
            del y
    assert live(storages) <= 2 and len(penalty._watch.passes) <= 2
    x = torch.randn(3, 4)
    last = model(x)
    with pytest.warns(UserWarning, match="40 forward passes .* do not count"):
        if how == "rebound":
            del output
        value = penalty()
    slope = (1 - model.fc(x).tanh().square()).square()
    close(value, (slope @ model.fc.weight.square().sum(1)).mean())
    assert last is not None


@pytest.mark.parametrize("end", ["layer", "activation"])
def test_passes_count_as_long_as_a_loss_has_their_output(end: str) -> None:
    model = one_layer(nn.Tanh())
    if end == "activation":
        model.run = lambda m, x: m.act(m.fc(x))
    penalty, parts, loss = DREG(model), torch.randn(3, 5, 4), torch.zeros(())
    for x in parts:
        loss = loss + model(x).square().sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = penalty()
    close(value, DREG()(copy.deepcopy(model), parts.flatten(0, 1))[1])
    (loss + value).backward()


def test_a_model_that_ends_in_an_activation_returns_a_tensor_that_can_be_written_to() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.GELU()), torch.randn(3, 4)
    grads = []
    for attach in (False, True):
        if attach:
            penalty = DREG(model)
            output = model(x)
            value = penalty()
        else:
            output, value = DREG()(model, x)
            output = output.clone()
        output.mul_(2)
        loss = output.square().sum() + value
        grads.append((output, *torch.autograd.grad(loss, list(model.parameters()))))
    close(*grads)


# ---- norms under forward mode


NORMS = [nn.LayerNorm(6), nn.BatchNorm1d(5), nn.InstanceNorm1d(5, affine=True), nn.GroupNorm(1, 5)]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_accumulated_through_norms(norm: nn.Module, training: bool) -> None:
    norm = copy.deepcopy(norm).double().train(training)
    model = nn.Sequential(nn.Conv1d(4, 5, 1), norm, nn.Conv1d(5, 5, 1), nn.Tanh())
    x, u = torch.randn(3, 4, 6), torch.randn(3, 4, 6)

    def value(weight: Tensor, gamma: Tensor) -> Tensor:
        own = copy.deepcopy(model)
        for module, w in ((own[0], weight), (own[1], gamma)):
            del module.weight
            module.weight = w
        return AccumulatedDREG()(own, x, tangent=u)[1]

    inputs = [t.detach().clone().requires_grad_() for t in (model[0].weight, model[1].weight)]
    close(AccumulatedDREG()(model, x, tangent=u)[0], model(x))
    assert torch.autograd.gradcheck(value, inputs)


def test_torch_has_not_mended_the_forward_mode_of_norms() -> None:
    """If this fails, `fastjac.layerwise.tangents` is no longer needed."""
    w, u = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    tangent = lambda w: torch.func.jvp(lambda x: F.layer_norm(x, (5,)), (w,), (u,))[1]  # noqa: E731
    assert not torch.autograd.gradcheck(tangent, (w,), raise_exception=False)


def test_norms_below_torch_nn_functional_are_refused() -> None:
    model = Model(
        lambda m, x: m.act(torch.layer_norm(m.fc(x), (5,))), fc=nn.Linear(4, 5), act=nn.Tanh()
    )
    with pytest.raises(NotImplementedError, match=r"torch.layer_norm has .* call F.layer_norm"):
        AccumulatedDREG()(model, torch.randn(3, 4))


def test_standardised_weight_has_its_gradient() -> None:
    """The gradient flows back into what made the weight."""

    class Std(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, standardised(self.weight), self.bias)

    model, x = (
        nn.Sequential(Std(2, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, 2)),
        torch.randn(4, 2, 3, 3),
    )
    penalty = DREG(model)

    def value(weight: Tensor) -> Tensor:
        torch.func.functional_call(model, {"0.weight": weight}, (x,))
        return penalty()

    assert torch.autograd.gradcheck(value, (model[0].weight.detach().requires_grad_(),))
