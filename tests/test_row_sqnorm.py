"""`fastjac.row_sqnorm`: norms of the rows of many weights, and gradients added in place."""

import pytest
import torch
from conftest import DEVICE
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

import fastjac
from fastjac.cli.check import relative_error
from fastjac.ops.dispatch import FLOAT_DTYPES, OPS, why_not
from fastjac.ops.row_sqnorm import add_to, tapped

IMPLS = [
    impl
    for impl in OPS["row_sqnorm"].implementations
    if impl != "reference" and why_not(impl, DEVICE, torch.float64) is None
]
SHAPES = ((3, 4), (2, 3, 2, 2), (1, 5), (4, 1), (0, 3), (2, 0), (3,))


def make(dtype=torch.float64, shapes=SHAPES, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    weights = [scale * torch.randn(s, generator=generator) for s in shapes]
    weights = [w.to(DEVICE, dtype) for w in weights]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    return weights


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_and_gradgradcheck(impl):
    weights = [w.requires_grad_() for w in make()]

    def f(*weights):
        return torch.cat(fastjac.row_sqnorm(weights, impl=impl))

    assert gradcheck(f, weights, check_forward_ad=True)
    assert gradgradcheck(f, weights)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_values_and_gradients(dtype, impl):
    """Includes rows that are not blocks of memory, and values whose squares overflow in float16."""
    shapes = (*SHAPES, (5, 700), (300, 33), (2, 5000))
    weights = [w.requires_grad_() for w in make(dtype, shapes, scale=300)]
    weights.append(torch.randn(6, 4, dtype=dtype, device=DEVICE).t().requires_grad_())
    rows = fastjac.row_sqnorm(weights, impl=impl)
    c = [torch.rand_like(r) for r in rows]
    grads = torch.autograd.grad(rows, weights, c)
    # Sums of 16 rounded products, then double: 2 eps. The gradient is rounded once more.
    eps = torch.finfo(rows[0].dtype).eps
    for w, r, ci, grad in zip(weights, rows, c, grads, strict=True):
        wide = w.detach().double()
        assert r.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert relative_error(r.detach(), wide.flatten(1).square().sum(1)
                              if w.dim() > 1 else wide.square()) <= 2 * eps  # fmt: skip
        truth = 2 * ci.double().view(-1, *[1] * (w.dim() - 1)) * wide
        finite = truth.abs() < torch.finfo(dtype).max
        limit = torch.finfo(dtype).eps
        assert grad.dtype == dtype and grad.shape == w.shape
        assert relative_error(grad[finite], truth[finite]) <= limit


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_add_to_adds_in_place_and_overwrites_poison(impl):
    weights = make()
    c = torch.rand(sum(w.shape[0] for w in weights), dtype=torch.float64, device=DEVICE)
    parts = c.split([w.shape[0] for w in weights])
    terms = [2 * p.view(-1, *[1] * (w.dim() - 1)) * w for p, w in zip(parts, weights, strict=True)]
    grads = [torch.randn_like(w) for w in weights]
    expected = [g + t for g, t in zip(grads, terms, strict=True)]
    pointers = [g.data_ptr() for g in grads]
    add_to(grads, weights, c, impl, add=True)
    torch.testing.assert_close(grads, expected)
    assert [g.data_ptr() for g in grads] == pointers
    poisoned = [torch.full_like(w, torch.nan) for w in weights]
    add_to(poisoned, weights, c, impl, add=False)
    torch.testing.assert_close(poisoned, terms)


def test_opcheck():
    weights = [w.requires_grad_() for w in make()]
    torch.library.opcheck(torch.ops.fastjac.row_sqnorm.default, (weights,))
    backward = torch.ops.fastjac.row_sqnorm_backward.default
    weights = make()
    grads = [torch.randn_like(w) for w in weights]
    c = torch.rand(sum(w.shape[0] for w in weights), dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(backward, (grads, weights, c, True))


def test_tapped_gradients_are_the_sum_of_both():
    """The gradients of views and norms: both, only one of them, and with create_graph=True."""
    for use in ("both", "views", "norms", "one view"):
        for recorded in (False, True):
            results = []
            for tap in (True, False):
                weights = [w.requires_grad_() for w in make(shapes=((3, 4), (2, 3, 2, 2)))]
                if tap:
                    rows, views = tapped(weights, DEVICE)
                    flat = torch.cat(rows)
                else:
                    flat, views = torch.cat(fastjac.row_sqnorm(weights, impl="reference")), weights
                loss = flat.square().sum() if use != "views" else 0
                if use != "norms":
                    used = views[:1] if use == "one view" else views
                    loss = loss + sum(v.sin().sum() for v in used)
                grads = torch.autograd.grad(
                    loss, weights, create_graph=recorded, materialize_grads=True
                )
                results.append(grads)
                if recorded:
                    norm = sum(g.square().sum() for g in grads)
                    results[-1] += torch.autograd.grad(norm, weights, materialize_grads=True)
            torch.testing.assert_close(*results)


def test_torch_func():
    w, t = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    ours, truth = (lambda w, i=i: fastjac.row_sqnorm([w], impl=i)[0] for i in ("auto", "reference"))
    torch.testing.assert_close(jvp(ours, (w[0],), (t[0],)), jvp(truth, (w[0],), (t[0],)))
    torch.testing.assert_close(vmap(ours)(w), vmap(truth)(w))


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([], ValueError, "weights is empty"),
        ([torch.ones(2, 2, dtype=torch.int64)], TypeError, r"weights\[0\] is torch.int64"),
        ([torch.ones(())], ValueError, r"weights\[0\] is a scalar"),
        ([torch.ones(2), torch.ones(2).double()], TypeError, r"weights\[1\] has dtype"),
        ([torch.ones(2), None], TypeError, r"weights\[1\] is NoneType"),
        (torch.ones(2, 3), TypeError, "weights is Tensor: it must be a list of tensors"),
    ],
)
def test_refusals(weights, error, message):
    with pytest.raises(error, match=message):
        fastjac.row_sqnorm(weights)


def test_gradients_that_do_not_lie_like_their_weights_are_refused():
    w = torch.randn(3, 4)
    for grads, c, message in (
        ([torch.empty(4, 3).t()], torch.ones(3), "same strides"),
        ([torch.empty(3, 4)], torch.ones(4), r"c must have shape \[3\]"),
        ([], torch.ones(3), "one gradient per weight"),
    ):
        with pytest.raises(RuntimeError, match=message):
            add_to(grads, [w], c, "cpu", add=False)
