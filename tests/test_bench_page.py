"""The tables of the README: only measured rows, of one run, with the machine named."""

import pytest
from bench_cases import record

from fastjac.bench import page


def rows(case="spectreg-a", commit="aaa", machine="M", eager=2.0, ours=1.5, **more):
    common = {"case": case, "commit": commit, "machine": machine, "kind": "step", **more}
    return [
        record(contestant="plain", median_ms=10.0, overhead=1.0, **common),
        record(contestant="eager", median_ms=10 * eager, overhead=eager, peak_mb=8.0, **common),
        record(contestant="fastjac", median_ms=10 * ours, overhead=ours, peak_mb=4.0, **common),
    ]


def page_of(records, table="time"):
    text = f"before\n<!-- bench: {table} -->\nold\n<!-- bench: end -->\nafter\n"
    return page.update(text, records)


def test_a_table():
    text = page_of(rows())
    assert "old" not in text and text.startswith("before\n<!-- bench: time -->\n")
    assert text.endswith("<!-- bench: end -->\nafter\n")
    assert "M, 2 threads, float32, torch 2.13, commit aaa:" in text
    assert "| case | plain, ms | eager | fastjac |\n| --- | --- | --- | --- |\n" in text
    assert "| `spectreg-a` | 10.0 | 2.00× | **1.50×** |" in text
    assert page_of(rows()) == page.update(text, rows())
    assert "| `spectreg-a` | 10.0 | 2.00× | **1.50×** | 4.00 (8.00) |" in page_of(rows(), "summary")
    assert "| `spectreg-a` | – | 8.00 | 4.00 |" in page_of(rows(), "memory")


def test_a_case_is_of_one_commit_the_last():
    old, new = rows(commit="aaa", ours=1.4), rows(commit="bbb", ours=1.6)
    del new[1]  # eager was not in the later run
    text = page_of([*old, *rows("spectreg-b", ours=1.1), *new])
    assert "| `spectreg-a` | 10.0 | – | **1.60×** |" in text
    assert "| `spectreg-b` | 10.0 | 2.00× | **1.10×** |" in text
    assert "commits bbb, aaa:" in text


def test_the_later_of_two_runs_of_a_commit_counts():
    assert "**1.60×**" in page_of([*rows(ours=1.4), *rows(ours=1.6)])


def test_machines_apart_the_latest_first():
    records = [*rows(machine="A"), *rows(machine="B"), *rows("spectreg-b", machine="A")]
    text = page_of(records)
    assert text.index("A, 2 threads") < text.index("B, 2 threads")
    summary = page_of(records, "summary")
    assert "A, 2 threads" in summary and "B, 2 threads" not in summary
    both = page_of([*records, *rows(machine="G", device="cuda")], "summary")
    assert both.index("G, float32") < both.index("A, 2 threads")


def test_the_suite_networks_has_a_table_of_its_own():
    records = [*rows(), *rows("net-a", suite="quick networks")]
    assert "| `net-a` | 10.0 | 2.00× | **1.50×** | 4.00 (8.00) |" in page_of(records, "networks")
    assert "spectreg-a" not in page_of(records, "networks")
    for table in ("time", "memory", "summary"):
        assert "net-a" not in page_of(records, table)


@pytest.mark.parametrize(
    "change",
    ({"status": "wrong"}, {"axes": "width=64"}),
    ids=lambda change: next(iter(change)),
)
def test_what_is_not_quoted(change):
    assert "spectreg-a" not in page_of(rows(**change))
    assert "Nothing was measured yet." in page_of(rows(**change))


def test_host_costs_are_in_microseconds_with_launches_and_on_their_own():
    host = rows("host-a", kind="host", launches=7, ours=0.15)
    host.append(record("host-a", "compiled", median_ms=0.2, kind="host", commit="aaa", machine="M"))
    text = page_of(host, "host")
    assert "| µs (launches) | plain | eager | compiled | fastjac |" in text
    assert "| `host-a` | 10000 (7) | 20000 (7) | 200 (–) | 1500 (7) |" in text
    assert "host-a" not in page_of(host, "time") and "host-a" not in page_of(host, "summary")


def test_times_over_the_compiled_plain_step():
    more = {"kind": "step", "commit": "aaa", "machine": "M"}
    plain = record("spectreg-a", "plain-compiled", median_ms=8.0, overhead=0.8, **more)
    text = page_of([*rows(), plain, *rows("spectreg-b")], "over-compiled")
    assert "| time / plain-compiled | plain | plain-compiled | eager | fastjac |" in text
    assert "| `spectreg-a` | 1.25× | 1.00× | 2.50× | 1.88× |" in text
    assert "spectreg-b" not in text  # where that step was not measured
    assert "**0.80×**" not in page_of([*rows(), plain])  # it has no penalty


def test_activations():
    common = {"case": "act-gelu-double", "kind": "elementwise", "activation": "gelu"}
    records = [
        record(contestant="eager", median_ms=20.0, phase="act-double", **common),
        record(contestant="fastjac", median_ms=4.0, vs_eager=5.0, phase="act-double", **common),
    ]
    assert "| `gelu` | 20.0 / 4.00: **5.00×** |" in page_of(records, "elementwise")


def test_markers():
    with pytest.raises(ValueError, match="no table 'tim'; choose from summary, claims"):
        page_of(rows(), "tim")
    with pytest.raises(ValueError, match="The page has no <!-- bench: TABLE -->"):
        page.update("nothing", rows())


def test_claims_are_drawn_from_the_rows():
    def step(case, way, times, **more):
        common = {"median_ms": times, "overhead": times, "ratio": times, "ratio_se": 0.0}
        return record(case, way, kind="step", commit="a", machine="M", **common, **more)

    records = []
    for case, ours, compiled in (("spectreg-a", 1.2, 1.0), ("spectreg-b", 1.5, 2.0)):
        for way, times in (
            ("plain", 1.0),
            ("eager", 3.0),
            ("fastjac", ours),
            ("compiled", compiled),
        ):
            records.append(step(case, way, times, penalty="spectreg"))
    records.append(step("spectreg-a", "fastjac+compile", 1.1, penalty="spectreg"))
    records += [step("dreg-a", way, t, penalty="dreg") for way, t in (("eager", 2), ("fastjac", 1))]
    text = page_of(records, "claims")
    for sentence in (
        "- With one projection (SpectReg, DataGrad, GradientPenalty), a step takes 1.20 to 1.50 "
        "times (median 1.35) as long as without a penalty, where eager PyTorch takes 3.00 times.",
        "- With DREG, a step takes 1.00 times as long as without a penalty, where eager PyTorch "
        "takes 2.00 times.",
        "slower than PyTorch's own code under torch.compile in 1 of 2 cases",
        "is the fastest of all in 0 of 1, and takes at most 1.10 times as long as the best",
    ):
        assert sentence in text, text
