"""Layer-wise penalties attached to a model: what they find and leave alone, what is exact."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections import Counter
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac import reference
from fastjac.functional import OBSERVERS
from fastjac.nn import ConvAct1d, ConvAct2d, ConvAct3d, LinearAct
from fastjac.penalties import DREG, AccumulatedDREG, Contractive, GuRigazio

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def _double_and_seeded() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Model(nn.Module):
    """A network given by modules and a forward function."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3)
    )  # fmt: skip


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(
        4, 2, dim_feedforward=6, dropout=0.0, activation=F.gelu, batch_first=True
    )


def recorded(model: nn.Module, x: Tensor, pairs: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """Output and the reference's stack, seen by plain hooks: ``pairs`` names Linear → φ."""
    stack = []

    def hook(phi: Any, module: Any, args: Any, z: Tensor) -> None:
        stack.append((z.clone(), module.weight, phi))  # as it is before an in-place activation

    handles = [
        model.get_submodule(name).register_forward_hook(partial(hook, phi))
        for name, phi in pairs.items()
    ]
    output = model(x)
    for handle in handles:
        handle.remove()
    return output, stack


def check(model: nn.Module, x: Tensor, pairs: dict[str, Any], **options: Any) -> DREG:
    """Value, output and the gradients of everything against the reference, in float64.

    In the first step and in one after it, when the penalty knows the layers.
    """
    plain = copy.deepcopy(model)
    output, stack = recorded(plain, x, pairs)
    truth = reference.dreg(stack, **options).mean()
    (output.square().mean() + truth).backward()
    penalty = DREG(model, **options)
    for _ in range(2):
        model.zero_grad()
        ours = model(x)
        close(ours, output)
        value = penalty()
        close(value, truth)
        (ours.square().mean() + value).backward()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
    assert penalty.layers_found == list(pairs)
    return penalty


@pytest.fixture(params=["rows by layer", "rows at once"])
def both_ways(request: Any, monkeypatch: Any) -> str:
    """What the CPU does, and what a GPU would do."""
    monkeypatch.setattr(DREG, "_tap_on_cpu", request.param == "rows at once")
    return request.param


def nested() -> tuple[nn.Module, dict[str, Any]]:
    inner = Model(lambda m, x: m.act(m.fc(x)) + x, fc=nn.Linear(5, 5), act=nn.Mish())
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), inner, nn.Linear(5, 2))
    return model, {"0": torch.tanh, "2.fc": F.mish}


def functional() -> tuple[nn.Module, dict[str, Any]]:
    def forward(m: Model, x: Tensor) -> Tensor:
        a = fastjac.gelu(m.one(x), approximate="tanh")
        return m.head(fastjac.softplus(m.two(a), beta=2.0))

    model = Model(forward, one=nn.Linear(4, 5), two=nn.Linear(5, 5), head=nn.Linear(5, 2))
    return model, {
        "one": partial(F.gelu, approximate="tanh"),
        "two": partial(F.softplus, beta=2.0),
    }


def fused() -> tuple[nn.Module, dict[str, Any]]:
    return fastjac.fuse(mlp()), {"0": F.gelu, "2": F.silu}


def layer_acts() -> tuple[nn.Module, dict[str, Any]]:
    model = nn.Sequential(LinearAct(4, 5, "elu", alpha=0.7), LinearAct(5, 5, "sine", bias=False))
    return nn.Sequential(model, nn.Linear(5, 2)), {
        "0.0": partial(F.elu, alpha=0.7),
        "0.1": torch.sin,
    }


def convolutions() -> tuple[nn.Module, dict[str, Any]]:
    grouped = nn.Conv1d(2, 4, 3, padding=1, groups=2)
    circular = nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular")
    modules = (grouped, nn.GELU(), nn.Conv1d(4, 3, 3, stride=2), nn.SiLU(), circular, nn.Tanh())
    return nn.Sequential(*modules), {"0": F.gelu, "2": F.silu, "4": torch.tanh}


