"""What the compiled code says about the kernels: ``python -m benchmarks.gpu.predictions``.

Reads the kernels for compute capability 9.0 from the CUDA library (build it with ``FASTJAC_CUDA=1
TORCH_CUDA_ARCH_LIST=9.0 python setup.py build_ext --inplace``), compiles those of Triton, counts
the instructions for an element (`benchmarks.gpu.sass`), and writes ``PREDICTIONS.md`` and
``predictions.csv``. No GPU is needed. The first run on one is held against the table.
"""

from __future__ import annotations

import csv
import re
import statistics
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from benchmarks.gpu import sass
from benchmarks.gpu.report import markdown
from fastjac.activations import IDS, TABLE
from fastjac.codegen import camel
from fastjac.ops.dispatch import OPS
from fastjac.ops.native import build_info

HERE = Path(__file__).resolve().parent
OBJECTS = HERE.parent.parent / "build/native"

# The H200 that the predictions are for: its data sheet, and what was read on a lent one in
# October 2026 (a copy by torch, read and written bytes counted; the clock after a matrix product).
PROCESSORS, CLOCK, COPY = 132, 1.98e9, 4.3e12
# The time from a load to its result with many in flight. The bytes that a processor transfers in it
# must be in flight for the memory to be busy.
LATENCY = 0.7e-6
REGISTERS, MOST_THREADS, THREADS = 65536, 2048, 256

#: The activations of the page, and of Triton. Those of CUDA are all in ``predictions.csv``.
SHOWN = ("relu", "silu", "gelu", "tanh", "mish", "sine")

TYPES = {"float32": "f", "bfloat16": "13__nv_bfloat16", "float16": "6__half"}
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Kernel:
    """How a kernel is found and what it does with a pack of 16 bytes.

    Attributes:
        name: a pattern of the mangled name, with A for the activation and S for the dtype.
        loads, stores: accesses of 16 bytes to operands for each result.
        ahead: packs that a thread has in flight; 0: all that it reads for a path.
    """

    op: str
    phase: str
    name: str
    loads: int
    stores: int
    ahead: int = 0


CUDA = (
    Kernel("act", "forward", r"10act_kernelINS_AELi0ES", 1, 1),
    Kernel("act", "backward", r"10act_kernelINS_AELi1ES", 2, 1),
    Kernel("act", "double", r"19act_backward_kernelINS_AELi1ES", 3, 2),
    Kernel("act_stats", "forward", r"16act_stats_kernelINS_AELb0ELb1ELb1ES", 1, 1, 2),
    Kernel("act_stats", "backward", r"16act_stats_kernelINS_AELb1ELb1ELb1ES", 2, 1, 2),
    Kernel("row_sqnorm", "forward", r"17row_sqnorm_kernelIS", 1, 0),
    Kernel("row_sqnorm", "backward", r"26row_sqnorm_backward_kernelIS", 1, 1),
    Kernel("softmax_residual", "forward", r"14softmax_kernelISLi32ELb1ELb0E", 1, 1),
)


@dataclass
class Prediction:
    """A row of the tables. ``share``: of the bandwidth of a copy, between 0 and 1."""

    op: str
    implementation: str
    activation: str
    dtype: str
    phase: str
    bytes_per_element: int
    instructions_per_element: float
    registers: int
    limit: str
    predicted_share: float


