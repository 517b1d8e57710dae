"""A run: nothing wrong is timed, what is done is kept, nothing stays behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import (
    FAST,
    interrupting,
    named,
    not_a_number,
    planted,
    slightly_off,
    tiny_case,
    tiny_problem,
    without_second_order,
)

from fastjac.bench import steps
from fastjac.bench.contestants import Contestant
from fastjac.bench.measure import busy
from fastjac.bench.runner import run
from fastjac.observers import OBSERVERS


def test_no_penalty_stays_attached():
    before = list(OBSERVERS)
    closed = []

    def setup(problem):
        wrong = replace(problem, weight=2 * problem.weight)
        prepared = steps.ours(wrong)

        def close():
            closed.append(1)
            prepared.close()

        return replace(prepared, close=close)

    contestants = [*named("fastjac", "fastjac:cpu"), Contestant("planted", setup)]
    outcome = run([tiny_case("dreg")], contestants, FAST)
    assert [r.contestant for r in outcome.bad] == ["planted"]
    assert closed == [1] and before == OBSERVERS


@pytest.mark.parametrize("gradients", [without_second_order, slightly_off, not_a_number])
def test_a_wrong_contestant_is_caught_and_never_timed(gradients):
    contestants = [*named("eager"), planted("planted", gradients)]
    outcome = run([tiny_case()], contestants, FAST)
    (bad,) = outcome.bad
    assert (bad.case, bad.contestant, bad.status) == ("spectreg-tiny", "planted", "wrong")
    assert bad.median_ms is None and not bad.rel_err <= bad.rel_err_limit
    assert [r.contestant for r in outcome.records if r.median_ms] == ["plain", "eager"]


def test_a_case_that_cannot_be_built_leaves_the_others_alone():
    def build(device, dtype):
        raise MemoryError("too large")

    cases = [replace(tiny_case(name="large"), build=build), tiny_case(name="small")]
    outcome = run(cases, named("eager"), FAST)
    assert [(r.case, r.status) for r in outcome.records] == [
        *(("large", "failed"), ("large", "failed"), ("small", "ok"), ("small", "ok")),
    ]


def test_a_failing_contestant_leaves_the_others_alone():
    def setup(problem):
        raise RuntimeError("no such kernel\nsecond line")

    outcome = run([tiny_case()], [*named("eager"), Contestant("broken", setup)], FAST)
    (bad,) = outcome.bad
    assert (bad.contestant, bad.status) == ("broken", "failed")
    assert "no such kernel" in bad.message and "\n" not in bad.message
    assert [r.contestant for r in outcome.records if r.status == "ok"] == ["plain", "eager"]


def test_ctrl_c_keeps_the_current_case_once_it_has_rounds():
    options = replace(FAST, min_rounds=50, max_rounds=50, sample_s=0)
    outcome = run([tiny_case()], [*named("eager"), interrupting(30)], options)
    assert outcome.interrupted
    assert {r.contestant for r in outcome.records} == {"plain", "eager", "interrupting"}
    assert all(3 <= r.n_rounds < 50 and r.median_ms for r in outcome.records)


def test_a_busy_machine_is_warned_about(monkeypatch):
    monkeypatch.setattr("fastjac.bench.measure.available_cores", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (2.5, 0, 0))
    assert busy(2) is None
    assert "load 2.5, 4 cores, 3 threads" in (busy(3) or "")


def test_a_host_case_runs_on_one_thread_and_is_timed_without_a_ceiling():
    seen = []

    def build(device, dtype):
        seen.append(torch.get_num_threads())
        return tiny_problem("spectreg", dtype)

    host = replace(tiny_case(name="host"), kind="host", threads=1, build=build)
    compiled = Contestant("compiled", steps.eager, compiler="aot_eager")
    contestants = [*named("eager", "fastjac"), compiled]
    records = run([host, tiny_case()], contestants, replace(FAST, threads=2)).records
    assert seen == [1]
    assert [r.threads for r in records] == [1] * 4 + [2] * 4
    for record in records[:4]:
        assert record.status == "ok" and record.median_ms
        assert record.peak_mb is record.pct_gemm is record.gflop is None
    counts = [r.launches for r in records]
    assert counts[:4] == counts[4:] and counts[3] is None
    assert 0 < counts[2] < counts[1] and counts[0] < counts[1]


def test_settings_are_restored():
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    run([tiny_case()], named("plain"), replace(FAST, threads=before[0] + 1))
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before
