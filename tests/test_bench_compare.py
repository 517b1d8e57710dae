"""What is reported as faster or slower, and what is not."""

from __future__ import annotations

import io
import math
import random
from dataclasses import replace

import pytest
from bench_cases import record
from rich.console import Console

from fastjac.bench.compare import compare, render
from fastjac.bench.records import Record

CASES = [f"case-{k}" for k in range(8)]
SLOWER = {("case-3", "fastjac"): 1.15}
#: eager moved between the runs, up on one case and down on the next
UNSTEADY = {(case, "eager"): 1.1 if k % 2 else 0.9 for k, case in enumerate(CASES)}


def run_of(scale: dict[tuple[str, str], float] | None = None, **values) -> list[Record]:
    """plain, eager and fastjac on every case; ``scale`` by case and contestant."""
    ratios = {"plain": 1.0, "eager": 2.5, "fastjac": 2.0}
    values = {"ratio_se": 0.005, "median_ms": 1.0, **values}
    return [
        record(case, contestant, ratio=ratio * (scale or {}).get((case, contestant), 1), **values)
        for case in CASES
        for contestant, ratio in ratios.items()
    ]


def verdicts(old: list[Record], new: list[Record]) -> dict[tuple[str, str], str]:
    return {(c.case, c.contestant): c.verdict for c in compare(old, new)[0] if c.verdict}


def text_of(old: list[Record], new: list[Record]) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    render(*compare(old, new), console)
    return " ".join(console.export_text().split())


def test_a_planted_slowdown_is_reported_and_the_way_back_is_faster():
    assert verdicts(run_of(), run_of(SLOWER)) == {("case-3", "fastjac"): "slower"}
    text = text_of(run_of(), run_of(SLOWER))
    assert "case-3 fastjac 2.00× 2.30× +15.0%" in text and text.count("slower") == 1
    assert "8 ratios compared, 1 beyond the noise" in text
    assert verdicts(run_of(SLOWER), run_of()) == {("case-3", "fastjac"): "faster"}


def test_equal_runs_agree_on_a_machine_at_half_speed_too():
    assert verdicts(run_of(), run_of(median_ms=2.0)) == {}
    assert "8 ratios compared, 0 beyond the noise" in text_of(run_of(), run_of())


def test_wide_rounds_mask_a_small_change_of_their_own_case_only():
    assert verdicts(run_of(ratio_se=0.05), run_of(SLOWER, ratio_se=0.05)) == {}
    both = run_of({("case-1", "fastjac"): 1.15, **SLOWER})
    new = [replace(r, ratio_se=0.05) if r.case == "case-1" else r for r in both]
    assert verdicts(run_of(), new) == {("case-3", "fastjac"): "slower"}


def test_what_torch_alone_moved_by_is_noise():
    assert verdicts(run_of(), run_of({**UNSTEADY, **SLOWER})) == {}
    # the yardstick itself is never reported, by however much it moved
    assert verdicts(run_of(), run_of({("case-0", "eager"): 3.0})) == {}


def test_the_noise_of_steps_is_not_that_of_activations():
    def acts(scale=None):
        return [replace(r, case=f"act-{r.case}", kind="elementwise") for r in run_of(scale)]

    found = verdicts([*run_of(), *acts()], [*run_of(UNSTEADY), *acts(SLOWER)])
    assert found == {("act-case-3", "fastjac"): "slower"}


def test_where_everybody_moved_it_was_the_plain_step():
    both = {("case-3", who): 1.4 for who in ("eager", "fastjac")}
    assert verdicts(run_of(), run_of(both)) == {}
    more = {**both, ("case-3", "fastjac"): 1.8}
    assert verdicts(run_of(), run_of(more)) == {("case-3", "fastjac"): "slower"}


def test_the_last_record_counts():
    old = [*run_of(SLOWER), *run_of()]
    assert verdicts(old, run_of()) == {}
    assert verdicts(old, run_of(SLOWER)) == {("case-3", "fastjac"): "slower"}


@pytest.mark.parametrize(
    "other",
    [
        *({"machine": "Another CPU"}, {"dtype": "float64"}, {"threads": 8}),
        *({"device": "cuda"}, {"torch": "2.12"}, {"status": "wrong"}, {"ratio": None}),
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_cannot_be_compared_is_named(other):
    foreign = [replace(r, **other) for r in run_of(SLOWER)]
    assert not compare(foreign, run_of())[0]
    text = text_of(foreign, run_of())
    assert "not in both files, 16: case-0 (eager), case-0 (fastjac), case-1 (eager)" in text
    # beside records of this machine, they do not disturb
    assert verdicts([*foreign, *run_of()], run_of()) == {}


def test_noise_alone_reports_nothing():
    """Within runs 1%, between them 3%: of 200 comparisons of 8 cases at most a few say anything."""
    draw = random.Random(0)

    def noisy():
        spread = math.hypot(0.01, 0.03 / math.sqrt(2))
        pairs = [(case, who) for case in CASES for who in ("eager", "fastjac")]
        return run_of({pair: math.exp(draw.gauss(0, spread)) for pair in pairs}, ratio_se=0.01)

    alarms = sum(bool(verdicts(noisy(), noisy())) for _ in range(200))
    assert alarms <= 10
