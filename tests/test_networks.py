"""Networks: which runs C++ sweeps through (`chain.network`), against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import run, same, spectreg, three_layers
from conftest import cpu_only
from layer_cases import Model
from torch import Tensor, nn

from fastjac.input_jacobian.chain import network, program, sweeps

pytestmark = pytest.mark.usefixtures("double")


def skip(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    return m.c(F.softplus(m.b(h)) + 0.5 * h)


def joined(m: Any, x: Tensor) -> Tensor:
    return m.d(torch.cat([F.leaky_relu(m.a(x)), x], dim=1)).squeeze(-1)


def normed(m: Any, h: Tensor) -> Tensor:
    return h + m.n(F.gelu(h))


NETWORKS: dict[str, Callable[[Any, Tensor], Any]] = {
    "two activations": lambda m, x: m.c(F.silu(m.b(torch.sigmoid(m.a(x))))),
    "skip": skip,
    "joined": joined,
    "one weight twice": lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.b(F.relu(m.a(x))))))),
    "no bias": lambda m, x: F.linear(F.gelu(F.linear(x, m.a.weight)), m.c.weight),
    "image": lambda m, x: m.c(F.gelu(m.a(x.view(6, 2, 2).flatten(1)))),
    "ends in an activation": lambda m, x: torch.tanh(m.a(x)),
    "norms": lambda m, x: m.c(normed(m, torch.tanh(m.b(normed(m, m.a(x)))))),
    "norm of the input": lambda m, x: m.c(F.layer_norm(m.a(F.layer_norm(x, (4,))), (5,), m.a.bias)),
}


@cpu_only
@pytest.mark.parametrize("options", [{}, {"n_proj": 3}, {"n_proj": 3, "chunk_size": 2}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_in_any_module(name: str, frozen: bool, options: dict[str, Any]) -> None:
    parts = {"a": nn.Linear(4, 5), "b": nn.Linear(5, 5), "c": nn.Linear(5, 3), "d": nn.Linear(9, 1)}
    model = Model(NETWORKS[name], **parts, n=nn.LayerNorm(5))
    nn.init.normal_(model.n.weight)
    model.n.weight.requires_grad_(not frozen)
    model.a.weight.requires_grad_(not frozen)
    model.c.bias.requires_grad_(not frozen)
    x = torch.randn(6, 4, requires_grad=True)
    expected = run(model, x, spectreg("autograd", **options))
    for _ in range(3):
        same(run(model, x, spectreg("auto", **options)), expected)
    assert next(iter(program._programs.values())).network is not None


@cpu_only
def test_threads_and_flat_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of further threads are limited; tensors of norms count, too."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    rows = sweeps.rows_of_a_thread
    assert rows(6400, 10**4, 1) == 100
    assert rows(6400, 3 << 20, 1) == 6400
    assert rows(6400, 3 << 20, 9 << 20) == 1600
    model, x = three_layers(lambda m, x: m.c(m.n(m.a(x))), n=nn.LayerNorm(5)), torch.randn(6, 4)
    for limit, flat in ((30, True), (29, False)):
        monkeypatch.setattr(network, "FLAT", limit)
        program.forget()
        for _ in range(2):
            spectreg("auto")(model, x)
        (found,) = [p.network for p in program._programs.values()]
        assert found.flat is flat


def test_norms_over_all_dimensions() -> None:
    """γ has the shape of the input, whose gradient is not summed over any dimension."""
    x, weight = torch.randn(3, 4), nn.Parameter(torch.randn(3, 5))
    model = three_layers(lambda m, x: m.c(F.layer_norm(m.a(x).tanh() * m.w, (3, 5), m.w)))
    model.w = weight
    for engine in ("chain", "auto", "auto", "auto"):
        same(run(model, x, spectreg(engine)), run(model, x, spectreg("autograd")))


@cpu_only
def test_what_is_no_network() -> None:
    for forward in (
        lambda m, x: F.gelu(m.n(x)),  # without a Linear layer
        lambda m, x: m.c(m.a(x).cos()),
        lambda m, x: m.c(m.a(x) @ m.a(x).t() @ m.a(x)),
    ):
        model, x = three_layers(forward, n=nn.LayerNorm(4)), torch.randn(3, 4)
        for _ in range(2):
            spectreg("auto")(model, x)
        assert [p.network for p in program._programs.values()] == [None]
        program.forget()
    wide = three_layers(lambda m, x: m.c(F.gelu(m.a(x))))
    assert network.TILED < 10**5
    wide.a, wide.c = nn.Linear(4, 60000), nn.Linear(60000, 3)
    for _ in range(2):
        spectreg("auto")(wide, torch.randn(2, 4))
    assert [p.network for p in program._programs.values()] == [None]
