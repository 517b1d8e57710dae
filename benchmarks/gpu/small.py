"""Every CUDA kernel once on small shapes, for compute-sanitizer, or two of them, for ncu.

    python -m benchmarks.gpu.small DEVICE all|two

Shapes are odd, and tensors begin in the middle of a vector load. ``two`` runs the forward and the
backward of ``act_stats`` in bfloat16 on a large tensor.
"""

from __future__ import annotations

import sys

import torch

import fastjac

SHAPES = (((37, 130), 1), ((5, 33, 7), 1), ((5, 7, 33), 2), ((3, 5000), 1))


def elementwise(fn: str, dtype: torch.dtype, impl: str, device: str) -> None:
    z = torch.randn(1237, dtype=dtype).to(device)[1:].requires_grad_()
    (d,) = torch.autograd.grad(fastjac.act(z, fn=fn, impl=impl).sum(), z, create_graph=True)
    torch.autograd.grad(d.sum(), z, materialize_grads=True)
    for shape, dim in SHAPES:
        for per in ("channel", "sample"):
            z = torch.randn(shape, dtype=dtype).to(device).requires_grad_()
            a, s = fastjac.act_stats(z, fn, dim=dim, per=per, impl=impl)
            torch.autograd.grad((a.sum(), s.sum()), z)


def rows(dtype: torch.dtype, impl: str, device: str) -> None:
    for n, m in ((5, 10), (3, 1500)):
        z = torch.randn(n, m, dtype=dtype).to(device).requires_grad_()
        y = torch.arange(n, device=device)
        torch.autograd.grad(fastjac.softmax_residual(z, y, impl=impl).sum(), z)
    shapes = ((33, 7), (5, 4, 3, 3), (2, 5000))
    w = [torch.randn(shape, dtype=dtype).to(device).requires_grad_() for shape in shapes]
    torch.autograd.grad(torch.cat(fastjac.row_sqnorm(w, impl=impl)).sum(), w)


def two(impl: str, device: str) -> None:
    size = (8192, 8192) if device == "cuda" else (64, 48)
    z = torch.randn(size, device=device).bfloat16().requires_grad_()
    for _ in range(3):
        a, s = fastjac.act_stats(z, "gelu", impl=impl)
        torch.autograd.grad((a, s), z, (a.detach(), s.detach()))


if __name__ == "__main__":
    device, what = sys.argv[1:]
    impl = "cuda" if device == "cuda" else "auto"
    if what == "two":
        two(impl, device)
    else:
        for dtype in (torch.float32, torch.bfloat16):
            for fn in ("relu", "gelu", "tanh"):
                elementwise(fn, dtype, impl, device)
            rows(dtype, impl, device)
            print(f"{dtype} done", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
