"""Fuzzing of the raw ops: no arguments of ``torch.ops.fastjac.*`` crash them.

Each call of fuzz_ops.py returns, or raises an error that can be understood. For most of the cases
the library is built with AddressSanitizer and UBSan, so that a read or write out of bounds ends the
program. Planted faults show that the number of cases is large enough. To run more cases:

    FASTJAC_FUZZ_CASES=100000 FASTJAC_FUZZ_SEED=1 pytest tests/test_fuzz_ops.py -m slow
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import fuzz_ops
import host
import pytest
import torch
from fuzz_cases import draw_call, fault_of, recorded_calls
from host import needs_compiler
from test_build import copy_of_the_sources

from fastjac import codegen
from fastjac.activations import ROWS

CASES = int(os.environ.get("FASTJAC_FUZZ_CASES", "10000"))
SEED = os.environ.get("FASTJAC_FUZZ_SEED", "0")
TESTS = Path(__file__).resolve().parent
NATIVE = "^(?!.*_triton$)"
SANITIZE = "-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined"


def fuzz(
    log: Path,
    *options: str,
    cases: int,
    package: Path = TESTS.parent,
    program: tuple[str, ...] = (str(TESTS / "fuzz_ops.py"),),
    **environment: str,
) -> tuple[bool, str]:
    """Runs the program; returns whether there was no fault, and the text with the last call."""
    done = subprocess.run(
        [sys.executable, *program, f"--log={log}", f"--cases={cases}", f"--seed={SEED}", *options],
        env={
            **os.environ, "PYTHONPATH": f"{package}{os.pathsep}{TESTS}", "TRITON_INTERPRET": "0",
            **environment,
        },
        capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    errors = "".join(
        line for line in done.stderr.splitlines(True) if "failed to allocate" not in line
    )
    text = f"{done.stdout[-20000:]}\n{errors[:20000]}"
    if not re.search(r"^seed .* faults$", done.stdout, re.M):  # the last line of a full run
        text = f"exit code {done.returncode} in {log.read_text()}\n{text}"
    return done.returncode == 0, text


def sanitized() -> dict[str, str]:
    """The environment in which a Python without sanitizers runs libraries with them."""

    def runtime(name: str) -> str:
        command = ["c++", f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return {
        # Without libstdc++ the sanitizer does not find the function that throws exceptions.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Torch raises if an allocation fails; leaks of Python itself are not reported.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=2048",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


@pytest.fixture(scope="module")
def sanitized_copy(tmp_path_factory):
    """A copy of the package, its C++ library with sanitizers, and the function that builds it."""
    folder = copy_of_the_sources(tmp_path_factory.mktemp("sanitized"))

    def build() -> Path:
        flags = {"CXXFLAGS": f"-O1 {SANITIZE}", "LDFLAGS": SANITIZE, "FASTJAC_CUDA": "0"}
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=folder, env={**os.environ, **flags}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return folder

    build()
    return folder, build


def test_native_ops(tmp_path):
    clean, text = fuzz(tmp_path / "case", "--ops", NATIVE, cases=min(CASES // 20, 500))
    assert clean, text


@pytest.mark.slow
@needs_compiler
def test_native_ops_under_sanitizers(sanitized_copy, tmp_path):
    folder, _ = sanitized_copy
    clean, text = fuzz(
        tmp_path / "case", "--ops", NATIVE, cases=CASES, package=folder, **sanitized()
    )
    assert clean, text


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong"),
    (
        ("target.size(0) == logits.size(0)", "target.size(0) >= logits.size(0) - 1"),
        ("target.scalar_type() == torch::headeronly::ScalarType::Long &&", ""),
    ),
    ids=("bound off by one", "no dtype check"),
)
def test_planted_faults_are_found(right, wrong, sanitized_copy, tmp_path):
    folder, build = sanitized_copy
    header = folder / "csrc/common/softmax.h"
    source = header.read_text()
    assert right in source
    header.write_text(source.replace(right, wrong))
    try:
        clean, text = fuzz(
            tmp_path / "case", "--ops", NATIVE, cases=CASES, package=build(), **sanitized()
        )
    finally:
        header.write_text(source)
    assert not clean and "AddressSanitizer: heap-buffer-overflow" in text, text
    assert "fastjac::softmax_residual(" in text.partition("\n")[0]  # the call that did it


@pytest.mark.slow
@needs_compiler
def test_cuda_ops_under_sanitizers(tmp_path):
    """The host shim runs 256 threads per block, so there are fewer cases."""
    rows = 2  # of the activation table: each row has 8 kernels to compile
    headers = codegen.cpp_headers(ROWS[:rows], "of a test")
    for name, text in headers.items():
        (tmp_path / name).write_text(text)
    library, flags = tmp_path / "host.so", ("-O1", *SANITIZE.split())
    host.compile_host(library, flags=flags, link=("-shared",), table=tmp_path)
    clean, text = fuzz(
        tmp_path / "case", "--namespace=fastjac_host", f"--library={library}", f"--rows={rows}",
        cases=CASES // 50, **sanitized(),
    )  # fmt: skip
    assert clean, text


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_triton_ops(tmp_path):
    """In Triton's interpreter, which takes about 50 ms per case."""
    clean, text = fuzz(
        tmp_path / "case", "--ops", "_triton$", cases=CASES // 25, TRITON_INTERPRET="1"
    )
    assert clean, text


