"""``norm_push``: the tangent of a LayerNorm and its second-order terms, against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import Kernels, only_triton
from net_cases import layer_norm
from torch import Tensor

from fastjac.input_jacobian.chain import norms
from fastjac.ops.dispatch import why_not

needs_library = pytest.mark.skipif(
    why_not("cpu", "cpu", torch.float32) is not None, reason="needs the CPU library"
)
EPS = 1e-3


class Case:
    def __init__(self, shape: tuple[int, ...], k: int, weighted: bool, device: str = "cpu") -> None:
        torch.manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, device=device)

        self.a, self.t, self.delta = randn(*shape), randn(k, *shape), randn(k, *shape)
        self.weight = randn(shape[-1]) if weighted else None

    def statistics(self) -> tuple[Tensor, Tensor]:
        variance = self.a.var(-1, keepdim=True, correction=0)
        return self.a.mean(-1, keepdim=True), (variance + EPS).rsqrt()

    def truth(self) -> list[Tensor | None]:
        """γ P t, and the gradients with respect to a and γ, by the formula of the norm."""
        a = self.a.clone().requires_grad_()
        weight = None if self.weight is None else self.weight.clone().requires_grad_()

        def norm(a: Tensor) -> Tensor:
            return layer_norm(a, weight, None, EPS)

        pushed = [torch.func.jvp(norm, (a,), (t,))[1] for t in self.t]
        total = sum((p * d).sum() for p, d in zip(pushed, self.delta, strict=True))
        leaves = [a] if weight is None else [a, weight]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.stack(pushed).detach(), *grads, *[None] * (2 - len(grads))]

    def operands(self, dtype: torch.dtype, wanted: bool, trained: bool) -> list[Any]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        t, delta, a = (s.to(dtype) for s in (self.t, self.delta, self.a))
        weight = None if self.weight is None else self.weight.to(dtype)
        mean, iota = (s.to(wide) for s in self.statistics())
        return [t, delta, a, mean, iota, weight, self.a.shape[-1], wanted, trained]


def check(op: Any, case: Case, dtype: torch.dtype, limit: float) -> None:
    truth = case.truth()
    for wanted, trained in ((True, case.weight is not None), (False, False)):
        expected = [truth[0] if wanted else None, truth[1], truth[2] if trained else None]
        out, extra, product = op(*case.operands(dtype, wanted, trained))
        assert extra.shape == case.a.shape
        assert extra.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        found = [out, extra, product.view(-1, case.a.shape[-1]).sum(0) if trained else product]
        for a, b in zip(found, expected, strict=True):
            if b is None:
                assert a.numel() == 0
            else:
                assert a.shape == b.shape and (a.double() - b).norm() <= limit * b.norm()


SHAPES = [(5, 7), (2, 3, 33), (3, 512), (2, 1000)]


@needs_library
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, (1200, 7)], ids=str)  # the last one on two threads
def test_cpu(shape, k, weighted, dtype, limit):
    check(torch.ops.fastjac.norm_push, Case(shape, k, weighted), dtype, limit)


@only_triton
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 2500)], ids=str)
def test_triton(kernels: Kernels, shape, k, weighted, dtype, limit):
    check(kernels.norm_push, Case(shape, k, weighted, kernels.device), dtype, limit)


@needs_library
def test_memory_formats():
    """Operands in another memory format give the same numbers."""
    case, op = Case((4, 6), 2, True), torch.ops.fastjac.norm_push
    expected = op(*case.operands(torch.float64, True, True))
    case.t, case.delta = (t.mT.contiguous().mT for t in (case.t, case.delta))
    case.a = torch.stack([case.a, case.a], -1).flatten(-2)[..., ::2]
    for a, b in zip(op(*case.operands(torch.float64, True, True)), expected, strict=True):
        torch.testing.assert_close(a, b)


NAMES = ("t", "delta", "a", "mean", "iota", "weight")


def refuses(op: Any, device: str) -> None:
    good = Case((4, 6), 1, True, device).operands(torch.float64, True, True)
    op(*good)
    for place, name in enumerate(NAMES):
        right = good[place]
        for wrong in (right[:0], right.float(), right[..., :-1] if place else right[:, :1]):
            if name == "weight" and wrong.numel() == right.numel():
                continue  # the Triton kernel takes a weight of another dtype
            argument = name if name != "a" else "(a|t|delta)"  # to which the others do not fit
            if name == "t" and wrong.numel() == 0:
                argument = "t"
            with pytest.raises(RuntimeError, match=f"norm_push: {argument} must"):
                op(*good[:place], wrong, *good[place + 1 :])
    for wrong in (0, -1, 5):
        with pytest.raises(RuntimeError, match=f"a must have one row of {wrong} elements or more"):
            op(*good[:6], wrong, *good[7:])
    with pytest.raises(RuntimeError, match="weight is None and trained is true"):
        op(*good[:5], None, *good[6:])


@needs_library
def test_refusals():
    refuses(torch.ops.fastjac.norm_push, "cpu")
    with pytest.raises(RuntimeError, match="float32 or float64"):
        torch.ops.fastjac.norm_push(*Case((4, 6), 1, True).operands(torch.bfloat16, True, True))


@only_triton
def test_refusals_of_triton(kernels: Kernels):
    refuses(kernels.norm_push, kernels.device)


@needs_library
def test_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_a_gpu(impl: str, device: str, dtype: torch.dtype) -> str | None:
        return None if (impl, device) in (("triton", "cuda"), ("cpu", "cpu")) else "no"

    norms.kernel_suffix.cache_clear()
    monkeypatch.setattr(norms, "why_not", on_a_gpu)
    monkeypatch.setattr(norms, "triton_interpreted", lambda: False)
    try:
        assert norms.kernel_suffix("cpu", torch.float32) == ""
        assert norms.kernel_suffix("cpu", torch.bfloat16) is None
        assert norms.kernel_suffix("cuda", torch.float32) == "_triton"
        assert norms.kernel_suffix("cuda", torch.bfloat16) == "_triton"
        monkeypatch.setattr(norms, "triton_interpreted", lambda: True)
        norms.kernel_suffix.cache_clear()
        assert norms.kernel_suffix("cuda", torch.float32) is None
    finally:
        norms.kernel_suffix.cache_clear()
