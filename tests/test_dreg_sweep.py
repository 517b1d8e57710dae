"""DREG over layers × norms × activations: each cell equals the formula, or is left out and says so.

The fast suite runs pairs of these; the slow one runs every triple, and compiles pairs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from dreg_cases import ACTS, LAYERS, NORMS, Case, generic, input_of, is_linear, norm_left_out
from dreg_formula import OPTIONS, Net, written_out
from dreg_table import page
from torch import Tensor, nn
from torch.nn.utils import prune

from fastjac.layerwise.reasons import NOT_FOLLOWED, NOT_FOLLOWED_NORM
from fastjac.penalties import DREG

pytestmark = pytest.mark.usefixtures("double")
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
PAGE = Path(__file__).resolve().parent.parent / "docs/LAYERS.md"
LAYER, NORM, ACT = ({case.name: case for case in cases} for cases in (LAYERS, NORMS, ACTS))
POSITIONS = ("LayerNorm over two dimensions", "LocalResponseNorm", "InstanceNorm")
FORMS = ("attached", "called")


def fits(layer: Case, norm: Case) -> bool:
    """Some norms need positions."""
    positions = layer.name.endswith("[N, T, C]") or not is_linear(layer.make())
    return positions or norm.name not in POSITIONS


def left_out(layer: Case, norm: Case, act: Case, net: Net, x: Tensor) -> str | None:
    if layer.left_out is not None:
        return layer.left_out
    reason = norm_left_out(norm, net.layer, x)
    if reason is not None:
        return reason
    if act.left_out is None or norm.name in ("none", "2 z"):
        return act.left_out
    return act.left_out.replace(NOT_FOLLOWED, NOT_FOLLOWED_NORM)


def twin_of(net: Net) -> Net:
    if any(isinstance(p, prune.BasePruningMethod) for p in net.layer._forward_pre_hooks.values()):
        net.layer.weight = net.layer.weight.detach()  # deepcopy takes leaves only
    return copy.deepcopy(net)


def gradients(net: Net, x: Tensor, output: Tensor, value: Tensor) -> list[Any]:
    loss = (
        output.square().mean() + (value * torch.linspace(1, 2, value.numel()).view_as(value)).sum()
    )
    inputs = [x, *net.parameters()]
    return list(torch.autograd.grad(loss, inputs, allow_unused=True))


def zeros(grads: list[Any], like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, like, strict=True)]


def run(net: Net, x: Tensor, form: str, options: dict[str, Any]) -> tuple[Tensor, Tensor, DREG]:
    if form == "called":
        penalty = DREG(**options)
        return *penalty(net, x), penalty
    penalty = DREG(net, **options)
    model = torch.compile(net, backend="aot_eager", fullgraph=True) if form == "compiled" else net
    output = model(x)
    value = penalty()
    return output, value, penalty


def check(layer: Case, norm: Case, act: Case, form: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = Net(layer, norm, act)
    twin = twin_of(net)
    x = input_of(layer.name, net.layer).requires_grad_()
    reason = left_out(layer, norm, act, net, x)
    reason = generic(reason) if form == "compiled" else reason
    truth = written_out(twin, x, reason is not None, options)
    reduce = {"none": lambda r: r, "sum": torch.sum, "mean": torch.mean}
    expected = reduce[options.get("reduction", "mean")](truth[1])
    output, value, penalty = run(net, x, form, options)
    # Torch's Hardsigmoid, which some of these cells run, has 1/6 in float32.
    rounded = {"rtol": 2e-7, "atol": 1e-7} if isinstance(net.act, nn.Hardsigmoid) else {}
    close(output, truth[0], **rounded)
    close(value, expected, **rounded)
    assert dict(penalty.layers_left_out).get("layer") == reason
    assert ("layer" in penalty.layers_found) == (reason is None)
    close(list(net.buffers()), list(twin.buffers()))  # the model ran once
    tensors = [x, *net.parameters()]
    found = zeros(gradients(net, x, output, value), tensors)
    wanted = zeros(gradients(twin, x, truth[0], expected), tensors)
    # A sum that cancels (the gradient of a bias before a BatchNorm is 0) has the rounding errors of
    # its terms, which are as large as the largest gradients.
    scale = max(1.0, *(float(g.abs().max()) for g in wanted))
    close(found, wanted, **{"atol": 1e-12 * scale, **rounded})
    penalty.detach()


def cells(layers: Any, norms: Any, acts: Any) -> Iterator[tuple[Case, Case, Case]]:
    for layer, norm, act in product(layers, norms, acts):
        layer, norm, act = LAYER[layer], NORM[norm], ACT[act]
        if fits(layer, norm):
            yield layer, norm, act


def every(cells: Iterator[tuple[Case, Case, Case]], forms: tuple[str, ...] = FORMS) -> None:
    """All cells, each with the next of the options; every fault is named at the end."""
    faults, count = [], 0
    for number, cell in enumerate(cells):
        for form in forms:
            options = OPTIONS[(number + (form == "called")) % len(OPTIONS)]
            try:
                check(*cell, form, options)
            except Exception as error:
                names = ", ".join(case.name for case in cell)
                faults.append(f"{names}, {form}, {options}: {type(error).__name__}: {error}")
            count += 1
    assert count, "no cell"
    assert not faults, "\n".join((f"{len(faults)} of {count} cells", *faults[:20]))


@pytest.mark.parametrize("layer", LAYER)
def test_layers_and_norms(layer: str) -> None:
    every(cells([layer], NORM, ["GELU", "ReLU(inplace=True)"]))


@pytest.mark.parametrize("norm", ["none", "BatchNorm", "BatchNorm, eval", "LayerNorm"])
def test_norms_and_activations(norm: str) -> None:
    every(cells(["Linear", "Conv2d"], [norm], ACT))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options: dict[str, Any]) -> None:
    layers = ["Linear on [N, T, C]", "ConvTranspose2d, grouped", "equalised learning rate"]
    for cell in cells(layers, ["none", "BatchNorm", "LayerNorm"], ["SiLU", "Hardtanh"]):
        for form in FORMS:
            check(*cell, form, options)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYER)
@pytest.mark.parametrize("form", FORMS)
def test_every_triple(layer: str, form: str) -> None:
    every(cells([layer], NORM, ACT), (form,))


@pytest.mark.parametrize("norm", ["none", "BatchNorm", "BatchNorm, eval", "LayerNorm"])
def test_gradient_of_the_formula_by_finite_differences(norm: str) -> None:
    net = Net(LAYER["equalised learning rate"], NORM[norm], ACT["GELU"])
    inputs = (input_of("", net.layer).requires_grad_(), net.layer.weight)
    torch.autograd.gradcheck(lambda x, w: written_out(net, x, False, {})[1], inputs)


def compiled_cells() -> Iterator[Any]:
    for layer, norm, act in (
        *cells(LAYER, ["none"], ["GELU"]),
        *cells(["Linear", "Conv2d"], NORM, ["ReLU(inplace=True)"]),
        *cells(["Conv2d"], ["BatchNorm"], ACT),
    ):
        yield pytest.param(layer, norm, act, id=f"{layer.name}-{norm.name}-{act.name}")


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "norm", "act"), list(compiled_cells()))
def test_compiled(layer: Case, norm: Case, act: Case, no_stale_graphs: None) -> None:
    if layer.compiled or norm.compiled or act.compiled:
        with pytest.raises(Exception, match=layer.compiled or norm.compiled or act.compiled):
            check(layer, norm, act, "compiled", {})
    else:
        check(layer, norm, act, "compiled", {})


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python tests/dreg_table.py docs/LAYERS.md"
