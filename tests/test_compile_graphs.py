"""What a penalty adds to the graphs of ``torch.compile``: products, ops, and outputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled_cases import MARKS, Graphs, calls, compiled
from torch import Tensor, nn

from fastjac.penalties import DREG, Contractive, FrobReg, SpectReg

pytestmark = MARKS


def mlp() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)),
    )


def traced(step: Callable[[Tensor], Tensor]) -> tuple[Graphs, Counter[str], Counter[str]]:
    """The graphs of a step and its backward, and the operations of each of the two."""
    graphs = Graphs()
    compiled(step, graphs)(torch.randn(16, 4)).backward()
    return graphs, calls(graphs.forward[-1]), calls(graphs.backward[-1])


@pytest.mark.parametrize("penalty", [SpectReg(engine="autograd"), SpectReg(3, engine="autograd")])
def test_products_of_an_input_jacobian_penalty(penalty: Any) -> None:
    """Of a plain step there are 8. Several cotangents share their products.

    x does not require grad, and the products of its gradient are left out.
    """
    model = mlp()

    def step(x: Tensor) -> Tensor:
        output, value = penalty(model, x)
        return output.square().mean() + value

    _, forward, backward = traced(step)
    assert forward["aten.mm"] == 6  # three layers, and Jᵀw
    assert forward["aten.mm"] + backward["aten.mm"] <= 16
    _, forward, backward = traced(lambda x: model(x).square().mean())
    assert forward["aten.mm"] + backward["aten.mm"] == 8


@pytest.mark.parametrize("penalty", [SpectReg(), SpectReg(3), FrobReg()])
def test_an_mlp_is_three_ops(penalty: Any) -> None:
    model = mlp()

    def step(x: Tensor) -> Tensor:
        output, value = penalty(model, x)
        return output.square().mean() + value

    graphs, forward, backward = traced(step)
    assert (forward["fastjac.mlp_forward"], forward["fastjac.mlp_pull"]) == (1, 1)
    assert backward["fastjac.mlp_backward"] == 1 and not backward["fastjac.mlp_push"]
    assert not forward["aten.mm"] + backward["aten.mm"]
    assert requiring_grad(graphs) == 1


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(("kind", "watched"), [(DREG, 2), (Contractive, 1)])
def test_layer_wise_penalties(kind: Any, watched: int, attached: bool) -> None:
    """The gradients of a watched layer are one op. The penalty adds no product to the step."""
    model = mlp()
    penalty = kind(model) if attached else kind()

    def step(x: Tensor) -> Tensor:
        output, value = (model(x), penalty()) if attached else penalty(model, x)
        return output.square().mean() + value

    graphs, forward, backward = traced(step)
    assert forward["aten.mm"] == 3 and forward["fastjac.layer_act"] == 2
    assert backward["fastjac.linear_act_backward"] == watched
    # Two for each layer that is not watched, but one for the first layer.
    assert backward["aten.mm"] == {2: 2, 1: 4}[watched]
    assert requiring_grad(graphs) == 1


@pytest.mark.parametrize("norm", [nn.Identity, lambda: nn.LayerNorm(5)])
def test_a_compiled_model_returns_no_pre_activation(norm: Any) -> None:
    """Its output, and what the attached penalty, outside of the graph, needs of each layer."""
    layers = nn.Linear(4, 5), norm(), nn.GELU(), nn.Linear(5, 5), norm(), nn.GELU()
    model, graphs = nn.Sequential(*layers, nn.Linear(5, 3)), Graphs()
    penalty = DREG(model)
    output = compiled(model, graphs)(torch.randn(6, 4))
    (output.square().mean() + penalty()).backward()
    assert len(penalty.layers_found) == 2
    assert [t.shape for t in graphs.outputs if t.requires_grad and t.dim() > 1] == [(6, 3)]


def requiring_grad(graphs: Graphs) -> int:
    """The outputs that the backward gets gradients of; any but the loss would be zeros."""
    return sum(t.requires_grad for t in graphs.outputs if isinstance(t, Tensor))