CASES = {
    "sequential": (lambda: (mlp(), {"0": F.gelu, "2": F.silu}), (7, 4)),
    "tokens": (lambda: (mlp(), {"0": F.gelu, "2": F.silu}), (3, 5, 4)),
    "nested": (nested, (7, 4)),
    "functional": (functional, (7, 4)),
    "fused": (fused, (7, 4)),
    "held-function": (lambda: (encoder_layer(), {"linear1": F.gelu}), (3, 5, 4)),
    "convolutions": (convolutions, (3, 2, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, both_ways: str) -> None:
    make, shape = CASES[case]
    model, pairs = make()
    check(model, torch.randn(shape), pairs)


@pytest.mark.parametrize(
    "options",
    [
        {"over": "units"},
        {"over": "elements", "positions": "mean"},
        {"layers": "mean"},
        {"use_weight": False},
        {"squared": False},
        {"layer_weights": (0.0, 2.0)},
    ],
    ids=str,
)
def test_options(options: dict[str, Any], both_ways: str) -> None:
    check(mlp(), torch.randn(3, 5, 4), {"0": F.gelu, "2": F.silu}, **options)


def test_layer_act_modules_are_torchs_with_their_activation() -> None:
    x = torch.randn(7, 4)
    model, _ = layer_acts()
    first, second = model[0]
    plain = nn.Sequential(nn.Linear(4, 5), nn.ELU(0.7), nn.Linear(5, 5, bias=False))
    plain[0].load_state_dict(first.state_dict())
    plain[2].load_state_dict(second.state_dict())
    close(model[0](x), torch.sin(plain(x)))
    truth = reference.dreg(
        [(plain[0](x), plain[0].weight, plain[1]), (plain(x), plain[2].weight, torch.sin)]
    ).mean()
    penalty = DREG(model)
    model(x)
    value = penalty()
    close(value, truth)
    close(
        torch.autograd.grad(value, [first.weight, first.bias, second.weight]),
        torch.autograd.grad(truth, [plain[0].weight, plain[0].bias, plain[2].weight]),
    )
    for kind, conv, n in ((ConvAct1d, nn.Conv1d, 1), (ConvAct2d, nn.Conv2d, 2)):
        ours, theirs = kind(2, 3, 3, "tanh", padding=1), conv(2, 3, 3, padding=1)
        theirs.load_state_dict(ours.state_dict())
        image = torch.randn(2, 2, *[5] * n)
        close(ours(image), theirs(image).tanh())
    assert isinstance(ConvAct3d(1, 1, 1), nn.Conv3d)


def test_shared_module_and_tied_weight_count_each_time(both_ways: str) -> None:
    tied = nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    other.weight = tied.weight
    model = Model(
        lambda m, x: m.act(m.b(m.act(m.a(m.act(m.a(x)))))), a=tied, b=other, act=nn.GELU()
    )
    x = torch.randn(5, 4)
    penalty = DREG(model)
    model(x)
    penalty()
    model(x)
    value = penalty()
    assert penalty.layers_found == ["a", "a", "b"]
    z1 = F.linear(x, tied.weight, tied.bias)
    z2 = F.linear(F.gelu(z1), tied.weight, tied.bias)
    z3 = F.linear(F.gelu(z2), tied.weight, other.bias)
    truth = reference.dreg([(z, tied.weight, F.gelu) for z in (z1, z2, z3)]).mean()
    close(value, truth)
    inputs = [tied.weight, tied.bias, other.bias]
    close(torch.autograd.grad(value, inputs), torch.autograd.grad(truth, inputs))


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


def test_several_forwards_are_one_batch(both_ways: str) -> None:
    model, x = mlp(), torch.randn(7, 4)
    for options in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"squared": False}):
        penalty = DREG(model, **options)
        model(x)
        whole = penalty()
        model(x[:2])
        model(x[2:])
        close(penalty(), whole)
        penalty.detach()


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
        close(p.grad, truth) if truth is not None else None


def test_layer_values_add_up(both_ways: str) -> None:
    model, x = mlp(), torch.randn(7, 4)
    for options in ({}, {"squared": False}, {"layers": "mean"}, {"over": "units"}):
        penalty = DREG(model, **options)
        model(x)
        value = penalty()
        names, shares = zip(*penalty.layer_values, strict=True)
        assert names == ("0", "2")
        close(sum(shares), value.detach())
        assert not any(s.requires_grad for s in shares)
        penalty.detach()


def test_every() -> None:
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model, every=3)
    values = []
    for _ in range(4):
        output = model(x)
        value = penalty()
        (output.sum() + value).backward()
        values.append(value.item())
    close(torch.tensor(values[3]), torch.tensor(values[0]))
    assert values[1] == values[2] == 0 and values[0] > 0


def test_passes_that_do_not_count() -> None:
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model)
    with pytest.raises(RuntimeError, match="model has not run since"):
        penalty()
    with torch.no_grad():
        model(x)
    model.eval()
    model(x)
    model.train()
    with torch.inference_mode():
        model(x)
    with pytest.raises(RuntimeError, match="model has not run since"):
        penalty()


