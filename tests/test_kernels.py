"""The kernels of `act`, `row_sqnorm` and `softmax_residual`, against float64 formulas.

The CUDA sources are built for the CPU. Those of the Triton kernels that are not called here are
called by test_act.py and test_softmax_residual.py, in Triton's interpreter.
"""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import both, laid_out, only_cuda, randn

import fastjac
from fastjac.activations import IDS, TABLE
from fastjac.cli.check import relative_error, tolerance
from fastjac.ops.act_stats import spread
from fastjac.ops.dispatch import FLOAT_DTYPES, accumulate_dtype


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", TABLE)
@only_cuda
def test_act(kernels, name, dtype):
    """The error is that of all sizes together, because a single number can lie next to a root.

    The third derivative of quick GELU at 1.984 is -0.0067: the float64 reference is off by 2e-14.
    """
    rest = IDS[name], TABLE[name].param_values({})
    operands = []
    # One element past a 16-byte pack, and an operand that does not start at a 16-byte address.
    for size, offset in ((0, 0), (1, 0), (129, 0), (77, 1)):
        generator = torch.Generator().manual_seed(size)
        drawn = [3 * torch.randn(size, generator=generator) for _ in range(3)]
        operands.append([laid_out(t.to(dtype), offset=offset) for t in drawn])
    wide_z, wide_g, wide_v = (torch.cat(parts).double() for parts in zip(*operands, strict=True))

    def assert_near(results, g, order):
        truth = fastjac.act(wide_z, g, order, name, impl="reference")
        assert relative_error(torch.cat(results), truth) <= tolerance("cuda", dtype), order

    for order in range(4):
        assert_near([kernels.act(z, g, order, *rest) for z, g, _ in operands], wide_g, order)
        assert_near([kernels.act(z, None, order, *rest) for z, _, _ in operands], None, order)
    for order in range(3):
        grads = [kernels.act_backward(z, g, v, order, *rest) for z, g, v in operands]
        grads_z, grads_g = zip(*grads, strict=True)
        assert_near(grads_z, wide_g * wide_v, order + 1)
        assert_near(grads_g, wide_v, order)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", [name for name in TABLE if name != "sine"])
@only_cuda
def test_act_of_subnormal_and_huge_numbers(kernels, name, dtype):
    """Sine has a bound on its argument. An exponential below 2^-126 may be zero on a GPU."""
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    least = torch.finfo(dtype).tiny
    sizes = (most / 3, most / 2**10, most / 2**10, 1e4, 80.0, 1e-3, least, least / 8)
    z = torch.tensor([s * sign for s in sizes for sign in (1, -1)], dtype=dtype)
    got = kernels.act(z, None, 0, IDS[name], TABLE[name].param_values({})).double()
    # The truth is rounded to the dtype: the square of a huge number is infinite there.
    truth = fastjac.act(z.double(), None, 0, name, impl="reference").to(dtype).double()
    eps = 64 * torch.finfo(accumulate_dtype(dtype)).eps + torch.finfo(dtype).eps
    torch.testing.assert_close(got, truth, rtol=eps, atol=least)
    edge = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    for order in range(2):
        got = kernels.act(edge, None, order, IDS[name], TABLE[name].param_values({}))
        torchs = fastjac.act(edge, None, order, name, impl="reference")
        assert ((got == torchs) | torchs.isnan() | (edge.isnan() & got.isnan())).all()


@both
def test_act_layouts_and_refusals(kernels):
    z = randn(kernels, (2, 3, 4, 5), torch.float32, "channels_last")
    g = randn(kernels, (2, 3, 4, 5), torch.float32, seed=1)
    got = kernels.act(z, g, 1, IDS["silu"], ())
    assert got.stride() == z.stride()
    torch.testing.assert_close(got, fastjac.act(z, g, 1, "silu", impl="reference"))
    with pytest.raises(RuntimeError, match="order must be 0 to 3, got 4"):
        kernels.act(z, g, 4, 0, ())
    with pytest.raises(RuntimeError, match="no activation with id 99"):
        kernels.act(z, g, 0, 99, ())


# ---- row_sqnorm

WEIGHTS = [
    (5, 7), (3, 4, 3, 2), (3, 6, 2, 2), (2, 600), (33, 1), (0, 4), (4, 0), (6,), (3, 512), (40, 64),
    (9, 1024), (2, 1100), (2, 2048), (2, 4100), (1, 70_000), (300, 8),
]  # fmt: skip


