"""What the tests of launch configurations share: calls, and tuning with made-up times."""

import shutil

import pytest
import torch
from conftest import DEVICE

from fastjac import launch, tuning
from fastjac.activations import IDS
from fastjac.launch import KERNELS
from fastjac.ops.dispatch import FLOAT_DTYPES, accumulate_dtype, why_not

MEASURED: list = []  # kernel, dtype and configuration that are being measured
INDEX = torch.empty(0, device=DEVICE).get_device()
GELU = (IDS["gelu"], 0.0, 0.0)
needs_triton = pytest.mark.skipif(
    why_not("triton", DEVICE, torch.float32) is not None, reason="Triton does not run here"
)
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def use_everywhere(impl, config, dtypes=FLOAT_DTYPES, index=INDEX):
    """``config`` for every kernel of an implementation that takes as many numbers."""
    for name, kernel in KERNELS.items():
        for dtype in dtypes:
            if kernel.impl == impl and config in kernel.configs_for(dtype):
                launch.use(name, index, dtype, {1: config})


def operands(dtype, *shape, device=DEVICE):
    z, g, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    w = torch.rand(shape[1] if len(shape) > 1 else 1, device=device).to(accumulate_dtype(dtype))
    return z, g, v, w


def made_up_times(fastest, seen=None):
    """A timer: 1 ms for the ``fastest`` configuration of a kernel, 2 ms for the rest."""

    def timer(calls):
        name, _, config = MEASURED
        assert all(launch.config(name, calls[-1]()[0], size) == config for size in (1, 10**9))
        if seen is not None:
            seen.append((name, config))
        return 1.0 if config == fastest.get(name) else 2.0

    return timer


def tune(timer, **options):
    options = {"impls": ("triton",), "dtypes": (torch.float32,), "sizes": (1024,)} | options
    return tuning.tune(device=DEVICE, timer=timer, **options)


ACT = {"triton act forward": (512, 2), "triton act_backward": (2048, 8)}
