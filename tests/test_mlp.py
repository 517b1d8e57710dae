"""The C++ sweeps of an MLP: which models use them, that they are deterministic, their memory."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac
import fastjac.input_jacobian.chain.mlp as mlp_module
from fastjac.input_jacobian.chain.mlp import LARGE, Mlp
from fastjac.ops.dispatch import why_not

if why_not("cpu", "cpu", torch.float32):
    pytest.skip(why_not("cpu", "cpu", torch.float32), allow_module_level=True)
pytestmark = pytest.mark.usefixtures("two_threads")


def net(width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(16, width), nn.GELU(), nn.Linear(width, width, bias=False)),
        *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 10)),
    )


def gradients(model: nn.Module, x: Tensor, y: Tensor, w: Tensor) -> list[Tensor]:
    output, value = fastjac.SpectReg(engine="chain")(model, x, projection=w)
    loss = F.cross_entropy(output, y) + value
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize(
    ("n", "width"), [(3, 64), (301, 64), (LARGE // 320, 320)], ids=["small", "tiles", "layers"]
)
@pytest.mark.parametrize("k", [1, 3])
def test_same_bits_twice(n: int, width: int, k: int) -> None:
    model, x, y = net(width), torch.randn(n, 16), torch.randint(10, (n,))
    w = torch.randn(k, n, 10)
    first, second = (gradients(model, x, y, w) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


PENALTIES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "one projection": (fastjac.SpectReg, (13, 10)),
    "three": (fastjac.SpectReg, (3, 13, 10)),
    "w of the output": (fastjac.DataGrad, ()),
    "l2": (lambda **options: fastjac.SpectReg(norm="l2", **options), (13, 10)),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("rows", [1, 5, 13])
def test_tiles_are_exact(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 5, 5 and 3 of 13 samples; one weight is frozen, x requires grad; twice."""
    monkeypatch.setattr(mlp_module, "rows_of_a_thread", lambda n, *sizes: rows)
    make, shape = PENALTIES[name]
    model = net().double()
    model[3].weight.requires_grad_(False)
    y = torch.randint(10, (13,))
    targets = () if shape else (y,)
    named = {"projection": torch.randn(shape, dtype=torch.float64)} if shape else {}
    x = torch.randn(13, 16, dtype=torch.float64)
    found = []
    for engine in ("chain", "autograd"):
        inner = x.clone().requires_grad_()
        leaves = [inner, *(p for p in model.parameters() if p.requires_grad)]
        output, value = make(engine=engine)(model, inner, *targets, **named)
        loss = F.cross_entropy(output, y) + value
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        found.append(first)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_threads_set_between_forward_and_backward() -> None:
    """The backward uses the size of the tiles of the forward."""
    model, x, w = net(), torch.randn(64, 16), torch.randn(64, 10)
    threads, found = torch.get_num_threads(), []
    try:
        for last in (2, 1):
            torch.set_num_threads(2)
            output, value = fastjac.SpectReg(engine="chain")(model, x, projection=w)
            torch.set_num_threads(last)
            found.append(torch.autograd.grad(output.sum() + value, list(model.parameters())))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def with_hook() -> nn.Module:
    model = net()
    model[1].register_forward_hook(lambda module, args, out: out)
    return model


class Subclass(nn.Linear):
    pass


MODELS: dict[str, tuple[Any, bool]] = {
    "plain": (net, True),
    "nested": (lambda: nn.Sequential(nn.Flatten(), nn.Sequential(net())), True),
    "fused": (lambda: fastjac.fuse(net()), True),
    "hook": (with_hook, False),
    "subclass": (lambda: nn.Sequential(Subclass(16, 4), nn.GELU(), nn.Linear(4, 2)), False),
    "dropout": (lambda: nn.Sequential(nn.Linear(16, 4), nn.Dropout(), nn.Linear(4, 2)), False),
    "ends in an activation": (lambda: net().append(nn.Tanh()), False),
    "transposed weight": (lambda: transposed(net()), False),
    "other dtype": (lambda: net().double(), False),
}


def transposed(model: nn.Sequential) -> nn.Sequential:
    model[2].weight.data = model[2].weight.data.t().contiguous().t()  # type: ignore[operator]
    return model


@pytest.mark.parametrize("name", MODELS)
def test_models_that_take_it(name: str) -> None:
    make, taken = MODELS[name]
    assert (Mlp.of(make(), torch.randn(5, 16)) is not None) is taken