def squared_norms(weights):
    return [w.double().square().reshape(len(w), w[:1].numel()).sum(1) for w in weights]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("offset", (0, 3))
@only_cuda
def test_row_sqnorm(kernels, offset, dtype, poison):
    weights = [randn(kernels, shape, dtype, offset=offset) for shape in WEIGHTS]
    for i in (1, 2):
        weights[i] = laid_out(weights[i], "channels_last", offset)
    r = kernels.row_sqnorm(weights)
    assert r.dtype == accumulate_dtype(dtype)
    parts = r.split([len(w) for w in weights])
    for got, want in zip(parts, squared_norms(weights), strict=True):
        assert relative_error(got, want) <= tolerance(kernels.impl, r.dtype)
    assert torch.equal(r, kernels.row_sqnorm(weights))
    c = torch.randn_like(r)
    parts = c.double().split([len(w) for w in weights])
    for add in (False, True):
        grads = [torch.randn_like(w) if add else torch.empty_like(w) for w in weights]
        old = [grad.double().clone() for grad in grads]
        kernels.row_sqnorm_backward(grads, weights, c, add)
        for grad, was, w, part in zip(grads, old, weights, parts, strict=True):
            want = 2 * spread(part, w, 0) * w.double() + (was if add else 0)
            assert relative_error(grad, want) <= tolerance(kernels.impl, dtype), (w.shape, add)


@only_cuda
def test_row_sqnorm_of_many_weights(kernels, poison):
    # Two launches of the CUDA kernel: its parameters hold 96.
    weights = [randn(kernels, (i % 4 + 1, i + 1), torch.float32) for i in range(100)]
    r = kernels.row_sqnorm(weights)
    assert relative_error(r, torch.cat(squared_norms(weights))) < 1e-6
    grads = [torch.empty_like(w) for w in weights]
    kernels.row_sqnorm_backward(grads, weights, torch.ones_like(r), False)
    for grad, w in zip(grads, weights, strict=True):
        assert torch.equal(grad, 2 * w)


@only_cuda
def test_row_sqnorm_of_rows_that_are_no_blocks_of_memory(kernels):
    w = randn(kernels, (6, 5), torch.float32)
    for strided in (w.mT, w[::2], w[:, 1:]):
        assert relative_error(kernels.row_sqnorm([strided]), squared_norms([strided])[0]) < 1e-6
    grad, ones = torch.empty_like(w), w.new_ones(6)
    for message, *args in (
        ("weight 0 and its gradient must have rows", [grad.mT], [w.mT], ones[:5]),
        ("the same strides", [grad.mT.contiguous().mT], [w], ones),
        ("c must have (the )?shape", [grad], [w], ones[:5]),
        ("one gradient per weight", [], [w], ones),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernels.row_sqnorm_backward(*args, False)


# ---- softmax_residual


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 10), (3, 33), (2, 1024), (2, 1025), (3, 2500)])
@only_cuda
def test_softmax_residual(kernels, shape, dtype, poison):
    z, v = (randn(kernels, shape, dtype, offset=3, seed=i) for i in range(2))
    target = torch.arange(shape[0]) * 7 % shape[1]
    r = kernels.softmax_residual(z, target)
    p = z.double().softmax(1)
    limit = tolerance("cuda", dtype)
    assert relative_error(r, p - F.one_hot(target, shape[1])) <= limit
    grad = kernels.softmax_residual_backward(z, v)
    dot = (p * v.double()).sum(1, keepdim=True)
    # p (v − ⟨p, v⟩) cancels: an error of ⟨p, v⟩ counts against the size of p v.
    error = (grad.double() - p * (v.double() - dot)).norm()
    assert error <= limit * ((p * v.double()).norm() + (p * dot).norm())
    target[-1] = shape[1]
    wrong = kernels.softmax_residual(z, target)
    assert wrong[-1].isnan().all() and not wrong[:-1].isnan().any()


@both
def test_softmax_residual_refusals(kernels):
    z, target = randn(kernels, (4, 3), torch.float32), torch.arange(3, device=kernels.device)
    assert kernels.softmax_residual(z[:0], target[:0]).shape == (0, 3)
    with pytest.raises(RuntimeError, match=r"target must be int64 \[N\]"):
        kernels.softmax_residual(z, target)
    with pytest.raises(RuntimeError, match="v must have the shape"):
        kernels.softmax_residual_backward(z, z[:3])
