"""Launch configurations: those that a kernel may run with, and the one that a launch takes.

A launch takes its kernel's default unless `fastjac.tuning` has chosen another one for the device,
the dtype and the size. The lookup is one dict access (in C++ one atomic load), the same inside a
CUDA-graph capture as outside; it never measures and never touches a file.

What may vary, and what not:

- Elementwise results do not depend on tile, block, warps or grid, so there these vary: all of
  `act`, the backward of `row_sqnorm`, the backward of `act_stats` that sums nothing (``none``).
- The order of a sum does. A tile is summed in the order of its threads, partial sums in that of the
  blocks. Sums that are promised the same bits (of ``deterministic=True``, and the row norms) have
  one configuration, in Triton and in CUDA; those by float atomics (``atomic``) promise none.
- Triton's ``num_stages`` never varies: with two stages the compiler fuses other multiplications
  with additions (mish, float32, sm_90: 40 FMAs for 48), and results differ in the last bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastjac.ops.dispatch import FLOAT_DTYPES

Config = tuple[int, ...]
SIZE_CLASSES = 65
"""A size class is the number of bits of the number of elements (csrc/cuda/launch_config.h)."""


@dataclass(frozen=True)
class Kernel:
    """A kernel in one kind of call.

    Attributes:
        impl: "triton" or "cuda".
        op: the op it belongs to, a key of `fastjac.ops.dispatch.OPS`.
        call: the raw op without its suffix, ``act_backward``, and what kind of call of it.
        parameters: what the numbers of a configuration are.
        configs: the configurations it may run with, the default first.
        not_float64: those of them that spill registers there.
        atomic: whether sums differ from one to the other.
    """

    impl: str
    op: str
    call: str
    parameters: tuple[str, ...]
    configs: tuple[Config, ...]
    not_float64: tuple[Config, ...] = ()
    atomic: bool = False

    @property
    def name(self) -> str:
        return f"{self.impl} {self.call}"

    @property
    def default(self) -> Config:
        return self.configs[0]

    def configs_for(self, dtype: torch.dtype) -> tuple[Config, ...]:
        left_out = self.not_float64 if dtype == torch.float64 else ()
        return tuple(config for config in self.configs if config not in left_out)


# ---- Triton

# Block, warps. Bound by memory: 8 elements a thread are one or two 16-byte accesses of each operand
# (four of float64), 4 leave registers for twice the threads, 16 have twice the bytes in flight.
# Blocks of 2 warps even out the last wave, of 8 they are fewer to start.
_ACT = ((1024, 4), (512, 2), (512, 4), (1024, 8), (2048, 8), (2048, 4))
# 255 registers and 280 bytes spilled in the double backward of mish.
_ACT_NOT_FLOAT64 = ((2048, 4),)

# Elements of a tile (half of them float64), warps, programs that strips are split into. 8 elements
# a thread: twice as many take up to 230 registers and spill for some activations. 2048 programs are
# two waves of 132 processors that hold 8 each.
STATS = (1024, 4, 2048)
# One wave, with half the atomics; four, of which the last is more even; 4 elements a thread, so
# twice the threads; blocks of 2 or 8 warps.
_STATS = (
    STATS, (1024, 4, 1024), (1024, 4, 4096), (1024, 8, 2048), (512, 2, 4096), (2048, 8, 1024),
)  # fmt: skip

# Bytes of a weight that a program moves at once, warps: two 16-byte accesses in flight a thread.
ROWS = (4096, 4)
# One access, for twice the threads; blocks of 8 or 16 warps for long rows. Four accesses took up to
# 242 of 255 registers.
_ROWS = (ROWS, (4096, 8), (8192, 8), (16384, 16))

# ---- CUDA

# Threads of a block: no more than it is compiled for, so that the machine code stays. Blocks come
# and go as a whole: 48 registers leave room for 1365 threads, five blocks of 256, ten of 128 or 21
# of 64.
_THREADS = ((256,), (128,), (64,))
# Blocks from which a block takes more than one pack a thread: 512 are a wave of two to four on each
# of 132 processors; more of them even out the last wave, and cost more atomics.
_BLOCKS = ((1024,), (512,), (2048,), (4096,))
# 16-byte packs of a row to each of its threads, once the row has a whole warp.
_PACKS = ((4,), (2,), (8,), (16,))


def _kernels() -> Iterator[Kernel]:
    for call in ("act forward", "act vjp", "act_backward"):
        yield Kernel("triton", "act", call, ("block", "warps"), _ACT, _ACT_NOT_FLOAT64)
        yield Kernel("cuda", "act", call, ("threads",), _THREADS)
    for call in ("act_stats atomic", "act_stats_backward atomic", "act_stats_backward none"):
        for along in ("columns", "rows"):  # that are summed
            rest: dict = {"atomic": call.endswith("atomic")}
            name, stats = f"{call} {along}", ("tile", "warps", "programs")
            yield Kernel("triton", "act_stats", name, stats, _STATS, **rest)
            yield Kernel("cuda", "act_stats", name, ("blocks",), _BLOCKS, **rest)
    call = "row_sqnorm_backward"
    yield Kernel("triton", "row_sqnorm", call, ("tile_bytes", "warps"), _ROWS)
    yield Kernel("cuda", "row_sqnorm", call, ("packs",), _PACKS)


KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _kernels()}
CUDA_KERNELS = [name for name, kernel in KERNELS.items() if kernel.impl == "cuda"]
"""In the order of `Tunable` in csrc/cuda/launch_config.h."""

_DEFAULTS = {name: kernel.default for name, kernel in KERNELS.items()}
_chosen: dict[tuple[str, int, torch.dtype], tuple[Config, ...]] = {}


def config(kernel: str, t: Tensor, size: int) -> Config:
    """The configuration of a launch over ``size`` elements on ``t``'s device and of its dtype."""
    by_class = _chosen.get((kernel, t.get_device(), t.dtype))
    return _DEFAULTS[kernel] if by_class is None else by_class[size.bit_length()]


