"""The file of launch configurations: whose it is, what a broken one does, when it is read."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from tuning_cases import ACT, made_up_times, needs_triton, tune

import fastjac
from fastjac import launch, launch_cache, tuning

pytestmark = pytest.mark.usefixtures("untuned")


@needs_triton
@pytest.mark.parametrize(
    "what",
    ("gpu", "capability", "torch", "triton", "fastjac", "table"),
    ids=lambda what: f"another {what}",
)
def test_another_gpu_or_version_has_its_own_file(what, monkeypatch):
    tune(made_up_times(ACT), ops=("act",))
    mine, identity = tuning.cache_file(DEVICE), launch_cache.identity
    launch._chosen.clear()
    monkeypatch.setattr(
        launch_cache, "identity", lambda device: identity(device) | {what: "another"}
    )
    other = tuning.cache_file(DEVICE)
    assert other != mine and tuning.load(DEVICE) == 0
    # Though somebody copies it there.
    shutil.copy(mine, other)
    with pytest.warns(UserWarning, match="ignored the launch configurations in .*written on"):
        assert tuning.load(DEVICE) == 0
    assert launch._chosen == {}


def spoilt(record, **change):
    return lambda content: content["choices"][record].update(change)


BROKEN = {
    "empty": "",
    "cut off": '{"machine": {"gpu',
    "not text": b"\xff\xfe\x00",
    "a list": "[]",
    "no choices": lambda content: content.pop("choices"),
    "unknown kernel": spoilt(1, kernel="triton gemm"),
    "unknown dtype": spoilt(1, dtype="int8"),
    "no candidate": spoilt(1, config={"block": 333, "warps": 4}),
    "spills": spoilt(1, dtype="float64", config={"block": 2048, "warps": 4}),
    "another parameter": spoilt(1, config={"tile": 1024}),
    "config is a number": spoilt(1, config=7),
    "size is text": spoilt(1, size="1024"),
    "size is negative": spoilt(1, size=-1),
    "one field more": spoilt(1, note="hello"),
}


@needs_triton
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_ignored_with_one_warning(how):
    tune(made_up_times(ACT), ops=("act",))
    path, change = tuning.cache_file(DEVICE), BROKEN[how]
    if callable(change):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(change if isinstance(change, bytes) else change.encode())
    launch._chosen.clear()
    with pytest.warns(UserWarning, match="ignored the launch configurations in") as caught:
        assert tuning.load(DEVICE) == 0
    assert len(caught) == 1 and launch._chosen == {}
    assert torch.equal(
        fastjac.gelu(torch.ones(3, device=DEVICE), impl="triton"),
        fastjac.gelu(torch.ones(3, device=DEVICE), impl="triton"),
    )
    # Tuning writes it anew.
    assert len(tune(made_up_times(ACT), ops=("act",))) == tuning.load(DEVICE)


def test_a_folder_that_cannot_be_read_is_a_warning(monkeypatch, untuned):
    assert tuning.load(DEVICE) == 0  # no file: nothing to say
    tuning.cache_file(DEVICE).mkdir(parents=True)
    with pytest.warns(UserWarning, match="IsADirectoryError"):
        assert tuning.load(DEVICE) == 0


@needs_triton
def test_the_file_is_replaced_whole(monkeypatch, untuned):
    tune(made_up_times(ACT), ops=("act",))
    before = tuning.cache_file(DEVICE).read_text()
    monkeypatch.setattr(json, "dump", lambda content, file, **_: 1 / file.write("half of it"))

    def fails(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        tune(made_up_times({}), ops=("act",))
    assert tuning.cache_file(DEVICE).read_text() == before
    assert len(list(untuned.iterdir())) == 1


def test_where_the_file_is(monkeypatch, tmp_path):
    assert tuning.cache_file(DEVICE).parent == tmp_path / "cache"
    monkeypatch.delenv("FASTJAC_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_file(DEVICE).parent == tmp_path / "xdg/fastjac"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_file(DEVICE).parent == tmp_path / ".cache/fastjac"


# ---- CUDA's start


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU as far as the file's name needs one."""
    gpu = SimpleNamespace(name="NVIDIA H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    return torch.device("cuda", 0)


def at_cuda_start():
    """What fastjac has torch call then."""
    (call,) = [c for c, _ in torch.cuda._queued_calls if c.__module__ == "fastjac.ops.registration"]
    return call


@pytest.mark.skipif(DEVICE == "cuda", reason="CUDA has started")
def test_choices_are_read_when_cuda_starts(a_gpu, capsys):
    choices = [
        launch_cache.Choice("triton act vjp", "float32", 2**20, (2048, 8), 1.0, 2.0),
        launch_cache.Choice("cuda act vjp", "float32", 2**20, (64,), 1.0, 2.0),  # not built here
    ]
    path = tuning.cache_file(a_gpu)
    path.parent.mkdir()
    launch_cache.write(path, choices, a_gpu)
    at_cuda_start()()
    assert launch._chosen == {("triton act vjp", 0, torch.float32): ((2048, 8),) * 65}
    # Warnings are errors in these tests: CUDA has to start all the same.
    path.write_text("broken")
    at_cuda_start()()
    assert "ignored the launch configurations" in capsys.readouterr().err


def test_import_neither_starts_cuda_nor_reads_a_file(untuned):
    program = "import torch, fastjac, fastjac.tuning; assert not torch.cuda.is_initialized()"
    untuned.write_text("a file where the folder should be: reading there would warn")
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
