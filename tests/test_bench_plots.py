"""Pictures, drawn from records alone."""

from __future__ import annotations

from dataclasses import replace

from bench_cases import elementwise_records, record, trio
from matplotlib.figure import Figure

from fastjac.bench import plots
from fastjac.bench.cases import select_cases


def scaling_records():
    return [
        replace(r, axes=case.axes)
        for case in select_cases(suite="scaling")
        for r in trio(case.name, 1.25)
    ]


def test_plots_are_drawn_from_records(tmp_path):
    products = {"gflop": 1.0, "gemm_gflops": 100.0, "pct_gemm": 25.0}
    records = [*trio("case-a", 1.25, **products), *elementwise_records(), *scaling_records()]
    written = plots.draw(records, tmp_path / "new" / "folder")
    assert [p.name for p in written] == [
        f"{kind}-cpu-float32-2t.png"
        for kind in ("overhead", "scaling", "roofline", "memory", "speedup", "bandwidth")
    ]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


def test_plots_keep_machines_apart_and_take_the_last_record(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "PICTURES", {"p": None})
    monkeypatch.setattr(plots, "paint", lambda f, p, rows: bool(seen.append(rows)) or True)
    old, new = trio("case-a", 1.0), trio("case-a", 2.0)
    other = [replace(r, machine="Other GPU") for r in old]
    bad = replace(record("case-b"), status="wrong")
    written = plots.draw([*old, *other, *new, bad], tmp_path)
    assert [p.name for p in written] == [
        "p-cpu-float32-2t-m-1.png",
        "p-cpu-float32-2t-other-gpu.png",
    ]
    assert seen == [new, other]


def test_a_panel_of_the_scaling_holds_one_axis():
    figure = Figure(layout="constrained")
    assert plots.paint(figure, plots.PICTURES["scaling"], scaling_records())
    panels = {ax.get_title(): ax for ax in figure.axes}
    labels = {
        axis: [int(text.get_text().split()[0]) for text in ax.get_xticklabels()]
        for axis, ax in panels.items()
    }
    assert labels == {
        "width": [64, 256, 1024, 4096],
        "batch": [8, 32, 128, 512, 2048],
        "depth": [1, 2, 4, 8, 16],
        "projections": [1, 2, 4, 8, 16],
    }
    (eager, ours, _one) = panels["width"].lines
    assert list(eager.get_ydata()) == [2.0] * 4 and list(ours.get_ydata()) == [1.6] * 4


def test_scaling_cases_stay_out_of_the_other_pictures():
    for kind in ("overhead", "memory", "roofline"):
        assert not plots.paint(Figure(), plots.PICTURES[kind], scaling_records())


def test_parts_of_the_scaling_suite_are_drawn():
    some = [r for r in scaling_records() if r.case in ("scale-base", "scale-width-64")]
    figure = Figure(layout="constrained")
    assert plots.paint(figure, plots.PICTURES["scaling"], some)
    assert [ax.get_title() for ax in figure.axes] == ["width"]
    assert not plots.paint(Figure(), plots.PICTURES["scaling"], some[:3])


def test_nothing_to_plot_draws_nothing(tmp_path):
    assert plots.draw([replace(record(), status="failed")], tmp_path) == []
