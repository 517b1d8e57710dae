"""GPU code compiles for every target without register spills. This needs no GPU.

With ``pytest -s`` the registers and the shared memory of each kernel are printed.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import NVCC

ROOT = Path(__file__).resolve().parent.parent
ARCHS = (80, 90, 100)
pytestmark = pytest.mark.slow


def resources(log: str) -> dict[str, dict[str, int]]:
    """Registers, shared memory and spilled bytes of each kernel in the output of ``ptxas -v``."""
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


def test_cuda():
    """The library that is installed: a kernel that spills registers has a stack."""
    tools = pytest.importorskip("triton.backends.nvidia").__path__[0]
    if not NVCC.exists():
        pytest.skip("nvcc not found")
    # Compiles only what has changed since the library was built.
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    env = {**os.environ, "FASTJAC_CUDA": "1"}
    done = subprocess.run(build, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = dict.fromkeys(ARCHS, 0)
    for unit in sorted((ROOT / "build/native").glob("cuda_*.o")):
        log = subprocess.run(
            [Path(tools) / "bin/cuobjdump", "-res-usage", unit], capture_output=True, text=True
        ).stdout
        for part in log.split("arch = sm_")[1:]:
            arch = int(re.match(r"\d+", part)[0])
            for name, registers, stack in re.findall(
                r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", part
            ):
                print(f"{registers:>4} registers  sm_{arch}  {name}")
                assert stack == "0", f"{name} spills registers on sm_{arch}"
                kernels[arch] += 1
    assert min(kernels.values()) > 1000, kernels


# Calls the launchers on CPU tensors, with each kernel replaced by a compiler, so that exactly the
# launches that are made are compiled.
TRITON_PROGRAM = """
import re, sys, torch, triton
from pathlib import Path
from triton.backends.nvidia.compiler import get_ptxas
from benchmarks.gpu.triton_launches import replace
from fastjac.activations import TABLE
from fastjac.kernels import act, act_stats, norm, softmax_residual
from fastjac.ops.act_stats import BIAS, CHANNEL, NONE, SAMPLE

arch, folder = int(sys.argv[1]), Path(sys.argv[2])
print(get_ptxas(arch).path)
WIDE = {"load": r"ld\\.global[.\\w:]*\\.(v4\\.b32|v2\\.b64)",
        "store": r"st\\.global[.\\w:]*\\.(v4\\.b32|v2\\.b64)"}
now = {}

def see(kernel, args, options):
    source, options = kernel.source(args, options)
    out = triton.compile(source, target=kernel.target, options=options)
    ptx, name = out.asm["ptx"], f"{kernel.kernel.__name__}_{now['name']}"
    for kind in now["wide"]:
        assert re.search(WIDE[kind], ptx), f"{name}: no {kind} is 16 bytes wide"
    (folder / f"{name}.ptx").write_text(
        ptx.replace(f".entry {out.metadata.name}(", f".entry {name}("))

for module in (act, act_stats, norm, softmax_residual):
    replace(module, arch, see)

def compile(name, call, wide=("load", "store")):
    now.update(name=name, wide=wide)
    call()

dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}

for fn, (name, row) in enumerate(TABLE.items()):
    params = row.param_values({})
    for label, dtype in dtypes.items():
        if label != "fp32" and name not in ("gelu", "mish"):
            continue
        z = torch.empty(4096, dtype=dtype)
        for k in range(3):
            compile(f"{name}_{k}_{label}", lambda: act.act(z, z if k else None, k, fn, params),
                    ("store",))
        compile(f"{name}_{label}", lambda: act.act_backward(z, z, z, 1, fn, params), ("store",))

# (label, shape, channels, statistic); the first three are the common ones.
STATS = [
    ("channel", (512, 256), 1, CHANNEL),
    ("bias", (512, 256), 1, BIAS),
    ("conv", (32, 16, 1024), 1, CHANNEL),
    ("sample", (64, 8192), 1, SAMPLE),
    ("conv_sample", (4, 16, 1024), 1, SAMPLE),
    ("small_conv_sample", (64, 16, 64), 1, SAMPLE),
    ("conv_last_sample", (4, 1024, 16), 2, SAMPLE),
    ("small_conv", (512, 4, 8), 1, CHANNEL),
    ("none", (512, 256), 1, NONE),
    ("odd", (99, 77), 1, CHANNEL),
    ("one", (1, 1), 1, SAMPLE),
]
cases = [("relu", "fp32", STATS), ("mish", "bf16", STATS), ("mish", "fp32", STATS[3:8]),
         ("mish", "fp64", STATS[:8]), ("gelu", "fp64", STATS[3:6]), ("sine", "fp32", STATS[:7]),
         ("sine", "fp64", STATS[1:2]), ("gelu", "bf16", STATS[1:2])]
for name, label, stats in cases:
    fn, params = list(TABLE).index(name), TABLE[name].param_values({})
    for case, shape, dim, statistic in stats:
        z = torch.empty(shape, dtype=dtypes[label])
        weight = torch.float64 if label == "fp64" else torch.float32
        n, c = (torch.empty(shape[d], dtype=weight) for d in (0, dim))
        wide = () if case in ("odd", "one") else ("load", "store")
        if statistic in (CHANNEL, SAMPLE):
            per_sample = statistic == SAMPLE
            compile(f"{case}_{name}_{label}",
                    lambda: act_stats.act_stats(z, None, dim, per_sample, 0.5, fn, params),
                    wide)
        compile(f"{case}_backward_{name}_{label}",
                lambda: act_stats.act_stats_backward(z, z, n, c, dim, statistic, 0.5, fn,
                                                     params), wide)

for label, dtype in dtypes.items():
    for m in (10, 1024, 50_000):
        z, target = torch.empty(4, m, dtype=dtype), torch.zeros(4, dtype=torch.int64)
        wide = () if m == 10 else ("load", "store")
        compile(f"{m}_{label}",
                lambda: softmax_residual.softmax_residual(z, target), wide)
        compile(f"backward_{m}_{label}",
                lambda: softmax_residual.softmax_residual_backward(z, z), wide)
        stats = torch.empty(4, dtype=torch.float64 if label == "fp64" else torch.float32)
        for weight in (None, z[0]):
            compile(f"norm_{weight is None}_{m}_{label}",
                    lambda: norm.norm_push(z, z, z, stats, stats, weight, m, True,
                                           weight is not None), wide)
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_triton(arch, tmp_path):
    pytest.importorskip("triton")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {
        **os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": path,
    }  # fmt: skip
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRITON_PROGRAM, str(arch), str(tmp_path)],
        env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-4000:]
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
    assert_no_spills(found, least=150)
