"""Every penalty on `pretend`, a device that only pretends to be a GPU: see pretend.py.

Values and gradients are those of the CPU, and a step does not wait for the device. It runs in a
process of its own, since torch can have one such device and cannot forget it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from penalty_cases import CASES, Call, by_engine, close, close_gradients, gradients, takes

from fastjac.penalties import PenaltySpec

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is at hand")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_on_it() -> None:
    files = [str(HERE / name) for name in ("test_pretend.py", "test_gpu.py", "test_attach.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "FASTJAC_TEST_DEVICE": "pretend"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


on_pretend = pytest.mark.skipif(DEVICE != "pretend", reason="run by test_on_it")


@on_pretend
@pytest.mark.parametrize(("spec", "options", "engine"), by_engine(CASES))
def test_as_on_the_cpu(spec: PenaltySpec, options: dict[str, Any], engine: str | None) -> None:
    with torch.device("cpu"):
        truth = Call(spec, options, engine=engine)
        value = truth.values()
        expected = [value, *gradients(value, truth.inputs)]
    call = Call(spec, options, engine=engine)
    found = call.values()
    found = [found, *gradients(found, call.inputs)]
    assert {t.device.type for t in found} == {DEVICE}
    found = [t.cpu() for t in found]
    close(found[0], expected[0])
    close_gradients(found[1:], expected[1:])


@on_pretend
@pytest.mark.parametrize(("spec", "options", "engine"), by_engine(CASES))
def test_no_waiting(spec: PenaltySpec, options: dict[str, Any], engine: str | None) -> None:
    import pretend

    call = Call(spec, options, engine=engine)
    weight = torch.tensor(0.5)
    penalty = call.module(weight=weight)

    def step() -> None:
        gradients(penalty(call.model, call.x, *call.targets)[1], call.inputs)

    step()
    with pretend.strict():
        step()
    if takes(spec, "generator"):  # torch's own
        penalty.generator = None
        with pretend.strict():
            step()
