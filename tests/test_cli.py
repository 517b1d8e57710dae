"""The command line: exit codes, files, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import FAST, interrupting, named, planted, slightly_off, tiny_case, tiny_op, trio
from typer.testing import CliRunner

import fastjac
from fastjac.bench import contestants
from fastjac.bench import records as storage
from fastjac.bench.contestants import Contestant
from fastjac.cli import __main__ as entry
from fastjac.cli import bench as command
from fastjac.cli import commands, own_model


def invoke(*args: object):
    return CliRunner().invoke(commands.app, [*map(str, args)])


def flat(result) -> str:
    """Output of both streams on one line."""
    return " ".join(result.output.split())


@pytest.fixture(autouse=True)
def tiny_registry(monkeypatch):
    cases = (tiny_case("spectreg"), tiny_case("dreg"), tiny_op("gelu", "double"))
    monkeypatch.setattr("fastjac.bench.cases.all_cases", lambda: cases)
    monkeypatch.setattr(command, "_options", lambda quick, threads, device, dtype: FAST)


@pytest.fixture
def nothing_is_measured(monkeypatch):
    monkeypatch.setattr(command, "_run", lambda *_: pytest.fail("measured before the check"))


@pytest.fixture
def plant(monkeypatch):
    """Add a contestant to the registry."""

    def add(contestant):
        names = ("plain", "eager", "fastjac")
        known = [c for c in contestants.all_contestants() if c.name in names]
        everyone = (*known, contestant)
        monkeypatch.setattr(contestants, "all_contestants", lambda: everyone)

    return add


def test_files_are_written_and_shown_again(tmp_path, monkeypatch):
    args = ("bench", "--contestant", "eager", "--contestant", "fastjac")
    files = ("--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv", "--plot", tmp_path / "p")
    result = invoke(*args, *files)
    assert result.exit_code == 0, result.output
    from_json, from_csv = (storage.load(tmp_path / name) for name in ("r.json", "r.csv"))
    assert len(from_json) == 9 and from_csv == from_json
    kinds = sorted(path.name.partition("-")[0] for path in (tmp_path / "p").iterdir())
    assert kinds == ["bandwidth", "memory", "overhead", "roofline", "speedup"]
    assert "vs eager" in result.stdout and "overhead-cpu-float32" in result.stdout
    monkeypatch.setattr(command, "_run", lambda *_: pytest.fail("measured again"))
    result = invoke("bench", "--from", tmp_path / "r.csv", "--plot", tmp_path / "q")
    assert result.exit_code == 0, result.output
    assert "dreg-tiny" in result.stdout and list((tmp_path / "q").glob("overhead-*.png"))


def test_a_wrong_contestant_is_named_and_stops_the_run_unless_told_otherwise(plant):
    plant(planted("planted", slightly_off))
    result = invoke("bench", "--json", "-")
    assert result.exit_code == 1, result.output
    statuses = {(r["case"], r["contestant"]): r["status"] for r in json.loads(result.stdout)}
    names = {"plain": "ok", "eager": "ok", "fastjac": "ok", "planted": "wrong"}
    assert statuses == {("spectreg-tiny", name): status for name, status in names.items()}
    assert "WRONG spectreg-tiny, planted: the relative error" in flat(result)
    assert "stopped at spectreg-tiny; --keep-going runs the rest" in flat(result)
    result = invoke("bench", "--json", "-", "--keep-going")
    assert result.exit_code == 1, result.output
    assert len({r["case"] for r in json.loads(result.stdout)}) == 3


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize("kind", ["csv", "json"])
def test_two_files_are_compared(tmp_path, kind):
    def file_of(name: str, speed: float, **values) -> Path:
        found = [replace(r, ratio=r.overhead, ratio_se=0.0, **values) for r in trio("c", speed)]
        path = tmp_path / f"{name}.{kind}"
        if kind == "csv":
            storage.append_csv(found, path)
        else:
            path.write_text(storage.to_json(found))
        return path

    def compared(*files: Path):
        return invoke("bench", *(word for file in files for word in ("--from", file)))

    old, new, other = file_of("old", 1.25), file_of("new", 1.0), file_of("other", 1.0, threads=64)
    for files, code, said in (
        ((old, new), 1, "c fastjac 1.60× 2.00× +25.0%"),
        ((new, old), 0, "faster"),
        ((old, old), 0, "0 beyond the noise"),
        ((old, other), 2, "no case of fastjac can be compared"),
        ((old, new, other), 2, "or two to compare"),
    ):
        result = compared(*files)
        assert result.exit_code == code and said in flat(result), result.output


def test_ctrl_c_exits_130_and_writes_what_is_done(plant, tmp_path):
    calls = 0

    def setup(problem):
        nonlocal calls
        calls += 1
        return interrupting(10**9 if calls == 1 else 1).setup(problem)

    plant(Contestant("late", setup))
    result = invoke("bench", "--csv", tmp_path / "r.csv")
    assert result.exit_code == 130, result.output
    assert "interrupted" in flat(result)
    written = storage.load(tmp_path / "r.csv")
    assert {r.case for r in written} == {"spectreg-tiny"}
    assert all(r.median_ms and r.peak_mb is not None for r in written)


def test_records_are_in_the_csv_file_when_the_next_case_begins(plant, tmp_path):
    path, seen = tmp_path / "r.csv", []

    def setup(problem):
        seen.append([r.case for r in storage.load(path)] if path.exists() else [])
        return named("plain")[0].setup(problem)

    plant(Contestant("late", setup))
    invoke("bench", "--contestant", "late", "--csv", path, "--keep-going")
    cases = ["spectreg-tiny", "dreg-tiny", "act-gelu-double"]
    assert [list(dict.fromkeys(names)) for names in seen] == [[], cases[:1], cases[:2]]
    assert list(dict.fromkeys(r.case for r in storage.load(path))) == cases


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--case", "spectreg-tin"], "Did you mean spectreg-tiny, dreg-tiny? Valid names are:"),
        (["--suite", "none"], "The suite 'none' does not exist. Valid names are: quick,"),
        (["--contestant", "egaer"], "Did you mean eager? Valid names are: plain, plain-compiled, "),
        (["--contestant", "jacobianreg", "--case", "dreg*"], "no contestant is left"),
        (["--from", "{}/empty.json"], "holds no records"),
        (["--from", "{}/other.json"], "is not a list of benchmark records"),
        (["--csv", "{}/other.csv"], "other columns"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_bad_arguments_exit_2_before_anything_is_measured(tmp_path, args, message):
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "other.csv").write_text("a,b\n")
    result = invoke("bench", *(arg.format(tmp_path) for arg in args))
    assert result.exit_code == 2 and message in flat(result), result.output


@pytest.mark.usefixtures("nothing_is_measured")
def test_missing_matplotlib_is_said_before_measuring(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("bench", "--plot", tmp_path)
    assert result.exit_code == 2 and 'pip install "fastjac[bench]"' in flat(result)


def test_cuda_without_a_device_is_refused(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("bench", "--device", "cuda", "--list")
    assert result.exit_code == 2 and "finds no CUDA device" in flat(result)


def test_an_unwritable_file_is_an_error(tmp_path):
    result = invoke("bench", "--contestant", "plain", "--json", tmp_path / "no" / "r.json")
    assert result.exit_code == 2 and "cannot write" in flat(result)


def test_list_names_cases_contestants_and_reasons():
    result = invoke("bench", "--list")
    assert result.exit_code == 0
    assert "dreg-tiny" in flat(result) and "plain eager compiled fastjac" in flat(result)
    assert "layer-wise steps with a layer-wise penalty" in flat(result)
    assert "jacobianreg is left out: JacobianReg cannot express" in flat(result)


def test_what_the_machine_lacks_is_said_in_one_line(monkeypatch):
    cases = (replace(tiny_case("spectreg"), jax=True),)
    monkeypatch.setattr("fastjac.bench.cases.all_cases", lambda: cases)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = "jax is left out: JAX is not installed; pip install jax"
    known = [c for c in contestants.all_contestants() if c.name in ("plain", "jax")]
    monkeypatch.setattr(contestants, "all_contestants", lambda: known)
    monkeypatch.setattr(contestants, "available_cores", lambda: FAST.threads)
    result = invoke("bench")
    assert result.exit_code == 0 and result.output.count(line) == 1, result.output
    assert line in flat(invoke("bench", "--list"))
    result = invoke("bench", "--contestant", "jax")
    assert result.exit_code == 2 and line in flat(result), result.output
    cases = (tiny_case("spectreg"),)  # it would not run there anyway
    assert "jax is left out" not in invoke("bench").output


def test_options_reach_the_run(monkeypatch):
    monkeypatch.undo()
    cpu, dtype = command.Device.cpu, command.Dtype
    options = command._options(True, 1, cpu, dtype.bfloat16)
    assert (options.quick, options.threads, options.dtype) == (True, 1, torch.bfloat16)
    assert options.budget_s < command._options(False, 1, cpu, dtype.float32).budget_s


def test_info_as_json_and_as_text():
    result = invoke("info", "--json", "-")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["fastjac"] == fastjac.__version__
    result = invoke("info")
    assert result.exit_code == 0 and fastjac.__version__ in result.stdout


@pytest.mark.parametrize(
    ("verdicts", "code"), [((True, None, True), 0), ((True, False), 1), ((None,), 2)]
)
def test_check_exits_1_on_a_miss_and_2_if_nothing_was_checked(
    monkeypatch, tmp_path, verdicts, code
):
    asked = {}

    def fake_run(**filters):
        asked.update({name: value for name, value in filters.items() if value})
        return [{"ok": ok} for ok in verdicts]

    monkeypatch.setattr("fastjac.check.run", fake_run)
    monkeypatch.setattr("fastjac.check.render", lambda records, console: None)
    result = invoke("check", "--op", "act", "--dtype", "float32", "--json", tmp_path / "c.json")
    assert result.exit_code == code, result.output
    assert asked == {"op": ["act"], "dtype": ["float32"]}
    assert [r["ok"] for r in json.loads((tmp_path / "c.json").read_text())] == [*verdicts]


def test_check_of_one_example():
    filters = {"op": ["act", "act_stats"], "dtype": ["float32"], "device": ["cpu"], "impl": ["cpu"]}
    found = fastjac.check.run(example=["gelu"], **filters)
    assert [(r["op"], r["example"], r["ok"]) for r in found] == [("act", "gelu", True)]
    with pytest.raises(ValueError, match=r"example='galu' is not known here; choose from .*gelu"):
        fastjac.check.run(example=["galu"], **filters)


BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(("numpy", "rich", "typer", "matplotlib")))  # import raises
import torch, fastjac
model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GELU(), torch.nn.Linear(5, 2))
x = torch.ones(4, 3)
output, value = fastjac.SpectReg()(fastjac.fuse(model), x)
penalty = fastjac.DREG(model)
(model(x).sum() + value + penalty()).backward()
assert model[0].weight.grad.any()
assert fastjac.info.collect()["ops"]["act"]["cpu"]
assert {r["ok"] for r in fastjac.check.run(op=["softmax_residual"], dtype=["float32"])} >= {True}
from fastjac.cli.__main__ import main
main()
"""


