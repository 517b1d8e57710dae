"""Builds other than the usual one: without a compiler, without torch in sight, as a wheel."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def copy_of_the_sources(folder: Path) -> Path:
    """What git tracks, so that nothing built in the working tree helps."""
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    return folder


def wheel(source: Path, **env: str) -> zipfile.ZipFile:
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps",
         "-w", source / "dist", source],
        env={**os.environ, "FASTJAC_CUDA": "0", **env}, check=True, capture_output=True,
    )  # fmt: skip
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_without_a_compiler_it_installs_imports_and_runs(tmp_path):
    archive = wheel(copy_of_the_sources(tmp_path / "src"), CXX="no-such-compiler")
    names = archive.namelist()
    assert "fastjac/_cpu.so" not in names and "fastjac/kernels/_phi.py" in names
    assert "no C++ compiler found" in json.loads(archive.read("fastjac/_build.json"))["cpu"]["why"]
    archive.extractall(tmp_path / "site")
    program = """
import torch, fastjac
assert "site" in fastjac.__file__, fastjac.__file__
print(fastjac.explain("act"))
x = torch.randn(4, 3)
model = fastjac.fuse(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GELU()))
output, value = fastjac.SpectReg()(model, x)
value.backward()
assert model[0].weight.grad.any()
try:
    fastjac.act(x, impl="cpu")
except RuntimeError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "-> reference" in out.stdout
    assert out.stdout.count("no C++ compiler found (set CXX or install g++)") == 2


def test_wheel_holds_the_library_and_complete_metadata(tmp_path):
    archive = wheel(copy_of_the_sources(tmp_path / "src"))
    names = archive.namelist()
    for name in ("_cpu.so", "_build.json", "py.typed", "kernels/_phi.py", "cli/__main__.py"):
        assert f"fastjac/{name}" in names
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "build/"))]
    (metadata,) = [n for n in names if n.endswith(".dist-info/METADATA")]
    text = archive.read(metadata).decode()
    for field in ("Summary: ", "License-Expression: MIT", "Requires-Python: >=3.10", "Keywords: "):
        assert field in text
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_a_compiler_that_fails_is_an_error(tmp_path):
    source = copy_of_the_sources(tmp_path / "src")
    (source / "csrc/cpu/act.cpp").write_text("#error planted\n")
    with pytest.raises(subprocess.CalledProcessError):
        wheel(source)


def test_cuda_demanded_without_nvcc_is_an_error(tmp_path):
    source = copy_of_the_sources(tmp_path / "src")
    (source / "setup.py").write_text(
        (source / "setup.py").read_text().replace('"/usr/local/cuda"', '"/nowhere"')
    )
    with pytest.raises(subprocess.CalledProcessError) as caught:
        wheel(source, FASTJAC_CUDA="1", CUDA_HOME="/nowhere", CUDA_PATH="/nowhere")
    assert b"FASTJAC_CUDA is 1, but nvcc is not found" in caught.value.stdout + caught.value.stderr