@pytest.mark.parametrize("every_block", [True, False])
def test_checkpoint(every_block: bool, both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        if every_block:
            x = checkpoint(lambda t: m.act(m.one(t)), x, use_reentrant=False)
            return m.head(checkpoint(lambda t: fastjac.silu(m.two(t)), x, use_reentrant=False))
        return checkpoint(
            lambda t: m.head(fastjac.silu(m.two(m.act(m.one(t))))), x, use_reentrant=False
        )

    modules = {"one": nn.Linear(4, 5), "two": nn.Linear(5, 5), "head": nn.Linear(5, 2)}
    model = Model(forward, act=nn.GELU(), **modules)
    plain = Model(
        lambda m, x: m.head(F.silu(m.two(m.act(m.one(x))))), act=nn.GELU(), **copy.deepcopy(modules)
    )
    x = torch.randn(6, 4)
    output, stack = recorded(plain, x, {"one": F.gelu, "two": F.silu})
    (output.square().mean() + reference.dreg(stack).mean()).backward()
    penalty = DREG(model)
    for _ in range(2):
        model.zero_grad()
        output = model(x)
        (output.square().mean() + penalty()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad)


def test_two_checkpointed_forwards_in_one_step(both_ways: str) -> None:
    """The second forward must not take the first for one whose graph is gone."""
    model = Model(lambda m, x: checkpoint(m.net, x, use_reentrant=False), net=mlp())
    plain, x = copy.deepcopy(model.net), torch.randn(6, 4)
    output, stack = recorded(plain, x, {"0": F.gelu, "2": F.silu})
    (output.sum() + reference.dreg(stack).mean()).backward()
    penalty = DREG(model)
    for _ in range(2):
        model.zero_grad()
        outputs = model(x[:2]).sum() + model(x[2:]).sum()
        (outputs + penalty()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad)


def test_reentrant_checkpoint_is_refused() -> None:
    model = Model(
        lambda m, x: checkpoint(lambda t: m.act(m.fc(t)), x, use_reentrant=True),
        fc=nn.Linear(4, 4),
        act=nn.GELU(),
    )
    penalty = DREG(model)
    with pytest.raises(RuntimeError, match="layer fc: its pre-activation was computed with grad"):
        model(torch.randn(3, 4).requires_grad_())
    penalty.detach()


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


def test_a_penalty_that_is_thrown_away_leaves_the_model() -> None:
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model)
    model(x)
    watch = weakref.ref(penalty._watch)
    del penalty
    gc.collect()
    assert watch() is None and not OBSERVERS
    assert all("forward" not in vars(module) for module in model.modules())


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


def test_penalty_inside_its_model_cannot_be_copied_with_it() -> None:
    model = one_layer(nn.GELU())
    model.penalty = DREG(model)
    with pytest.raises(RuntimeError, match="DREG is a part of the model that it is attached to"):
        copy.deepcopy(model)


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


def test_second_derivative_through_an_attached_penalty(both_ways: str) -> None:
    """The gradient of the gradient: a recorded backward is made of differentiable operations."""
    model, x = mlp(), torch.randn(4, 4).requires_grad_()
    plain = copy.deepcopy(model)
    results = []
    for net in (model, plain):
        if net is model:
            penalty = DREG(net)
            net(x)
            penalty()
            loss = net(x).square().mean() + penalty()
        else:
            output, stack = recorded(net, x, {"0": F.gelu, "2": F.silu})
            loss = output.square().mean() + reference.dreg(stack).mean()
        inputs = [x, *net.parameters()]
        first = torch.autograd.grad(loss, inputs, create_graph=True)
        norm = sum(g.square().sum() for g in first)
        results.append((*first, *torch.autograd.grad(norm, inputs)))
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_parametrised_weight(both_ways: str) -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.GELU())
    x = torch.randn(6, 4)
    z = model[0](x)
    truth = reference.dreg([(z, model[0].weight, F.gelu)]).mean()
    expected = torch.autograd.grad(truth, list(model.parameters()))
    penalty = DREG(model)
    for _ in range(2):
        model(x)
        close(torch.autograd.grad(penalty(), list(model.parameters())), expected)


