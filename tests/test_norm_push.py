"""``norm_push``: the tangent of a LayerNorm and its second-order terms, against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import Kernels, only_triton
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

        def layer_norm(a: Tensor) -> Tensor:
            centred = a - a.mean(-1, keepdim=True)
            hat = centred * (centred.square().mean(-1, keepdim=True) + EPS).rsqrt()
            return hat if weight is None else hat * weight

        pushed = [torch.func.jvp(layer_norm, (a,), (t,))[1] for t in self.t]
        total = sum((p * d).sum() for p, d in zip(pushed, self.delta, strict=True))
        leaves = [a] if weight is None else [a, weight]
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        return [torch.stack(pushed).detach(), *grads, *[None] * (2 - len(grads))]

    def run(self, op: Any, dtype: torch.dtype, wanted: bool = True) -> list[Tensor | None]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        t, delta, a = (s.to(dtype) for s in (self.t, self.delta, self.a))
        weight = None if self.weight is None else self.weight.to(dtype)
        mean, iota = (s.to(wide) for s in self.statistics())
        width = self.a.shape[-1]
        out, extra, product = op(t, delta, a, mean, iota, weight, width, wanted)
        assert extra.shape == a.shape and extra.dtype == wide
        return [out, extra, product.view(-1, width).sum(0) if product.numel() else None]


def check(op: Any, case: Case, dtype: torch.dtype, limit: float) -> None:
    truth = case.truth()
    for wanted in (True, False):
        found = case.run(op, dtype, wanted)
        if not wanted:
            assert found[0] is not None and found[0].numel() == 0
            found[0] = None
        for a, b in zip(found, truth, strict=True):
            assert b is not None or a is None
            if a is not None and b is not None:
                assert a.shape == b.shape and (a.double() - b).norm() <= limit * b.norm()


SHAPES = [(5, 7), (2, 3, 33), (3, 512), (2, 1000)]


@needs_library
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
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
    case = Case((4, 6), 2, True)
    truth = case.truth()
    case.t, case.delta = (t.mT.contiguous().mT for t in (case.t, case.delta))
    case.a = torch.stack([case.a, case.a], -1).flatten(-2)[..., ::2]
    for a, b in zip(case.run(torch.ops.fastjac.norm_push, torch.float64), truth, strict=True):
        torch.testing.assert_close(a, b)


@needs_library
def test_refusals():
    case = Case((4, 6), 1, True)
    mean, iota = case.statistics()
    good = [case.t, case.delta, case.a, mean, iota, case.weight, 6, True]
    op = torch.ops.fastjac.norm_push
    op(*good)
    for place in range(7):
        right = good[place]
        wrongs = (
            [0, -1, 5] if isinstance(right, int) else [right[:0], right.float(), right[..., 1:]]
        )
        for wrong in wrongs:
            if place in (3, 4) and wrong.numel() == right.numel():
                continue
            with pytest.raises(RuntimeError):
                op(*good[:place], wrong, *good[place + 1 :])
    with pytest.raises(RuntimeError, match="float32 or float64"):
        op(*(t.bfloat16() if isinstance(t, Tensor) else t for t in good))


def test_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "why_not", lambda impl, device, dtype: None)
    monkeypatch.setattr(norms, "triton_interpreted", lambda: False)
    norms.kernel_suffix.cache_clear()
    try:
        assert norms.kernel_suffix("cpu", torch.float32) == ""
        assert norms.kernel_suffix("cuda", torch.bfloat16) == "_triton"
    finally:
        norms.kernel_suffix.cache_clear()
