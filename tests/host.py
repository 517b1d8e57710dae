"""Builds the CUDA sources for the CPU (tests/shim) and loads them as ``torch.ops.fastjac_host``."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = (
    "act(Tensor z, Tensor? g, int order, int fn, float p0, float p1) -> Tensor",
    "act_backward(Tensor z, Tensor g, Tensor v, int order, int fn, float p0, float p1)"
    " -> (Tensor, Tensor)",
)


def compile_host(out: Path, *flags: str, sources: list[Path] | None = None) -> None:
    """g++ over every .cu file with the shim's headers in place of CUDA's."""
    torch_root = Path(torch.__file__).parent
    subprocess.run(
        [shutil.which("c++") or "c++", "-std=c++20", "-g1", "-x", "c++", "-shared", "-fPIC",
         "-DFASTJAC_HOST_SHIM", "-DTORCH_TARGET_VERSION=0x020a000000000000", *(flags or ("-O1",)),
         f"-I{ROOT}/tests/shim", f"-I{ROOT}/csrc/common", f"-I{ROOT}/build/native/generated",
         "-isystem", str(torch_root / "include"), "-Wno-attributes",
         *map(str, sources or sorted((ROOT / "csrc/cuda").glob("*.cu"))),
         f"-L{torch_root}/lib", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10", "-pthread",
         "-o", str(out)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


@functools.cache
def host_ops() -> object:
    """``torch.ops.fastjac_host``, built once a session."""
    library = torch.library.Library("fastjac_host", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    out = Path(tempfile.mkdtemp(prefix="fastjac-host-")) / "host.so"
    compile_host(out)
    torch.ops.load_library(str(out))
    host_ops.library = library  # type: ignore[attr-defined]  # lives as long as the ops
    return torch.ops.fastjac_host
