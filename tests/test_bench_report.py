"""Records, their files, tables and plots."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace

import pytest
import torch
from bench_cases import (
    FAST,
    named,
    tiny_activation,
    tiny_case,
)
from rich.console import Console

from fastjac.bench import Record, plots, report, run
from fastjac.bench import cases as registry
from fastjac.bench import contestants as entrants
from fastjac.bench import records as storage


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Three buffers are enough where nothing is measured."""
    monkeypatch.setattr("fastjac.bench.problems.last_level_cache", lambda device: 0)


def test_record_schema():
    outcome = run([tiny_case(), tiny_activation()], named("eager", "fastjac"), FAST)
    rows = json.loads(storage.to_json(outcome.records))
    wanted = (
        "case penalty contestant device dtype threads median_ms p20_ms p80_ms overhead peak_mb "
        "rel_err suite n_rounds compile_s gbps pct_copy torch machine commit"
    )
    for row in rows:
        assert set(wanted.split()) <= row.keys()
        assert (row["device"], row["dtype"], row["threads"]) == ("cpu", "float32", 1)
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["torch"] == torch.__version__ and row["machine"]
    plain, eager, ours = rows[:3]
    assert plain["overhead"] == 1 and plain["gbps"] is None
    assert eager["overhead"] == pytest.approx(eager["median_ms"] / plain["median_ms"])
    assert ours["vs_eager"] == pytest.approx(eager["median_ms"] / ours["median_ms"])
    assert (eager["impl"], ours["impl"] != "") == ("", True)
    act = rows[5]
    # double backward: three tensors read and two written, of 16 x 9 float32
    assert act["gbps"] == pytest.approx(5 * 16 * 9 * 4 / act["median_ms"] / 1e6)
    assert act["pct_copy"] == pytest.approx(100 * act["gbps"] / act["copy_gbps"])
    assert act["peak_mb"] >= 2 * 16 * 9 * 4 / 1e6


def _record(case="c", contestant="eager", **values) -> Record:
    base = Record(
        *(case, "spectreg", "step", "quick step", "", "", contestant, "ok", "cpu", "float32", 2)
    )
    return replace(base, n_rounds=5, torch="2.13", machine="M, 1", **values)


def test_csv_and_json_come_back(tmp_path):
    records = [_record(median_ms=1.5, rel_err=1e-7), _record(contestant="fastjac", message='a,"b"')]
    path = tmp_path / "r.csv"
    storage.append_csv(records[:1], path)
    storage.append_csv(records[1:], path)
    assert path.read_text().count("contestant") == 1
    assert storage.load(path) == records
    (tmp_path / "r.json").write_text(storage.to_json(records))
    assert storage.load(tmp_path / "r.json") == records


def test_infinite_errors_are_valid_json():
    row = json.loads(storage.to_json([_record(rel_err=float("inf"))]))[0]
    assert row["rel_err"] is None


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        storage.append_csv([_record()], path)
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="not a list of benchmark records"):
        storage.load(path)


def _pair(case, ratio, **values):
    shared = {"p20_ms": 1.0, "p80_ms": 9.0, "rel_err": 1e-7, **values}
    return [
        _record(case, "plain", median_ms=4.0, overhead=1.0, peak_mb=3.0, **shared),
        _record(case, "eager", median_ms=8.0, overhead=2.0, vs_eager=1.0, peak_mb=6.0, **shared),
        _record(
            *(case, "fastjac"),
            median_ms=8 / ratio,
            overhead=2 / ratio,
            vs_eager=ratio,
            peak_mb=4.0,
            **shared,
        ),
    ]


def _elementwise_records():
    shared = {"kind": "elementwise", "activation": "gelu", "gbps": 5.0, "copy_gbps": 10.0}
    return [
        replace(r, pct_copy=50.0, phase=phase, **shared)
        for phase in registry.PHASES
        for r in _pair(f"act-gelu-{phase}", 4.5)
    ]


@pytest.mark.parametrize("width", [80, 140])
def test_tables_show_the_ratio_and_what_is_wrong(width):
    wrong = replace(
        _record("case-b", "compiled"), status="wrong", message="relative error 3.00e-01"
    )
    records = [*_pair("case-a", 1.25), wrong, *_elementwise_records()]
    console = Console(width=width, record=True, file=io.StringIO())
    report.render(records, console)
    text = console.export_text()
    assert "vs eager" in text and "1.25×" in text and "4.50×" in text
    assert "WRONG case-b, compiled: relative error 3.00e-01" in text.replace("\n", " ")
    assert ("p20 - p80" in text) == (width == 140)
    assert max(map(len, text.splitlines())) <= width


def test_estimate_grows_with_compiling_contestants():
    few = report.expected_seconds(named("eager"), FAST)
    assert report.expected_seconds(named("eager", "compiled"), FAST) > few + 5


def test_plots_are_drawn_from_records(tmp_path):
    records = [*_pair("case-a", 1.25), *_elementwise_records()]
    written = plots.draw(records, tmp_path / "new" / "folder")
    assert [p.name for p in written] == [
        f"{kind}-cpu-float32-2t.png" for kind in ("overhead", "speedup", "bandwidth", "memory")
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


def test_plots_keep_machines_apart_and_take_the_last_record(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        plots, "PAINTERS", {"p": lambda figure, rows: bool(seen.append(rows)) or True}
    )
    old, new = _pair("case-a", 1.0), _pair("case-a", 2.0)
    other = [replace(r, machine="Other GPU") for r in old]
    bad = replace(_record("case-b"), status="wrong")
    written = plots.draw([*old, *other, *new, bad], tmp_path)
    assert [p.name for p in written] == [
        "p-cpu-float32-2t-m-1.png",
        "p-cpu-float32-2t-other-gpu.png",
    ]
    assert seen == [new, other]


def test_nothing_to_plot_draws_nothing(tmp_path):
    assert plots.draw([replace(_record(), status="failed")], tmp_path) == []


def test_every_contestant_has_a_colour():
    assert {c.name for c in entrants.all_contestants()} <= plots.COLOURS.keys()
    assert set(asdict(_record())) == set(storage.COLUMNS)
