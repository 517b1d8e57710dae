"""The counts of instructions from which benchmarks/gpu/PREDICTIONS.md is made."""

import csv
import subprocess
from pathlib import Path

import pytest
from conftest import NVCC

from benchmarks.gpu import predictions, sass
from fastjac.ops.dispatch import OPS

HERE = Path(predictions.__file__).parent


def code(text: str) -> list[str]:
    """Lines as nvdisasm writes them; labels have a colon, branches name them."""
    lines = []
    for line in text.strip().splitlines():
        line = line.strip()
        lines.append(line if line.endswith(":") else f"        /*0010*/    {line} ;")
    return lines


# A loop over packs: a rare block inside of it, an aligned path and one for single elements.
LOOP = code("""
    S2R R0, SR_TID.X
    @P3 EXIT
    .L_x_1:
    ISETP.NE.AND P0, PT, R1, RZ, PT
    @!P0 BRA `(.L_x_2)
    LDG.E.128 R4, desc[UR4][R2.64]
    MUFU.EX2 R5, R4
    FMUL R6, R5, R4
    F2FP.BF16.F32.PACK_AB R6, R6, R5
    STG.E.128 desc[UR4][R2.64], R4
    BRA `(.L_x_3)
    .L_x_2:
    LDG.E.U16 R4, desc[UR4][R2.64]
    STG.E.U16 desc[UR4][R2.64], R4
    .L_x_3:
    @P1 BRA `(.L_x_4)
    IADD3 R7, R7, 0x1, RZ
    FADD R8, R8, R9
    .L_x_4:
    IADD3 R2, R2, 0x10, RZ
    @P2 BRA `(.L_x_1)
    EXIT
""")


def test_the_path_with_wide_accesses_is_counted():
    mix, times = sass.counts(LOOP, loads=1, stores=1)
    assert times == 1
    # The rare block is left out, and so are the instructions before and after the loop.
    assert mix == {"alu": 3, "branch": 4, "memory": 2, "mufu": 1, "fma": 1}
    assert sass.counts(LOOP, loads=1, stores=2) is None


def test_a_kernel_without_a_loop_may_do_several_packs():
    straight = code("""
        @P0 EXIT
        LDG.E.128 R4, desc[UR4][R2.64]
        @P1 LDG.E.128 R8, desc[UR4][R2.64]
        LDG.E.128 R12, desc[UR4][R2.64]
        DFMA R4, R4, R8, R12
        STG.E.128 desc[UR4][R2.64], R4
        STG.E.128 desc[UR4][R2.64], R8
        EXIT
    """)
    mix, times = sass.counts(straight, loads=1, stores=1)
    assert times == 2 and mix == {"branch": 2, "memory": 5, "fp64": 1}


def test_passes_over_a_row():
    rows = code("""
        .L_x_1:
        LDG.E.U16 R4, desc[UR4][R2.64]
        LDG.E.U16 R5, desc[UR4][R2.64]
        FADD R6, R4, R5
        @P0 BRA `(.L_x_1)
        .L_x_2:
        LDG.E.128 R4, desc[UR4][R2.64]
        @P0 BRA `(.L_x_2)
        .L_x_3:
        LDG.E.U16 R4, desc[UR4][R2.64]
        @P0 BRA `(.L_x_3)
        EXIT
    """)
    mix = sass.passes(rows, count=2, size=2)
    assert mix == {"memory": 1 + 1 / 8, "fma": 0.5, "branch": 0.5 + 1 / 8}


@pytest.mark.parametrize(
    ("mix", "limit", "cycles"),
    [
        ({"fma": 128}, "fma", 1.0),
        ({"fma": 64, "imad": 64}, "fma", 1.5),  # one pipe, of which IMAD takes two lanes
        ({"alu": 64}, "alu", 1.0),
        ({"mufu": 32, "fma": 32}, "mufu", 2.0),
        ({"alu": 64, "fma": 128}, "issue", 1.5),
    ],
)
def test_what_limits_a_processor(mix, limit, cycles):
    assert sass.cycles(sass.Counter(mix)) == (cycles, limit)


def test_the_share_is_the_least_of_what_each_resource_allows():
    # 31 instructions for the 4 bytes of an element are issued in the time of their transfer.
    few = sass.Counter(fma=20, alu=10)
    assert predictions.predict(few, 1, 4, 32, 256, 16.0) == (1.0, "memory")
    many = sass.Counter(fma=40, alu=22)
    share, limit = predictions.predict(many, 1, 4, 32, 256, 16.0)
    assert limit == "issue" and share == pytest.approx(0.5, abs=0.01)
    # With 255 registers there is one block of 256 threads, which has 4 KB in flight.
    share, limit = predictions.predict(few, 1, 4, 255, 256, 16.0)
    assert limit == "bytes in flight" and share == pytest.approx(4096 / 22803, abs=0.001)


def test_the_table_has_every_op_on_a_gpu():
    with (HERE / "predictions.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    for op in OPS.values():
        kinds = set(op.implementations) & {"cuda", "triton"}
        assert {row["implementation"] for row in rows if row["op"] == op.name} == kinds, op.name
    assert all(0 < float(row["predicted_share"]) <= 1 for row in rows)
    page = (HERE / "PREDICTIONS.md").read_text()
    assert all(f"| {op} |" in page for op in OPS)


@pytest.mark.slow
@pytest.mark.skipif(not NVCC.exists(), reason="needs nvcc")
def test_kernels_are_those_for_9_0(tmp_path):
    """In an object for several compute capabilities, whose kernels have the same names."""
    pytest.importorskip("triton.backends.nvidia")
    source, unit = tmp_path / "few.cu", tmp_path / "few.o"
    source.write_text("""
        extern "C" __global__ void copy(const float* from, float* to) {
        #if __CUDA_ARCH__ == 900
          *to = *from;
        #else
          float all[64];
          for (int i = 0; i < 64; ++i) all[i] = from[i];
          __syncthreads();
          for (int i = 0; i < 64; ++i) to[i] = all[63 - i];
        #endif
        }""")
    archs = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90, 100)]
    subprocess.run([NVCC, "-c", *archs, source, "-o", unit], check=True)
    ((name, lines, registers),) = predictions.kernels_of_object(unit)
    assert name == "copy" and registers < 16
    assert sum("LDG" in line for line in lines) == 1
