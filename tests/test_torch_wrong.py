"""What torch 2.13 differentiates wrongly, and fastjac computes in another way or refuses.

Each test shows that torch is wrong: its derivative differs from finite differences. If a test
fails, this torch has mended the operation, and the guard named in the table can go. The tests of
what is right show that the differences themselves are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, grad

import fastjac

pytestmark = pytest.mark.usefixtures("double")
STEP = 1e-5
Function = Callable[[Tensor], Tensor]


class Operation(NamedTuple):
    node: str  # of the autograd graph
    function: Function
    shape: tuple[int, ...]


def batch_norm(a: Tensor) -> Tensor:
    return F.batch_norm(a, None, None, training=True)


def batch_norm_eval(a: Tensor) -> Tensor:
    c = a.shape[1]
    return F.batch_norm(a.sin(), torch.linspace(-1, 1, c), torch.linspace(0.5, 2, c))


OPERATIONS = {
    "layer_norm": Operation("NativeLayerNormBackward0", lambda a: F.layer_norm(a, (5,)), (3, 5)),
    "batch_norm": Operation("NativeBatchNormBackward0", batch_norm, (4, 3)),
    "instance_norm": Operation("NativeBatchNormBackward0", F.instance_norm, (3, 3, 4)),
    "batch_norm_eval": Operation("NativeBatchNormBackward0", batch_norm_eval, (4, 3)),
    "group_norm": Operation("NativeGroupNormBackward0", lambda a: F.group_norm(a, 1), (3, 3, 3)),
    "rms_norm": Operation("MulBackward0", lambda a: F.rms_norm(a, (5,)), (3, 5)),
    "det": Operation("LinalgDetBackward0", torch.linalg.det, (2, 3, 3)),
    "solve": Operation("LinalgSolveExBackward0", lambda a: torch.linalg.solve(a, a.sin()), (3, 3)),
    "logcumsumexp": Operation("LogcumsumexpBackward0", lambda a: a.logcumsumexp(1), (3, 5)),
}

# ---- ways to compute a derivative; each returns a function of a


def vjp(f: Function, w: Tensor) -> Function:
    return lambda a: grad(f(a), a, w, create_graph=True)[0]


def double_vjp(f: Function, u: Tensor) -> Function:
    """``J u``, as a VJP of a VJP."""

    def pushed(a: Tensor) -> Tensor:
        output = f(a)
        w = torch.zeros_like(output, requires_grad=True)
        return grad(grad(output, a, w, create_graph=True)[0], w, u, create_graph=True)[0]

    return pushed


def forward_mode(f: Function, u: Tensor) -> Function:
    def pushed(a: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(a, u))).tangent

    return pushed


def second(f: Function, w: Tensor, u: Tensor) -> Function:
    """The gradient of ``⟨u, Jᵀw⟩``: a part of the gradient of a penalty."""
    return vjp(vjp(f, w), u)


WAYS: dict[str, Callable[[Function, Tensor, Tensor], Function]] = {
    "vjp": lambda f, w, u: vjp(f, w),
    "double vjp": lambda f, w, u: double_vjp(f, u),
    "forward mode": lambda f, w, u: forward_mode(f, u),
    "second": second,
}
WRONG = {
    # The graph of such a derivative is wrong: fastjac.input_jacobian.by_autograd refuses it.
    *((name, "double vjp") for name in ("layer_norm", "batch_norm", "instance_norm")),
    *((name, "second") for name in ("layer_norm", "batch_norm", "instance_norm")),
    # fastjac.AccumulatedDREG differentiates forward mode.
    *((name, "forward mode") for name in ("layer_norm", "batch_norm", "instance_norm")),
    *((name, "forward mode") for name in ("det", "solve")),
}
# The derivative of its VJP has a logarithm of the cotangent, which is 0 in a JVP.
NOT_A_NUMBER = {("logcumsumexp", "double vjp"), ("logcumsumexp", "second")}


def start(name: str) -> tuple[Operation, Tensor, Tensor, Tensor]:
    operation = OPERATIONS[name]
    a = torch.randn(operation.shape, requires_grad=True)
    output = operation.function(a)
    assert operation.node in nodes(output)
    return operation, a, torch.randn_like(output), torch.randn_like(a)


def nodes(t: Tensor) -> set[str]:
    found, left = set(), [t.grad_fn]
    while left:
        node = left.pop()
        if node is not None:
            found.add(type(node).__name__)
            left += [f for f, _ in node.next_functions]
    return found


def error(derivative: Tensor, f: Function, a: Tensor, direction: Tensor) -> float:
    """Of a derivative of f along a direction, against differences, relative."""
    above, below = f(a + STEP * direction), f(a - STEP * direction)
    truth = (above - below).detach() / (2 * STEP)
    return float((derivative - truth).detach().norm() / truth.norm())


def along(f: Function, a: Tensor, direction: Tensor) -> Tensor:
    """The derivative of f along a direction by first derivatives of each element of ``f(a)``."""
    value = f(a)
    rows = [grad(v, a, retain_graph=True)[0] for v in value.flatten()]
    return torch.stack([(row * direction).sum() for row in rows]).view(value.shape)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_gradient_of_a_derivative(name: str, way: str) -> None:
    """A derivative by each way, differentiated once more by torch."""
    operation, a, w, u = start(name)
    f, direction = operation.function, torch.randn_like(a)
    assert error(along(f, a, direction), f, a, direction) < 1e-7
    derivative = WAYS[way](f, w, u)
    if (name, way) == ("logcumsumexp", "forward mode"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            along(derivative, a, direction)
        return
    found = error(along(derivative, a, direction), derivative, a, direction)
    if (name, way) in NOT_A_NUMBER:
        assert found != found, f"torch has mended {name}: {way}"
    elif (name, way) in WRONG:
        assert found > 1e-3, f"torch has mended {name}: {way}"
    else:
        assert found < 1e-6


@pytest.mark.parametrize("way", ["double vjp", "forward mode"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_jvps_themselves_are_right(name: str, way: str) -> None:
    operation, a, w, u = start(name)
    found = error(WAYS[way](operation.function, w, u)(a), operation.function, a, u)
    if (name, way) in NOT_A_NUMBER:
        assert found != found, f"torch has mended {name}: {way}"
    else:
        assert found < 1e-7


# ---- several cotangents at once


def pull(a: Tensor, groups: int, ws: Tensor, create_graph: bool, at_once: bool) -> Tensor:
    output = F.group_norm(a, groups)
    options = {"create_graph": create_graph, "retain_graph": True}
    if at_once:
        return grad(output, a, ws, is_grads_batched=True, **options)[0]
    return torch.stack([grad(output, a, w, **options)[0] for w in ws])


@pytest.mark.parametrize("differentiated", [False, True])
def test_group_norm_of_several_cotangents(differentiated: bool) -> None:
    """Wrong numbers if sizes agree: 2 groups, 2 positions."""
    a, ws, u = torch.randn(2, 4, 2, requires_grad=True), torch.randn(3, 2, 4, 2), torch.randn(4, 2)
    at_once, one_by_one = (pull(a, 2, ws, True, at_once) for at_once in (True, False))
    if differentiated:
        at_once, one_by_one = (grad((v * u).sum(), a)[0] for v in (at_once, one_by_one))
    assert (at_once - one_by_one).norm() > 1e-2 * one_by_one.norm(), "torch has mended group_norm"


SIZES = [((2, 4, 3), 2), ((2, 6), 3), ((2, 4, 4, 3), 4), ((3, 6, 5), 1)]


@pytest.mark.parametrize(("shape", "groups"), SIZES)
def test_group_norm_of_several_cotangents_raises(shape: tuple[int, ...], groups: int) -> None:
    a, ws = torch.randn(shape, requires_grad=True), torch.randn(3, *shape)
    with pytest.raises(RuntimeError, match="must match the size|is invalid for input of size"):
        pull(a, groups, ws, True, True)


@pytest.mark.parametrize(("shape", "groups"), [*SIZES, ((2, 4, 2), 2)])
def test_group_norm_without_create_graph_is_right(shape: tuple[int, ...], groups: int) -> None:
    """The chain engine computes several cotangents at once, without ``create_graph``."""
    a, ws = torch.randn(shape, requires_grad=True), torch.randn(3, *shape)
    torch.testing.assert_close(pull(a, groups, ws, False, True), pull(a, groups, ws, True, False))


# ---- the first derivative


def test_cross_map_lrn() -> None:
    """It has no second derivative, so that every penalty raises."""
    module, a = nn.CrossMapLRN2d(3, alpha=0.5), torch.randn(2, 4, 3, 2, requires_grad=True)
    direction = torch.randn_like(a)
    wrong = error(along(module, a, direction), module, a, direction)
    assert wrong > 1e-3, "torch has mended CrossMapLRN2d"
    model = nn.Sequential(module, nn.Flatten())
    with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
        fastjac.SpectReg()(model, a)


# ---- models that compute a gradient themselves


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "instance_norm"])
def test_graph_of_a_gradient_is_known_by_its_nodes(name: str) -> None:
    """The node by which fastjac recognises that a model has differentiated such a norm."""
    operation, a, w, _ = start(name)
    gradient = vjp(operation.function, w)(a)
    assert operation.node.replace("Backward0", "BackwardBackward0") in nodes(gradient)
