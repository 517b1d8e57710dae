"""What is reported as faster or slower, and what is not."""

from __future__ import annotations

import io
import math
import random
from dataclasses import replace

import pytest
from bench_cases import record
from rich.console import Console

from fastjac.bench import Record, report_compare
from fastjac.bench.compare import FLOOR, compare

CASES = [f"case-{k}" for k in range(8)]


def run_of(
    scale: dict[tuple[str, str], float] | None = None, error: float = 0.005, **values
) -> list[Record]:
    """plain, eager and fastjac on every case; ``scale`` by case and contestant."""
    ratios = {"plain": 1.0, "eager": 2.5, "fastjac": 2.0}
    return [
        record(
            *(case, contestant),
            ratio=ratio * (scale or {}).get((case, contestant), 1.0),
            ratio_se=error,
            overhead=ratio * (scale or {}).get((case, contestant), 1.0),
            median_ms=ratio,
            p20_ms=0.99 * ratio,
            p80_ms=1.01 * ratio,
            **values,
        )
        for case in CASES
        for contestant, ratio in ratios.items()
    ]


def older(records: list[Record]) -> list[Record]:
    """As a version before ``ratio`` wrote them."""
    return [replace(r, ratio=None, ratio_se=None) for r in records]


def verdicts(old: list[Record], new: list[Record]) -> dict[tuple[str, str], str]:
    return {(c.name, c.contestant): c.verdict for c in compare(old, new).beyond}


def text_of(old: list[Record], new: list[Record], width: int = 140) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    report_compare.render(compare(old, new), console)
    return " ".join(console.export_text().split())


SLOWER = {("case-3", "fastjac"): 1.15}


@pytest.mark.parametrize("before", [lambda r: r, older], ids=["ratio", "older file"])
def test_a_planted_slowdown_is_reported(before):
    old, new = before(run_of()), run_of(SLOWER)
    result = compare(old, new)
    assert verdicts(old, new) == {("case-3", "fastjac"): "slower"} and result.slower
    (change,) = result.beyond
    assert (change.old, change.new) == (pytest.approx(2.0), pytest.approx(2.3))
    text = text_of(old, new)
    assert "case-3 fastjac 2.00× 2.30× +15.0%" in text and text.count("slower") == 1
    assert "8 cases compared (8 ratios), 1 beyond the noise" in text


def test_many_small_changes_are_reported_as_one():
    draw = random.Random(1)
    noisy = {(case, "eager"): math.exp(draw.gauss(0, 0.04)) for case in CASES}
    slower = {(case, "fastjac"): 1.12 * math.exp(draw.gauss(0, 0.01)) for case in CASES}
    assert verdicts(run_of(), run_of({**noisy, **slower})) == {
        ("all of double-backward (8)", "fastjac"): "slower"
    }
    (change,) = compare(run_of(), run_of({**noisy, **slower})).beyond
    assert change.log_ratio == pytest.approx(math.log(1.12), abs=0.01)
    assert {*change.cases} == {*CASES}
    # where eager moved as much, it was plain that moved
    everybody = {(case, "eager"): 1.12 for case in CASES}
    assert verdicts(run_of(), run_of({**everybody, **slower})) == {}


def test_faster_is_no_failure():
    old, new = run_of(SLOWER), run_of()
    assert verdicts(old, new) == {("case-3", "fastjac"): "faster"}
    assert not compare(old, new).slower


@pytest.mark.parametrize("before", [lambda r: r, older], ids=["ratio", "older file"])
def test_the_same_records_agree(before):
    records = before(run_of())
    assert verdicts(records, records) == {}
    assert "nothing beyond the noise" in text_of(records, records)


def test_a_machine_at_half_speed_changes_nothing():
    slow = [replace(r, median_ms=2 * (r.median_ms or 0)) for r in run_of()]
    assert verdicts(run_of(), slow) == {}


@pytest.mark.parametrize("before", [lambda r: r, older], ids=["ratio", "older file"])
def test_wide_rounds_mask_a_small_change(before):
    def wide(records):
        return [replace(r, ratio_se=0.05, p20_ms=0.6, p80_ms=1.4) for r in records]

    assert verdicts(before(wide(run_of())), before(wide(run_of(SLOWER)))) == {}
    # one wide case does not hide another one
    other = {("case-1", "fastjac"): 1.15, **SLOWER}
    new = [replace(r, ratio_se=0.05) if r.case == "case-1" else r for r in run_of(other)]
    assert verdicts(run_of(), new) == {("case-3", "fastjac"): "slower"}


def test_what_torch_alone_moved_by_is_noise():
    moved = {(case, "eager"): 1.1 if k % 2 else 0.9 for k, case in enumerate(CASES)}
    assert verdicts(run_of(), run_of({**moved, **SLOWER})) == {}
    # the yardstick itself is never reported, by however much it moved
    assert verdicts(run_of(), run_of({("case-0", "eager"): 3.0})) == {}


