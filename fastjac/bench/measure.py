"""Clocks, samples in turn, and peak memory."""

from __future__ import annotations

import contextlib
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

from fastjac.bench.options import Options

Step = Callable[[], object]


def timed(step: Step, repeats: int, device: torch.device) -> float:
    """Seconds of one call, over ``repeats`` calls: wall clock on the CPU, CUDA events on a GPU."""
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


def warm_up(step: Step, device: torch.device, sample_s: float) -> tuple[int, float]:
    """Calls until caches and allocators have settled.

    Returns:
        Repeats that make a sample of at least ``sample_s``, and the expected seconds of a sample.
    """
    once = min(timed(step, 1, device) for _ in range(3))
    # a short step is timed again over many calls: one call is mostly the clock's own cost
    if once < sample_s / 4:
        once = timed(step, max(1, math.ceil(sample_s / 4 / max(once, 1e-7))), device)
    repeats = max(1, math.ceil(1.1 * sample_s / max(once, 1e-7)))
    return repeats, repeats * once


def order_of_round(names: Sequence[str], round_number: int) -> list[str]:
    """The contestants in turn, each round starting with the next one, every other cycle backwards.

    Whoever runs after a big step finds a cold cache; so nobody always follows the same one.
    """
    cycle, first = divmod(round_number, len(names))
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if cycle % 2 else turned


#: of a normal distribution: the range p20 to p80 in standard deviations
FIFTHS = 2 * statistics.NormalDist().inv_cdf(0.8)


def error_of_median(p20: float, p80: float, n: int) -> float:
    """Standard error of the median of ``n`` values, from the range of their middle three fifths.

    ``sqrt(pi / 2) sigma / sqrt(n)``, with sigma taken from that range, which outliers do not move.
    """
    return math.sqrt(math.pi / 2 / n) * (p80 - p20) / FIFTHS


@dataclass
class Samples:
    """Seconds per call of each contestant, one entry a completed round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    @property
    def n_rounds(self) -> int:
        """Rounds in which every contestant was sampled."""
        return min(map(len, self.seconds.values()), default=0)

    def quantiles_ms(self, name: str) -> tuple[float, float, float]:
        """p20, median and p80 in ms."""
        return quantiles([1e3 * s for s in self.seconds[name][: self.n_rounds]])

    def ratio(self, name: str, base: str) -> tuple[float, float]:
        """Median over the rounds of a contestant's time over another's, and the error of its log.

        Taken round by round, it is not moved by what slows both.
        """
        n = self.n_rounds
        pairs = zip(self.seconds[name][:n], self.seconds[base][:n], strict=True)
        p20, median, p80 = quantiles([math.log(mine / other) for mine, other in pairs])
        return math.exp(median), error_of_median(p20, p80, n)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p20, median and p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return fifths[0], statistics.median(values), fifths[3]


def interleave(
    steps: Mapping[str, Step],
    options: Options,
    samples: Samples,
    ceilings: Mapping[str, Step] | None = None,
) -> None:
    """Sample the steps in turn, round after round, into ``samples``.

    The number of rounds is what fits the budget of the options, between their limits. What was
    sampled stays in ``samples`` if the caller is interrupted.

    Args:
        steps: the contestants.
        options: device, budget, limits of the rounds and length of a sample.
        samples: filled.
        ceilings: sampled once at the end of each round, so that what they leave in the cache meets
            each contestant in turn.
    """
    ceilings = ceilings or {}
    names = [*steps, *ceilings]
    everything = {**steps, **ceilings}
    device = options.device
    samples.seconds.update({name: [] for name in names})
    plans = {name: warm_up(step, device, options.sample_s) for name, step in everything.items()}
    round_s = sum(expected for _, expected in plans.values())
    affordable = int(options.budget_s * len(names) / round_s)
    gc.collect()
    for k in range(min(max(affordable, options.min_rounds), options.max_rounds)):
        for name in (*order_of_round([*steps], k), *ceilings):
            samples.seconds[name].append(timed(everything[name], plans[name][0], device))


def peak_bytes(step: Step, device: torch.device) -> int:
    """Bytes allocated at the peak of one call, above the level before it.

    On the CPU every allocation and free that passes through torch's allocator is recorded by
    torch's profiler, C++ backward included; on a GPU it is the caching allocator's own counter.
    Blocks that exist before the call and are freed in it are not subtracted on the CPU, so callers
    release gradients first.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _muted_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        result = step()
    del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = sorted(
        _allocations(profile.profiler.kineto_results.experimental_event_tree()),
        key=lambda event: event.start_time_ns,
    )
    live: dict[int, int] = {}
    level = peak = 0
    for event in events:
        block = event.extra_fields
        if block.alloc_size > 0:
            live[block.ptr] = block.alloc_size
            level += block.alloc_size
        else:
            # Not its own size: the profiler remembers, from an earlier profile, blocks that were
            # freed since, and gives their size to a block of today at the same address.
            level -= live.pop(block.ptr, 0)
        peak = max(peak, level)
    return peak


def kernels(step: Step, device: torch.device) -> int | None:
    """How many kernels one call launches on a GPU; None on the CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with _muted_stderr(), torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize(device)
    on_gpu = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_gpu for event in profile.events() or ())


def _allocations(events: Sequence[Any]) -> Iterator[Any]:
    for event in events:
        if event.tag.name == "Allocation":
            yield event
        yield from _allocations(event.children)


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Silence the profiler's C++ log lines, which would tear the progress bar."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
