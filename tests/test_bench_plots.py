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


def painted(kind, records):
    """The panels of a picture by their titles; empty if there is nothing to draw."""
    figure = Figure(layout="constrained")
    drawn = plots.paint(figure, plots.PICTURES[kind], records)
    assert drawn == bool(figure.axes)
    return {ax.get_title(): ax for ax in figure.axes}


def test_plots_are_drawn_from_records(tmp_path):
    products = {"gflop": 1.0, "gemm_gflops": 100.0, "pct_gemm": 25.0}
    records = [*trio("case-a", 1.25, **products), *elementwise_records(), *scaling_records()]
    written = plots.draw(records, tmp_path / "new" / "folder")
    assert [p.name for p in written] == [f"{kind}-cpu-float32-2t.png" for kind in plots.PICTURES]
    assert len(written) == 6
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


def test_plots_keep_machines_apart_and_take_the_last_record(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "PICTURES", {"p": None})
    monkeypatch.setattr(plots, "paint", lambda f, p, rows: bool(seen.append(rows)) or True)
    old, new = trio("case-a", 1.0), trio("case-a", 2.0)
    other = [replace(r, machine="Other GPU") for r in old]
    bad = replace(record("case-b"), status="wrong")
    names = [path.name for path in plots.draw([*old, *other, *new, bad], tmp_path)]
    assert names == ["p-cpu-float32-2t-m-1.png", "p-cpu-float32-2t-other-gpu.png"]
    assert seen == [new, other]


def test_the_values_of_bars_and_dots():
    products = {"gemm_gflops": 100.0, "pct_gemm": 25.0}
    records = trio("case-a", 1.25, **products)
    for kind, values in (
        ("overhead", ["2.00×  8.00 ms", "1.60×  6.40 ms"]),
        ("memory", ["2.00×  6.00 MB", "1.33×  4.00 MB"]),
        ("roofline", ["25%"]),
    ):
        (ax,) = painted(kind, records).values()
        assert [text.get_text() for text in ax.texts] == values
    panels = painted("speedup", elementwise_records())
    assert [*panels] == ["forward", "backward", "double backward"]
    assert [text.get_text() for text in panels["forward"].texts] == ["4.50×"]
    (text,) = painted("bandwidth", elementwise_records())["forward"].texts
    assert text.get_text() == "50%"


def test_a_panel_of_the_scaling_holds_one_axis():
    panels = painted("scaling", scaling_records())
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
    assert not any(painted(kind, scaling_records()) for kind in ("overhead", "memory", "roofline"))


def test_parts_of_the_scaling_suite_are_drawn():
    some = [r for r in scaling_records() if r.case in ("scale-base", "scale-width-64")]
    assert [*painted("scaling", some)] == ["width"]
    assert not painted("scaling", some[:3])