# ---- the fuzzer itself


@pytest.fixture(scope="module")
def planted(request):
    """Ops with faults, in a namespace of their own."""
    library = torch.library.Library("fuzz_planted", "DEF")
    request.addfinalizer(library._destroy)

    def plant(schema, function):
        library.define(schema)
        library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")

    def on_meta(z, other):
        return torch.empty_like(z)

    plant("writes(Tensor z) -> Tensor", lambda z: z.detach().add_(1).clone())
    plant("declares(Tensor(a!) z) -> Tensor", lambda z: z.detach().add_(1).clone())
    plant("mixes(Tensor z, Tensor other) -> Tensor", on_meta)
    plant("asserts(Tensor z) -> Tensor", lambda z: {}[z])
    return torch.ops.fuzz_planted


def test_faults_of_a_call_are_seen(planted):
    z, rng = torch.ones(3), fuzz_ops.Random(0)
    assert "wrote to an argument" in fuzz_ops.call(planted.writes.default, [z], rng)
    assert fuzz_ops.call(planted.declares.default, [z], rng) is None
    two = [z, torch.ones(3, device="meta")]
    assert "one computation" in fuzz_ops.call(planted.mixes.default, two, rng)
    with pytest.raises(KeyError) as caught:
        fuzz_ops.call(planted.asserts.default, [z], rng)
    assert "KeyError" in fault_of(caught.value)
    assert fault_of(ValueError("z must be a matrix")) is None
    assert fault_of(RuntimeError("t.dim() INTERNAL ASSERT FAILED")) is not None


def test_a_crash_is_reported_with_its_case(tmp_path):
    program = """
import ctypes, sys, torch
library = torch.library.Library("fuzz_planted", "DEF")
library.define("crash(Tensor z, int[] sizes) -> Tensor")
library.impl("crash", lambda z, sizes: ctypes.string_at(0), "CompositeExplicitAutograd")
import fuzz_ops
sys.exit(fuzz_ops.main())
"""
    clean, text = fuzz(
        tmp_path / "case", "--namespace=fuzz_planted", cases=5, program=("-c", program)
    )
    assert not clean
    assert text.startswith(f"exit code -11 in seed {SEED} case ") and "fuzz_planted::crash(" in text
    assert "Segmentation fault" in text


def test_cases_repeat():
    """The same seed draws the same calls, and right calls of every native op are recorded."""
    calls = recorded_calls(most=5)
    for name, op in fuzz_ops.overloads("fastjac", NATIVE).items():
        stem = name.removeprefix("fastjac::")
        assert calls.get(stem), f"no right call of {name} is recorded"
        first, second = (
            fuzz_ops.described(draw_call(fuzz_ops.Random(f"0:{stem}"), op._schema, calls[stem]))
            for _ in range(2)
        )
        assert first == second
