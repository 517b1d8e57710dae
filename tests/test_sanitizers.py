"""The CUDA kernels on the CPU under AddressSanitizer, UBSan and ThreadSanitizer.

Calls of every op on a few shapes (shim/calls.cpp) must cause no report. A write out of bounds and a
missing barrier, which are planted in copies of the sources, must cause one. Races between blocks
are not seen, because the shim runs one block after the other.
"""

import os
import subprocess
from pathlib import Path

import pytest
from host import CUDA, ROOT, SCHEMAS, compile_host, needs_compiler

from fastjac import codegen
from fastjac.activations import TABLE

pytestmark = [pytest.mark.slow, needs_compiler]

ADDRESS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize=vptr",
           "-fno-sanitize-recover=all")  # fmt: skip
THREAD = ("-O1", "-g", "-fsanitize=thread")
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "detect_leaks=0",  # torch and the kept counters live until the end
    "TSAN_OPTIONS": "halt_on_error=1",
}


def call_ops(folder: Path, flags, *ops: str, kernels: Path = CUDA):
    """Builds the kernels of a folder with sanitizers and calls the named ops, or all."""
    names = ("gelu", "sine")  # each activation has 8 kernels to compile
    headers = codegen.cpp_headers([TABLE[name] for name in names], "of a test")
    for name, text in headers.items():
        (folder / name).write_text(text)
    (folder / "schemas.inc").write_text("".join(f'm.def("{s}");\n' for s in SCHEMAS))
    program = folder / "calls"
    compile_host(
        program, flags=(*flags, f"-I{folder}"), link=(), sources=[ROOT / "tests/shim/calls.cpp"],
        kernels=kernels, table=folder,
    )  # fmt: skip
    command = [str(program), *ops]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:  # TSan before GCC 14, much address randomisation
        command = ["setarch", "-R", *command]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    return done


def copy_with(folder: Path, source: str, right: str, wrong: str) -> Path:
    """Copies row_sqnorm.cu and the headers, and plants a fault in one of them."""
    kernels = folder / "kernels"
    kernels.mkdir()
    for path in (*CUDA.glob("*.cuh"), *CUDA.glob("*.h"), CUDA / "row_sqnorm.cu"):
        text = path.read_text()
        if path.name == source:
            assert right in text, f"{source} no longer has {right!r}"
            text = text.replace(right, wrong)
        (kernels / path.name).write_text(text)
    return kernels


@pytest.mark.parametrize("flags", (ADDRESS, THREAD), ids=("address", "thread"))
def test_no_report(flags, tmp_path):
    done = call_ops(tmp_path, flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all calls done\n" and done.stderr == ""


@pytest.mark.parametrize(
    ("flags", "source", "right", "wrong", "report"),
    (
        (
            ADDRESS, "rows.cuh", "if (i * apart < left) row[i * apart] = narrow<S>(values.at[i]);",
            "row[i * apart] = narrow<S>(values.at[i]);", "AddressSanitizer: heap-buffer-overflow",
        ),
        (
            THREAD, "sums.cuh", "    if (bit >= 32) {\n      __syncthreads();",
            "    if (bit >= 32) {", "ThreadSanitizer: data race",
        ),
        # A fault of an earlier version: a thread added to a sum that another warp was reading.
        (THREAD, "sums.cuh", "if ((t & mask) < bit)", "if (!(t & bit))",
         "ThreadSanitizer: data race"),
    ),
    ids=("write out of bounds", "missing barrier", "sum still read"),
)  # fmt: skip
def test_planted_faults_are_reported(flags, source, right, wrong, report, tmp_path):
    kernels = copy_with(tmp_path, source, right, wrong)
    done = call_ops(tmp_path, flags, "row_sqnorm", kernels=kernels)
    assert done.returncode != 0 and report in done.stderr, done.stderr