def test_frozen_parameters(both_ways: str) -> None:
    for frozen in ("weight", "bias"):
        model, x = mlp(), torch.randn(6, 4)
        getattr(model[0], frozen).requires_grad_(False)
        penalty = DREG(model)
        for _ in range(2):
            model(x)
            penalty().backward()
        assert getattr(model[0], frozen).grad is None
        assert model[2].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, both_ways: str) -> None:
    """Against float64: no worse than what eager torch does under the same autocast."""
    model, x = mlp().float(), torch.randn(64, 4, dtype=torch.float32)
    wide = copy.deepcopy(model).double()

    def gradients(net: nn.Module, x: Tensor, *, ours: bool, cast: bool) -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=cast):
            if ours:
                penalty = DREG(net)
                net(x)
                penalty()
                output = net(x)
                value = penalty()
            else:
                output, stack = recorded(net, x, {"0": F.gelu, "2": F.silu})
                value = reference.dreg(stack).mean()
            loss = output.float().square().mean() if cast else output.square().mean()
        return list(torch.autograd.grad(loss + value, list(net.parameters())))

    truth = gradients(wide, x.double(), ours=False, cast=False)
    eager = gradients(copy.deepcopy(model), x, ours=False, cast=True)
    mine = gradients(copy.deepcopy(model), x, ours=True, cast=True)
    for m, e, t, p in zip(mine, eager, truth, model.parameters(), strict=True):
        assert m.dtype == p.dtype
        error, eagers = ((v.double() - t).norm() / t.norm() for v in (m, e))
        assert error <= max(1.5 * eagers.item(), 4 * torch.finfo(dtype).eps), (error, eagers)


def test_penalty_alone_reaches_every_weight_and_bias(both_ways: str) -> None:
    model, x = mlp(), torch.randn(6, 4)
    penalty = DREG(model)
    for _ in range(2):
        model.zero_grad()
        model(x)
        penalty().backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    _, stack = recorded(plain, x, {"0": F.gelu, "2": F.silu})
    reference.dreg(stack).mean().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(p.grad, q.grad)


def test_number_of_operations_does_not_grow_with_the_layers(monkeypatch: Any) -> None:
    """On a GPU an operation is a launch: all row norms are one, all additions to ∂W are one."""
    monkeypatch.setattr(DREG, "_tap_on_cpu", True)

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


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


# ---- what an attached model must not get wrong


def against_plain(model: nn.Module, phi: Any, x: Tensor, before: Any = None) -> None:
    """Two steps of ``square mean + penalty`` against the same model under plain hooks."""
    penalty = DREG(model)
    for _ in range(2):
        plain = copy.deepcopy(model)
        for net in (plain, model):
            if before is not None:
                before(net)
            net.zero_grad()
        output, stack = recorded(plain, x, {"fc": phi})
        (output.square().mean() + reference.dreg(stack).mean()).backward()
        ours = model(x)
        value = penalty()
        close(ours, output)
        close(value, reference.dreg(stack).mean())
        (ours.square().mean() + value).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            close(p.grad, q.grad)


def one_layer(act: nn.Module, forward: Any = lambda m, x: m.head(m.act(m.fc(x)))) -> Model:
    return Model(forward, fc=nn.Linear(4, 5), act=act, head=nn.Linear(5, 2))


def low_rank(self: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.a), self.b)


def test_forward_patched_by_somebody_else(both_ways: str) -> None:
    model, x = one_layer(nn.GELU()), torch.randn(6, 4)
    model.fc.a = nn.Parameter(torch.randn(2, 4))
    model.fc.b = nn.Parameter(torch.randn(5, 2))
    plain = copy.deepcopy(model)
    for net in (model, plain):
        net.fc.forward = MethodType(low_rank, net.fc)
    output, stack = recorded(plain, x, {"fc": F.gelu})
    (output.square().mean() + reference.dreg(stack).mean()).backward()
    penalty = DREG(model)
    (model(x).square().mean() + penalty()).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        close(p.grad, q.grad)
    model.act.forward = lambda z: z.tanh()  # nobody knows what it is now
    with pytest.raises(RuntimeError, match="model has no layer to penalise"):
        DREG()(model, x)


