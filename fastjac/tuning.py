"""Choice of launch configurations by measurement, kept on disk per GPU and version.

    fastjac.tuning.tune()    # once on a machine: a minute or two

times the candidates of `fastjac.launch` with calls of a training step, makes launches take the
fastest and writes them to `fastjac.launch_cache`, which every later process reads when torch starts
CUDA. Without that, launches take the defaults. No launch ever tunes.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastjac import launch, launch_cache
from fastjac.activations import IDS
from fastjac.launch import KERNELS, Config, Kernel
from fastjac.launch_cache import Choice, Device, cache_file, load
from fastjac.ops.act_stats import BIAS, NONE
from fastjac.ops.autograd import below_autograd
from fastjac.ops.dispatch import FLOAT_DTYPES, OPS, accumulate_dtype
from fastjac.ops.registration import raw, suffix_of

__all__ = ["Choice", "cache_file", "gpu_ms", "load", "tune"]

SIZES = (2**16, 2**20, 2**24)
"""Numbers of elements that `tune` measures at: from a small layer's to one past every cache."""
KEEP_DEFAULT = 0.97
"""A candidate must take less than this share of the default's time: runs differ by a percent."""
ROUNDS, REPLAYS, MOST_SETS = 2, 10, 64

Call = Callable[[], Sequence[Tensor]]
Timer = Callable[[Sequence[Call]], float]


def tune(
    ops: Iterable[str] | None = None,
    impls: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    sizes: Iterable[int] = SIZES,
    budget_s: float = 120.0,
    device: Device = None,
    timer: Timer | None = None,
) -> list[Choice]:
    """Times the candidates of every kernel on a GPU, and has launches take the fastest from now on.

    Call it before training, on a GPU that does nothing else. What is chosen is written to
    `cache_file`, beside what was chosen earlier for other ops, dtypes and sizes. Results stay: a
    candidate whose results differ from the default's is not taken (sums by float atomics, which
    differ each time, may), nor one that does not run.

    Args:
        ops: keys of `fastjac.ops.dispatch.OPS`; None is all that have candidates.
        impls: "cuda", "triton" or both; None is what ``impl="auto"`` takes.
        dtypes: of the tensors; other dtypes keep what they have.
        sizes: numbers of elements, powers of two from 1024 on; a launch of another size takes what
            was chosen at the nearest.
        budget_s: seconds after which no further measurement is begun. What is left out keeps what
            it has; a call with fewer ``ops`` or ``sizes`` can fetch it.
        device: the GPU; None is the current one.
        timer: milliseconds of one call, given calls that differ in their tensors alone; None is
            `gpu_ms`.

    Returns:
        What was chosen, in the order of measuring; ``print(*tune(), sep="\\n")`` shows it.

    Raises:
        ValueError: an op, impl or dtype that is unknown, or a size that is no power of two.
        RuntimeError: inside a CUDA-graph capture, no GPU, an impl that cannot run, or a cache
            directory that cannot be written.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tune() inside a CUDA-graph capture: call it before the capture")
    device = launch_cache.resolve(device)
    if timer is None and (device.type != "cuda" or not torch.cuda.is_available()):
        raise RuntimeError(f"device={device}: tune() measures GPUs, and torch finds none there")
    plan = list(_plan(ops, impls, list(dtypes), list(sizes), device))
    if not plan:
        raise RuntimeError(
            f"tune() has nothing to measure: of what impls={impls} selects on {device}, nothing has"
            " candidates; `fastjac info` says what can run"
        )
    path = _writable(cache_file(device))
    deadline = time.monotonic() + budget_s
    made: list[Choice] = []
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with on_device:
            for kernel, dtype, size in plan:
                if time.monotonic() > deadline:
                    break
                try:
                    made.append(_measure(kernel, dtype, size, device, timer or gpu_ms))
                except Exception as error:  # the other kernels can be measured all the same
                    warnings.warn(
                        f"{kernel.name}, {dtype}, {size} keeps what it has: {error!r}", stacklevel=2
                    )
    finally:  # an interrupt keeps what is done
        if made:
            known = {(c.kernel, c.dtype, c.size): c for c in (*_known(path, device), *made)}
            launch_cache.use(known.values(), device)
            launch_cache.write(path, known.values(), device)
    return made


def _plan(
    ops: Iterable[str] | None,
    impls: Iterable[str] | None,
    dtypes: list[torch.dtype],
    sizes: list[int],
    device: torch.device,
) -> Iterator[tuple[Kernel, torch.dtype, int]]:
    tunable = list(dict.fromkeys(kernel.op for kernel in KERNELS.values()))
    chosen, able = list(tunable if ops is None else ops), list(impls or ("auto",))
    for op in chosen:
        if op not in tunable:
            raise ValueError(f"ops: {op!r} has no candidates; choose from {', '.join(tunable)}")
    for dtype in dtypes:
        if dtype not in FLOAT_DTYPES:
            known = ", ".join(launch_cache.DTYPES)
            raise ValueError(f"dtypes: {dtype} is not supported; choose from {known}")
    for size in sizes:
        if type(size) is not int or size < 1024 or size.bit_count() != 1:
            raise ValueError(f"sizes: {size!r} is not a power of two from 1024 on")
    wanted = {
        (op, OPS[op].select(impl, device, dtype), dtype)
        for op, dtype, impl in itertools.product(chosen, dtypes, able)
    }
    for size, kernel, dtype in itertools.product(sizes, KERNELS.values(), dtypes):
        if (kernel.op, kernel.impl, dtype) in wanted:
            yield kernel, dtype, size


def _writable(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise RuntimeError(
            f"tune() cannot write to {path.parent} ({error.strerror}): set FASTJAC_CACHE_DIR to a"
            " directory that can be written"
        ) from error
    return path


def _known(path: Path, device: torch.device) -> list[Choice]:
    try:
        return launch_cache.read(path, device)
    except Exception:  # it is about to be written anew
        return []


# ---- one measurement


def _measure(
    kernel: Kernel, dtype: torch.dtype, size: int, device: torch.device, timer: Timer
) -> Choice:
    calls = _calls(kernel, dtype, size, device)
    place = kernel.name, launch_cache.index_of(device), dtype
    with launch.using(*place, kernel.default):
        expected = calls[0]()
    times: dict[Config, float] = {}
    for config in kernel.configs_for(dtype) * ROUNDS:  # in turn: a clock that drifts favours none
        with launch.using(*place, config):
            try:
                right = _agree(calls[0](), expected, kernel.atomic)
                ms = timer(calls) if right else math.inf
            except Exception:
                if config == kernel.default:
                    raise
                ms = math.inf  # more registers or shared memory than this GPU has
        times[config] = min(ms, times.get(config, math.inf))
    best = min(times, key=lambda config: times[config])
    if not times[best] < KEEP_DEFAULT * times[kernel.default]:
        best = kernel.default
    name = str(dtype).removeprefix("torch.")
    return Choice(kernel.name, name, size, best, times[best], times[kernel.default])


def _agree(got: Sequence[Tensor], expected: Sequence[Tensor], atomic: bool) -> bool:
    """Equal; sums by atomics, which come last, within what their order can make."""
    pairs = list(zip(got, expected, strict=True))
    if atomic:
        sums, wanted = pairs.pop()
        if not (sums - wanted).abs().max() <= 1e-4 * wanted.abs().max():
            return False
    return all(torch.equal(a, b) for a, b in pairs)


def gpu_ms(calls: Sequence[Call]) -> float:
    """Milliseconds of one call on the GPU alone: median over replays of a graph of all calls.

    Launched one by one, calls of a few microseconds would show the time that Python takes.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        kept = [call() for call in calls]  # alive, so that no two calls write the same memory
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    del kept
    times = [begun.elapsed_time(ended) for begun, ended in itertools.pairwise(marks)]
    return statistics.median(times) / len(calls)