def test_the_noise_of_steps_is_not_that_of_activations():
    moved = {(case, "eager"): 1.1 if k % 2 else 0.9 for k, case in enumerate(CASES)}

    def with_activations(steps, scale=None):
        acts = {"kind": "elementwise", "phase": "forward"}
        return [*steps, *(replace(r, case=f"act-{r.case}", **acts) for r in run_of(scale))]

    found = verdicts(with_activations(run_of()), with_activations(run_of(moved), SLOWER))
    assert found == {("act-case-3", "fastjac"): "slower"}


def test_where_everybody_moved_it_was_the_plain_step():
    both = {("case-3", who): 1.4 for who in ("eager", "fastjac")}
    assert verdicts(run_of(), run_of(both)) == {}
    more = {**both, ("case-3", "fastjac"): 1.8}
    assert verdicts(run_of(), run_of(more)) == {("case-3", "fastjac"): "slower"}


def test_the_spread_of_repeated_runs_is_noise():
    unsteady = [run_of({("case-3", "fastjac"): scale}) for scale in (0.9, 1.1, 1.0)]
    assert verdicts([r for run in unsteady for r in run], run_of(SLOWER)) == {}
    steady = [run_of({("case-3", "fastjac"): scale}) for scale in (0.99, 1.01, 1.0)]
    old = [r for run in steady for r in run]
    assert verdicts(old, run_of(SLOWER)) == {("case-3", "fastjac"): "slower"}
    # a change that does not come back when it is measured again
    assert verdicts(run_of(), [*run_of(SLOWER), *run_of()]) == {}


def test_the_last_commit_counts():
    old = [*run_of(SLOWER, commit="aaa"), *run_of(commit="bbb")]
    assert verdicts(old, run_of(commit="ccc")) == {}
    assert verdicts(old, run_of(SLOWER, commit="ccc")) == {("case-3", "fastjac"): "slower"}
    # and what it replaced is no noise
    assert max(c.noise for c in compare(old, run_of()).changes) == FLOOR


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"machine": "Another CPU"}, "Another CPU"),
        ({"dtype": "float64"}, "float64"),
        ({"threads": 8}, "8 threads"),
        ({"device": "cuda"}, "M, 1"),
        ({"torch": "2.12"}, "torch 2.12"),
    ],
)
def test_what_cannot_be_compared_is_left_out_and_said(other, named):
    foreign = [replace(r, **other) for r in run_of(SLOWER)]
    result = compare(foreign, run_of())
    assert not result.changes and not result.controls
    assert sum(map(len, result.left_out.values())) == 4 * len(CASES)
    text = text_of(foreign, run_of())
    assert named in text and "left out, 16 records, old:" in text and "left out, 16" in text
    # beside records of this machine, they do not disturb
    assert verdicts([*foreign, *run_of()], run_of()) == {}


def test_without_a_plain_step_there_is_no_ratio():
    bare = [
        replace(r, ratio=None, ratio_se=None, overhead=None)
        for r in run_of(SLOWER)
        if r.contestant != "plain"
    ]
    result = compare(run_of(), bare)
    assert not result.changes
    assert "new: plain was not timed beside it: case-0 (eager, fastjac)" in text_of(run_of(), bare)


def test_wrong_and_failed_contestants_are_left_out():
    new = [
        replace(r, status="wrong", ratio=None, ratio_se=None, overhead=None)
        if (r.case, r.contestant) == ("case-2", "fastjac")
        else r
        for r in run_of()
    ]
    text = text_of(run_of(), new)
    assert "left out, 1 record, new: wrong, so not timed: case-2 (fastjac)" in text
    assert "7 cases compared" in text and "only among the old records, 1: case-2 (fastjac)" in text


def test_what_is_on_one_side_alone_is_counted_and_named():
    old = [r for r in run_of() if r.case != "case-7"]
    new = [r for r in run_of() if r.case not in ("case-0", "case-1")]
    text = text_of(old, new)
    assert "5 cases compared" in text
    assert "only among the old records, 4: case-0 (eager, fastjac), case-1 (eager, fastjac)" in text
    assert "only among the new records, 2: case-7 (eager, fastjac)" in text


def test_noise_alone_reports_nothing():
    """Within runs 1%, between them 3%: of 200 comparisons of 8 cases at most a few say anything."""
    draw = random.Random(0)

    def noisy():
        scale = {
            (case, who): math.exp(draw.gauss(0, math.hypot(0.01, 0.03 / math.sqrt(2))))
            for case in CASES
            for who in ("eager", "fastjac")
        }
        return run_of(scale, error=0.01)

    alarms = sum(bool(verdicts(noisy(), noisy())) for _ in range(200))
    assert alarms <= 10
