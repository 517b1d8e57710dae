"""The command line: exit codes, files, messages."""

from __future__ import annotations

import json

import pytest
from bench_cases import FAST, interrupting, planted, slightly_off, tiny_activation, tiny_case
from typer.testing import CliRunner

import fastjac.bench.cases
import fastjac.bench.contestants
from fastjac.bench import records as storage
from fastjac.bench.steps import eager_step, plain_step
from fastjac.cli import main as cli

runner = CliRunner()


def invoke(*args: str):
    return runner.invoke(cli.app, [*map(str, args)])


def flat(result) -> str:
    """Output of both streams on one line."""
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def tiny_registry(monkeypatch):
    cases = (tiny_case("spectreg"), tiny_case("dreg"), tiny_activation("gelu", "double"))
    monkeypatch.setattr(fastjac.bench.cases, "all_cases", lambda: cases)
    monkeypatch.setattr("fastjac.bench.problems.last_level_cache", lambda device: 0)
    monkeypatch.setattr(cli, "_options", lambda quick, threads, device, dtype: FAST)


@pytest.fixture
def plant(monkeypatch):
    """Add a contestant to the registry."""

    def add(contestant):
        names = ("plain", "eager", "fastjac")
        known = [c for c in fastjac.bench.contestants.all_contestants() if c.name in names]
        everyone = (*known, contestant)
        monkeypatch.setattr(fastjac.bench.contestants, "all_contestants", lambda: everyone)

    return add


def test_json_on_standard_output_is_nothing_but_json():
    result = invoke("bench", "--case", "spectreg-tiny", "--contestant", "eager", "--json", "-")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [(r["case"], r["contestant"]) for r in rows] == [
        ("spectreg-tiny", "plain"),
        ("spectreg-tiny", "eager"),
    ]
    assert "Training step" in result.stderr


def test_files_are_written(tmp_path):
    args = ("bench", "--contestant", "eager", "--contestant", "fastjac")
    files = ("--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv", "--plot", tmp_path / "p")
    result = invoke(*args, *files)
    assert result.exit_code == 0, result.output
    from_json, from_csv = (storage.load(tmp_path / name) for name in ("r.json", "r.csv"))
    assert len(from_json) == 9 and from_csv == from_json
    kinds = sorted(path.name.partition("-")[0] for path in (tmp_path / "p").iterdir())
    assert kinds == ["bandwidth", "memory", "overhead", "roofline", "speedup"]
    assert "vs eager" in result.stdout and "overhead-cpu-float32" in result.stdout


def test_records_of_a_file_are_shown_and_plotted(tmp_path, monkeypatch):
    invoke("bench", "--contestant", "eager", "--csv", tmp_path / "r.csv")
    monkeypatch.setattr(cli, "_run", lambda *_: pytest.fail("measured again"))
    result = invoke("bench", "--from", tmp_path / "r.csv", "--plot", tmp_path / "p")
    assert result.exit_code == 0, result.output
    assert "dreg-tiny" in result.stdout and list((tmp_path / "p").glob("overhead-*.png"))


def test_a_wrong_contestant_makes_the_exit_code_1_and_is_named(plant, tmp_path):
    plant(planted("planted", slightly_off))
    args = ("bench", "--case", "spectreg-tiny", "--json", tmp_path / "r.json")
    result = invoke(*args)
    assert result.exit_code == 1, result.output
    assert "WRONG spectreg-tiny, planted: relative error" in flat(result)
    statuses = {r.contestant: r.status for r in storage.load(tmp_path / "r.json")}
    assert statuses == {"plain": "ok", "eager": "ok", "fastjac": "ok", "planted": "wrong"}


def test_a_wrong_contestant_stops_the_run_unless_told_otherwise(plant):
    plant(planted("planted", slightly_off))
    result = invoke("bench", "--json", "-")
    assert result.exit_code == 1, result.output
    assert {r["case"] for r in json.loads(result.stdout)} == {"spectreg-tiny"}
    assert "stopped at spectreg-tiny; --keep-going runs the rest" in flat(result)
    result = invoke("bench", "--json", "-", "--keep-going")
    assert result.exit_code == 1, result.output
    assert len({r["case"] for r in json.loads(result.stdout)}) == 3


