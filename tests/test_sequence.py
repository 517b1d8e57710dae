"""Small layers of an ``nn.Sequential`` as one node, and when they are computed one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import cpu_only
from layer_cases import check, close, mlp
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac import reference
from fastjac.activations import IDS
from fastjac.layerwise.sequence import SMALL, Run
from fastjac.ops.registration import raw
from fastjac.penalties import DREG

pytestmark = [cpu_only, pytest.mark.usefixtures("double")]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of layers that were computed at once."""
    found: list[int] = []
    call = Run.__call__

    def counted(self: Run, *args: Any) -> Any:
        found.append(len(self.pairs))
        return call(self, *args)

    monkeypatch.setattr(Run, "__call__", counted)
    yield found


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], tuple[int, ...], list[int]]] = {
    "two layers": (mlp, {"0": F.gelu, "2": F.silu}, (3, 4), [2]),
    "tokens": (mlp, {"0": F.gelu, "2": F.silu}, (3, 5, 4), [2]),
    "no bias": (
        lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2), nn.ReLU()),
        {"0": F.tanh, "2": F.relu},
        (5, 4),
        [2],
    ),
    "nested": (
        lambda: nn.Sequential(mlp(), nn.Softplus(), nn.Sequential(nn.Linear(3, 3), nn.ELU())),
        {"0.0": F.gelu, "0.2": F.silu, "0.4": F.softplus, "2.0": F.elu},
        (3, 4),
        [2, 1],
    ),
    "in place, with an option": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.3, inplace=True), nn.Linear(3, 2)),
        {"0": lambda z: F.leaky_relu(z, 0.3)},
        (5, 4),
        [1],
    ),
    "split by a dropout": (
        lambda: nn.Sequential(*mlp()[:2], nn.Dropout(0.0), nn.Linear(5, 3), nn.Tanh()),
        {"0": F.gelu, "3": F.tanh},
        (3, 4),
        [1, 1],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients(name: str, ran: list[int]) -> None:
    make, pairs, shape, lengths = MODELS[name]
    penalty = check(make(), torch.randn(shape), pairs)
    assert penalty.layers_found == list(pairs)
    assert ran == 2 * lengths


@pytest.mark.parametrize("options", [{"layers": "mean"}, {"weight": 0.3}, {"reduction": "sum"}])
def test_options(options: dict[str, Any], ran: list[int]) -> None:
    model, x = mlp(), torch.randn(3, 4)
    slow = copy.deepcopy(model)
    ours, theirs = DREG(model, **options), DREG(slow, **options)
    slow[0].register_forward_hook(lambda *args: None)
    for net, penalty in ((model, ours), (slow, theirs)):
        (net(x).sum() + penalty()).backward()
    assert ran == [2]
    for p, q in zip(model.parameters(), slow.parameters(), strict=True):
        close(p.grad, q.grad)
    for (name, v), (other, w) in zip(ours.layer_values, theirs.layer_values, strict=True):
        assert name == other
        close(v, w)


def test_both_orders_of_the_gradient(ran: list[int]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.SiLU())
    penalty = DREG(model)
    x = torch.randn(2, 3, requires_grad=True)
    inputs = (x, *model.parameters())

    def both(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return model(x), penalty()

    assert torch.autograd.gradcheck(both, inputs)
    assert torch.autograd.gradgradcheck(both, inputs)
    assert set(ran) == {2}


def test_second_derivative_with_a_tied_weight(ran: list[int]) -> None:
    """The input of the run depends on a weight of the run."""
    layer = nn.Linear(3, 3)
    model = nn.Sequential(nn.Sequential(layer, nn.Tanh()), nn.Sequential(layer, nn.Tanh()))
    penalty, x = DREG(model), torch.randn(2, 3)

    def second(value: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(value, layer.weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), layer.weight)[0]

    output = model(x)
    ours = second(output.square().sum() + penalty())
    z = layer(x)
    stack = [(z, layer.weight, F.tanh), (layer(z.tanh()), layer.weight, F.tanh)]
    truth = second(stack[1][0].tanh().square().sum() + reference.dreg(stack).mean())
    close(ours, truth)
    assert ran == [1, 1]


@pytest.mark.parametrize("part", ["loss", "penalty"])
def test_loss_or_penalty_alone_and_twice(part: str, ran: list[int]) -> None:
    model, x = mlp(), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    z = plain[0](x)
    stack = [(z, plain[0].weight, F.gelu), (plain[2](F.gelu(z)), plain[2].weight, F.silu)]
    penalty = DREG(model)
    ours, truth = model(x).sum(), plain(x).sum()
    if part == "penalty":
        ours, truth = penalty(), reference.dreg(stack).mean()
    for _ in range(2):
        ours.backward(retain_graph=True)
        truth.backward(retain_graph=True)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(p.grad, q.grad)
    assert ran == [2]


# ---- what a run would hide


def hook(model: nn.Sequential) -> None:
    model[1].register_forward_hook(lambda module, args, a: a + 1)


def pre_hook(model: nn.Sequential) -> None:
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(model: nn.Sequential) -> None:
    model[0].register_full_backward_hook(lambda module, grads, outs: (None,))


def own_forward(model: nn.Sequential) -> None:
    model[1].forward = torch.sin  # type: ignore[method-assign]


def frozen(model: nn.Sequential) -> None:
    model[0].weight.requires_grad_(False)


def pruned(model: nn.Sequential) -> None:
    prune.l1_unstructured(model[0], "weight", amount=0.5)


def spectral(model: nn.Sequential) -> None:
    parametrizations.weight_norm(model[0])


def strided(model: nn.Sequential) -> None:
    model[2].weight = nn.Parameter(torch.randn(5, 6).t())


CHANGES = (hook, pre_hook, backward_hook, own_forward, frozen, pruned, spectral, strided)


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_of_a_module_counts(change: Callable[..., None], ran: list[int]) -> None:
    """After it the layers are computed one by one, and give what a plain model gives."""
    model, x = mlp(), torch.randn(3, 4)
    plain = copy.deepcopy(model)
    penalty = DREG(model)
    (model(x).sum() + penalty()).backward()
    assert ran == [2]
    model.zero_grad()
    torch.manual_seed(1)
    change(model)
    torch.manual_seed(1)
    change(plain)
    close(model(x), plain(x))
    assert ran == [2]


def test_another_slope_counts(ran: list[int]) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.LeakyReLU(0.1)), torch.randn(5, 4)
    penalty = DREG(model)
    for slope in (0.1, 0.4, 0.4, 0.4):
        model[1].negative_slope = slope
        z = F.linear(x, model[0].weight, model[0].bias)
        close(model(x), F.leaky_relu(z, slope))
        truth = reference.dreg([(z, model[0].weight, lambda z, s=slope: F.leaky_relu(z, s))])
        close(penalty(), truth.mean())
    assert ran == [1, 1, 1]  # not in the call that meets the change


def test_modules_that_come_and_go(ran: list[int]) -> None:
    model, x = mlp(), torch.randn(3, 4)
    penalty = DREG(model)
    model.append(nn.ReLU())
    model(x)
    penalty()
    model[1] = nn.ReLU()  # is not watched, but its function is seen
    z = F.linear(x, model[0].weight, model[0].bias)
    close(model(x), F.relu(model[4](F.silu(model[2](F.relu(z))))))
    penalty()
    assert penalty.layers_found == ["0", "2", "4"]
    assert ran == [2, 1]


def test_what_torch_watches_is_computed_one_by_one(ran: list[int]) -> None:
    model, x = mlp(), torch.randn(3, 4)
    penalty = DREG(model)
    close(checkpoint(model, x, use_reentrant=False), model(x))
    penalty.clear()
    ran.clear()
    checkpoint(model, x, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    model(x)
    handle.remove()
    with torch.overrides.BaseTorchFunctionMode():
        model(x)
    with torch.no_grad():
        model(x)
    assert ran == []
    model(x)
    assert ran == [2]


def test_larger_layers_are_computed_one_by_one(ran: list[int]) -> None:
    wide = SMALL // 4 + 4
    for model in (
        nn.Sequential(nn.Linear(4, wide), nn.Tanh(), nn.Linear(wide, 2), nn.Tanh()),
        nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
    ):
        penalty = DREG(model)
        model(torch.randn(3 if len(model) > 2 else wide, 4))
        penalty()
    assert ran == []


def test_wrong_sizes_raise_the_error_of_torch() -> None:
    model = mlp()
    penalty = DREG(model)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        model(torch.randn(3, 5))
    with pytest.raises(RuntimeError, match="dimension 0 must be the samples"):
        model(torch.randn(4))
    assert penalty.attached


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("needs", [True, False])
def test_opcheck_of_one_layer(shape: tuple[int, ...], needs: bool) -> None:
    x, z, g = torch.randn(*shape, 5), torch.randn(*shape, 4), torch.randn(*shape, 4)
    weight, dim = torch.randn(4, 5), len(shape)
    end = (0.5, IDS["silu"], ())
    total = torch.randn(()) if needs else None
    torch.library.opcheck(raw("layer_act"), (z, weight, dim, *end, total))
    _, table, v = raw("layer_act")(z, weight, dim, *end, total)
    torch.library.opcheck(raw("layer_act_backward"), (z, g, v, table, dim, needs, *end))
    given = (x, weight, z, g if needs else None, v, table, needs, needs, *end)
    torch.library.opcheck(raw("linear_act_backward"), given)
    s, r = table.view(2, -1)
    _, truth = fastjac.act_stats(z, "silu", dim=dim, scale=0.5)
    close(s, truth)
    close(r, weight.square().sum(1))
    close(v, s @ r + (0 if total is None else total))
