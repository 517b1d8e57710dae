"""Each cell of the matrix ways of running × things is exact, or raises what the table says."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any

import matrix_transforms
import pytest
import torch
from matrix_table import EXPECTED, INDUCTOR, page, state_of
from matrix_things import THINGS, Thing
from matrix_transforms import WAYS, Way
from torch.func import functional_call

from fastjac.activations import SLOPES
from fastjac.input_jacobian import by_autograd
from fastjac.input_jacobian.chain import activations
from fastjac.layerwise import layer_act, sequence
from fastjac.ops.registration import raw

pytestmark = pytest.mark.usefixtures("empty_graphs")
PAGE = Path(__file__).resolve().parent.parent / "docs/MATRIX.md"
WAY = {way.key: way for way in WAYS}
THING = {thing.name: thing for thing in THINGS}

# A cell that compiles takes seconds. The fast suite runs these; the slow one runs all others.
FAST_COMPILED = {
    ("step", "fused + func.vjp"),
    ("fastjac_step", "fused + autograd.grad"),
    *((way, "DREG attached") for way in ("compiled_model", "three_steps")),
    *((way, "SpectReg graph") for way in ("compiled_model", "step")),
    *((way, "SpectReg auto") for way in ("step", "whole_step")),
}


def cells() -> Iterator[Any]:
    for way in WAYS:
        for thing in THINGS:
            marks = [pytest.mark.gpu] if way.gpu else []
            if way.group == "torch.compile" and (way.key, thing.name) not in FAST_COMPILED:
                marks.append(pytest.mark.slow)
            yield pytest.param(way, thing, marks=marks, id=f"{way.key}-{thing.name}")


def check(way: Way, thing: Thing) -> None:
    torch._dynamo.reset()
    state = state_of(way, thing)
    if state is None:
        way.check(thing)
        return
    with pytest.raises(Exception, match=re.escape(state.message)) as raised:
        way.check(thing)
    assert not isinstance(raised.value, AssertionError)


@pytest.mark.parametrize(("way", "thing"), list(cells()))
def test_cell(way: Way, thing: Thing) -> None:
    check(way, thing)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "thing"), INDUCTOR)
def test_by_inductor(way: str, thing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_transforms, "BACKEND", "inductor")
    assert state_of(WAY[way], THING[thing]) is None
    check(WAY[way], THING[thing])


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python tests/matrix_table.py docs/MATRIX.md"


def test_table_speaks_of_cells_that_exist() -> None:
    for key, states in EXPECTED.items():
        assert key in WAY
        for pattern in states:
            assert any(fnmatchcase(name, pattern) for name in THING), (key, pattern)


# ---- planted faults, which the cells must see


def without_curvature(monkeypatch: pytest.MonkeyPatch, thing: Thing) -> Thing:
    """Drops φ'' in the double backward of fused activations, of DREG and of the chain engine."""
    fused = importlib.import_module("fastjac.ops.act")._Act

    def backward(ctx: Any, v: Any) -> Any:
        grad_z, *others = original(ctx, v)
        order, fn, *_ = ctx.constants
        curved = not ctx.of_output and (order > 0 or fn in SLOPES.values())
        return torch.zeros_like(grad_z) if curved else grad_z, *others

    def planted(name: str) -> Any:
        op = raw(name)
        if "act_stats_backward" in name:
            return lambda z, g, n, q, *rest: op(z, g, n, torch.zeros_like(q), *rest)
        return without_table(name, op, half=1)

    original = fused.backward
    monkeypatch.setattr(fused, "backward", staticmethod(backward))
    monkeypatch.setattr(layer_act, "raw", planted)
    monkeypatch.setattr(sequence, "raw", planted)
    monkeypatch.setattr(importlib.import_module("fastjac.ops.act_stats"), "raw", planted)
    push = activations.Kernel.push
    monkeypatch.setattr(activations.Kernel, "push", lambda *a: (push(*a)[0], (None,)))
    return thing


def without_graph(monkeypatch: pytest.MonkeyPatch, thing: Thing) -> Thing:
    """VJPs that are not differentiable, as without ``create_graph``."""
    vjp = by_autograd.checked
    monkeypatch.setattr(by_autograd, "checked", lambda *a: vjp(*a).detach() + 0 * a[0].sum())
    return thing


def with_detached_weight(monkeypatch: pytest.MonkeyPatch, thing: Thing) -> Thing:
    """The penalty runs a model whose first weight is detached, the loss does not."""

    def form(penalty: Any, run: Any, x: Any, y: Any) -> Any:
        held = {"0.weight": run[0].weight.detach()}
        value = thing.form(penalty, lambda x: functional_call(run, held, (x,)), x, y)[1]
        return run(x), value

    return replace(thing, form=form)


def without_weight_of_a_layer(monkeypatch: pytest.MonkeyPatch, thing: Thing) -> Thing:
    def add_nothing(grads: Any, weights: Any, c: Any, suffix: str, add: bool) -> None:
        for grad in () if add else grads:
            grad.zero_()

    def planted(name: str) -> Any:
        return without_table(name, raw(name), half=0)

    monkeypatch.setattr(layer_act, "add_to", add_nothing)
    monkeypatch.setattr(layer_act, "raw", planted)
    monkeypatch.setattr(sequence, "raw", planted)
    return thing


def without_table(name: str, op: Any, half: int) -> Any:
    """The backward of layers on a CPU with zeros for s (``half=0``) or r in the table."""
    places = {"layer_act_backward": 3, "linear_act_backward": 5, "layers_act_backward": 5}
    if name not in places:
        return op

    def call(*args: Any) -> Any:
        given = list(args)
        given[places[name]] = table = given[places[name]].clone()
        widths = [w.shape[0] for w in args[3]] if name.startswith("layers") else [len(table) // 2]
        for part in table.split([2 * c for c in widths]):
            part.view(2, -1)[half] = 0
        return op(*given)

    return call


LAYER_WISE = ("DREG attached", "DREG called", "Contractive attached")
GRAPHS = ("SpectReg graph", "DataGrad autograd")
BY_INPUT = ("fused + autograd.grad", "SpectReg graph", "DataGrad chain", "FrobReg autograd")
FUSED = ("fused + autograd.grad", "fused + func.vjp")
FAULTS: list[tuple[Any, tuple[str, ...], tuple[str, ...]]] = [
    (without_curvature, ("eager", "autocast_bf16", "spectral_norm"), (*FUSED, *LAYER_WISE[:2])),
    # With convolutions, because an MLP is one call in C++.
    (without_curvature, ("channels_last",), ("SpectReg chain", "DataGrad chain", "FrobReg chain")),
    (without_graph, ("eager", "autocast_fp16", "checkpointed"), GRAPHS),
    (without_graph, ("step", "whole_step"), ("SpectReg autograd",)),
    (with_detached_weight, ("eager", "non_leaf", "frozen_layer"), BY_INPUT),
    (without_weight_of_a_layer, ("eager",), LAYER_WISE),
]


@pytest.mark.parametrize(
    ("fault", "way", "thing"),
    [(fault, *cell) for fault, ways, things in FAULTS for cell in product(ways, things)],
)
def test_planted_fault_is_seen(
    fault: Any, way: str, thing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    faulty = fault(monkeypatch, THING[thing])
    with pytest.raises(AssertionError, match="not close"):
        WAY[way].check(faulty)