def _calls(kernel: Kernel, dtype: torch.dtype, size: int, device: torch.device) -> list[Call]:
    """One call with so many sets of tensors that they are past the second-level cache."""
    sets = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        sets = min(max(2, math.ceil(2 * cache / (size * dtype.itemsize))), MOST_SETS)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return [_call(kernel, size, normal) for _ in range(sets)]


def _call(kernel: Kernel, size: int, normal: Callable[..., Tensor]) -> Call:
    """A call as in a training step: GELU, and shapes of a common layer."""
    name, *kind = kernel.call.split()
    op, gelu = raw(name + suffix_of(kernel.impl)), (IDS["gelu"], 0.0, 0.0)
    half, third = 1 << size.bit_length() // 2, 1 << size.bit_length() // 3

    def calling(*args: Any) -> Call:
        def call() -> Sequence[Tensor]:
            with below_autograd():
                out = op(*args)
            return (out,) if isinstance(out, Tensor) else out

        return call

    if name == "act":
        product = kind == ["vjp"]
        return calling(normal(size), normal(size) if product else None, int(product), *gelu)
    if name == "act_backward":
        return calling(normal(size), normal(size), normal(size), 1, *gelu)
    if name.startswith("act_stats"):
        sums, along = kind
        columns = min(512, half)
        shape: tuple[int, ...] = (size // columns, columns)
        if along == "rows":
            c, p = min(64, third), min(1024, third)
            shape = (size // (c * p), c, p)
        z, scale, rest = normal(*shape), 1 / shape[0], (sums != "atomic", *gelu)
        if name == "act_stats":
            return calling(z, None, 1, False, scale, *rest)
        statistic = NONE if sums == "none" else BIAS
        weight = normal(shape[1], dtype=accumulate_dtype(z.dtype))
        return calling(z, normal(*shape), None, weight, 1, statistic, scale, *rest)
    columns = min(1024, half)
    weights = [normal(size // (4 * columns), columns) for _ in range(4)]
    c_rows = normal(4 * len(weights[0]), dtype=accumulate_dtype(weights[0].dtype))

    def row_sqnorm_backward() -> Sequence[Tensor]:
        grads = [torch.empty_like(w) for w in weights]
        op(grads, weights, c_rows, False)
        return grads

    return row_sqnorm_backward