class Clock:
    """Time that passes by a microsecond a look, and as its contestants say."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-6
        return self.now

    def contestant(self, name: str, seconds: dict[str, float]) -> fastjac.bench.Contestant:
        def setup(problem):
            right = (plain_step if name == "plain" else eager_step)(problem)

            def step():
                self.now += seconds[name]

            return fastjac.bench.Prepared(step, right.gradients)

        return fastjac.bench.Contestant(name, setup)


@pytest.fixture
def seconds(monkeypatch):
    """How long each contestant takes, to be changed."""
    taken = {"plain": 4e-3, "eager": 9e-3, "fastjac": 8e-3}
    clock = Clock()
    everyone = tuple(clock.contestant(name, taken) for name in taken)
    cases = tuple(tiny_case(name=f"case-{k}") for k in range(3))
    monkeypatch.setattr(fastjac.bench.contestants, "all_contestants", lambda: everyone)
    monkeypatch.setattr(fastjac.bench.cases, "all_cases", lambda: cases)
    monkeypatch.setattr("fastjac.bench.measure.time", clock)
    return taken


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_planted_slowdown_is_reported_by_compare(seconds, tmp_path, kind):
    old, new = tmp_path / f"old.{kind}", tmp_path / f"new.{kind}"
    assert invoke("bench", f"--{kind}", old).exit_code == 0
    same = invoke("bench", "--compare", old)
    assert same.exit_code == 0, same.output
    assert "3 cases compared (3 ratios), nothing beyond the noise" in flat(same)

    seconds["fastjac"] *= 1.15
    slower = invoke("bench", "--case", "case-1", "--compare", old, f"--{kind}", new)
    assert slower.exit_code == 1, slower.output
    assert "case-1 fastjac 2.00× 2.30× +15.0%" in flat(slower) and "slower" in flat(slower)
    assert "only among the old records, 4: case-0 (eager, fastjac), case-2" in flat(slower)
    assert len(storage.load(new)) == 6  # what seemed changed was measured twice

    files = invoke("bench", "--from", new, "--compare", old)
    assert files.exit_code == 1 and "+15.0%" in flat(files)


def test_faster_and_equal_exit_with_0(seconds, tmp_path):
    path = tmp_path / "r.csv"
    invoke("bench", "--csv", path)
    seconds["fastjac"] /= 1.15
    # the records are compared with those from before the run, in the file that it adds to
    result = invoke("bench", "--csv", path, "--compare", path)
    assert result.exit_code == 0, result.output
    assert flat(result).count("faster") == 3 and "-13.0%" in flat(result)


def test_a_comparison_of_nothing_does_not_pass(seconds, tmp_path):
    path = tmp_path / "r.json"
    invoke("bench", "--json", path)
    path.write_text(path.read_text().replace('"threads": 1', '"threads": 64'))
    result = invoke("bench", "--compare", path)
    assert result.exit_code == 2, result.output
    assert "64 threads" in flat(result) and "nothing was compared" in flat(result)
    path.write_text("[]")
    result = invoke("bench", "--compare", path)
    assert result.exit_code == 2 and "holds no records" in flat(result)


def test_a_file_that_holds_no_records_is_refused_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda *_: pytest.fail("measured before the check"))
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    result = invoke("bench", "--compare", path)
    assert result.exit_code == 2 and "not a list of benchmark records" in flat(result)


def test_ctrl_c_exits_130_and_writes_what_is_done(plant, tmp_path):
    calls = 0

    def setup(problem):
        nonlocal calls
        calls += 1
        return interrupting(10**9 if calls == 1 else 1).setup(problem)

    plant(fastjac.bench.Contestant("late", setup))
    result = invoke("bench", "--csv", tmp_path / "r.csv")
    assert result.exit_code == 130, result.output
    assert "interrupted" in flat(result)
    assert {r.case for r in storage.load(tmp_path / "r.csv")} == {"spectreg-tiny"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--case", "spectreg-tin"],
            "did you mean spectreg-tiny, dreg-tiny? valid names are: spectreg-tiny,",
        ),
        (["--suite", "fast"], "suite 'fast' does not exist; the suites are quick, layerwise"),
        (["--contestant", "egaer"], "did you mean eager? valid names are: plain, eager, compiled"),
        (
            ["--contestant", "jacobianreg", "--case", "dreg*"],
            "--contestant jacobianreg: no contestant is left",
        ),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(args, message):
    result = invoke("bench", *args)
    assert result.exit_code == 2
    assert message in flat(result)


def test_cuda_without_a_device_is_refused(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("bench", "--device", "cuda", "--list")
    assert result.exit_code == 2 and "finds no CUDA device" in flat(result)


def test_a_foreign_csv_is_refused_before_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda *_: pytest.fail("measured before the check"))
    path = tmp_path / "other.csv"
    path.write_text("a,b\n")
    result = invoke("bench", "--csv", path)
    assert result.exit_code == 2 and "other columns" in flat(result)


def test_an_unwritable_file_is_an_error(tmp_path):
    result = invoke("bench", "--contestant", "plain", "--json", tmp_path / "no" / "r.json")
    assert result.exit_code == 2 and "cannot write" in flat(result)


def test_missing_matplotlib_is_said_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setattr(cli, "_run", lambda *_: pytest.fail("measured before the check"))
    result = invoke("bench", "--plot", tmp_path)
    assert result.exit_code == 2 and "pip install 'fastjac[plot]'" in flat(result)


def test_list_names_cases_contestants_and_reasons():
    result = invoke("bench", "--list")
    assert result.exit_code == 0
    assert "dreg-tiny" in flat(result) and "plain eager compiled fastjac" in flat(result)
    assert "layerwise steps with a layer-wise penalty" in flat(result)
    assert "jacobianreg is left out: JacobianReg cannot express" in flat(result)


def test_options_reach_the_run(monkeypatch):
    monkeypatch.undo()
    options = cli._options(True, 1, cli.Device.cpu, cli.Dtype.bfloat16)
    assert (options.quick, options.threads, options.dtype_name) == (True, 1, "bfloat16")
    assert options.budget_s < cli._options(False, 1, cli.Device.cpu, cli.Dtype.float32).budget_s


def test_info_as_json():
    result = invoke("info", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)


def test_info_as_text():
    result = invoke("info")
    assert result.exit_code == 0 and fastjac.__version__ in result.stdout


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_check_exits_1_on_a_miss(monkeypatch, tmp_path, ok, code):
    asked = {}

    def fake_run(**filters):
        asked.update(filters)
        return [{"ok": True}, {"ok": None}, {"ok": ok}]

    monkeypatch.setattr("fastjac.check.run", fake_run)
    monkeypatch.setattr("fastjac.check.render", lambda records, console: None)
    result = invoke("check", "--op", "act", "--dtype", "float32", "--json", tmp_path / "c.json")
    assert result.exit_code == code, result.output
    assert {name: value for name, value in asked.items() if value} == {
        "op": ["act"],
        "dtype": ["float32"],
    }
    assert json.loads((tmp_path / "c.json").read_text())[2] == {"ok": ok}


def test_a_check_of_nothing_does_not_pass(monkeypatch):
    monkeypatch.setattr("fastjac.check.run", lambda **filters: [{"ok": None}])
    monkeypatch.setattr("fastjac.check.render", lambda records, console: None)
    result = invoke("check", "--impl", "cuda")
    assert result.exit_code == 2 and "nothing was checked" in flat(result)


@pytest.mark.parametrize("command", ["info", "check", "bench"])
def test_help(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and "--json" in result.output
