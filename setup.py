"""Builds the native libraries of fastjac.

There are two shared libraries, which are loaded with ``torch.ops.load_library``: ``_cpu.so`` (C++)
and ``_cuda.so`` (nvcc). They use the stable ABI of torch, so a binary works with every torch from
2.10 on and with every Python. ``_record.abi3.so`` is a module of the stable ABI of Python, which
works with every Python from 3.10 on and every torch. All commands are in
``build/native/build.ninja``, which can also be run by hand.

If torch, a compiler or nvcc is missing, the package is installed without the library that needs it.
``_build.json`` keeps the reason, which ``fastjac info`` prints. It is an error if a compiler exists
but fails.

Environment:
    FASTJAC_CPU=auto|0            0 does not build the C++ library
    FASTJAC_CUDA=auto|0|1         auto builds the CUDA library if torch has CUDA and nvcc is found;
                                  1 builds it if nvcc is found (to check that it compiles)
    TORCH_CUDA_ARCH_LIST          default 8.0;9.0;10.0+PTX
    CUDA_HOME, CXX, MAX_JOBS      as usual
    CXXFLAGS, LDFLAGS             added for the C++ library (for example -fsanitize=address)
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "native"
TORCH_TARGET = "0x020a000000000000"  # the oldest torch supported: 2.10
ARCHITECTURES = "8.0;9.0;10.0+PTX"
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
STORAGE_TYPES = {"f32": "float", "f64": "double", "bf16": "__nv_bfloat16", "f16": "__half"}
# -ffast-math is not used. These three flags keep NaN and infinities correct: no errno, no
# floating-point traps, and a*b+c may be fused.
CXX_FLAGS = (
    "-std=c++17 -O3 -g1 -fPIC -Wall -Wextra -fvisibility=hidden"
    " -fno-math-errno -fno-trapping-math -ffp-contract=fast"
)
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden --expt-relaxed-constexpr"


def load(name: str):
    """Load a module of the package by its path, because importing the package imports torch."""
    spec = importlib.util.spec_from_file_location(f"_{name}", ROOT / "fastjac" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def generate(package: Path) -> str:
    """Write the C++ headers and the Triton functions of the activation table; return its hash."""
    activations, codegen = load("activations"), load("codegen")
    table_hash = activations.table_hash()
    headers = codegen.cpp_headers(activations.KERNEL_ROWS, table_hash)
    files = {BUILD / "generated" / name: text for name, text in headers.items()}
    files[package / "kernels" / "_phi.py"] = codegen.triton_module(activations.KERNEL_ROWS)
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:  # keep ninja's timestamps
            path.write_text(text)
    return table_hash


def torch_include() -> tuple[Path | None, str]:
    """The include directory of torch, or None and the reason."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None, "torch is not found at build time: use pip install --no-build-isolation"
    include = Path(next(iter(spec.submodule_search_locations))) / "include"
    if not (include / "torch/csrc/stable/library.h").exists():
        return None, "torch is older than 2.10 (no stable ABI headers)"
    return include, ""


def cuda_home() -> Path | None:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home)
    return None


def gencode(arch_list: str) -> str:
    flags = []
    for entry in arch_list.replace(" ", ";").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        if not entry:
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


