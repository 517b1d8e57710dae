"""A device that pretends to be a GPU: its tensors are in the memory of the host.

Every operation runs the CPU's kernel, fastjac's ops that of their CPU implementation, and raises
for a tensor of the CPU, as CUDA does. With `strict` it also raises for what would make Python wait
for a GPU. So it finds, without a GPU, tensors and generators on the wrong device, code that only
looks at CPU tensors, and synchronisations. It says nothing about kernels, streams or speed.

    FASTJAC_TEST_DEVICE=pretend pytest -m "not slow" tests/test_chain.py

runs tests on it as they run on a GPU (`conftest.ON_DEVICE`). It compiles `shim/pretend.cpp` for
half a minute, once.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

NAME = "pretend"
# A test of what it lacks: GroupNorm of channels_last tensors.
LACKING = ("test_operation_that_vmap_cannot_map",)
SOURCE = Path(__file__).parent / "shim/pretend.cpp"


def _library() -> Any:
    from torch.utils.cpp_extension import load

    # ninja is installed with torch, which is not always on the PATH.
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    return load("fastjac_pretend", [str(SOURCE)], extra_cflags=["-O0"])


def set_up() -> None:
    """Register the device with torch, and with fastjac as one that its ops run on."""
    if NAME in vars(torch):
        return
    global LIBRARY
    LIBRARY = _library()
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count, module.current_device = lambda: 1, lambda: 0
    module.device = contextlib.nullcontext
    module.manual_seed_all = lambda seed: None  # its generator is that of the CPU
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    torch._register_device_module(NAME, module)
    sys.modules[f"torch.{NAME}"] = module

    from fastjac.layerwise import statistics
    from fastjac.ops import dispatch

    why_not = dispatch.why_not

    def why_not_here(impl: str, device_type: str, dtype: torch.dtype) -> str | None:
        if device_type == NAME and impl == "cuda":  # the ops without a suffix
            return why_not("cpu", "cpu", dtype)
        return why_not(impl, device_type, dtype)

    select = dispatch._select_cached

    def select_here(op: str, impl: str, device_type: str, dtype: torch.dtype) -> str:
        # Raw ops call the implementation without a suffix by the type of its device.
        return select(op, "cuda" if impl == NAME else impl, device_type, dtype)

    dispatch.why_not, dispatch._select_cached = why_not_here, select_here
    statistics.TAPPED.add(NAME)


@contextlib.contextmanager
def strict() -> Iterator[None]:
    """Raises for what would make Python wait for a GPU."""
    LIBRARY.strict(True)
    try:
        yield
    finally:
        LIBRARY.strict(False)
