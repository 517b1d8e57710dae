"""The runner of the studies: what runs, what is recorded, and what runs again."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

import studies
from studies import running
from studies.experiment import Experiment, _code, code_version
from studies.records import Records
from studies.running import run_missing
from studies.settings import cross
from tests.studies_cases import Run, experiment, run, timed_run

ROOT = Path(__file__).parents[1]


def done(folder, *chosen, jobs=1, **options):
    pairs = [(e, Records(folder, e.name)) for e in chosen]
    return run_missing(pairs, jobs=jobs, console=Console(quiet=True), **options)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_finished_run_is_not_run_again(tmp_path):
    log = tmp_path / "log"
    assert done(tmp_path, experiment(log=log)) == 6
    assert done(tmp_path, experiment(log=log)) == 0
    assert len(log.read_text().splitlines()) == 6
    assert done(tmp_path, experiment(levels=4, log=log)) == 2
    frame = Records(tmp_path, "toy").frame(experiment(levels=4))
    assert sorted(zip(frame["level"], frame["seed"], strict=True)) == [
        (level, seed) for level in range(4) for seed in range(2)
    ]
    assert set(frame["threads"]) == {1}
    # A setting that is left out of the study has a record, which the report does not see.
    assert len(Records(tmp_path, "toy").frame(experiment(levels=1))) == 2


def test_a_setting_that_occurs_twice_runs_once(tmp_path):
    twice = Experiment.of("toy", run, [*cross(Run, level=[1, 2]), *cross(Run, level=[2, 1])])
    assert done(tmp_path, twice) == 2


def test_the_result_does_not_depend_on_the_order(tmp_path):
    drawn = ["by_torch", "by_numpy", "by_python"]
    done(tmp_path / "a", experiment(levels=4))
    done(tmp_path / "b", experiment(levels=2))
    done(tmp_path / "b", experiment(levels=4), jobs=2)
    a, b = (Records(tmp_path / name, "toy").frame(experiment(levels=4)) for name in "ab")
    pd.testing.assert_frame_equal(a[["key", *drawn]], b[["key", *drawn]])
    assert (a.groupby("seed")[drawn].nunique() == 1).all(axis=None)
    assert (a[drawn].nunique() == 2).all()


def test_a_run_that_raises_is_a_record_with_the_reason(tmp_path):
    faulty = Experiment.of("toy", run, [Run(level=1), Run(level=2, fault="raises"), Run(level=3)])
    done(tmp_path, faulty)
    frame = Records(tmp_path, "toy").frame(faulty).set_index("level")
    assert frame["error"].dropna().to_dict() == {2: "ValueError: a line and another"}
    assert frame["level_seen"].dropna().to_dict() == {1: 1, 3: 3}
    assert done(tmp_path, faulty) == 0


@pytest.mark.slow
def test_a_process_that_dies_is_a_record_with_the_reason(tmp_path):
    settings = [replace(Run(level=level), fault="dies" if level == 5 else "") for level in range(9)]
    faulty = Experiment.of("toy", run, settings)
    assert done(tmp_path, faulty, jobs=2) == 9
    frame = Records(tmp_path, "toy").frame(faulty).set_index("level")
    assert sorted(frame.index) == list(range(9))
    assert list(frame["error"].dropna().index) == [5]
    assert "the process died" in frame["error"][5]


@pytest.mark.slow
def test_a_killed_study_goes_on_where_it_was(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    command = [sys.executable, "-m", "tests.studies_cases", "--out", str(out), "--jobs", "2"]
    environment = os.environ | {"TOY_LOG": str(log)}
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not log.exists() or len(log.read_text().splitlines()) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    kept = rows(out / "records" / "toy.csv")
    ended = len(log.read_text().splitlines())
    assert 0 < len(kept) < 40
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    records = rows(out / "records" / "toy.csv")
    assert records[: len(kept)] == kept
    assert len(records) == len({row["key"] for row in records}) == 40
    # What had ended when the process was killed, and had no record yet, runs again.
    assert len(log.read_text().splitlines()) == 40 + ended - len(kept)
    assert ended - len(kept) <= 4
    assert "There are 40 records." in (out / "README.md").read_text()


def test_a_last_line_that_was_cut_off_is_run_again(tmp_path):
    done(tmp_path, experiment())
    path = tmp_path / "toy.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert len(Records(tmp_path, "toy").frame(experiment())) == 5
    assert done(tmp_path, experiment()) == 1
    assert len(rows(path)) == 6
    assert all(None not in row and None not in row.values() for row in rows(path))


def test_a_hash_is_no_number(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "commit", lambda: "12e4567")
    done(tmp_path, experiment(levels=1))
    assert set(Records(tmp_path, "toy").frame(experiment(levels=1))["commit"]) == {"12e4567"}


def test_two_processes_do_not_write_one_file(tmp_path):
    records = Records(tmp_path, "toy")
    with records.writing(), pytest.raises(RuntimeError, match="another process is writing"):
        done(tmp_path, experiment())
    assert done(tmp_path, experiment()) == 6
    assert {path.name for path in tmp_path.iterdir()} == {"toy.csv"}


def test_runs_that_failed_can_be_repeated(tmp_path):
    log = tmp_path / "log"
    faulty = Experiment.of("toy", run, [Run(fault="raises"), Run(level=1)])
    done(tmp_path, faulty)
    assert done(tmp_path, faulty) == 0
    assert done(tmp_path, faulty, again=True) == 1
    assert len(rows(tmp_path / "toy.csv")) == 3
    frame = Records(tmp_path, "toy").frame(faulty)
    assert len(frame) == 2
    assert frame.attrs["other"] == 0
    assert not log.exists()


def test_records_of_other_settings_are_counted(tmp_path):
    done(tmp_path, experiment(levels=4))
    assert Records(tmp_path, "toy").frame(experiment(levels=1)).attrs["other"] == 6


@pytest.mark.slow
def test_one_at_a_time(tmp_path):
    timed = replace(experiment(levels=4, seeds=1, pause=0.2), alone=True, run=timed_run)
    done(tmp_path, timed, jobs=2)
    frame = Records(tmp_path, "toy").frame(timed).sort_values("begin")
    assert (frame["begin"].to_numpy()[1:] >= frame["end"].to_numpy()[:-1]).all()


def test_shards_share_the_runs(tmp_path):
    whole = experiment(levels=5, seeds=3)
    for i in (1, 2, 3, 4):
        records = Records(tmp_path, "toy", (i, 4))
        counted = run_missing([(whole, records)], jobs=1, console=Console(quiet=True))
        assert counted in (3, 4)
    assert len(list(tmp_path.glob("toy.shard-*-of-4.csv"))) == 4
    assert len(Records(tmp_path, "toy").frame(whole)) == 15
    assert done(tmp_path, whole) == 0


def test_columns_may_be_added(tmp_path):
    records = Records(tmp_path, "toy")
    with records.writing():
        records.append({"key": "a", "error": "", "x": 1})
        records.append({"key": "b", "error": "", "y": 2})
        records.append({"key": "c", "error": ""})
    assert rows(records.path) == [
        {"key": "a", "error": "", "x": "1", "y": ""},
        {"key": "b", "error": "", "x": "", "y": "2"},
        {"key": "c", "error": "", "x": "", "y": ""},
    ]


def test_a_metric_may_not_have_the_name_of_another_column(tmp_path):
    for fault in ("seed", "commit"):
        named = Experiment.of("toy", run, [Run(fault=fault)])
        with pytest.raises(ValueError, match=f"the metric '{fault}' of toy has the name"):
            done(tmp_path, named)


def test_changed_code_runs_again(tmp_path, monkeypatch):
    package = tmp_path / "studies"
    package.mkdir()
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(package)])
    (package / "toy_below.py").write_text("def f():\n    return 1\n")
    (package / "toy_top.py").write_text("from studies.toy_below import f\n")

    def version():
        code_version.cache_clear()
        return code_version("studies.toy_top")

    below = package / "toy_below.py"
    first = version()
    below.write_text('# why\ndef f():\n    """What."""\n\n    return  1  # one\n')
    assert version() == first
    below.write_text("def f():\n    return 2\n")
    assert version() != first


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ('"""What."""\nx = 1', "x = 1", True),
        ("f(1,\n  2)", "f(1, 2)", True),
        ("for i in x:\n    f()\n    g()", "for i in x:\n    f()\ng()", False),
        ("x = 'a'", "x = 'b'", False),
        ("x = f'{a}'", "x = f'{b}'", False),
        ("x = f'{a} b'", "x = f'{a} c'", False),
        ("x = f'{a:{b}}'", "x = f'{a:{c}}'", False),
        ("f('a')", "f()", False),
        ("x: int = 1", "x = 1", False),
    ],
)
def test_what_counts_as_code(before, after, same):
    assert (_code(before + "\n") == _code(after + "\n")) is same


def test_the_code_is_the_same_text_in_all_versions_of_python():
    source = 'def f(a):\n    """What."""\n    x = f"a {a:>{3}} {{b}}"  # why\n    return (x,\n 1)\n'
    code = 'def f ( a ) :\nINDENT\nx = f"a {a:>{3}} {{b}}"\nreturn ( x , 1 )\nDEDENT'
    assert _code(source) == code


@pytest.mark.slow
def test_dask_workers_give_the_same_records(tmp_path):
    distributed = pytest.importorskip("dask.distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        address = cluster.scheduler_address
        assert done(tmp_path / "dask", experiment(), backend="dask", scheduler=address) == 6
    done(tmp_path / "loky", experiment())
    columns = ["key", "by_torch", "by_numpy", "by_python", "threads"]
    a, b = (
        Records(tmp_path / name, "toy").frame(experiment())[columns] for name in ("dask", "loky")
    )
    pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "toys"], "'toys' is no experiment: toy"),
        (["--shard", "3/2"], "'3/2' is not i/n"),
        (["--backend", "dask"], "needs --backend dask --scheduler ADDRESS"),
    ],
)
def test_wrong_options_say_what_is_right(arguments, message, tmp_path):
    command = [sys.executable, "-m", "tests.studies_cases", "--out", str(tmp_path), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert message in re.sub(r"[│\s]+", " ", ended.stderr)
