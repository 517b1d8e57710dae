"""An attached layer-wise penalty over many steps: passes, detach, copies, memory, launches."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import DEVICE
from layer_cases import Counting, Model, close, encoder_layer, mlp, one_layer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac import reference
from fastjac.layerwise import statistics
from fastjac.observers import OBSERVERS
from fastjac.penalties import DREG, AccumulatedDREG, Contractive, GuRigazio

pytestmark = pytest.mark.usefixtures("double")


def test_what_stays_as_it_was() -> None:
    model = nn.Sequential(mlp(), nn.Linear(3, 4), encoder_layer())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    held = model[2].activation
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        before = model(x)
    penalty = DREG(model)
    assert list(penalty.parameters()) == [] and penalty.state_dict() == {}
    assert [name for name, _ in model.named_modules()] == names
    close(model(x), before)
    penalty()
    assert model.state_dict().keys() == state.keys()
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name])
    penalty.detach()
    assert model[2].activation is held
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks
    with pytest.raises(TypeError, match=r"DREG\(\) has no model"):
        penalty()


@pytest.mark.parametrize(
    ("kind", "options", "error"),
    [
        (DREG, {"over": "nonsense"}, ValueError),
        (DREG, {"layer_weights": ["a"]}, TypeError),
        (DREG, {"every": 0}, ValueError),
        (DREG, {"nonsense": 1}, TypeError),
        (Contractive, {"reduction": "nonsense"}, ValueError),
        (GuRigazio, {"layer_weights": ["a"]}, TypeError),
        (GuRigazio, {"weight": "a"}, TypeError),
    ],
)
def test_refused_option_leaves_the_model_as_it_was(
    kind: type[DREG], options: dict[str, Any], error: type[Exception]
) -> None:
    model = nn.Sequential(mlp(), nn.Linear(3, 4), encoder_layer())
    held = model[2].activation
    (option,) = options
    # The traceback keeps the penalty alive: one that is thrown away would leave the model.
    with pytest.raises(error) as refused:
        kind(model, **options)
    assert model[2].activation is held
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert option in str(refused.value)


def test_a_penalty_that_is_thrown_away_leaves_the_model() -> None:
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model)
    model(x)
    watch = weakref.ref(penalty._watch)
    del penalty
    gc.collect()
    assert watch() is None and not OBSERVERS
    assert all("forward" not in vars(module) for module in model.modules())


def test_detached_penalty_does_not_keep_the_model() -> None:
    model = mlp()
    penalty, there = DREG(model), weakref.ref(model)
    model(torch.randn(7, 4))
    penalty.detach()
    del model
    gc.collect()
    assert there() is None
    assert penalty.layers_found == []


def test_two_penalties_on_one_model() -> None:
    model, x = mlp(), torch.randn(7, 4)
    alone = []
    for kind in (DREG, GuRigazio, Contractive):
        penalty = kind(model)
        model(x)
        value = penalty()
        alone.append((value, torch.autograd.grad(value, model[0].weight)))
        penalty.detach()
    penalties = [kind(model) for kind in (DREG, GuRigazio, Contractive)]
    model(x)
    for penalty, (value, gradient) in zip(penalties, alone, strict=True):
        both = penalty()
        close(both, value)
        close(torch.autograd.grad(both, model[0].weight, retain_graph=True), gradient)
    for penalty in penalties:  # in the order of attaching, not of a stack
        penalty.detach()
    assert all("forward" not in vars(module) for module in model.modules())


def test_accumulated_attached_raises() -> None:
    with pytest.raises(TypeError, match="AccumulatedDREG"):
        AccumulatedDREG(mlp())


def test_several_forwards_are_one_batch(both_ways: str) -> None:
    model, x = mlp(), torch.randn(7, 4)
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"squared": False}):
        penalty = DREG(model, **options)
        model(x)
        whole = penalty()
        outputs = model(x[:2]), model(x[2:])
        close(penalty(), whole)
        del outputs
        penalty.detach()


def test_layer_values_of_several_passes(both_ways: str) -> None:
    model, x = mlp(), torch.randn(7, 4)
    for options in (
        *({}, {"reduction": "sum"}, {"squared": False}, {"layers": "mean"}, {"over": "units"}),
    ):
        penalty = DREG(model, **options)
        model(x)
        value = penalty().detach()
        whole = penalty.layer_values
        assert [name for name, _ in whole] == ["0", "2"]
        assert not any(share.requires_grad for _, share in whole)
        close(sum(dict(whole).values()), value)
        outputs = model(x[:2]), model(x[2:])
        penalty()
        del outputs
        close(dict(penalty.layer_values), dict(whole))
        close(sum(dict(penalty.layer_values).values()), value)
        penalty.detach()


def test_called_form_of_an_attached_penalty_is_no_pass() -> None:
    model, x, y = mlp(), torch.randn(7, 4), torch.randn(5, 4)
    for every in (1, 2):
        penalty = DREG(model, every=every)
        model(y)
        value = penalty()
        if every == 2:
            penalty(model, x)
        model(y)
        penalty(model, x)
        if every == 2:
            penalty(model, x)
        close(penalty(), value)
        with pytest.raises(RuntimeError, match="has not run"):
            penalty()
        penalty.detach()


def test_called_form_of_an_attached_penalty_with_checkpoints() -> None:
    model, x = checkpointed(), torch.randn(3, 4)
    penalty = DREG(model)
    (model(x).sum() + penalty()).backward()
    grads = []
    for call, net in ((penalty, model), (DREG(), copy.deepcopy(model))):
        net.zero_grad()
        output, value = call(net, x)
        (output.sum() + value).backward()
        grads.append([p.grad for p in net.parameters()])
    close(*grads)


def test_gradient_accumulation_and_clear() -> None:
    model, x = mlp(), torch.randn(8, 4)
    penalty = DREG(model)
    model(x)
    penalty().backward()
    whole = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(x)
    penalty.clear()
    for half in x.chunk(2):
        model(half)
        (penalty() / 2).backward()
    for p, truth in zip(model.parameters(), whole, strict=True):
        if truth is not None:
            close(p.grad, truth)


def test_every_with_several_outputs() -> None:
    net, x = mlp(), torch.randn(7, 4)
    for parts in (
        lambda y: (y.argmax(1), y),
        lambda y: {"loss": y.sum(), "logits": y},
        lambda y: y.sum(),
    ):
        model = Model(lambda m, x, parts=parts: parts(m.net(x)), net=net)
        penalty = DREG(model, every=2)
        model(x)
        penalty()
        model(x)
        value = penalty()
        assert value == 0 and value.dtype == torch.double and value.requires_grad
        model(x)
        penalty()
        penalty.reduction = "none"
        output = model(x)
        assert penalty().shape == ((1,) if isinstance(output, Tensor) else (7,))
        penalty.detach()


def test_passes_that_do_not_count() -> None:
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model)

    def refused(message: str) -> None:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            penalty()

    refused("penalty(): the model has not run since the penalty was attached or last called")
    with torch.no_grad():
        model(x)
    refused("penalty(): the model has run under torch.no_grad(), and such a pass does not count")
    refused("penalty(): the model has not run since")
    model.eval()
    model(x)
    refused("penalty(): the model has run in eval mode, and such a pass does not count: call model")
    model.train()
    with torch.inference_mode():
        model(x)
    refused("penalty(): the model has run under torch.inference_mode(), and such a pass does not")
    model(x)
    with torch.no_grad():
        model(x)
    penalty()
    refused("penalty(): the model has not run since")


@pytest.mark.filterwarnings("ignore:.*has not been called yet")
def test_passes_from_before_an_optimiser_step_are_forgotten() -> None:
    """Autograd could not go back through them: the weights have changed."""
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):  # without the penalty: a schedule that starts later
        optimiser.zero_grad()
        model(x).sum().backward()
        optimiser.step()
    assert len(penalty._watch.passes) == 1
    model(x[:3])
    value = penalty()
    close(value, DREG()(model, x[:3])[1])
    value.backward()


@pytest.mark.filterwarnings("ignore:.*has not been called yet")
def test_spent_passes_are_forgotten_though_no_weight_changed() -> None:
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model)
    for _ in range(3):
        model(x).sum().backward()
    model(x[:3])
    expected = DREG()(copy.deepcopy(model), x[:3])[1]
    close(penalty(), expected)
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(
        dict(model.named_parameters())
    )
    model(x[:3])
    close(penalty(), expected)


def test_copies_of_the_model_are_not_watched() -> None:
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        close(twin(x), model(x))
        twin(x).sum().backward()
        penalty.clear()
        twin(x)
        with pytest.raises(RuntimeError, match="model has not run since"):
            penalty()
        assert all(p.grad is None for p in model.parameters())
    model(x)
    penalty()


def test_copies_of_the_penalty_watch_their_own_model() -> None:
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model, weight=0.5)
    model(x)
    truth = penalty()
    for twin in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        twin_model = twin._watch.model
        assert twin_model is not model
        twin_model(x)
        close(twin(), truth)
        with pytest.raises(RuntimeError, match="model has not run since"):
            penalty()


def test_penalty_inside_its_model_cannot_be_copied_with_it() -> None:
    model = one_layer(nn.GELU())
    model.penalty = DREG(model)
    with pytest.raises(RuntimeError, match="DREG is a part of the model that it is attached to"):
        copy.deepcopy(model)


def test_checkpointing_frees_what_it_should(both_ways: str) -> None:
    """The penalty holds no pre-activation that a checkpoint has let go."""
    alive: list[Any] = []

    def forward(m: Model, x: Tensor) -> Tensor:
        def block(t: Tensor) -> Tensor:
            z = m.fc(t)
            alive.append(weakref.ref(z.untyped_storage()))
            return m.act(z)

        for _ in range(4):
            x = checkpoint(block, x, use_reentrant=False)
        return x

    model = Model(forward, fc=nn.Linear(4, 4), act=nn.GELU())
    penalty = DREG(model)
    for _ in range(2):
        alive.clear()
        output = model(torch.randn(3, 4))
        assert sum(r() is not None for r in alive) <= 1
        (output.sum() + penalty()).backward()
        assert sum(r() is not None for r in alive) <= 1


def checkpointed() -> Model:
    """A layer with a function of ours in a checkpoint."""
    block = lambda m, x: fastjac.gelu(m.fc(x))  # noqa: E731
    return one_layer(nn.GELU(), lambda m, x: m.head(checkpoint(block, m, x, use_reentrant=False)))


def test_backward_that_fails_in_a_checkpointed_model_leaves_nothing() -> None:
    model, x = checkpointed(), torch.randn(3, 4)
    penalty = DREG(model)

    def fail(grad: Tensor) -> Tensor:
        raise ZeroDivisionError

    def failing_step(penalty: DREG) -> None:
        hook = model.fc.weight.register_hook(fail)
        with pytest.raises(ZeroDivisionError):
            (model(x).sum() + penalty()).backward()
        hook.remove()

    model(x)
    value = penalty()
    failing_step(penalty)
    (model(x).sum() + (again := penalty())).backward()
    close(again, value)
    assert penalty.layers_found == ["fc"] and not OBSERVERS
    failing_step(penalty)
    other = checkpointed()
    attached = DREG(other)
    (other(x).sum() + attached()).backward()
    assert attached.layers_found == ["fc"]
    del penalty, attached
    gc.collect()
    assert not OBSERVERS
    checkpointed()(x).sum().backward()


def test_pass_that_fails_before_the_model_runs_leaves_nothing(monkeypatch: Any) -> None:
    model, x = mlp(), torch.randn(3, 4)
    penalty = DREG(model)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(DREG, "before_pass", lambda *args: 1 / 0)
        model(x)
    assert not OBSERVERS and penalty._watch.current is None
    assert parametrize._cache_enabled == 0
    model(x)
    penalty()


def test_accumulated_keeps_nothing_of_a_checkpoint() -> None:
    model, x = mlp(), torch.randn(3, 4)
    penalty = AccumulatedDREG()
    call = lambda x: penalty(model, x, tangent=torch.ones_like(x))[1]  # noqa: E731
    checkpoint(call, x, use_reentrant=False).backward()
    pickle.dumps(penalty)


def test_number_of_operations_does_not_grow_with_the_layers(monkeypatch: Any) -> None:
    """On a GPU an operation is a launch: all row norms are one, all additions to ∂W are one."""
    monkeypatch.setattr(statistics, "TAPPED", {DEVICE})

    def operations(depth: int, attached: bool) -> Counter[str]:
        layers = [m for _ in range(depth) for m in (nn.Linear(4, 4), nn.GELU())]
        model, x = fastjac.fuse(nn.Sequential(*layers, nn.Linear(4, 2))), torch.randn(5, 4)
        penalty = DREG(model) if attached else None
        for _ in range(2):
            model.zero_grad()
            with Counting() as counted:
                output = model(x).sum()
                (output if penalty is None else output + penalty()).backward()
        return counted.names

    # Views and allocations launch nothing; a copy by `.t()` would show as clone or copy_.
    free = {"detach", "view", "t", "transpose", "split", "alias", "empty_like", "flatten", "narrow"}
    free |= {"split_with_sizes", "unsafe_view", "slice", "as_strided", "expand", "new_empty"}

    def launches(depth: int, attached: bool) -> dict[str, int]:
        return {k: v for k, v in operations(depth, attached).items() if k not in free}

    def beyond_the_layers(depth: int) -> int:
        plain, ours = launches(depth, False), launches(depth, True)
        return sum(ours.values()) - sum(plain.values())

    ours = launches(6, True)
    assert ours["row_sqnorm"] == ours["row_sqnorm_backward"] == 1
    assert ours["act_stats"] == ours["act_stats_backward"] == 6
    # Each layer saves the sum that the bias's gradient takes in the plain step.
    assert beyond_the_layers(6) - beyond_the_layers(2) == -4


@pytest.mark.parametrize("when", ["before the first pass", "later"])
@pytest.mark.parametrize("kind", ["sequential", "module"])
def test_replaced_modules_are_said(kind: str, when: str) -> None:
    x = torch.randn(4, 3)
    layers = {"a": nn.Linear(3, 5), "act": nn.Tanh(), "b": nn.Linear(5, 6), "other": nn.Sigmoid()}
    model: Any = Model(lambda m, x: m.other(m.b(m.act(m.a(x)))), **layers)
    a, act, b, _ = layers
    if kind == "sequential":
        model, (a, act, b, _) = nn.Sequential(*layers.values()), "0123"
    penalty = DREG(model)
    if when == "later":
        model(x)
        penalty()
    setattr(model, b, nn.Linear(5, 6))
    with pytest.warns(UserWarning, match=f"were replaced after .* attached: {b}. Layers among"):
        output = model(x)

    def formula(phi: Any) -> Tensor:
        z = getattr(model, a)(x)
        slopes = [reference.derivative(phi, z).square()]
        out = torch.sigmoid(getattr(model, b)(phi(z)))
        slopes.append((out * (1 - out)).square())
        rows = [getattr(model, name).weight.square().sum(1) for name in (a, b)]
        return out, (slopes[0] @ rows[0]).mean(), (slopes[1] @ rows[1]).mean()

    out, first, second = formula(torch.tanh)
    close(output, out)
    # The first pass looks at functions, and so do those after the one that warns.
    close(penalty(), first + second if when == "before the first pass" else first)
    reason = "was replaced in the model after the penalty was attached"
    left_out = [] if when == "before the first pass" else [(b, reason)]
    assert penalty.layers_left_out == left_out
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were replaced")  # once
        for _ in range(3):
            model(x)
            close(penalty(), first + second)
            assert penalty.layers_found == [a, b] and penalty.layers_left_out == []
    setattr(model, act, nn.ReLU())
    model(x)  # whose functions are looked at
    _, first, second = formula(torch.relu)
    close(penalty(), first + second)


def test_a_penalty_that_is_never_called_is_said_once() -> None:
    x, model = torch.randn(4, 4), mlp()
    penalty = DREG(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(*terms: Any) -> None:
        optimizer.zero_grad()
        (model(x).square().mean() + sum(term() for term in terms)).backward()
        optimizer.step()

    step()
    step()
    with pytest.warns(UserWarning, match="has not been called yet, and 2 forward passes have had"):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step()
        penalty.detach()
        for every in (1, 3):  # a training that has called it once
            known = DREG(model, every=every)
            step(known)
            for _ in range(3):
                step()
            known.detach()
        cleared = DREG(model)
        cleared.clear()
        for _ in range(3):
            step()
