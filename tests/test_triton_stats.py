"""The Triton kernels of `act_stats` and `row_sqnorm` themselves, against float64 formulas.

What `fastjac check` does not reach: layouts, strips that are split, partial sums in two levels, the
counters.
"""

import itertools

import pytest
import torch
from conftest import DEVICE

import fastjac
from fastjac.activations import IDS
from fastjac.cli.check import relative_error, tolerance
from fastjac.ops.act_stats import BIAS, CHANNEL, NONE, SAMPLE, spread
from fastjac.ops.dispatch import FLOAT_DTYPES, accumulate_dtype, why_not

if why_not("triton", DEVICE, torch.float32):
    pytest.skip(why_not("triton", DEVICE, torch.float32), allow_module_level=True)

from fastjac.kernels import act_stats as stats
from fastjac.kernels import row_sqnorm as rows

pytestmark = pytest.mark.triton

STATISTICS = {"none": NONE, "channel": CHANNEL, "sample": SAMPLE, "bias": BIAS}
LAYOUTS = {  # (shape, channels, memory)
    "[N, C]": ((37, 19), 1, None),
    "[N, C] wide": ((5, 300), 1, None),
    "[N, L, C]": ((6, 5, 130), 2, None),
    "[N, C, P]": ((5, 14, 40), 1, None),
    "[N, L, C] wide": ((3, 4, 140), 2, None),
    "[N, C, P] sample in a tile": ((40, 7, 5), 1, None),
    "[N, C, P] wide": ((3, 2, 700), 1, None),
    "channels_last": ((4, 6, 5, 3), 1, "channels_last"),
    "one sample": ((1, 3, 70), 1, None),
    "one channel": ((9, 1, 6), 1, None),
    "one": ((1, 1), 1, None),
    "transposed": ((19, 37), 1, "transposed"),
    "strided": ((6, 9, 14), 2, "strided"),
    "offset": ((16, 16), 1, "offset"),
    "no samples": ((0, 4), 1, None),
    "no channels": ((4, 0, 3), 1, None),
    "no positions": ((2, 3, 0), 1, None),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel leaves unwritten is NaN."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            t = allocate(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return allocated

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(autouse=True)
def counters_return_to_zero():
    yield
    for counters in stats._counters.values():
        assert not counters.any()


def arranged(t, memory):
    if memory == "channels_last":
        return t.to(memory_format=torch.channels_last)
    if memory == "transposed":
        return t.mT.contiguous().mT
    if memory == "strided":
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    if memory == "offset":
        return torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    return t


def operands(shape, dim, dtype, memory=None):
    """z, g, a weight per sample and one per channel."""
    z, g = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    wide = accumulate_dtype(dtype)
    w = [torch.rand(shape[d], dtype=wide, device=DEVICE) + 0.5 for d in (0, dim)]
    return arranged(z, memory), g, *w


def truth(z, g, w_sample, w_channel, dim, statistic, scale, fn, backward):
    z = z.double()
    first, second = (fastjac.act(z, None, k, fn, impl="reference") for k in (1, 2))
    u, v = (
        1.0 if w is None else spread(w.double(), z, d) for w, d in ((w_sample, 0), (w_channel, dim))
    )
    if backward:
        result = 2 * scale * u * v * first * second
        if g is not None:
            result = result + first * g.double()
    else:
        result = fastjac.act(z, fn=fn, impl="reference")
    if statistic == NONE:
        return result, z.new_zeros(0)
    terms = {
        CHANNEL: scale * u * first**2,
        SAMPLE: scale * v * first**2,
        BIAS: result,
    }[statistic]
    kept = 0 if statistic == SAMPLE else dim
    return result, terms.sum([d for d in range(z.dim()) if d != kept])


def assert_right(got, want, dtype):
    result, sums = got
    assert result.dtype == dtype and sums.dtype == accumulate_dtype(dtype)
    assert result.shape == want[0].shape and sums.shape == want[1].shape
    assert relative_error(result, want[0]) <= tolerance("triton", dtype)
    assert relative_error(sums, want[1]) <= tolerance("triton", sums.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("per_sample", [False, True])
def test_forward(layout, dtype, per_sample):
    shape, dim, memory = LAYOUTS[layout]
    z, _, *weights = operands(shape, dim, dtype, memory)
    w, statistic = weights[per_sample], SAMPLE if per_sample else CHANNEL
    w_sample, w_channel = (None, w) if per_sample else (w, None)
    got = stats.act_stats(z, w, dim, per_sample, 0.3, IDS["gelu"], ())
    want = truth(z, None, w_sample, w_channel, dim, statistic, 0.3, "gelu", False)
    assert_right(got, want, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_backward(layout, dtype, statistic):
    shape, dim, memory = LAYOUTS[layout]
    args = operands(shape, dim, dtype, memory)
    statistic = STATISTICS[statistic]
    got = stats.act_stats_backward(*args, dim, statistic, 0.3, IDS["mish"], ())
    assert_right(got, truth(*args, dim, statistic, 0.3, "mish", True), dtype)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("shape", [(12, 20), (5, 14, 40), (9, 3, 4)])
def test_operands_left_out(shape, statistic, given):
    z, *rest = operands(shape, 1, torch.float64)
    rest = [t if there else None for t, there in zip(rest, given, strict=True)]
    statistic = STATISTICS[statistic]
    got = stats.act_stats_backward(z, *rest, 1, statistic, 0.3, IDS["tanh"], ())
    assert_right(got, truth(z, *rest, 1, statistic, 0.3, "tanh", True), torch.float64)


def test_g_may_be_z():
    z, _, *weights = operands((4, 6), 1, torch.float64)
    args = (z, z, *weights)
    got = stats.act_stats_backward(*args, 1, BIAS, 0.3, IDS["tanh"], ())
    assert_right(got, truth(*args, 1, BIAS, 0.3, "tanh", True), torch.float64)


SPLIT = {  # strips of more than 64 tiles, so two levels of partial sums
    "columns": ((515, 130), 1, CHANNEL),
    "columns of samples": ((2100, 7, 5), 1, CHANNEL),  # three groups
    "bias": ((515, 100), 1, BIAS),
    "rows": ((2, 33_500), 1, SAMPLE),
    "planes": ((33, 2, 600), 1, CHANNEL),
    "planes of results": ((33, 2, 600), 1, BIAS),
    "rows, channels outside": ((2, 25, 1400), 1, SAMPLE),
}


@pytest.mark.parametrize("case", SPLIT)
def test_split_strips(case, monkeypatch):
    shape, dim, statistic = SPLIT[case]
    args = operands(shape, dim, torch.float32)
    want = truth(*args, dim, statistic, 0.3, "relu", True)

    def call():
        return stats.act_stats_backward(*args, dim, statistic, 0.3, IDS["relu"], ())

    first = call()
    assert_right(first, want, torch.float32)
    assert all(map(torch.equal, first, call()))
    # Few programs of long strips, in one level; and offsets in int64.
    monkeypatch.setattr(stats, "PROGRAMS", 6)
    monkeypatch.setattr(stats, "MOST_INT32", 0)
    assert_right(call(), want, torch.float32)


def test_what_is_split():
    """The cases above reach what they are for."""
    for case, (shape, dim, statistic) in SPLIT.items():
        p = torch.Size(shape[2:]).numel()
        at = stats._strips(
            shape[0], shape[dim], p, p == 1, statistic == SAMPLE, True, stats.TILE, stats.PROGRAMS
        )
        assert -(-at.steps // at.run) > stats.GROUP.value, case
        assert (at.channels > 0) == (case == "columns of samples")


def test_sums_are_no_worse_than_pairwise():
    """Of 8192 terms a serial float32 sum is off by 2.5e-5."""
    w = torch.full((8192,), 1.1, device=DEVICE)
    z = torch.ones(8192, 8, device=DEVICE)
    _, s = stats.act_stats(z, w, 1, False, 1.0, IDS["relu"], ())
    assert relative_error(s, w.double().sum().expand(8)) < 1e-6
    r = rows.row_sqnorm([torch.full((1, 150_000), 1.1, device=DEVICE)])
    assert relative_error(r, 150_000 * torch.tensor([1.1]).double() ** 2) < 1e-6


@pytest.mark.parametrize("n", [1, 10, 1000, 10**6, 10**8])
@pytest.mark.parametrize("p", [1, 30, 50_000])
def test_runs_are_short_and_programs_enough(n, p):
    for inner, per_sample in itertools.product([True, False], repeat=2):
        if p == 1 and not inner:
            continue
        at = stats._strips(n, 64, p, inner, per_sample, n < 10**6, stats.TILE, stats.PROGRAMS)
        assert at.run <= stats.LONGEST_RUN
        programs = at.tiles * -(-at.steps // at.run)
        assert programs >= min(at.tiles * at.steps // stats.SHORT_RUN, stats.PROGRAMS // 2)


def test_captured_tables_hold_the_same():
    values = (1, 0, -5, 2**40 + 1, 2**62 + 3)
    table = rows._filled(values, torch.device(DEVICE))
    assert table.dtype == torch.int64 and table.tolist() == list(values)


WEIGHTS = [(5, 7), (3, 4, 3, 2), (2, 600), (33, 1), (0, 4), (4, 0), (6,), (3, 512), (40, 64),
           (9, 1024), (2, 1100), (2, 2048), (1, 70_000)]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_row_sqnorm(dtype):
    weights = [torch.randn(s, device=DEVICE).to(dtype) for s in WEIGHTS]
    weights[1] = weights[1].to(memory_format=torch.channels_last)
    r = rows.row_sqnorm(weights)
    assert r.dtype == accumulate_dtype(dtype)
    for got, w in zip(r.split([len(w) for w in weights]), weights, strict=True):
        want = w.double().square().reshape(len(w), w[:1].numel()).sum(1)
        assert relative_error(got, want) <= tolerance("triton", r.dtype)
    assert torch.equal(r, rows.row_sqnorm(weights))
    c = torch.randn(len(r), device=DEVICE).to(r)
    for add in (False, True):
        grads = [torch.randn_like(w) if add else torch.empty_like(w) for w in weights]
        old = [g.double().clone() for g in grads]
        rows.row_sqnorm_backward(grads, weights, c, add)
        parts = c.double().split([len(w) for w in weights])
        for grad, was, w, part in zip(grads, old, weights, parts, strict=True):
            want = 2 * spread(part, w, 0) * w.double() + (was if add else 0)
            assert relative_error(grad, want) <= tolerance("triton", dtype)


def test_rows_that_are_no_blocks_of_memory():
    w = torch.randn(6, 5, device=DEVICE)
    for strided in (w.mT, w[::2], w[:, 1:]):
        r = rows.row_sqnorm([strided])
        assert relative_error(r, strided.double().square().sum(1)) < 1e-6
    grad, c = torch.empty_like(w), torch.ones(5, device=DEVICE)
    with pytest.raises(RuntimeError, match="weight 0 and its gradient must have rows"):
        rows.row_sqnorm_backward([grad.mT], [w.mT], c, False)
    with pytest.raises(RuntimeError, match="the same strides"):
        rows.row_sqnorm_backward([grad.mT.contiguous().mT], [w], c.new_ones(6), False)


def test_many_weights_in_one_launch(monkeypatch):
    weights = [torch.randn(1 + i % 3, 1 + i, device=DEVICE) for i in range(77)]
    launches = []
    kernel = rows.row_sqnorm_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(rows, "row_sqnorm_kernel", Counted())
    r = rows.row_sqnorm(weights)
    assert len(launches) == 1
    want = torch.cat([w.double().square().sum(1) for w in weights])
    assert relative_error(r, want) < 1e-6


BAD = [
    ({"w_sample": torch.ones(3)}, "a weight must have the shape"),
    ({"w_channel": torch.ones(4, dtype=torch.float64)}, "a weight must have the shape"),
    ({"g": torch.ones(2, 3)}, "g must have the shape"),
    ({"statistic": 4}, "statistic must be 0 to 3, got 4"),
    ({"dim": 0}, "dim must be 1 to 1, got 0"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_operands(change, message):
    given = {"z": torch.ones(2, 4), "g": None, "w_sample": None, "w_channel": None, "dim": 1,
             "statistic": NONE, "scale": 1.0, "fn": 0, "params": ()}  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        stats.act_stats_backward(**(given | change))
    with pytest.raises(RuntimeError, match="dim must be 1 or the last"):
        stats.act_stats_backward(**(given | {"z": torch.ones(2, 3, 4, 5), "dim": 2}))
