"""Records, their files and tables."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, replace

import pytest
import torch
from bench_cases import FAST, elementwise_records, named, record, tiny_case, tiny_op, trio
from rich.console import Console

from fastjac.bench import records as storage
from fastjac.bench import report
from fastjac.bench.runner import run


def test_record_schema():
    outcome = run([tiny_case(), tiny_op()], named("eager", "fastjac"), FAST)
    rows = json.loads(storage.to_json(outcome.records))
    for row in rows:
        assert row.keys() == {*storage.COLUMNS}
        assert (row["device"], row["dtype"], row["threads"]) == ("cpu", "float32", 1)
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["torch"] == torch.__version__ and row["machine"]
        step = row["kind"] == "step"
        assert (row["gemm_gflops"] is not None) == step == (row["copy_gbps"] is None)
        assert row["ratio"] > 0 and row["ratio_se"] >= 0
    plain, eager, ours = rows[:3]
    assert (plain["ratio"], plain["ratio_se"]) == (1, 0)
    assert plain["gflop"] < eager["gflop"] == ours["gflop"]
    rate = eager["gflop"] / eager["median_ms"] * 1e3
    assert eager["pct_gemm"] == pytest.approx(100 * rate / eager["gemm_gflops"])
    assert (ours["engine"], eager["engine"]) == ("chain", "")
    assert plain["overhead"] == 1 and plain["gbps"] is None
    assert eager["overhead"] == pytest.approx(eager["median_ms"] / plain["median_ms"])
    assert ours["vs_eager"] == pytest.approx(eager["median_ms"] / ours["median_ms"])
    assert (eager["impl"], ours["impl"] != "") == ("", True)
    act = rows[5]
    # double backward: three tensors read and two written, of 16 x 9 float32
    assert act["gbps"] == pytest.approx(5 * 16 * 9 * 4 / act["median_ms"] / 1e6)
    assert act["pct_copy"] == pytest.approx(100 * act["gbps"] / act["copy_gbps"])
    assert act["peak_mb"] >= 2 * 16 * 9 * 4 / 1e6


def test_csv_and_json_come_back(tmp_path):
    records = [
        record(median_ms=1.5, rel_err=1e-7, launches=7),
        record(contestant="fastjac", message='a,"b"'),
    ]
    path = tmp_path / "r.csv"
    storage.append_csv(records[:1], path)
    storage.append_csv(records[1:], path)
    assert path.read_text().count("contestant") == 1
    assert storage.load(path) == records
    (tmp_path / "r.json").write_text(storage.to_json(records))
    assert storage.load(tmp_path / "r.json") == records
    row = json.loads(storage.to_json([record(rel_err=float("inf"))]))[0]
    assert row["rel_err"] is None  # infinity is not JSON


def test_a_file_with_fewer_columns_is_read_and_added_to(tmp_path):
    path = tmp_path / "old.csv"
    later = ("ratio", "ratio_se", "launches", "axes")
    first = asdict(record(median_ms=1.5, overhead=2.0))
    with path.open("w", newline="") as file:
        old = csv.DictWriter(file, [c for c in storage.COLUMNS if c not in later])
        old.writeheader()
        old.writerow({k: v for k, v in first.items() if k not in later})
    assert [asdict(r) for r in storage.load(path)] == [first]
    added = record(contestant="fastjac", ratio=1.5, engine="chain")
    storage.append_csv([added], path)
    assert [asdict(r) for r in storage.load(path)] == [first, asdict(added)]
    assert [p.name for p in tmp_path.iterdir()] == ["old.csv"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        storage.append_csv([record()], path)
    assert path.read_text() == "a,b\n1,2\n"
    with pytest.raises(ValueError, match="not a list of benchmark records"):
        storage.load(path)


@pytest.mark.parametrize("width", [80, 140])
def test_tables_show_the_ratio_and_what_is_wrong(width):
    wrong = replace(record("case-b", "compiled"), status="wrong", message="relative error 3.00e-01")
    records = [*trio("case-a", 1.25), wrong, *elementwise_records()]
    console = Console(width=width, record=True, file=io.StringIO())
    report.render(records, console)
    text = console.export_text()
    assert "vs eager" in text and "1.25×" in text and "4.50×" in text
    assert "WRONG case-b, compiled: relative error 3.00e-01" in text.replace("\n", " ")
    assert ("p20 - p80" in text) == (width == 140)
    assert "launches" not in text  # no record has that
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 140])
def test_host_costs_are_shown_in_microseconds_with_the_launches(width):
    host = [replace(r, kind="host", threads=1, launches=26) for r in trio("case-h", 1.25)]
    host.append(replace(record("case-h", "compiled", median_ms=0.05), kind="host", threads=1))
    console = Console(width=width, record=True, file=io.StringIO())
    report.render(host, console)
    lines = [line.split() for line in console.export_text().splitlines()]
    (head,) = (words for words in lines if words[:2] == ["case", "contestant"])
    assert head[2] == "µs" and "ms" not in head and head.count("launches") == 1
    assert ["case-h", "plain", "4000"] in [words[:3] for words in lines]
    compiled = next(words for words in lines if words[:1] == ["compiled"])  # then the legend
    assert compiled == ["compiled", "50.0", "–"]
    text = console.export_text(clear=False) or " ".join(map(" ".join, lines))
    assert "1 thread" in text and "on one thread" in text and "not views" in text