def use(kernel: str, device: int, dtype: torch.dtype, choices: Mapping[int, Config]) -> None:
    """Makes launches take what was chosen.

    Args:
        kernel: a key of `KERNELS`.
        device: index of the GPU; -1 is the CPU, for the interpreter.
        dtype: of the elements.
        choices: configurations by the size they were chosen at; other sizes take that of the
            nearest, by size class. Empty: the default.
    """
    sizes = sorted(choices, reverse=True)
    by_class = tuple(
        choices[min(sizes, key=lambda size: abs(size.bit_length() - bits))]
        for bits in range(SIZE_CLASSES if choices else 0)
    )
    _set(kernel, device, dtype, by_class or None)


@contextlib.contextmanager
def using(kernel: str, device: int, dtype: torch.dtype, config: Config) -> Iterator[None]:
    """Inside, launches of all sizes take ``config``."""
    before = _chosen.get((kernel, device, dtype))
    try:
        use(kernel, device, dtype, {1: config})
        yield
    finally:
        _set(kernel, device, dtype, before)


def _set(kernel: str, device: int, dtype: torch.dtype, by_class: tuple[Config, ...] | None) -> None:
    if KERNELS[kernel].impl == "cuda":
        values = [config[0] for config in by_class or ((0,),) * SIZE_CLASSES]  # 0: its default
        _set_cuda(CUDA_KERNELS.index(kernel), device, FLOAT_DTYPES.index(dtype), values)
    if by_class is None:
        _chosen.pop((kernel, device, dtype), None)
    else:
        _chosen[kernel, device, dtype] = by_class


def _set_cuda(kernel: int, device: int, dtype: int, values: list[int]) -> None:
    torch.ops.fastjac.set_launch(kernel, device, dtype, values)