class Ninja:
    """The contents of a ninja file."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.targets: list[str] = []

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def compile(self, rule: str, source: Path, tag: str = "", flags: str = "") -> str:
        out = f"{source.parent.name}_{source.stem}{'_' + tag if tag else ''}.o"
        self.lines += [f"build {out}: {rule} {source}", f"  flags = {flags}"]
        return out

    def link(self, rule: str, objects: list[str], out: Path, after: str = "") -> None:
        self.lines.append(f"build {out}: {rule} {' '.join(objects)}" + (after and f" | {after}"))
        self.targets.append(str(out))

    def run(self) -> None:
        (BUILD / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja")
        if ninja is None:
            import ninja as package  # the wheel; its script may not be on PATH

            ninja = str(Path(package.BIN_DIR) / "ninja")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.check_call([ninja, "-C", str(BUILD), *jobs, *self.targets])


def version_line(compiler: str) -> str:
    text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    return next((line for line in text.splitlines() if "release" in line), text.split("\n")[0])


class NativeBuild(build_ext):
    """Generates the sources and runs ninja; the Extension only makes wheels platform-specific."""

    def run(self) -> None:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        package = ROOT / "fastjac" if inplace else Path(self.build_lib).resolve() / "fastjac"
        BUILD.mkdir(parents=True, exist_ok=True)
        info = {"table_hash": generate(package)}
        include, why = torch_include()
        ninja = Ninja()
        info["cpu"] = self.add_cpu(ninja, package, include, why)
        info["cuda"] = self.add_cuda(ninja, package, include, why)
        info["record"] = self.add_record(ninja, package)
        if ninja.targets:
            ninja.run()
        (package / "_build.json").write_text(json.dumps(info, indent=2) + "\n")

    def add_cpu(self, ninja: Ninja, package: Path, include: Path | None, why: str) -> dict:
        cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if os.environ.get("FASTJAC_CPU", "auto") == "0":
            return {"built": False, "why": "FASTJAC_CPU=0 was set"}
        if include is None:
            return {"built": False, "why": why}
        if not cxx or not shutil.which(cxx):
            return {"built": False, "why": "no C++ compiler found (set CXX or install g++)"}
        includes = f"-I{ROOT}/csrc/common -I{BUILD}/generated"
        more, link = (os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS"))
        command = f"{cxx} -MMD -MF $out.d {CXX_FLAGS} {more} {includes} $flags -c $in -o $out"
        ninja.rule("cxx", command)
        # No rpath is needed, because torch is imported before the library is loaded.
        torch_libs = f"-L{include.parent}/lib -Wl,--no-as-needed -ltorch_cpu -lc10"
        ninja.rule("link", f"{cxx} -shared {link} -o $out $in {torch_libs}", depfile=False)
        isas = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["baseline"]
        objects = []
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            if source.stem.endswith("_kernels"):
                for isa in isas:
                    flags = f"-DFASTJAC_ISA={isa} {ISA_FLAGS[isa]}"
                    objects.append(ninja.compile("cxx", source, isa, flags))
            else:
                flags = f"-DTORCH_TARGET_VERSION={TORCH_TARGET} -isystem {include}"
                objects.append(ninja.compile("cxx", source, flags=flags))
        ninja.link("link", objects, package / "_cpu.so")
        return {"built": True, "compiler": version_line(cxx), "instruction_sets": isas}

    def add_record(self, ninja: Ninja, package: Path) -> dict:
        """The extension module ``fastjac._record``, which Python code can stand in for."""
        cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        include = Path(sysconfig.get_path("include"))
        if os.environ.get("FASTJAC_CPU", "auto") == "0":
            return {"built": False, "why": "FASTJAC_CPU=0 was set"}
        if not cxx or not shutil.which(cxx):
            return {"built": False, "why": "no C++ compiler found (set CXX or install g++)"}
        if not (include / "Python.h").exists():
            return {"built": False, "why": "Python.h is not found (install python3-dev)"}
        more, link = (os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS"))
        command = f"{cxx} -MMD -MF $out.d {CXX_FLAGS} {more} -isystem {include} -c $in -o $out"
        ninja.rule("cxx_python", command)
        ninja.rule("link_python", f"{cxx} -shared {link} -o $out $in", depfile=False)
        source = ninja.compile("cxx_python", ROOT / "csrc/python/record.cpp")
        ninja.link("link_python", [source], package / "_record.abi3.so")
        return {"built": True}

    def add_cuda(self, ninja: Ninja, package: Path, include: Path | None, why: str) -> dict:
        wish = os.environ.get("FASTJAC_CUDA", "auto")
        home = cuda_home()
        if wish not in ("auto", "0", "1"):
            raise SystemExit(f"FASTJAC_CUDA is {wish!r}: it must be auto, 0 or 1")
        if wish == "0":
            return {"built": False, "why": "FASTJAC_CUDA=0 was set"}
        if include is None or home is None:
            why = why or "nvcc is not found (set CUDA_HOME)"
            if wish == "1":
                raise SystemExit(f"FASTJAC_CUDA is 1, but {why}")
            return {"built": False, "why": why}
        torch_cuda = (include.parent / "lib" / "libtorch_cuda.so").exists()
        if wish == "auto" and not torch_cuda:
            why = "this torch has no CUDA (FASTJAC_CUDA=1 compiles the library nevertheless)"
            return {"built": False, "why": why}
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        includes = f"-I{ROOT}/csrc/common -I{ROOT}/csrc/cuda -I{BUILD}/generated"
        flags = f"{NVCC_FLAGS} {gencode(archs)} {includes}"
        ninja.rule("nvcc", f"{home}/bin/nvcc -MMD -MF $out.d {flags} $flags -c $in -o $out")
        # cudart is linked statically, because that of torch may be of another minor version. The
        # library needs libtorch_cuda.so, which a torch for CPUs does not have. An empty library of
        # that name lets such a machine build what a machine with a GPU runs.
        torch_libs = (
            f"-L{include.parent}/lib -Xlinker --no-as-needed -ltorch_cpu -lc10 -ltorch_cuda"
        )
        stub = ""
        if not torch_cuda:
            cxx = os.environ.get("CXX", "c++")
            soname = "-Wl,-soname,libtorch_cuda.so"
            ninja.rule("stub", f"{cxx} -shared {soname} -x c /dev/null -o $out", depfile=False)
            stub = str(BUILD / "libtorch_cuda.so")
            ninja.link("stub", [], Path(stub))
            torch_libs = f"-L{BUILD} {torch_libs}"
        ninja.rule("nvlink", f"{home}/bin/nvcc -shared -o $out $in {torch_libs}", depfile=False)
        objects = []
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            if source.stem.endswith("_kernels"):
                for dtype, storage in STORAGE_TYPES.items():
                    objects.append(
                        ninja.compile("nvcc", source, dtype, f"-DFASTJAC_STORAGE={storage}")
                    )
            else:
                torch = f"-isystem {include} -DTORCH_TARGET_VERSION={TORCH_TARGET} -DUSE_CUDA"
                objects.append(ninja.compile("nvcc", source, flags=torch))
        ninja.link("nvlink", objects, package / "_cuda.so", after=stub)
        return {"built": True, "compiler": version_line(f"{home}/bin/nvcc"), "architectures": archs}

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "fastjac"
        names = ("_cpu.so", "_cuda.so", "_record.abi3.so", "_build.json", "kernels/_phi.py")
        return [str(package / name) for name in names if (package / name).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class PythonBuild(build_py):
    """Excludes the files that an editable install wrote to the source tree from a wheel."""

    def build_package_data(self) -> None:
        generated = {"_build.json", "_cpu.so", "_cuda.so", "_record.abi3.so"}
        self.data_files = [
            (package, src, build, [f for f in files if Path(f).name not in generated])
            for package, src, build, files in self.data_files
        ]
        super().build_package_data()


setup(
    ext_modules=[Extension("fastjac._native", sources=[])],
    cmdclass={"build_ext": NativeBuild, "build_py": PythonBuild},
)
