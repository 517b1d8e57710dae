"""Clocks, samples in turn, peak memory, and launches."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastjac.torch_private import TorchDispatchMode

Step = Callable[[], object]


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy(threads: int) -> str | None:
    """A warning if other processes use the cores that the run needs, else None."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cores = available_cores()
    if load + threads <= cores + 0.7:
        return None
    return (
        f"Other work is running on this machine (load {load:.1f}, {cores} cores, {threads} threads "
        "wanted). The p20 - p80 ranges will be wide; do not quote these times."
    )


def keep_memory() -> None:
    """Have glibc keep the freed memory of tensors up to 1 GiB, until the process ends.

    It would return some of it to the system in each step, and get it again. How much depends on
    what the other contestants have allocated. A step of a small ResNet had 7,400 page faults and
    took 22.9 ms, and takes 14.9 ms without.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        # Some versions take 32 MiB at most.
        if mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25):
            mallopt(trim_threshold, 2**31 - 1)


@dataclass(frozen=True)
class Options:
    """How a run measures.

    Attributes:
        device, dtype: The device and the dtype of networks and data.
        threads: The argument of ``torch.set_num_threads``.
        quick: Each case runs only the contestants of its quick list.
        budget_s: The sampling time for each contestant and case.
        min_rounds, max_rounds: The limits of the number of rounds that the budget allows.
        sample_s: The shortest sample; a shorter step is repeated within it. A training repeats one
            step, but the first call in a sample finds the code of the other contestants in the
            caches (benchmarks/NOTES.md).
        keep_going: A contestant with wrong gradients does not end the run.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int = field(default_factory=available_cores)
    quick: bool = False
    budget_s: float = 2.0
    min_rounds: int = 7
    max_rounds: int = 60
    sample_s: float = 1e-2
    keep_going: bool = False


def timed(step: Step, repeats: int, device: torch.device) -> float:
    """Seconds per call over ``repeats`` calls: wall clock on the CPU, CUDA events on a GPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    return (time.perf_counter() - began) / repeats


def warm_up(step: Step, options: Options) -> tuple[int, float]:
    """Call a step until caches and allocators have settled.

    Returns:
        The repeats that make a sample of at least ``options.sample_s``, and the expected seconds
        of such a sample.
    """
    sample_s, device = options.sample_s, options.device
    once = min(timed(step, 1, device) for _ in range(3))
    # A short step is timed again over many calls, because one call is mostly the clock's own cost.
    if once < sample_s / 4:
        once = timed(step, max(1, math.ceil(sample_s / 4 / max(once, 1e-7))), device)
    repeats = max(1, math.ceil(1.1 * sample_s / max(once, 1e-7)))
    return repeats, repeats * once


def order_of_round(names: Sequence[str], round_number: int) -> list[str]:
    """The contestants of a round: each round starts with the next, every other cycle is reversed.

    A step that runs after a large one finds a cold cache, so no contestant may always follow the
    same one.
    """
    cycle, first = divmod(round_number, len(names))
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if cycle % 2 else turned


#: The range from p20 to p80 of a normal distribution, in standard deviations.
FIFTHS = 2 * statistics.NormalDist().inv_cdf(0.8)


def error_of_median(p20: float, p80: float, n: int) -> float:
    """Standard error of the median of ``n`` values: ``sqrt(pi / 2) sigma / sqrt(n)``.

    sigma is taken from the range of the middle three fifths, which outliers do not change.
    """
    return math.sqrt(math.pi / 2 / n) * (p80 - p20) / FIFTHS


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


class Samples(dict[str, list[float]]):
    """Seconds per call of each contestant, one entry for each round."""

    @property
    def n_rounds(self) -> int:
        """The number of rounds in which every contestant was sampled."""
        return min(map(len, self.values()), default=0)

    def quantiles_ms(self, name: str) -> tuple[float, float, float]:
        """p20, median and p80 in ms."""
        return quantiles([1e3 * s for s in self[name][: self.n_rounds]])

    def ratio(self, name: str, base: str) -> tuple[float, float]:
        """Median over the rounds of the ratio of two times, and the standard error of its log.

        The ratio is taken round by round, so what slows both does not change it.
        """
        n = self.n_rounds
        pairs = zip(self[name][:n], self[base][:n], strict=True)
        p20, median, p80 = quantiles([math.log(mine / other) for mine, other in pairs])
        return math.exp(median), error_of_median(p20, p80, n)


def interleave(
    steps: Mapping[str, Step], ceilings: Mapping[str, Step], options: Options, samples: Samples
) -> None:
    """Sample the steps in turn, round after round, into ``samples``.

    The number of rounds is what the budget of the options allows, between their limits. If the run
    is interrupted, ``samples`` has what was sampled until then. The ceilings are sampled once at
    the end of each round, so each contestant in turn meets what they leave in the cache.
    """
    everything = {**steps, **ceilings}
    samples.update({name: [] for name in everything})
    plans = {name: warm_up(step, options) for name, step in everything.items()}
    round_s = sum(expected for _, expected in plans.values())
    affordable = int(options.budget_s * len(everything) / round_s)
    gc.collect()
    for k in range(min(max(affordable, options.min_rounds), options.max_rounds)):
        for name in (*order_of_round([*steps], k), *ceilings):
            samples[name].append(timed(everything[name], plans[name][0], options.device))


def peak_bytes(step: Step, device: torch.device) -> int:
    """Bytes allocated at the peak of one call, above the level before it.

    On a GPU this is the counter of the caching allocator. On the CPU torch's profiler records every
    allocation and free of torch's allocator, the C++ backward included. Blocks that exist before
    the call and are freed in it are not subtracted on the CPU, so callers release gradients first.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _muted_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        result = step()
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    tree = profile.profiler.kineto_results.experimental_event_tree()
    live: dict[int, int] = {}
    level = peak = 0
    for event in sorted(_allocations(tree), key=lambda event: event.start_time_ns):
        block = event.extra_fields
        if block.alloc_size > 0:
            live[block.ptr] = block.alloc_size
            level += block.alloc_size
        else:
            # The size of a freed block cannot be taken from the event. The profiler remembers
            # blocks of an earlier profile that were freed since, and reports their size for a
            # block of today at the same address.
            level -= live.pop(block.ptr, 0)
        peak = max(peak, level)
    return peak


class Launches(TorchDispatchMode):
    """Counts the dispatched operations that are not views.

    The number is the same on a CPU and on a GPU. What an operation calls inside itself is not
    counted, and neither is a kernel that compiled code or a CUDA graph starts without the
    dispatcher.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        # _unsafe_view is a view whose schema does not say so.
        self.total += not (func.is_view or func.name() == "aten::_unsafe_view")
        return func(*args, **(kwargs or {}))


def launches(step: Step) -> int:
    """The launches of one call, see :class:`Launches`."""
    with Launches() as counter:
        step()
    return counter.total


def _allocations(events: Sequence[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag.name == "Allocation":
            yield event
        yield from _allocations(event.children)


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Hide the log lines that the profiler writes from C++; they would tear the progress bar."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
