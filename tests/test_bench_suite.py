"""The pytest-benchmark suite of benchmarks/ holds what the registry holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastjac.bench import Options, all_contestants, select_cases
from fastjac.bench.options import contestants_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("suite", ["quick", "scaling"])
def test_a_test_per_case_and_contestant(suite):
    pytest.importorskip("pytest_benchmark", reason="pip install 'fastjac[bench]'")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, "benchmarks/test_bench.py", "--suite", suite],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    collected = {
        line.split("[")[1].rstrip("]") for line in result.stdout.splitlines() if "[" in line
    }
    options = Options(quick=suite == "quick")
    assert collected == {
        f"{case.name}-{contestant.name}"
        for case in select_cases(suite=suite)
        for contestant in contestants_of(case, all_contestants(), options)
    }
