"""GPU code compiles for every target with no register spilled: checked without a GPU.

Prints registers and shared memory per kernel (``pytest -s``).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90, 100)
pytestmark = pytest.mark.slow


def resources(log: str) -> dict[str, dict[str, int]]:
    """Registers, shared memory and spilled bytes per kernel, from what ``ptxas -v`` prints."""
    found: dict[str, dict[str, int]] = {}
    for block in log.split("Compiling entry function '")[1:]:
        spilled = re.findall(r"(\d+) bytes spill (?:stores|loads)", block)
        registers = re.search(r"Used (\d+) registers", block)
        shared = re.search(r"(\d+) bytes smem", block)
        assert spilled and registers, block
        found[block.split("'")[0]] = {
            "registers": int(registers[1]),
            "shared": int(shared[1]) if shared else 0,
            "spilled": sum(map(int, spilled)),
        }
    return found


def assert_no_spills(found: dict[str, dict[str, int]], least: int) -> None:
    assert len(found) >= least
    for name, use in found.items():
        print(f"{use['registers']:4d} registers {use['shared']:6d} B shared  {name}")
    assert {n: u for n, u in found.items() if u["spilled"]} == {}


def test_a_spill_is_seen():
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_90'\n"
        "    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 0 barriers, 64 bytes smem\n"
    )
    assert resources(log) == {"f": {"registers": 32, "shared": 64, "spilled": 20}}
    with pytest.raises(AssertionError):
        assert_no_spills(resources(log), 1)


def nvcc() -> Path:
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    pytest.skip("nvcc not found")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", sorted(p.name for p in (ROOT / "csrc/cuda").glob("*.cu")))
def test_cuda(source, arch, tmp_path):
    import torch

    include = Path(torch.__file__).parent / "include"
    out = subprocess.run(
        [nvcc(), "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v",
         f"-I{ROOT}/csrc/common", f"-I{ROOT}/build/native/generated", "-isystem", include,
         "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA", "--expt-relaxed-constexpr",
         ROOT / "csrc/cuda" / source, "-o", tmp_path / "out.cubin"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert_no_spills(resources(out.stderr), least=1)


TRITON_PROGRAM = """
import subprocess, sys, triton, triton.language as tl
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from fastjac.activations import TABLE
from fastjac.kernels import act

arch, folder = int(sys.argv[1]), Path(sys.argv[2])
print(get_ptxas(arch).path)
CONSTANTS = ("p0", "p1", "FN", "K", "ZEROS", "ZEROS_NEXT", "HAS_G", "COMPUTE", "BLOCK")
names = {tl.float32: "fp32", tl.float64: "fp64"}

def compile(kernel, tag, pointer, **constants):
    signature = {p: "constexpr" if p in CONSTANTS else "i64" if p == "numel" else "*" + pointer
                 for p in kernel.arg_names}
    # As the launcher specialises: aligned pointers, and a size that is a multiple of 16.
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.arg_names)
               if signature[p] != "constexpr"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    out = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                         options={"num_warps": act.NUM_WARPS})
    assert ".v4.b32" in out.asm["ptx"] or pointer == "fp64", "accesses are not 16 bytes wide"
    name = f"{kernel.__name__}_{tag}_{pointer}"
    (folder / f"{name}.ptx").write_text(
        out.asm["ptx"].replace(f".entry {out.metadata.name}(", f".entry {name}("))

for fn, (name, row) in enumerate(TABLE.items()):
    common = dict(zip(("p0", "p1"), row.param_values({}))) | {"FN": fn, "BLOCK": act.BLOCK}
    for pointer, compute in (("fp32", tl.float32), ("bf16", tl.float32), ("fp64", tl.float64)):
        if pointer != "fp32" and name not in ("gelu", "mish"):
            continue
        for k in range(3):
            compile(act.act_kernel, f"{name}_{k}", pointer, K=k, HAS_G=k > 0, COMPUTE=compute,
                    ZEROS=row.has_zeros(k), **common)
        compile(act.act_backward_kernel, f"{name}_1", pointer, K=1, COMPUTE=compute,
                ZEROS=row.has_zeros(1), ZEROS_NEXT=row.has_zeros(2), **common)
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_triton(arch, tmp_path):
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRITON_PROGRAM, str(arch), str(tmp_path)],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    ptxas = out.stdout.split()[0]
    found = {}
    for ptx in sorted(tmp_path.glob("*.ptx")):
        target = re.search(r"\.target (sm_\w+)", ptx.read_text())[1]
        log = subprocess.run(
            [ptxas, "-v", f"-arch={target}", ptx, "-o", tmp_path / "out.cubin"],
            capture_output=True, text=True,
        )  # fmt: skip
        assert log.returncode == 0, log.stderr
        found |= resources(log.stderr)
    assert_no_spills(found, least=70)
