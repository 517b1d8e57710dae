"""Clocks, the order of the rounds, statistics and peak memory."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from bench_cases import CPU, FAST, named

from fastjac.bench import measure
from fastjac.bench.measure import (
    Options,
    Samples,
    error_of_median,
    interleave,
    launches,
    order_of_round,
    peak_bytes,
    quantiles,
)
from fastjac.bench.networks import FunctionalMlp, mlp
from fastjac.bench.problems import step_problem


def rounds(n: int, sample_s: float = 0) -> Options:
    return replace(FAST, min_rounds=n, max_rounds=n, sample_s=sample_s)


def turns(order: list[str]) -> str:
    """Repeats within a sample are adjacent; between samples the contestants take turns."""
    return "".join(name for k, name in enumerate(order) if k == 0 or order[k - 1] != name)


def test_rounds_are_interleaved_and_rotated():
    order = []
    steps = {name: functools.partial(order.append, name) for name in "abc"}
    samples = Samples()
    interleave(steps, {}, rounds(4), samples)
    assert {name: len(s) for name, s in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert turns(order).endswith("abc" + "bca" + "cab" + "cba")
    assert ["".join(order_of_round("abc", k)) for k in range(7)] == [
        *("abc", "bca", "cab", "cba", "acb", "bac", "abc")
    ]


def test_ceilings_end_each_round():
    order = []
    steps = {name: functools.partial(order.append, name) for name in "ab"}
    samples = Samples()
    interleave(steps, {"top": functools.partial(order.append, "T")}, rounds(3), samples)
    assert turns(order).endswith("abT" + "baT" + "baT")
    assert len(samples["top"]) == samples.n_rounds == 3


def test_a_sample_is_long_enough(monkeypatch):
    seen = []
    timed = measure.timed
    monkeypatch.setattr(measure, "timed", lambda *args: seen.append(args[1]) or timed(*args))
    interleave({"short": lambda: None}, {}, rounds(2, sample_s=5e-3), Samples())
    first, second = seen[-2:]
    # 5 ms of a call that takes well under 10 us
    assert first == second > 500


def test_quantiles_of_complete_rounds_only():
    samples = Samples({"a": [1.0, 2.0, 3.0, 4.0, 100.0], "b": [1.0] * 4})
    assert samples.n_rounds == 4
    p20, median, p80 = samples.quantiles_ms("a")
    assert (p20, median, p80) == pytest.approx((1600, 2500, 3400))


def test_peak_memory_of_a_known_pattern_and_a_quiet_profiler(capfd):
    mb = 1 << 20

    def step():
        a = torch.empty(4 * mb, dtype=torch.uint8)
        b = torch.empty(2 * mb, dtype=torch.uint8)
        del a
        c = torch.empty(1 * mb, dtype=torch.uint8)
        return b, c

    assert peak_bytes(step, CPU) == 6 * mb
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "after\n"


def test_peak_memory_sees_the_cpp_backward():
    x = torch.randn(1 << 18, requires_grad=True)  # 1 MiB

    def step():
        x.grad = None
        x.exp().sum().backward()  # saves exp(x), then allocates the gradient in C++

    step()
    x.grad = None
    assert 2 << 20 <= peak_bytes(step, CPU) < (2 << 20) + 4096


def test_peak_memory_counts_no_block_from_before():
    kept = []

    def allocate():
        kept.extend(torch.empty(4096, dtype=torch.uint8) for _ in range(64))

    peak_bytes(allocate, CPU)
    seen = {block.data_ptr() for block in kept}
    kept.clear()  # torch's profiler does not see that, and still has their sizes
    allocate()
    assert seen & {block.data_ptr() for block in kept}

    def step():
        kept.clear()
        return torch.empty(1 << 20, dtype=torch.uint8)

    assert peak_bytes(step, CPU) == 1 << 20


def test_peak_memory_of_the_attached_penalty():
    problem = step_problem(
        *(functools.partial(mlp, [64, 64, 64, 64, 64, 10]), (256, 64), "dreg"),
        device=CPU,
        dtype=torch.float32,
    )
    peaks = {}
    for contestant in named("eager", "fastjac"):
        prepared = contestant.setup(problem)
        prepared.step()
        prepared.release()
        peaks[contestant.name] = peak_bytes(prepared.step, CPU)
        prepared.release()
        assert abs(peak_bytes(prepared.step, CPU) - peaks[contestant.name]) <= 64  # kept numbers
        prepared.close()
    hidden = 256 * 64 * 4  # bytes of one pre-activation
    assert peaks["plain"] <= peaks["fastjac"] <= peaks["plain"] + 2.5 * hidden
    assert peaks["fastjac"] + 2 * hidden < peaks["eager"]


def test_launches_are_the_operations_that_are_not_views():
    x = torch.ones(2, 3, requires_grad=True)

    def step():
        y = x.t().unsqueeze(0).expand(4, 3, 2)[1:].detach()  # views
        return torch.ops.aten._unsafe_view(y.contiguous(), [18]).sum()

    assert launches(step) == 2
    # The backward counts too: sin; cos, and its product with the gradient.
    z, grad = torch.ones(2, requires_grad=True), torch.ones(2)
    assert launches(lambda: z.sin().backward(grad)) == 3


def test_a_module_and_a_sequential_launch_the_same():
    counts = []
    for network in (mlp, FunctionalMlp):
        problem = step_problem(
            functools.partial(network, [4, 4, 10]), (2, 4), "spectreg", device=CPU,
            dtype=torch.float32,
        )  # fmt: skip
        (plain,) = (c for c in named("plain"))
        counts.append(launches(plain.setup(problem).step))
    assert counts[0] == counts[1] > 5


def test_ratios_are_taken_round_by_round():
    # a machine at half speed for some rounds: the ratio stands still, medians would not
    speed = [1, 1, 2, 2, 2, 1, 1]
    samples = Samples({"a": [3.0 * s for s in speed], "b": [2.0 * s for s in speed]})
    ratio, error = samples.ratio("a", "b")
    assert ratio == pytest.approx(1.5) and error == pytest.approx(0, abs=1e-9)


def test_the_error_of_a_median_is_that_of_normal_samples():
    generator = torch.Generator().manual_seed(0)
    values = 3 * torch.randn(4000, 41, generator=generator)
    spread = values.median(dim=1).values.std().item()
    guesses = [error_of_median(*(quantiles(row)[k] for k in (0, 2)), 41) for row in values.tolist()]
    assert sum(guesses) / len(guesses) == pytest.approx(spread, rel=0.1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_freed_memory_stays_with_the_process():
    """In a process of its own, since `keep_memory` has no end."""
    code = """
        import resource, torch
        from fastjac.bench.measure import keep_memory

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                [torch.zeros(2**22) for _ in range(12)]  # 16 MB each
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        first = faults()
        keep_memory()
        faults()
        print(first, faults())
    """
    run = [sys.executable, "-c", textwrap.dedent(code)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    first, kept = map(int, printed.split())
    assert kept < first / 10
