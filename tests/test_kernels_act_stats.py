"""The CUDA kernels of `act_stats`, built for the CPU, and the Triton ones, against formulas.

These tests reach what `fastjac check` does not: layouts, strips that are split, partial sums in two
levels, the counters, and memory next to the operands.
"""

import importlib
import itertools
from typing import NamedTuple

import pytest
import torch
from conftest import DEVICE
from host import set_capturing
from kernel_cases import both, by_impl, only_cuda, only_triton, randn

import fastjac
from fastjac.activations import IDS, TABLE
from fastjac.cli.check import relative_error, tolerance
from fastjac.ops.act_stats import BIAS, CHANNEL, NONE, SAMPLE, spread
from fastjac.ops.dispatch import FLOAT_DTYPES, accumulate_dtype


class Layout(NamedTuple):
    shape: tuple[int, ...]
    dim: int
    memory: str | None = None
    offset: int = 0


LAYOUTS = {
    "[N, C]": Layout((37, 19), 1),
    "[N, C] wide": Layout((5, 300), 1),
    "[N, L, C]": Layout((6, 5, 130), 2),
    "[N, L, C] wide": Layout((3, 4, 140), 2),
    "[N, C, P]": Layout((5, 14, 40), 1),
    "[N, C, P] sample in a tile": Layout((40, 7, 5), 1),
    "[N, C, P] wide": Layout((3, 2, 700), 1),
    "channels_last": Layout((4, 6, 5, 3), 1, "channels_last"),
    "one sample": Layout((1, 3, 70), 1),
    "one channel": Layout((9, 1, 6), 1),
    "one": Layout((1, 1), 1),
    "transposed": Layout((19, 37), 1, "transposed"),
    "strided": Layout((6, 9, 14), 2, "strided"),
    "offset": Layout((16, 16), 1, None, 1),
    "no samples": Layout((0, 4), 1),
    "no channels": Layout((4, 0, 3), 1),
    "no positions": Layout((2, 3, 0), 1),
}
FEW = list(LAYOUTS)  # those that the interpreter runs
# These differ in how blocks of 256 threads, of 16 bytes each, divide the tensor. With the shim a
# launch has about ten blocks; on a GPU it has a thousand (tiling.h).
LAYOUTS |= {
    "[N, C] odd": Layout((9, 7), 1),
    "[N, C] several blocks a tile": Layout((301, 12), 1),
    "[N, C] many rows": Layout((3000, 12), 1),
    "[N, C] several tiles": Layout((20, 264), 1),
    "[N, C] long rows": Layout((2, 5000), 1),
    "[N, L, C] even": Layout((5, 6, 8), 2),
    "[N, L, C] several blocks a sample": Layout((2, 300, 18), 2),
    "[N, C, P] odd": Layout((6, 5, 9), 1),
    "[N, C, P] several blocks a channel": Layout((300, 3, 20), 1),
    "[N, C, P] long rows": Layout((2, 2, 4996), 1),
    "[N, C, P] one long sample": Layout((1, 64, 2300), 1),
    "channels_last of many samples": Layout((20, 12, 5, 7), 1, "channels_last"),
    "channels_last odd": Layout((3, 5, 4, 3), 1, "channels_last"),
}
# The length of a row and the offset of an operand determine how many bytes are moved at once.
for columns, offset in ((16, 0), (16, 1), (16, 4), (12, 0), (12, 2), (10, 0), (10, 2), (9, 3)):
    LAYOUTS[f"[N, C] of {columns} from {offset}"] = Layout((7, columns), 1, None, offset)
    LAYOUTS[f"[N, C, P] of {columns} from {offset}"] = Layout((3, 5, columns), 1, None, offset)


def operands(kernels, layout, dtype):
    """z, g, a weight per sample and one per channel."""
    shape, dim, memory, offset = layout
    z, g = (randn(kernels, shape, dtype, memory, offset, seed) for seed in range(2))
    wide = accumulate_dtype(dtype)
    return z, g, *(randn(kernels, (shape[d],), wide, seed=2 + d).abs() + 0.5 for d in (0, dim))