@pytest.mark.parametrize("use", ["ignored", "both"])
def test_in_place_activation_still_writes_in_place(use: str, both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        z = m.fc(x)
        a = m.act(z)
        return m.head(z if use == "ignored" else a + z)

    against_plain(one_layer(nn.SiLU(inplace=True), forward), F.silu, torch.randn(6, 4))


def test_attributes_that_change_between_steps(both_ways: str) -> None:
    slopes = iter([0.1, 0.1, 0.4, 0.4])

    def anneal(net: Model) -> None:
        net.act.negative_slope = next(slopes)

    model = one_layer(nn.LeakyReLU(0.01))
    against_plain(
        model, lambda z: F.leaky_relu(z, model.act.negative_slope), torch.randn(6, 4), anneal
    )


def test_hooks_on_the_pre_activation(both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        z = m.fc(x)
        z.register_hook(lambda g: g / 2)
        return m.head(m.act(z))

    against_plain(one_layer(nn.GELU(), forward), F.gelu, torch.randn(6, 4))


def test_input_written_to_after_the_layer_is_refused(both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        x = x.clone()
        z = m.fc(x)
        x.add_(1)
        return m.head(m.act(z))

    penalty = DREG(model := one_layer(nn.GELU(), forward))
    model(torch.randn(6, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty().backward()


@pytest.mark.parametrize("how", ["set", "data", "copy"])
def test_weights_that_change_while_the_model_runs(how: str, both_ways: str) -> None:
    def forward(m: Model, x: Tensor) -> Tensor:
        if how == "data":
            m.fc.weight.data = m.fc.weight.data.clamp(-0.2, 0.2)
        elif how == "copy":
            with torch.no_grad():
                m.fc.weight.copy_(m.fc.weight.clamp(-0.2, 0.2))
        return m.head(m.act(m.fc(x)))

    model = one_layer(nn.GELU(), forward)
    if how == "set":

        def scaled(module: nn.Module, args: Any) -> None:
            module.weight = nn.Parameter(module.weight.detach() * 0.9)

        model.fc.register_forward_pre_hook(scaled)
    against_plain(model, F.gelu, torch.randn(6, 4))


def test_pruned_weight(both_ways: str) -> None:
    """Made anew by a hook in each forward, so no weight to take the norms of before."""
    model, x = one_layer(nn.GELU()), torch.randn(6, 4)
    prune.l1_unstructured(model.fc, "weight", 0.5)
    output, stack = recorded(model, x, {"fc": F.gelu})
    truth = output.square().mean() + reference.dreg(stack).mean()
    expected = torch.autograd.grad(truth, list(model.parameters()))
    penalty = DREG(model)
    for _ in range(2):
        loss = model(x).square().mean() + penalty()
        close(torch.autograd.grad(loss, list(model.parameters())), expected)


def test_layer_that_is_skipped_has_no_gradient(both_ways: str) -> None:
    model, x = one_layer(nn.GELU()), torch.randn(6, 4)
    model.other = nn.Linear(5, 5)
    model.run = lambda m, x: m.head(m.act(m.other(m.act(m.fc(x)))))
    penalty = DREG(model)
    (model(x).sum() + penalty()).backward()
    model.run = lambda m, x: m.head(m.act(m.fc(x)))
    model.zero_grad()
    (model(x).sum() + penalty()).backward()
    assert model.other.weight.grad is None and model.fc.weight.grad is not None


def test_spent_passes_are_forgotten_though_no_weight_changed() -> None:
    model, x = mlp(), torch.randn(7, 4)
    penalty = DREG(model)
    for _ in range(3):
        model(x).sum().backward()
    model(x[:3])
    expected = DREG()(mlp_like(model), x[:3])[1]
    close(penalty(), expected)
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(
        dict(model.named_parameters())
    )
    model(x[:3])
    close(penalty(), expected)


def mlp_like(model: nn.Module) -> nn.Module:
    """The same, unwatched."""
    return copy.deepcopy(model)


def test_two_threads_at_once_are_refused() -> None:
    inside, go, errors = threading.Event(), threading.Event(), []

    def forward(m: Model, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait()
        return m.head(m.act(m.fc(x)))

    model, x = one_layer(nn.GELU(), forward), torch.randn(3, 4)
    penalty = DREG(model)
    thread = threading.Thread(target=lambda: errors.append(model(x)))
    thread.start()
    inside.wait()
    with pytest.raises(RuntimeError, match="the model runs in two threads at once"):
        model(x)
    go.set()
    thread.join()
    assert len(errors) == 1
    penalty()


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


def test_one_dimensional_input_is_named() -> None:
    penalty = DREG(model := mlp())
    with pytest.raises(RuntimeError, match=r"layer 0: its output has shape \(5,\)"):
        model(torch.randn(4))
    penalty.detach()


def test_batched_cotangents_through_an_attached_model(both_ways: str) -> None:
    model, x = mlp(), torch.randn(2, 4)
    plain = copy.deepcopy(model)
    penalty = DREG(model)
    model(x)
    penalty()
    rows = [
        torch.autograd.grad(
            net(x).flatten(), list(net.parameters()), torch.eye(6), is_grads_batched=True
        )
        for net in (model, plain)
    ]
    close(*rows)
