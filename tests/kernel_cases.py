"""The CUDA and the Triton kernels, called without dispatch and autograd, and operands for them."""

import pytest
import torch
from conftest import DEVICE
from host import host_ops, needs_compiler

from fastjac.ops.dispatch import why_not

REASON = why_not("triton", DEVICE, torch.float32)
MARKS = {
    "cuda": [pytest.mark.slow, needs_compiler],
    "triton": [pytest.mark.triton, pytest.mark.skipif(REASON is not None, reason=str(REASON))],
}


class Kernels:
    """``Kernels(impl).act(z, ...)``; "cuda" means the CUDA sources built for the CPU."""

    def __init__(self, impl):
        self.impl, self.device = impl, "cpu" if impl == "cuda" else DEVICE

    def __getattr__(self, op):
        if self.impl == "cuda":
            return getattr(host_ops(), op)
        return getattr(torch.ops.fastjac, op + "_triton")


def by_impl(cuda, triton):
    """The cases of each implementation as pytest parameters: (kernels, case)."""
    return [
        pytest.param(Kernels(impl), case, marks=MARKS[impl], id=f"{impl}-{case}")
        for impl, cases in (("cuda", cuda), ("triton", triton))
        for case in cases
    ]


def _each(*impls):
    params = [pytest.param(Kernels(impl), marks=MARKS[impl], id=impl) for impl in impls]
    return pytest.mark.parametrize("kernels", params)


both, only_cuda, only_triton = _each("cuda", "triton"), _each("cuda"), _each("triton")


def laid_out(t, memory=None, offset=0):
    """The same numbers in a buffer that is NaN elsewhere, so that a read outside of them is seen.

    `memory` determines the strides, and `offset` is the number of elements after a 16-byte address.
    """
    like = {
        None: lambda: t,
        "channels_last": lambda: t.to(memory_format=torch.channels_last),
        "transposed": lambda: t.mT.contiguous().mT,
        "strided": lambda: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    }[memory]()
    reach = sum((size - 1) * stride for size, stride in zip(t.shape, like.stride(), strict=True))
    buffer = t.new_full((max(reach, 0) + 65,), torch.nan)
    return buffer.as_strided(t.shape, like.stride(), 16 + offset).copy_(t)


def randn(kernels, shape, dtype, memory=None, offset=0, seed=0):
    generator = torch.Generator().manual_seed(100 * sum(shape) + seed)
    t = torch.randn(shape, generator=generator).to(kernels.device, dtype)
    return laid_out(t, memory, offset)