def truth(z, g, w_sample, w_channel, dim, statistic, scale, fn, backward=True):
    """The result, the sums, and the sums of the absolute values of their terms."""
    z = z.double()
    phi, first, second = (fastjac.act(z, None, k, fn, impl="reference") for k in range(3))
    u, v = (
        1.0 if w is None else spread(w.double(), z, d) for w, d in ((w_sample, 0), (w_channel, dim))
    )
    result = phi
    if backward:
        result = 2 * scale * u * v * first * second + (0 if g is None else first * g.double())
    if statistic == NONE:
        return result, z.new_zeros(0), z.new_zeros(0)
    terms = {CHANNEL: scale * u * first**2, SAMPLE: scale * v * first**2, BIAS: result}[statistic]
    rest = [d for d in range(z.dim()) if d != (0 if statistic == SAMPLE else dim)]
    return result, terms.sum(rest), terms.abs().sum(rest)


def assert_right(kernels, got, want, dtype):
    result, sums = got
    assert result.dtype == dtype and sums.dtype == accumulate_dtype(dtype)
    assert result.shape == want[0].shape and sums.shape == want[1].shape
    assert relative_error(result, want[0]) <= tolerance(kernels.impl, dtype)
    size = want[2] if kernels.impl == "cuda" else want[1]
    error = (sums.double() - want[1]).norm()
    assert error <= tolerance(kernels.impl, sums.dtype) * size.norm()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("kernels", "name"), by_impl(LAYOUTS, FEW))
def test_forward(kernels, name, dtype, poison):
    dim = LAYOUTS[name].dim
    z, _, ws, wc = operands(kernels, LAYOUTS[name], dtype)
    calls = [(False, ws), (True, wc), (False, None), (True, None)]
    for per_sample, w in calls if kernels.impl == "cuda" or dtype == torch.float32 else calls[:2]:
        got = kernels.act_stats(z, w, dim, per_sample, 0.3, IDS["mish"], ())
        if LAYOUTS[name].memory != "transposed":
            assert got[0].stride() == torch.empty_like(z).stride()
        weights, statistic = ((None, w), SAMPLE) if per_sample else ((w, None), CHANNEL)
        want = truth(z, None, *weights, dim, statistic, 0.3, "mish", backward=False)
        assert_right(kernels, got, want, dtype)


@pytest.mark.parametrize(
    ("kernels", "case"),
    by_impl(
        itertools.product(LAYOUTS, FLOAT_DTYPES),
        itertools.product(FEW, (torch.float32, torch.bfloat16)),
    ),
)
def test_backward(kernels, case, poison):
    name, dtype = case
    dim = LAYOUTS[name].dim
    z, g, *weights = operands(kernels, LAYOUTS[name], dtype)
    for statistic, fn in ((NONE, "gelu"), (CHANNEL, "mish"), (SAMPLE, "sine"), (BIAS, "gelu")):
        other = g.contiguous() if statistic == CHANNEL else g  # strides that z may not have
        args = z, other, *weights, dim, statistic, 0.3
        got = kernels.act_stats_backward(*args, IDS[fn], TABLE[fn].param_values({}))
        assert_right(kernels, got, truth(*args, fn), dtype)


SMALL = [(12, 20), (5, 14, 40), (9, 3, 4)]


@pytest.mark.parametrize("statistic", [NONE, CHANNEL, SAMPLE, BIAS])
@pytest.mark.parametrize(("kernels", "shape"), by_impl(SMALL, SMALL))
def test_operands_left_out(kernels, shape, statistic):
    z, *rest = operands(kernels, Layout(shape, 1), torch.float64)
    left_out = itertools.product(*((t, None) for t in rest))
    for g, ws, wc in (*left_out, (z, *rest[1:])):  # g may be z
        args = z, g, ws, wc, 1, statistic, 0.3
        got = kernels.act_stats_backward(*args, IDS["tanh"], ())
        assert_right(kernels, got, truth(*args, "tanh"), torch.float64)


REFUSED = [
    ({"w_sample": torch.ones(3)}, "weight.* must have (the )?shape"),
    (
        {"w_channel": torch.ones(4, dtype=torch.float64)},
        "weight.* must (be float32|have the shape)",
    ),
    ({"g": torch.ones(2, 3)}, "g must have the shape"),
    ({"statistic": 4}, "statistic must be 0 to 3, got 4"),
    ({"fn": 99}, "no activation with id 99"),
    ({"dim": 0}, "dim must be 1 to 1"),
    ({"z": torch.ones(2, 3, 4, 5), "dim": 2}, "dim must be 1 or the last"),
]


@both
def test_refusals(kernels):
    right = {"z": torch.ones(2, 4), "g": None, "w_sample": None, "w_channel": None, "dim": 1,
             "statistic": NONE, "scale": 1.0, "fn": 0, "params": ()}  # fmt: skip
    for change, message in REFUSED:
        with pytest.raises(RuntimeError, match=message):
            kernels.act_stats_backward(*(right | change).values())


