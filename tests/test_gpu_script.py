"""The run on a GPU: deadlines, crashes, a kill in the middle, and the page from what is there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_cases import named, planted, slightly_off

from benchmarks.gpu import checks, host, kernels, report, run, work
from benchmarks.gpu.run import FILES, Run, Stage
from benchmarks.gpu.work import NOT_ALL_OK, POISONED, append, load, states
from fastjac.activations import TABLE
from fastjac.bench.cases import select_cases

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
WORKER = """
import os, signal
from benchmarks.gpu.work import main

def items(device):
    yield "good", lambda: [{"value": float("nan")}]
    yield "crashes", lambda: os.kill(os.getpid(), signal.SIGSEGV)
    yield "raises", lambda: 1 / 0
    yield "misses", lambda: [{"ok": False}]
    yield "last", lambda: [{"ok": True}]

main(items)
"""


def verdicts(out: Path) -> dict[str, str]:
    rows = [row for row in load(out / "run.jsonl") if row.get("event") == "stage"]
    return {row["stage"]: row["verdict"] for row in rows}


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_a_stage_that_hangs_is_killed_with_its_children_and_named(tmp_path):
    program = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "print('it hangs', flush=True)\n"
        "time.sleep(99)"
    )
    mine = Run(tmp_path / "out", FILES)
    mine.group(
        [
            Stage("hangs", [PYTHON, "-c", program], ends=3),
            Stage("works", [PYTHON, "-c", "print('it works')"], ends=90),
        ]
    )
    assert mine.seconds() < 60
    assert verdicts(mine.out) == {"hangs": "killed at its deadline, 3 s", "works": "ok"}
    assert mine.failed == 1
    log = mine.log.read_text()
    assert "it hangs" in log and "it works" in log and "hangs: killed" in log
    deadline = time.monotonic() + 10
    while alive(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_crash_costs_its_item_alone(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    mine = Run(tmp_path / "out", FILES)
    command = [PYTHON, str(tmp_path / "worker.py"), str(mine.out / "ops.jsonl"), "cpu"]
    here = {"PYTHONPATH": str(ROOT)}
    mine.group([Stage("ops", [*command, run.PART, run.PARTS], ends=90, variables=here)])
    assert verdicts(mine.out) == {"ops": "not all right"}
    assert states(load(mine.out / "ops.jsonl")) == {
        "good": "ok",
        "crashes": "unfinished",
        "raises": "ZeroDivisionError: division by zero",
        "misses": "wrong",
        "last": "ok",
    }
    assert '"value": null' in (mine.out / "ops.jsonl").read_text()  # NaN is not JSON
    assert "ended by SIGSEGV; again" in mine.log.read_text()


def test_a_stage_that_cannot_start_is_not_started_again(tmp_path):
    mine = Run(tmp_path, FILES)
    mine.group([Stage("broken", [PYTHON, "-c", "import no_such_module"], ends=90)])
    assert verdicts(tmp_path) == {"broken": "exit code 1"} and mine.failed == 1
    assert "again" not in mine.log.read_text() and "no_such_module" in mine.log.read_text()


def test_a_stage_that_always_crashes_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MOST_RESTARTS", 2)
    mine = Run(tmp_path, FILES)
    mine.group([Stage("crash", ["sh", "-c", "kill -KILL $$"], ends=90)])
    assert verdicts(tmp_path) == {"crash": "ended by SIGKILL"}
    assert mine.log.read_text().count("again") == 2


def test_a_broken_context_ends_the_process_and_the_next_one_goes_on(tmp_path, monkeypatch):
    path, ran = tmp_path / "ops.jsonl", []
    items = [(name, lambda name=name: ran.append(name) or []) for name in "abc"]
    monkeypatch.setattr(work, "poisoned", lambda: ran[-1] == "b")
    assert work.work(path, items) == POISONED and ran == ["a", "b"]
    assert work.work(path, items) == 0 and ran == ["a", "b", "c"]


def test_a_check_that_did_not_run_is_not_right(tmp_path):
    row = {"op": "act", "ok": None, "why_not": "torch cannot find a GPU"}
    assert work.work(tmp_path / "f.jsonl", [("act", lambda: [row])]) == NOT_ALL_OK


def test_killed_in_the_middle_everything_measured_is_there(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "steps.jsonl").write_text("left by an earlier run\n")
    names = {"DEVICE": "cpu", "STAGES": "machine kernels", "PYTHON": PYTHON}
    script = subprocess.Popen(
        [str(ROOT / "benchmarks/gpu.sh"), str(out)],
        env={**os.environ, **names},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (out / "kernels.jsonl").exists() and len(load(out / "kernels.jsonl")) > 9:
            break
        time.sleep(0.02)
    os.killpg(script.pid, signal.SIGKILL)
    script.wait()
    time.sleep(0.5)
    size = (out / "kernels.jsonl").stat().st_size
    assert {path.name for path in out.iterdir()} == {*FILES} and len(FILES) == 8
    rows = {name: load(out / name) for name in FILES if name.endswith(".jsonl")}
    found = states(rows["kernels.jsonl"])
    assert found and {*found.values()} <= {"ok", "unfinished"}
    assert states(rows["run.jsonl"])["copy"] == "ok" and not rows["steps.jsonl"]
    page = report.page(out, None, tmp_path / "page")
    assert "| copy |" in page and "| act_stats | gelu | bfloat16 | forward |" in page
    assert list((tmp_path / "page/pictures").glob("kernels.png"))
    time.sleep(1)
    assert (out / "kernels.jsonl").stat().st_size == size  # the stage died with the script


def test_page_of_nothing_and_of_wrong_things(tmp_path):
    empty = report.page(tmp_path / "no", None, tmp_path)
    assert "## Kernels" in empty and "Nothing." in empty
    missed = {"op": "act", "impl": "cuda", "device": "cuda", "dtype": "float16", "ok": False}
    missed |= {"error": 0.3, "tolerance": 0.1, "worst_output": "order | 1", "why_not": None}
    append(tmp_path / "ops.jsonl", {"item": "act, gelu", "event": "started"})
    append(tmp_path / "ops.jsonl", {"item": "act, gelu", **missed})
    failed = {"test": "tests/test_gpu.py::test_it", "outcome": "failed", "ok": False}
    append(tmp_path / "tests.jsonl", {**failed, "reason": "trace\nE assert 1 == 2"})
    page = report.page(tmp_path, None, tmp_path)
    assert "| act | cuda | cuda | float16 | 1 | 1 | 3.00, float16 |" in page
    assert "| ops.jsonl | act, gelu | order \\| 1: 3.00e-01 > 1.00e-01 |" in page
    assert "| ops.jsonl | act, gelu | unfinished |" in page
    assert "| tests.jsonl | tests/test_gpu.py::test_it | E assert 1 == 2 |" in page
    report.show([report.wrong(tmp_path)])


def test_a_kernel_stands_next_to_its_prediction(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    row = {"op": "row_sqnorm", "implementation": "cpu", "activation": "-", "dtype": "float32"}
    row |= {"pass": "backward", "bytes_per_element": "8", "predicted_share": "0.9"}
    path = tmp_path / "predictions.csv"
    path.write_text(",".join(row) + "\n" + ",".join(row.values()) + "\n")
    for name, measure in kernels.items("cpu"):
        if name.startswith("row-sqnorm-backward, float32"):
            for found in measure():
                append(tmp_path / "kernels.jsonl", {"item": name, **found})
    (cells,) = report.kernels(tmp_path)[2]
    assert cells[:4] == ["row_sqnorm", "–", "float32", "backward"]
    assert cells[-1].endswith(", predicted 90%") and "predicted" not in cells[-2]


@pytest.mark.parametrize("op", ["row_sqnorm", "softmax_residual"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_ops_without_an_activation_pass_the_gate_and_count_their_bytes(op, phase):
    case = kernels.case_of(op, "identity", phase)
    names = ("eager", "fastjac:cpu")
    options = kernels.Options(threads=1, budget_s=0.0, min_rounds=3, max_rounds=3, sample_s=1e-5)
    rows = list(kernels.measure(case, names, options))
    assert [row["contestant"] for row in rows] == [*names]
    assert all(row["status"] == "ok" and row["rel_err"] < 1e-6 for row in rows), rows
    tensors = {"row_sqnorm": {"forward": 1, "backward": 2}}.get(op, {"forward": 2, "backward": 3})
    moved = tensors[phase] * 64 * 48 * 4
    assert all(row["gbps"] * row["median_ms"] * 1e6 == pytest.approx(moved) for row in rows)


def test_checks_begin_with_what_matters_and_reach_every_activation():
    ops = [name for name, _ in checks.items("cuda", "cuda")]
    triton = [name for name, _ in checks.items("cuda", "triton")]
    assert len({*ops}) == len(ops) and len({*triton}) == len(triton)
    both = [name.replace("cuda", "triton") for name in ops if not name.startswith("row_sqnorm")]
    assert len(both) < len(ops) and both == triton[: len(both)]  # Triton has no row_sqnorm
    assert {name.split(", ")[-1] for name in ops} == {*checks.DTYPES}
    assert {fn for fn in TABLE if any(f"act, {fn}," in name for name in triton)} == {*TABLE}


def test_host_costs_are_those_of_the_suite_eager_and_in_graphs():
    names = [name for name, _ in host.items("cuda")]
    for case in select_cases(suite="host"):
        for contestant in ("plain", "eager", "fastjac", "graphed-eager", "graphed-fastjac"):
            assert f"{case.name}, {contestant}" in names
    assert "row_sqnorm backward, fastjac:cuda" in names


def test_a_step_with_wrong_gradients_has_no_host_cost(tmp_path):
    (case,) = select_cases(["host-dreg-3-layers"])
    contestants = (*named("eager")[1:], planted("fastjac", slightly_off))
    for contestant in contestants:
        for row in host.step_cost("cpu", case, contestant):
            append(tmp_path / "host.jsonl", {"item": contestant.name, **row})
    right, wrong = load(tmp_path / "host.jsonl")
    assert right["launches"] > 100 and right["host_us"] > 0 and right["rel_err"] < 1e-6
    assert not wrong["ok"] and "host_us" not in wrong
    (cells,) = report.host(tmp_path)[2]
    assert cells[0] == case.name and cells[1].endswith(f" / {right['launches']}")
    assert cells[2] == "wrong"
    (missed,) = report.wrong(tmp_path)[2]
    assert missed[1] == "fastjac: fastjac" and missed[2].startswith("relative error ")


@pytest.mark.parametrize("carried", [True, False])
def test_nothing_runs_beside_a_stage_that_measures_and_all_ends_in_eight_minutes(tmp_path, carried):
    mine = Run(tmp_path, FILES)
    groups = run.plan(mine, "cuda", carried)
    names = [[stage.name for stage in group] for group in groups]
    assert names[-3:] == [["kernels"], ["host"], ["steps"]]
    assert (["build", "checks"] in names) is not carried
    assert all(stage.ends <= 480 for group in groups for stage in group)
    ends = [max(stage.ends for stage in group) for group in groups]
    assert ends == sorted(ends)
    flat = [stage for group in groups for stage in group]
    (tests,) = (stage for stage in flat if stage.name == "tests")
    files = [word for word in tests.command if word.startswith("tests/")]
    assert "tests/test_nn.py" in files and "tests/test_chain.py" in files
    assert all((ROOT / file).exists() for file in files) and "-x" not in tests.command


def test_a_tool_that_is_missing_is_named_and_fails_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    mine = Run(tmp_path, run.SANITIZE_FILES)
    run.sanitize(mine, "cuda")
    missing = "not run: compute-sanitizer is not on the PATH"
    assert verdicts(tmp_path)["memcheck"] == missing and mine.failed == 0
    assert {path.name for path in tmp_path.iterdir()} == {*run.SANITIZE_FILES}


def test_results_of_tests_are_recorded_as_they_come(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # it tells the plugin where it runs
    file = tmp_path / "test_few.py"
    file.write_text("def test_good(): pass\n\ndef test_bad(): assert 1 == 2\n")
    mine = Run(tmp_path / "out", FILES)
    at = {"GPU_TESTS_FILE": str(mine.out / "tests.jsonl"), "PYTHONPATH": str(ROOT)}
    command = [*run.pytest(1), f"--rootdir={tmp_path}", "-c", os.devnull, str(file)]
    mine.group([Stage("tests", command, ends=90, variables=at)])
    assert verdicts(mine.out) == {"tests": "not all right"}, mine.log.read_text()
    found = {row["test"].split("::")[1]: row for row in load(mine.out / "tests.jsonl")}
    assert {name: row["outcome"] for name, row in found.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
    }
    assert "assert 1 == 2" in found["test_bad"]["reason"] and found["test_good"]["ok"]
