"""Starts the stages of a run, each with a deadline, and says how each one ended.

    python -m benchmarks.gpu.run OUT [sanitize]

``benchmarks/gpu.sh`` explains the run, its files and its variables. A stage is one or several
processes in a process group each. At its deadline a group is killed; when this process dies, the
kernel kills the stages. A stage that crashed, or whose CUDA context broke, is started again and
goes on after the item that did it. Stages of one group run side by side, groups one after another.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.work import NOT_ALL_OK, POISONED, append, load

ROOT = Path(__file__).resolve().parents[2]
#: The files of the first call, and of the second. All exist from the first moment on.
FILES = (
    *("run.jsonl", "ops.jsonl", "checks.jsonl", "tests.jsonl"),
    *("kernels.jsonl", "host.jsonl", "steps.jsonl", "log.txt"),
)
SANITIZE_FILES = ("run.jsonl", "memcheck.txt", "racecheck.txt", "ncu.csv", "log.txt")
MOST_RESTARTS = 10
#: Tests of what runs on a GPU. A name without a file is left out.
TESTS = (
    *("gpu", "nn", "act", "act_output", "act_stats", "row_sqnorm", "softmax_residual"),
    *("attach*", "batch_norm", "chain*"),
)
MATRIX = ("tests/test_matrix.py", "tests/test_bench_registry.py")
#: Deadlines in seconds after the start, if the library was carried, and if it has to be built.
ENDS = {
    **{"ops": 75, "checks": 180, "tests": 180, "matrix": 180},
    **{"kernels": 290, "host": 325, "steps": 480},
}
ENDS_WITH_BUILD = {
    **{"generate": 60, "build": 230, "checks": 230, "ops": 255, "tests": 320, "matrix": 320},
    **{"kernels": 390, "host": 420, "steps": 480},
}
PRCTL = ctypes.CDLL(None).prctl
PR_SET_PDEATHSIG = 1
#: Words of a command that stand for the number of a process, and for how many there are.
PART, PARTS = "{part}", "{parts}"


@dataclass
class Stage:
    """Processes that do one thing.

    Attributes:
        name: What ``STAGES`` and the table of verdicts call it.
        command: What runs.
        ends: Its deadline, in seconds after the start of the run.
        copies: Its number of processes; each is told which part of the items is its own.
        variables: Its environment variables, beside those of the run.
        output: Where it prints; the default is the log.
    """

    name: str
    command: Sequence[str]
    ends: float
    copies: int = 1
    variables: dict[str, str] = field(default_factory=dict)
    output: Path | None = None


class Run:
    """A run into a folder: its clock, its log and its verdicts."""

    def __init__(self, out: Path, files: Sequence[str], begun: float | None = None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.log = out, out / "log.txt"
        for name in files:
            (out / name).write_bytes(b"")
        self.begun = time.monotonic() if begun is None else begun
        self.failed = 0

    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        """A line for the terminal and the log."""
        print(text, flush=True)
        with self.log.open("a") as log:
            log.write(text + "\n")

    def start(self, stage: Stage, part: int) -> subprocess.Popen[bytes]:
        which = {PART: str(part), PARTS: str(stage.copies)}
        command = [which.get(word, word) for word in stage.command]

        def in_child() -> None:
            os.setpgid(0, 0)
            PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)

        with (stage.output or self.log).open("ab") as output:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **stage.variables},
                preexec_fn=in_child,
            )

    def group(self, stages: Sequence[Stage]) -> None:
        """Run stages side by side, until the last has ended or been killed."""
        started = self.seconds()
        for stage in stages:
            self.say(f"[{started:5.1f} s] {stage.name} begins; deadline {stage.ends:.0f} s")
        live = {
            (k, part): self.start(s, part) for k, s in enumerate(stages) for part in range(s.copies)
        }
        restarts = dict.fromkeys(live, 0)
        codes: dict[int, list[int | str]] = {k: [] for k in range(len(stages))}
        while live:
            for key, process in list(live.items()):
                stage = stages[key[0]]
                code = process.poll()
                if code is None and self.seconds() < stage.ends:
                    continue
                if code is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    codes[key[0]].append("killed")
                elif (code < 0 or code == POISONED) and restarts[key] < MOST_RESTARTS:
                    restarts[key] += 1
                    self.say(f"[{self.seconds():5.1f} s] {stage.name}: {died(code)}; again")
                    live[key] = self.start(stage, key[1])
                    continue
                else:
                    codes[key[0]].append(code)
                del live[key]
                if not any(other == key[0] for other, _ in live):
                    self.verdict(stage, codes[key[0]], started)
            time.sleep(0.05)

    def verdict(self, stage: Stage, codes: Sequence[int | str], started: float) -> None:
        bad = [code for code in codes if code not in (0, NOT_ALL_OK)]
        if "killed" in bad:
            said = f"killed at its deadline, {stage.ends:.0f} s"
        elif bad:
            said = died(int(bad[0]))
        else:
            said = "not all right" if NOT_ALL_OK in codes else "ok"
        self.note(stage.name, said, self.seconds() - started)

    def note(self, stage: str, verdict: str, seconds: float = 0.0) -> None:
        self.failed += not verdict.startswith(("ok", "not run"))
        row = {"event": "stage", "stage": stage, "verdict": verdict}
        append(self.out / "run.jsonl", {**row, "seconds": round(seconds, 1)})
        self.say(f"[{self.seconds():5.1f} s] {stage}: {verdict} ({seconds:.1f} s)")


def died(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


# ---- the stages


def module(run: Run, name: str, file: str, device: str, *words: str) -> list[str]:
    """The command of a stage that is a module; the runner fills in part and parts."""
    path = str(run.out / file)
    module = f"benchmarks.gpu.{name}"
    return [sys.executable, "-m", module, path, device, PART, PARTS, *words]


def pytest(workers: int, *words: str) -> list[str]:
    """The command of a test stage. It stops after 60 failures, and not at the first."""
    plugin = ("-p", "benchmarks.gpu.pytest_records", "-p", "no:cacheprovider")
    shown = ("-q", "--tb=short", "--color=no", "--maxfail=60")
    spread = ("-n", str(workers), "--dist", "worksteal")
    return [sys.executable, "-m", "pytest", *plugin, *shown, *spread, *words]


def plan(run: Run, device: str, carried: bool) -> list[list[Stage]]:
    """The groups after ``machine``. Without a library the Triton checks run beside the build."""
    gpu = device == "cuda"
    ends = ENDS if carried else ENDS_WITH_BUILD
    # The dry run measures nothing, so a slow machine only has to come to its end.
    ends = {name: seconds if gpu else 2 * seconds for name, seconds in ends.items()}

    def stage(name: str, command: Sequence[str], copies: int = 1, **more: Any) -> Stage:
        return Stage(name, command, ends[name], copies, **more)

    only = () if gpu else ("gelu",)
    interpreted = {} if gpu else {"TRITON_INTERPRET": "1"}
    ops = module(run, "checks", "ops.jsonl", device, device, *only)
    triton = module(run, "checks", "checks.jsonl", device, "triton", *only)
    checks = stage("checks", triton, 14 if gpu else 2, variables=interpreted)

    files = sorted(str(p.relative_to(ROOT)) for t in TESTS for p in ROOT.glob(f"tests/test_{t}.py"))
    few = () if gpu else ("-k", "softmax_residual or attach_traps")
    tests = pytest(7 if gpu else 2, *files, "-m", "not slow or gpu", *few)
    matrix = pytest(4 if gpu else 1, *MATRIX, "-m", "gpu")
    at = {"GPU_TESTS_FILE": str(run.out / "tests.jsonl")}
    both = [stage("tests", tests, variables=at), stage("matrix", matrix, variables=at)]

    first = [stage("ops", ops, 4 if gpu else 1)]
    timed = [
        [stage(name, module(run, name, f"{name}.jsonl", device))]
        for name in ("kernels", "host", "steps")
    ]
    if carried:
        return [first, [checks, *both], *timed]
    variables = {"FASTJAC_CUDA": "1" if gpu else "0", "MAX_JOBS": str(os.cpu_count())}
    if gpu:
        variables["TORCH_CUDA_ARCH_LIST"] = item(run, "versions").get("capability", "")
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    nothing = {"FASTJAC_CPU": "0", "FASTJAC_CUDA": "0"}  # the sources alone, which Triton needs
    generate = stage("generate", build, variables=nothing)
    beside = [stage("build", build, variables=variables), checks]
    return [[generate], beside, first, both, *timed]


def item(run: Run, name: str) -> dict:
    """The record of an item of ``machine``; empty if it has none."""
    rows = [r for r in load(run.out / "run.jsonl") if r.get("item") == name and "event" not in r]
    return rows[0] if rows else {}


def sanitize(run: Run, device: str) -> None:
    """The second call. On a CPU the programs run without the tools."""
    scale = 1 if device == "cuda" else 2
    metrics = "smsp__inst_executed.sum,smsp__issue_active.avg.pct_of_peak_sustained_active"
    tools = {
        "memcheck": (70, "all", "compute-sanitizer --tool memcheck --error-exitcode 9"),
        "racecheck": (130, "all", "compute-sanitizer --tool racecheck --error-exitcode 9"),
        "ncu": (
            *(175, "two"),
            "ncu --clock-control none --csv --page raw --kernel-name regex:act_stats"
            " --launch-skip 2 --launch-count 2 --section SpeedOfLight --section LaunchStats"
            f" --section Occupancy --metrics {metrics}",
        ),
    }
    for name, (ends, what, tool) in tools.items():
        words = tool.split() if device == "cuda" else []
        if words and shutil.which(words[0]) is None:
            run.note(name, f"not run: {words[0]} is not on the PATH")
            continue
        output = run.out / ("ncu.csv" if name == "ncu" else f"{name}.txt")
        program = [sys.executable, "-m", "benchmarks.gpu.small", device, what]
        # Each tensor in an allocation of its own, or an access beyond it meets another tensor.
        alone = {} if name == "ncu" else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run.group([Stage(name, [*words, *program], ends * scale, variables=alone, output=output)])


def measure(run: Run, device: str, chosen: Callable[[str], bool]) -> None:
    """The first call."""
    scale = 1 if device == "cuda" else 2
    if chosen("machine"):
        run.group([Stage("machine", module(run, "machine", "run.jsonl", device), 40 * scale)])
    library = item(run, "library")
    carried = library.get("runs", True)
    if library:
        how = "was carried, and loads" if carried else f"is built now: {library['why_not']}"
        run.say(f"The {device} library {how}.")
    for group in plan(run, device, carried):
        stages = [stage for stage in group if chosen(stage.name)]
        if stages:
            run.group(stages)


def main() -> int:
    out, *rest = sys.argv[1:]
    device, names = os.environ.get("DEVICE", "cuda"), os.environ.get("STAGES", "").split()
    second = rest == ["sanitize"]
    run = Run(Path(out).resolve(), SANITIZE_FILES if second else FILES)
    if second:
        sanitize(run, device)
    else:
        measure(run, device, lambda name: not names or name in names)
    summary = [sys.executable, "-m", "benchmarks.gpu.report", "--summary", str(run.out)]
    subprocess.run(summary, cwd=ROOT, timeout=60)
    return min(run.failed, 1)


if __name__ == "__main__":
    sys.exit(main())