# ---- the CUDA kernels alone


@only_cuda
def test_same_bits_twice(kernels, poison):
    # In between, launches that divide their tiles into other numbers of chunks: only if each leaves
    # its counters at zero does the last block of the next one know itself.
    shapes = ((700, 12), (3000, 12), (2, 5000), (520, 12), (301, 12))
    before = {}
    for shape in shapes * 2:
        for per_sample in (False, True):
            z = randn(kernels, shape, torch.float32)
            _, s = kernels.act_stats(z, None, 1, per_sample, 1.0, IDS["mish"], ())
            assert torch.equal(before.setdefault((shape, per_sample), s), s)


@only_cuda
def test_counters_of_a_graph_are_its_own(kernels):
    def zeroed():
        with torch.autograd.profiler.profile() as profile:
            s = kernels.act_stats(z, None, 1, False, 1.0, IDS["gelu"], ())[1]
        return s, sum(event.name == "aten::zero_" for event in profile.function_events)

    z = randn(kernels, (301, 12), torch.float32)
    s, _ = zeroed()
    assert zeroed()[1] == 0
    set_capturing(True)
    try:
        for _ in range(2):
            again, times = zeroed()
            assert times == 1 and torch.equal(again, s)
    finally:
        set_capturing(False)


# ---- the Triton kernels alone

SPLIT = {  # strips of more than 64 tiles, so two levels of partial sums
    "columns": ((515, 130), 1, CHANNEL),
    "columns of samples": ((2100, 7, 5), 1, CHANNEL),  # three groups
    "bias": ((515, 100), 1, BIAS),
    "rows": ((2, 33_500), 1, SAMPLE),
    "planes": ((33, 2, 600), 1, CHANNEL),
    "planes of results": ((33, 2, 600), 1, BIAS),
    "rows, channels outside": ((2, 25, 1400), 1, SAMPLE),
}


@pytest.fixture
def module():
    """``fastjac.kernels.act_stats``, which needs Triton."""
    return importlib.import_module("fastjac.kernels.act_stats")


@pytest.mark.parametrize("case", SPLIT)
@only_triton
def test_split_strips(kernels, case, module, monkeypatch):
    shape, dim, statistic = SPLIT[case]
    samples, channels, positions = shape[0], shape[dim], torch.Size(shape[2:]).numel()
    at = module.strips(
        samples, channels, positions, positions == 1, statistic == SAMPLE, True, module.TILE,
        module.PROGRAMS,
    )  # fmt: skip
    assert at.splits > module.GROUP.value
    assert (at.channels > 0) == (case == "columns of samples")

    args = *operands(kernels, Layout(shape, dim), torch.float32), dim, statistic, 0.3
    want = truth(*args, "relu")
    first, again = (kernels.act_stats_backward(*args, IDS["relu"], ()) for _ in range(2))
    assert_right(kernels, first, want, torch.float32)
    assert all(map(torch.equal, first, again))
    # Few programs of long strips, in one level; and offsets in int64.
    strips = importlib.import_module("fastjac.kernels.strips")
    monkeypatch.setattr(module, "PROGRAMS", 6)
    monkeypatch.setattr(strips, "MOST_INT32", 0)
    assert_right(kernels, kernels.act_stats_backward(*args, IDS["relu"], ()), want, torch.float32)


@only_triton
def test_sums_are_no_worse_than_pairwise(kernels):
    """Of 8192 terms a serial float32 sum is off by 2.5e-5."""
    w = torch.full((8192,), 1.1, device=DEVICE)
    z = torch.ones(8192, 8, device=DEVICE)
    _, s = kernels.act_stats(z, w, 1, False, 1.0, IDS["relu"], ())
    assert relative_error(s, w.double().sum().expand(8)) < 1e-6


@pytest.mark.parametrize("n", [1, 10, 1000, 10**6, 10**8])
@pytest.mark.parametrize("p", [1, 30, 50_000])
@only_triton
def test_runs_are_short_and_programs_enough(kernels, n, p, module):
    strips = importlib.import_module("fastjac.kernels.strips")
    for inner, per_sample in itertools.product([True, False], repeat=2):
        if p == 1 and not inner:
            continue
        sizes = module.TILE, module.PROGRAMS
        at = module.strips(n, 64, p, inner, per_sample, n < 10**6, *sizes)
        assert at.run <= strips.LONGEST_RUN
        programs = at.tiles * at.splits
        assert programs >= min(at.tiles * at.steps // strips.SHORT_RUN, module.PROGRAMS // 2)