def predict(
    mix: Counter[str], elements: float, moved: int, registers: int, threads: int, in_flight: float
) -> tuple[float, str]:
    """The share of the copy that one kind of resource allows at most, and which one it is."""
    cycles, limit = sass.cycles(mix)
    budget = moved / COPY * PROCESSORS * CLOCK  # cycles of a processor in which it is delivered
    resident = min(MOST_THREADS, REGISTERS // (-(-registers // 8) * 8 * threads) * threads)
    shares = {
        limit: budget / (cycles / elements),
        "bytes in flight": resident * in_flight / (COPY / PROCESSORS * LATENCY),
        "memory": 1.0,
    }
    least = min(shares, key=lambda name: shares[name])
    return shares[least], least


def run(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def tools() -> Path:
    """Where ``cuobjdump`` and ``nvdisasm`` are: in the package of Triton."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin"


def kernels_of(cubin: Path) -> Iterator[tuple[str, list[str], int]]:
    """The name, the lines and the registers of each kernel."""
    usage = run(tools() / "cuobjdump", "-res-usage", cubin)
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", usage))
    for name, lines in sass.functions(run(tools() / "nvdisasm", "-c", cubin)):
        yield name, lines, int(registers[name])


def kernels_of_object(unit: Path) -> Iterator[tuple[str, list[str], int]]:
    """The same of an object file, in which code for other compute capabilities may be."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [tools() / "cuobjdump", "-xelf", "sm_90", unit.resolve()], check=True, cwd=folder,
            capture_output=True,
        )  # fmt: skip
        for cubin in Path(folder).glob("*.cubin"):
            yield from kernels_of(cubin)


def cuda_predictions() -> Iterator[Prediction]:
    """One row for each kernel, activation and dtype of the library."""
    code = {
        name: (lines, registers)
        for unit in sorted(OBJECTS.glob("cuda_*.o"))
        for name, lines, registers in kernels_of_object(unit)
    }
    for kernel in CUDA:
        for fn in TABLE if "A" in kernel.name else ("identity",):
            for dtype, mangled in TYPES.items():
                functor = f"{len(camel(fn))}{camel(fn)}"
                pattern = kernel.name.replace("A", functor).replace("ES", f"E{mangled}")
                pattern = re.sub(r"IS(?=$|L)", f"I{mangled}", pattern)
                name = next((n for n in code if re.search(pattern + "E", n)), None)
                if name is None:
                    continue
                row = row_of(kernel, "cuda", fn, dtype, *code[name], THREADS)
                if row is not None:
                    yield row


def row_of(
    kernel: Kernel, implementation: str, fn: str, dtype: str, lines: list[str], registers: int,
    threads: int,
) -> Prediction | None:  # fmt: skip
    """The row of a kernel; None if it does not read an operand, because a derivative is zero."""
    size = SIZES[dtype]
    accesses = kernel.loads + kernel.stores
    if kernel.op == "softmax_residual":  # reads a row three times, the last two from the cache
        mix, elements = sass.passes(lines, 3, size), 1.0
        flight = 16.0
    else:
        found = sass.counts(lines, kernel.loads, kernel.stores)
        if found is None:
            return None
        mix, times = found
        elements = times * 16 / size
        flight = 16.0 * (times * kernel.loads)
        if implementation == "cuda" and kernel.ahead:
            flight = 16.0 * kernel.ahead
    share, limit = predict(mix, elements, accesses * size, registers, threads, flight)
    return Prediction(
        kernel.op, implementation, fn, dtype, kernel.phase, accesses * size,
        round(mix.total() / elements, 1), registers, limit, round(share, 2),
    )  # fmt: skip


def triton_predictions() -> Iterator[Prediction]:
    """One row for each launch of a Triton kernel on matrices of 8192 x 8192 elements."""
    import torch
    import triton

    from benchmarks.gpu.triton_launches import Kernel as Launched
    from benchmarks.gpu.triton_launches import replace
    from fastjac.kernels import act, act_stats, softmax_residual
    from fastjac.ops.act_stats import CHANNEL

    seen: list[tuple[list[str], int, int]] = []

    def see(kernel: Launched, args: tuple, options: dict) -> None:
        source, options = kernel.source(args, options)
        code = triton.compile(source, target=kernel.target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(code.asm["cubin"])
            ((_, lines, registers),) = kernels_of(Path(file.name))
        seen.append((lines, registers, 32 * options["num_warps"]))

    for module in (act, act_stats, softmax_residual):
        replace(module, 90, see)
    for dtype in ("float32", "bfloat16"):
        z = torch.empty(8192, 8192, dtype=getattr(torch, dtype), device="meta")
        n = torch.empty(8192, device="meta")
        for fn in SHOWN:
            at = IDS[fn], [*TABLE[fn].param_values({})]
            act.act(z, None, 0, *at)
            act.act(z, z, 1, *at)
            act.act_backward(z, z, z, 1, *at)
            act_stats.act_stats(z, n, 1, False, 0.5, *at)
            act_stats.act_stats_backward(z, z, n, n, 1, CHANNEL, 0.5, *at)
            for kernel in CUDA[:5]:
                lines, registers, threads = seen.pop(0)
                found = row_of(kernel, "triton", fn, dtype, lines, registers, threads)
                if found is not None:
                    yield found
        logits = z[:, :1024].contiguous()
        target = torch.empty(8192, dtype=torch.int64, device="meta")
        softmax_residual.softmax_residual(logits, target)
        lines, registers, threads = seen.pop(0)
        found = row_of(CUDA[-1], "triton", "identity", dtype, lines, registers, threads)
        if found is not None:
            yield found


TITLE = """# What the compiled kernels can reach

Written by `python -m benchmarks.gpu.predictions` from the compiled code for compute capability 9.0,
by {compilers}.
No GPU was used; the first run on one is held against this table.

* **instr.** is the number of instructions that a thread executes for an element, on the path that
  whole, aligned packs of 16 bytes take (`benchmarks/gpu/sass.py`).
* **bytes** is the number of bytes read and written for an element, each operand once.
* **share** is the predicted share of the bandwidth of a copy: the least of 1, of what the
  instructions allow, and of what the bytes in flight allow.

The machine is an H200: 132 processors at 1.98 GHz, each of which issues 128 lanes a cycle, and a
copy of 4.3 TB/s with a latency of 0.7 µs. With these numbers, an element of a copy in bfloat16 (4
bytes) is delivered in the time of 31 instructions, and one in float32 (8 bytes) in that of 62. The
model assumes that a processor issues an instruction in each cycle, which real kernels do not quite
reach: a share of 1 with few instructions is safer than one with many.
"""


def write(rows: list[Prediction]) -> None:
    import triton

    names = [f.name for f in fields(Prediction)]
    with (HERE / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow("pass" if n == "phase" else n for n in names)
        writer.writerows(astuple(row) for row in rows)
    by_case: dict[tuple[str, ...], dict[str, Prediction]] = {}
    for row in rows:
        has_one = row.op.startswith("act")
        if (row.activation in SHOWN or not has_one) and row.dtype != "float16":
            fn = row.activation if has_one else "–"
            case = (row.op, row.phase, fn, row.dtype, str(row.bytes_per_element))
            by_case.setdefault(case, {})[row.implementation] = row
    table = []
    for case, found in by_case.items():
        cells = []
        for implementation in ("cuda", "triton"):
            at = found.get(implementation)
            if at is None:
                cells += ["–"] * 3
            else:
                why = "" if at.limit == "memory" else f" ({at.limit})"
                cells += [
                    f"{at.instructions_per_element:g}", str(at.registers),
                    f"{min(1.0, at.predicted_share):.2f}{why}",
                ]  # fmt: skip
        table.append([*case, *cells])
    columns = ("op", "pass", "activation", "dtype", "bytes")
    each = ("instr.", "registers", "share")
    heads = (*columns, *(f"{i} {name}" for i in ("CUDA", "Triton") for name in each))
    title = TITLE.format(
        compilers=f"nvcc ({build_info()['cuda']['compiler']}) and Triton {triton.__version__}"
    )
    text = [title, *markdown(("Kernels", heads, table)), *markdown(defaults(rows))]
    (HERE / "PREDICTIONS.md").write_text("\n".join(text).rstrip() + "\n")


def defaults(rows: list[Prediction]) -> tuple[str, tuple[str, ...], list[list[str]]]:
    """For each op, the instructions of both implementations in the cases that both have."""
    table = []
    for op in dict.fromkeys(row.op for row in rows):
        mine = {(r.implementation, (r.activation, r.dtype, r.phase)): r for r in rows if r.op == op}
        counts = {key: row.instructions_per_element for key, row in mine.items()}
        both = [case for i, case in mine if i == "cuda" and ("triton", case) in mine]
        ratios = [counts["triton", case] / counts["cuda", case] for case in both]
        least = {
            i: min((r.predicted_share for key, r in mine.items() if key[0] == i), default=None)
            for i in ("cuda", "triton")
        }
        chosen = OPS[op].implementations[0]
        table.append([
            op, chosen, "–" if not ratios else f"{statistics.median(ratios):.2f}",
            *("–" if share is None else f"{share:.2f}" for share in least.values()),
        ])  # fmt: skip
    heads = ("op", "default on a GPU", "instructions Triton / CUDA", "least share CUDA",
             "least share Triton")  # fmt: skip
    return "Defaults", heads, table


if __name__ == "__main__":
    write([*cuda_predictions(), *triton_predictions()])
