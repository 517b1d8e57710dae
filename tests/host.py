"""Builds the CUDA sources for the CPU (tests/shim), loaded as ``torch.ops.fastjac_host``."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastjac.ops import registration
from fastjac.ops.dispatch import OPS

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS = [
    schema
    for name, schema in registration.SCHEMAS.items()
    if (op := OPS.get(name.removesuffix("_backward"))) and "cuda" in op.implementations
]
CUDA = ROOT / "csrc/cuda"
TABLE = ROOT / "build/native/generated"  # holds the generated headers
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def compile_host(
    out: Path,
    *,
    flags: Sequence[str] = ("-O1",),
    link: Sequence[str] = ("-shared",),
    sources: Sequence[Path] = (),
    kernels: Path = CUDA,
    table: Path = TABLE,
) -> None:
    """Compiles every .cu file of a folder by g++, with the headers of the shim."""
    torch_root = Path(torch.__file__).parent
    cxx = shutil.which("c++") or "c++"
    compile_flags = [
        "-std=c++20", "-g1", "-fPIC", "-DFASTJAC_HOST_SHIM", "-Wno-attributes",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", *flags,
        f"-I{ROOT}/tests/shim", f"-I{kernels}", f"-I{ROOT}/csrc/common", f"-I{table}",
        "-isystem", str(torch_root / "include"),
    ]  # fmt: skip
    libraries = [
        f"-L{torch_root}/lib", f"-Wl,-rpath,{torch_root}/lib", "-Wl,--no-as-needed",
        "-ltorch_cpu", "-lc10", "-pthread",
    ]  # fmt: skip

    def compile_one(unit: tuple[Path, str]) -> str:
        source, storage = unit
        target = out.parent / f"{out.stem}-{source.stem}{storage}.o"
        dtype = [f"-DFASTJAC_STORAGE={storage}"] if storage else []
        run([cxx, *compile_flags, *dtype, "-c", "-x", "c++", str(source), "-o", str(target)])
        return str(target)

    units = [(source, "") for source in (*kernels.glob("*.cu"), *sources)]
    for source, _ in units[:]:
        if source.stem.endswith("_kernels"):  # as setup.py compiles them
            units.remove((source, ""))
            units += [(source, s) for s in ("float", "double", "__nv_bfloat16", "__half")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, units))
    run([cxx, *flags, *link, *objects, *libraries, "-o", str(out)])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def load(out: Path) -> None:
    """Registers the kernels of a library that `compile_host` has built."""
    definitions = torch.library.Library("fastjac_host", "DEF")
    for schema in SCHEMAS:
        definitions.define(schema)
    torch.ops.load_library(str(out))
    load.definitions = definitions  # type: ignore[attr-defined]  # must live as long as the ops


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels for the CPU, built and loaded once per session."""
    out = Path(tempfile.mkdtemp(prefix="fastjac-host-")) / "host.so"
    compile_host(out)
    load(out)
    return ctypes.CDLL(str(out))


def host_ops() -> object:
    """``torch.ops.fastjac_host``."""
    library()
    return torch.ops.fastjac_host


def set_capturing(on: bool) -> None:
    """Sets the answer of cudaStreamIsCapturing."""
    ctypes.c_bool.in_dll(library(), "fastjac_host_capturing").value = on