CHANGES: dict[str, Any] = {
    "hook": lambda model: model[0].register_forward_hook(lambda module, args, out: out + 1),
    "patched forward": lambda model: setattr(model[2], "forward", lambda a: a[:, :64] * 2),
    "hook on the model": lambda model: model.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
    "parametrization": lambda model: nn.utils.parametrizations.weight_norm(model[2]),
    "other module": lambda model: model.__setitem__(1, nn.Tanh()),
    "other option": lambda model: setattr(model[1], "approximate", "tanh"),
    "other slope": lambda model: setattr(model[5], "negative_slope", 0.5),
    "other parameter": lambda model: setattr(model[2], "weight", nn.Parameter(torch.ones(64, 64))),
    "bias dropped": lambda model: model[0].register_parameter("bias", None),
    "other memory": lambda model: setattr(model[2].weight, "data", torch.ones(64, 64)),
    "transposed memory": lambda model: setattr(model[2].weight, "data", torch.rand(64, 64).t()),
    "other subclass": lambda model: setattr(model[2], "__class__", Doubled),
    "inner module": lambda model: model[4].__setitem__(0, nn.Linear(64, 64)),
    "frozen": lambda model: model[2].weight.requires_grad_(False),
    "thawed": lambda model: model[6].weight.requires_grad_(True),
    "appended": lambda model: model.append(nn.Tanh()),
    "cut": lambda model: model.__delitem__(6),
}


class Doubled(nn.Linear):
    def forward(self, a: Tensor) -> Tensor:
        return 2 * super().forward(a)


@pytest.mark.parametrize("name", CHANGES)
def test_model_that_changes_between_calls(name: str) -> None:
    """A change of the model after its first call is noticed."""
    model = nn.Sequential(
        *(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU()),
        *(nn.Sequential(nn.Linear(64, 64)), nn.LeakyReLU(), nn.Linear(64, 10)),
    )
    model[6].weight.requires_grad_(False)
    x = torch.randn(7, 16)
    penalty = fastjac.SpectReg()
    penalty(model, x)
    assert Mlp.of(model, x) is not None
    CHANGES[name](model)
    leaves = [p for p in model.parameters() if p.requires_grad]
    found = []
    for engine in ("auto", "autograd"):
        torch.manual_seed(0)
        output, value = fastjac.SpectReg(engine=engine)(model, x)
        grads = torch.autograd.grad(output.sum() + value, leaves, materialize_grads=True)
        found.append((output, value, *grads))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_models_are_let_go_and_may_hold_anything() -> None:
    """The recipe does not keep the model alive, and ignores other attributes."""
    model, x = fastjac.fuse(net()), torch.randn(5, 16)
    model.kept, model[1].kept, model[1].step = torch.randn(3), torch.randn(3), 0
    for step in range(2):
        output, value = fastjac.SpectReg(engine="chain")(model, x)
        (output.sum() + value).backward()
        model.kept, model[1].kept, model[1].step = torch.randn(3), torch.randn(3), step
        assert Mlp.of(model, x) is not None
    watched = weakref.ref(model), weakref.ref(model[0].weight)
    del model, output, value
    assert [w() for w in watched] == [None, None]


@pytest.mark.parametrize("flat", [True, False])
def test_penalty_holds_no_more_than_it_says(flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 matrices of N rows per layer until the backward: a, φ', φ'', δ. None afterwards."""
    if not flat:
        monkeypatch.setattr(mlp_module, "FLAT", 0)
    model, x, w = net(), torch.randn(8, 16), torch.randn(8, 10)
    output, value = fastjac.SpectReg(engine="chain")(model, x, projection=w)
    chain = value.grad_fn.next_functions[0][0]
    while not hasattr(chain, "chain"):
        chain = chain.next_functions[0][0]
    run = chain.chain.run
    # The layer in the middle has no activation, so it has z and δ.
    assert sum(t.numel() for t in run.saved) == 8 * 64 * (3 + 1 + 3)
    assert sum(t.numel() for t in run.deltas) == 8 * (64 * 3 + 10)
    assert len(run.saved) == (1 if flat else 3 * 2 + 3)
    (output.sum() + value).backward()
    assert chain.chain is None
    assert run.saved == run.deltas == run.pushes == []


def test_a_default_device_that_is_not_the_cpu() -> None:
    """C++ reads the plan of the layers, which must be on the CPU, as the model is."""
    model, x, y, w = net(8), torch.randn(5, 16), torch.arange(5), torch.ones(1, 5, 10)
    expected = gradients(model, x, y, w)
    with torch.device("meta"):
        found = gradients(copy.deepcopy(model), x, y, w)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
