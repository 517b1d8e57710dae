"""`fastjac.softmax_residual`: p − y and its derivatives."""

from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

import fastjac
from fastjac.cli.check import relative_error, tolerance
from fastjac.ops.dispatch import FLOAT_DTYPES, OPS, why_not

IMPLS = [
    impl
    for impl in OPS["softmax_residual"].implementations
    if impl != "reference" and why_not(impl, DEVICE, torch.float64) is None
]
SHAPES = ((1, 1), (5, 10), (3, 17), (2, 1025), (0, 3), (2, 5000))


def make(n: int, m: int, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Any:
    generator = torch.Generator().manual_seed(n + m)
    z = (scale * torch.randn(n, m, generator=generator, dtype=torch.float64)).to(DEVICE, dtype)
    v = torch.randn(n, m, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return z, torch.randint(m, (n,), generator=generator).to(DEVICE), v


def truth(z: Tensor, target: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    p, v = z.double().softmax(1), v.double()
    y = torch.nn.functional.one_hot(target, z.shape[1])
    return p - y, p * (v - (p * v).sum(1, keepdim=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck_and_gradgradcheck(impl: str) -> None:
    z, target, _ = make(4, 5)
    z.requires_grad_()

    def f(z: Tensor) -> Tensor:
        return fastjac.softmax_residual(z, target, impl=impl)

    assert gradcheck(f, (z,), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, (z,), check_batched_grad=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [3.0, 300.0])
def test_values_and_gradients(
    shape: tuple[int, int], dtype: torch.dtype, impl: str, scale: float, poison: None
) -> None:
    z, target, v = make(*shape, dtype, scale)
    z.requires_grad_()
    r = fastjac.softmax_residual(z, target, impl=impl)
    (grad,) = torch.autograd.grad(r, z, v)
    want_r, want_grad = truth(z.detach(), target, v)
    assert r.dtype == grad.dtype == dtype
    limit = tolerance(impl, dtype)
    assert relative_error(r.detach(), want_r) <= limit
    # p (v − ⟨p, v⟩) cancels where p is near 1: its error is one of p v and of p ⟨p, v⟩.
    p = z.detach().double().softmax(1)
    size = (p * v).norm() + (p * (p * v).sum(1, keepdim=True)).norm()
    assert (grad.double() - want_grad).norm() <= limit * size


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl: str) -> None:
    z, target, v = make(4, 5)
    suffix = "_triton" if impl == "triton" else ""
    op = getattr(torch.ops.fastjac, "softmax_residual" + suffix).default
    torch.library.opcheck(op, (z.requires_grad_(), target))
    backward = getattr(torch.ops.fastjac, "softmax_residual_backward" + suffix).default
    torch.library.opcheck(backward, (z.detach(), v))


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_finite(impl: str) -> None:
    """As in torch: −inf has probability 0; +inf and NaN make their own row NaN."""
    z = torch.tensor([[0.0, -torch.inf, 1], [torch.inf, 0, 0], [torch.nan, 0, 0], [1, 2, 3]])
    z, target = z.to(DEVICE), torch.tensor([1, 1, 1, 1], device=DEVICE)
    want = z.softmax(1) - torch.nn.functional.one_hot(target, 3)
    got = fastjac.softmax_residual(z, target, impl=impl)
    torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts(impl: str) -> None:
    z, target, _ = make(6, 4)
    want = fastjac.softmax_residual(z, target, impl=impl)
    for other in (z.t().contiguous().t(), z.repeat(1, 2)[:, :4], z.repeat_interleave(2, 0)[::2]):
        assert torch.equal(fastjac.softmax_residual(other, target, impl=impl), want)
    twice = target.repeat_interleave(2)[::2]
    assert torch.equal(fastjac.softmax_residual(z, twice, impl=impl), want)


def test_torch_func() -> None:
    z, target, v = make(4, 5)
    ours, plain = (
        lambda z, i=i: fastjac.softmax_residual(z, target, impl=i) for i in ("auto", "reference")
    )
    torch.testing.assert_close(jvp(ours, (z,), (v,)), jvp(plain, (z,), (v,)))
    stack = torch.stack([z, v])
    torch.testing.assert_close(vmap(ours)(stack), vmap(plain)(stack))


@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize("impl", IMPLS)
def test_class_out_of_range(bad: int, impl: str) -> None:
    z, target = torch.randn(4, 3, device=DEVICE), torch.tensor([0, bad, 2, 1], device=DEVICE)
    if impl == "cpu":
        with pytest.raises(RuntimeError, match=r"class indices outside of \[0, 3\)"):
            fastjac.softmax_residual(z, target, impl=impl)
        return
    r = fastjac.softmax_residual(z, target, impl=impl)
    assert r.isnan().any(1).tolist() == [False, True, False, False]


LOGITS, TARGET = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (LOGITS.long(), TARGET, TypeError, "logits is torch.int64"),
        (None, TARGET, TypeError, "logits is NoneType"),
        (LOGITS, TARGET.int(), TypeError, "target is torch.int32"),
        (LOGITS, TARGET[:3], ValueError, r"it must be \[4\]"),
        (LOGITS[0], TARGET, ValueError, r"it must be \[N, m\]"),
        (LOGITS[:, :0], TARGET, ValueError, "m >= 1"),
    ],
)
def test_refusals(logits: Any, target: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fastjac.softmax_residual(logits, target)


def test_raw_calls_that_do_not_fit_raise() -> None:
    op, backward = torch.ops.fastjac.softmax_residual, torch.ops.fastjac.softmax_residual_backward
    for logits, target in (
        (LOGITS[0], TARGET), (LOGITS, TARGET[:3]), (LOGITS, TARGET.int()), (LOGITS[:, :0], TARGET),
        (LOGITS.long(), TARGET), (LOGITS, TARGET[:, None]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            op(logits, target)
    for v in (LOGITS[:3], LOGITS.double(), LOGITS[0]):
        with pytest.raises(RuntimeError):
            backward(LOGITS, v)