def test_the_library_needs_only_torch_and_the_command_names_the_extra():
    env = {**os.environ, "TRITON_INTERPRET": "0"}  # Triton's interpreter is numpy, its kernels not
    program = [sys.executable, "-W", "ignore", "-c", BLOCKED, "info"]
    result = subprocess.run(program, capture_output=True, text=True, env=env)
    assert result.returncode == 2, result.stderr
    assert result.stderr.strip() == entry.MISSING and "fastjac[bench]" in entry.MISSING
    assert not result.stdout


def test_python_m_runs_the_command():
    program = [sys.executable, "-m", "fastjac.cli", "bench", "--suite", "layer-wise", "--list"]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "dreg-resnet" in result.stdout and "act-stats-gelu-forward" in result.stdout


# ---- --model

MODULE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

model = make()

def with_batch():
    return make(), torch.zeros(5, 6), torch.zeros(5, dtype=torch.int64)

def narrow():
    return make().bfloat16()

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make()

    def forward(self, x):
        return x, self.net(x)

def number():
    return 3

def broken():
    raise KeyError("weights.pt")

def wrong():
    return make(), torch.zeros(5, 7)
"""


@pytest.fixture
def mymodule(tmp_path, monkeypatch):
    (tmp_path / "mymodule_of_a_user.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "mymodule_of_a_user"
    sys.modules.pop("mymodule_of_a_user", None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


@pytest.mark.parametrize(
    "options",
    [
        ("make", "--input", "5,6", "--target", "classes:3", "--penalty", "datagrad"),
        ("model", "--input", "5,6", "--target", "values:3"),
        ("with_batch", "--penalty", "dreg"),
    ],
)
def test_a_model_of_the_user(mymodule, tmp_path, options):
    ways = ("--contestant", "eager", "--contestant", "fastjac")
    files = ("--csv", tmp_path / "r.csv", "--json", tmp_path / "r.json")
    result = invoke("bench", "--model", f"{mymodule}:{options[0]}", *options[1:], *ways, *files)
    assert result.exit_code == 0, result.output
    penalties = {"datagrad", "dreg"} & {*options} or {"spectreg", "dreg"}
    for name in ("r.csv", "r.json"):
        found = storage.load(tmp_path / name)
        assert {r.penalty for r in found} == penalties and len(found) == 3 * len(penalties)
    verdicts = ("Write this", "Not worth it", "The times vary too much")  # of three rounds
    assert any(words in result.stdout for words in verdicts)
    assert "% GEMM" in result.stdout


def test_an_index_names_the_output_and_the_batch_is_seeded(mymodule):
    function = own_model.function_of(f"{mymodule}:Pair")
    batch = own_model.Batch("5,6", "classes:3", "1")
    first, second = (own_model.own_model("name", function(), batch) for _ in range(2))
    assert first.output == 1 and first.shape == (5, 3)
    assert torch.equal(first.x, second.x) and torch.equal(first.target, second.target)


@pytest.mark.parametrize(
    ("asked", "dtype"), [((), "bfloat16"), (("--dtype", "float32"), "float32")]
)
def test_a_model_of_the_user_keeps_its_dtype(mymodule, tmp_path, asked, dtype):
    options = ("--input", "5,6", "--penalty", "dreg", "--contestant", "fastjac", "--quick", *asked)
    result = invoke(
        *("bench", "--model", f"{mymodule}:narrow", *options, "--json", tmp_path / "r.json")
    )
    assert result.exit_code == 0, result.output
    assert {r.dtype for r in storage.load(tmp_path / "r.json")} == {dtype}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--model", "{}"), "it must be MODULE:FUNCTION, such as mymodule:make_model"),
        (("--model", "nothing_of_a_user:make"), "there is no module nothing_of_a_user"),
        (("--model", "{}:mkae"), "has no function mkae"),
        (("--model", "{}:number", "--input", "5"), "it returned int: it must return an nn.Module"),
        (("--model", "{}:make"), "--input is missing: give the shape of a batch, such as --input"),
        (("--model", "{}:make", "--input", "5;6"), "--input 5;6: it must be the shape of a batch"),
        (("--model", "{}:make", "--input", "0,6"), "--input 0,6: it must be the shape of a batch"),
        (("--model", "{}:with_batch", "--input", "5,6"), "returns the input itself"),
        (("--model", "{}:with_batch", "--target", "classes:3"), "returns the target itself"),
        (
            ("--model", "{}:make", "--input", "5,6", "--target", "3"),
            "--target 3: it must be classes:K",
        ),
        (("--model", "{}:with_batch", "--penalty", "drag"), "The penalty 'drag' does not exist."),
        (("--model", "{}:make", "--input", "5,6", "--penalty", "datagrad"), "needs class indices"),
        (("--model", "{}:wrong"), "cannot be multiplied (5x7 and 6x8)"),
        (("--model", "{}:make", "--suite", "host"), "leave out --case, --suite, --list"),
        (("--input", "5,6"), "belong to --model"),
    ],
)
def test_wrong_options_of_a_model_exit_2(mymodule, options, text):
    result = invoke("bench", *(option.format(mymodule) for option in options))
    assert result.exit_code == 2 and text in flat(result), result.output


def test_an_error_of_the_users_function_keeps_its_traceback(mymodule):
    result = invoke("bench", "--model", f"{mymodule}:broken")
    assert isinstance(result.exception, KeyError)


def test_version():
    result = invoke("--version")
    assert result.exit_code == 0 and result.output == f"fastjac {fastjac.__version__}\n"
