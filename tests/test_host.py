"""The CUDA kernels themselves, run on the CPU: values against the float64 reference."""

import shutil

import pytest
import torch
from host import host_ops, set_capturing

import fastjac
from fastjac.activations import TABLE
from fastjac.cli.check import relative_error, tolerance
from fastjac.ops.act_stats import BIAS, CHANNEL, NONE, SAMPLE, spread
from fastjac.ops.dispatch import accumulate_dtype

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]


def inputs(dtype, size, offset=0):
    """NaN around each operand, so that a read or write outside shows."""
    generator = torch.Generator().manual_seed(size)
    out = []
    for _ in range(3):
        t = torch.full((size + 64,), float("nan"), dtype=dtype)
        view = t[16 + offset : 16 + offset + size]
        view.copy_(3 * torch.randn(size, generator=generator))
        out.append(view)
    return out


@pytest.mark.parametrize("dtype", fastjac.ops.dispatch.FLOAT_DTYPES)
@pytest.mark.parametrize("name", TABLE)
def test_act_kernels(name, dtype):
    fn, params = list(TABLE).index(name), TABLE[name].param_values({})
    # One element past a 16-byte pack, and an operand that does not start at a 16-byte address.
    for size, offset in ((0, 0), (1, 0), (129, 0), (77, 1)):
        z, g, v = inputs(dtype, size, offset)
        wide = [t.double() for t in (z, g, v)]
        for order in range(4):
            for factor in (g, None):
                got = host_ops().act(z, factor, order, fn, params)
                wide_factor = None if factor is None else wide[1]
                truth = fastjac.act(wide[0], wide_factor, order, name, impl="reference")
                assert relative_error(got, truth) <= tolerance("cuda", dtype), (size, order)
        for order in range(3):
            grad_z, grad_g = host_ops().act_backward(z, g, v, order, fn, params)
            truth_z = fastjac.act(wide[0], wide[1] * wide[2], order + 1, name, impl="reference")
            truth_g = fastjac.act(wide[0], wide[2], order, name, impl="reference")
            assert relative_error(grad_z, truth_z) <= tolerance("cuda", dtype), (size, order)
            assert relative_error(grad_g, truth_g) <= tolerance("cuda", dtype), (size, order)


def test_layouts_and_refusals():
    z = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    g = torch.randn(2, 3, 4, 5)
    got = host_ops().act(z, g, 1, list(TABLE).index("silu"), ())
    assert got.stride() == z.stride()
    torch.testing.assert_close(got, fastjac.act(z, g, 1, "silu", impl="reference"))
    with pytest.raises(RuntimeError, match="order must be 0 to 3, got 4"):
        host_ops().act(z, g, 4, 0, ())
    with pytest.raises(RuntimeError, match="no activation with id 99"):
        host_ops().act(z, g, 0, 99, ())


# ---- act_stats

IDS = {name: i for i, name in enumerate(TABLE)}

# Where channels lie, and what of the kernel a shape reaches. Blocks have 256 threads of 16 bytes;
# with the shim a launch has about ten of them, where on a GPU it has a thousand (tiling.h).
SHAPES = {
    "[N, C], one element": ((1, 1), 1, torch.contiguous_format),
    "[N, C], odd": ((9, 7), 1, torch.contiguous_format),
    "[N, C], several blocks a tile": ((301, 12), 1, torch.contiguous_format),
    "[N, C], many rows": ((3000, 12), 1, torch.contiguous_format),
    "[N, C], several tiles": ((20, 264), 1, torch.contiguous_format),
    "[N, C], long rows": ((2, 5000), 1, torch.contiguous_format),
    "[N, L, C]": ((5, 6, 8), 2, torch.contiguous_format),
    "[N, L, C], several blocks a sample": ((2, 300, 18), 2, torch.contiguous_format),
    "[N, C, P], odd": ((6, 5, 9), 1, torch.contiguous_format),
    "[N, C, P], several blocks a channel": ((300, 3, 20), 1, torch.contiguous_format),
    "[N, C, P], long rows": ((2, 2, 4996), 1, torch.contiguous_format),
    "[N, C, P], one long sample": ((1, 64, 2300), 1, torch.contiguous_format),
    "channels_last": ((20, 12, 5, 7), 1, torch.channels_last),
    "channels_last, odd": ((3, 5, 4, 3), 1, torch.channels_last),
}


def tensor(shape, dtype, memory_format=torch.contiguous_format, offset=0, seed=0):
    """Random numbers in a view of a buffer that is NaN elsewhere."""
    like = torch.empty(shape).to(memory_format=memory_format)
    flat = inputs(dtype, like.numel(), offset)[seed % 3]
    return flat.as_strided(shape, like.stride(), flat.storage_offset())


def weights(size, dtype, seed):
    generator = torch.Generator().manual_seed(size + seed)
    return torch.randn(size, generator=generator, dtype=accumulate_dtype(dtype))


def truth(z, g, w_sample, w_channel, dim, statistic, scale, name, backward=True):
    """(result, statistic, what the error of the statistic is relative to), in float64."""
    z, g, w_sample, w_channel = (None if t is None else t.double() for t in
                                 (z, g, w_sample, w_channel))  # fmt: skip
    u = torch.ones(z.shape[0]).double() if w_sample is None else w_sample
    v = torch.ones(z.shape[dim]).double() if w_channel is None else w_channel
    u, v = spread(u, z, 0), spread(v, z, dim)
    phi = [fastjac.act(z, None, k, name, impl="reference") for k in range(3)]
    result = phi[0]
    if backward:
        result = 2 * scale * u * v * phi[1] * phi[2] + (0 if g is None else phi[1] * g)
    terms = {NONE: None, CHANNEL: scale * u * phi[1] ** 2, SAMPLE: scale * v * phi[1] ** 2,
             BIAS: result}[statistic]  # fmt: skip
    if terms is None:
        return result, torch.empty(0), None
    kept = 0 if statistic == SAMPLE else dim
    terms = terms.transpose(0, kept).flatten(1)
    return result, terms.sum(1), terms.abs().sum(1)


def assert_stats(got, expected, dtype, *what):
    (result, value), (true_result, true_value, size) = got, expected
    assert relative_error(result, true_result) <= tolerance("cuda", dtype), what
    assert value.shape == true_value.shape, what
    if size is not None:
        assert value.dtype == accumulate_dtype(dtype)
        error = (value.double() - true_value).norm() / size.norm()
        assert error <= tolerance("cuda", value.dtype), what


@pytest.mark.parametrize("dtype", fastjac.ops.dispatch.FLOAT_DTYPES)
@pytest.mark.parametrize("label", SHAPES)
def test_act_stats_kernels(label, dtype, poison):
    shape, dim, memory_format = SHAPES[label]
    z = tensor(shape, dtype, memory_format)
    g = tensor(shape, dtype, memory_format, seed=1)
    ws, wc = weights(shape[0], dtype, 1), weights(shape[dim], dtype, 2)
    for per_sample, w in ((False, None), (False, ws), (True, None), (True, wc)):
        statistic = SAMPLE if per_sample else CHANNEL
        expected = truth(
            z, None, None if per_sample else w, w if per_sample else None, dim, statistic, 0.3,
            "mish", backward=False,
        )  # fmt: skip
        got = host_ops().act_stats(z, w, dim, per_sample, 0.3, IDS["mish"], ())
        assert got[0].stride() == z.stride()
        assert_stats(got, expected, dtype, per_sample)
    for name, statistic, operands in (
        ("gelu", NONE, (g, None, wc)),
        ("gelu", CHANNEL, (g, ws, wc)),
        ("relu", SAMPLE, (g, ws, wc)),
        ("sine", SAMPLE, (None, ws, None)),
        ("gelu", BIAS, (g, None, wc)),
        ("gelu", BIAS, (g, ws, None)),
    ):
        params = TABLE[name].param_values({})
        expected = truth(z, *operands, dim, statistic, 0.3, name)
        got = host_ops().act_stats_backward(z, *operands, dim, statistic, 0.3, IDS[name], params)
        assert_stats(got, expected, dtype, name, statistic)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_act_stats_kernels_of_views(dtype, poison):
    # Rows of 2, 4, 6 … elements move in units of as many bytes as they, and the operands, allow.
    for columns, offset in ((16, 0), (16, 1), (16, 4), (12, 0), (12, 2), (10, 0), (10, 2), (9, 3)):
        for shape, dim in (((7, columns), 1), ((3, 5, columns), 1)):
            z, g = tensor(shape, dtype, offset=offset), tensor(shape, dtype, offset=offset, seed=1)
            ws, wc = weights(shape[0], dtype, 1), weights(shape[dim], dtype, 2)
            for statistic in (CHANNEL, SAMPLE):
                expected = truth(z, g, ws, wc, dim, statistic, 0.3, "gelu")
                got = host_ops().act_stats_backward(
                    z, g, ws, wc, dim, statistic, 0.3, IDS["gelu"], ()
                )
                assert_stats(got, expected, dtype, shape, offset, statistic)


def test_act_stats_has_the_same_bits_twice(poison):
    # In between, launches that divide their tiles into other numbers of chunks: only if each leaves
    # its counters at zero does the last block of the next one know itself.
    shapes = ((700, 12), (3000, 12), (2, 5000), (520, 12), (301, 12))
    before = {}
    for shape in shapes * 2:
        for per_sample in (False, True):
            z = tensor(shape, torch.float32)
            _, s = host_ops().act_stats(z, None, 1, per_sample, 1.0, IDS["mish"], ())
            assert torch.equal(before.setdefault((shape, per_sample), s), s)


def test_counters_of_a_graph_are_its_own():
    def zeroed(z):
        with torch.autograd.profiler.profile() as profile:
            s = host_ops().act_stats(z, None, 1, False, 1.0, IDS["gelu"], ())[1]
        return s, sum(event.name == "aten::zero_" for event in profile.function_events)

    z = tensor((301, 12), torch.float32)
    s, _ = zeroed(z)
    assert zeroed(z)[1] == 0
    set_capturing(True)
    try:
        for _ in range(2):
            again, times = zeroed(z)
            assert times == 1 and torch.equal(again, s)
    finally:
        set_capturing(False)


def test_act_stats_of_nothing_and_refusals(poison):
    ops, gelu = host_ops(), (IDS["gelu"], ())
    for shape in ((0, 3), (3, 0), (2, 3, 0)):
        for per_sample in (False, True):
            a, s = ops.act_stats(torch.empty(shape), None, 1, per_sample, 1.0, *gelu)
            assert a.shape == shape and torch.equal(s, torch.zeros(shape[1 - per_sample]))
    z = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="no activation with id 99"):
        ops.act_stats(z, None, 1, False, 1.0, 99, ())
    with pytest.raises(RuntimeError, match="the weight per sample must have shape"):
        ops.act_stats(z, torch.ones(3), 1, False, 1.0, *gelu)
    with pytest.raises(RuntimeError, match="statistic must be 0 to 3, got 4"):
        ops.act_stats_backward(z, None, None, None, 1, 4, 1.0, *gelu)
    with pytest.raises(RuntimeError, match="dim must be 1 or the last dimension"):
        ops.act_stats(torch.randn(2, 3, 4, 5), None, 2, False, 1.0, *gelu)


# ---- row_sqnorm


def row_weights(dtype, offset=0):
    shapes = ((5, 7), (3, 4, 3, 2), (1, 600), (33, 1), (0, 4), (3, 0), (2, 4100), (300, 8))
    ts = [tensor(shape, dtype, offset=offset, seed=i) for i, shape in enumerate(shapes)]
    return [*ts, tensor((3, 6, 2, 2), dtype, torch.channels_last, offset)]


@pytest.mark.parametrize("dtype", fastjac.ops.dispatch.FLOAT_DTYPES)
@pytest.mark.parametrize("offset", (0, 3))
def test_row_sqnorm_kernels(dtype, offset, poison):
    ws = row_weights(dtype, offset)
    got = host_ops().row_sqnorm(ws)
    rows = [w.double().flatten(1).square().sum(1) for w in ws]
    assert got.dtype == accumulate_dtype(dtype)
    assert relative_error(got, torch.cat(rows)) <= tolerance("cuda", got.dtype)
    assert torch.equal(host_ops().row_sqnorm(ws), got)
    c = torch.randn_like(got)
    for add in (False, True):
        grads = [torch.empty_like(w) for w in ws]
        if add:
            for grad in grads:
                grad.normal_()
        before = [grad.double().clone() for grad in grads]
        host_ops().row_sqnorm_backward(grads, ws, c, add)
        for grad, old, w, part in zip(
            grads, before, ws, c.double().split([len(w) for w in ws]), strict=True
        ):
            expected = 2 * spread(part, w, 0) * w.double() + (old if add else 0)
            assert relative_error(grad, expected) <= tolerance("cuda", dtype), (w.shape, add)


def test_row_sqnorm_of_many_weights(poison):
    # Two launches: the kernel's parameters hold 96.
    ws = [tensor((i % 4 + 1, i + 1), torch.float32, seed=i) for i in range(100)]
    got = host_ops().row_sqnorm(ws)
    torch.testing.assert_close(got, torch.cat([w.square().sum(1) for w in ws]))
    grads = [torch.empty_like(w) for w in ws]
    host_ops().row_sqnorm_backward(grads, ws, torch.ones_like(got), False)
    for grad, w in zip(grads, ws, strict=True):
        assert torch.equal(grad, 2 * w)


def test_row_sqnorm_refusals():
    w = torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="c must have shape"):
        host_ops().row_sqnorm_backward([w.clone()], [w], torch.ones(3), True)
    with pytest.raises(RuntimeError, match="the same strides"):
        host_ops().row_sqnorm_backward([w.t().contiguous().t()], [w], torch.ones(4), True)


# ---- softmax_residual


@pytest.mark.parametrize("dtype", fastjac.ops.dispatch.FLOAT_DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 10), (3, 33), (2, 1024), (2, 1025), (3, 2500)])
def test_softmax_residual_kernels(shape, dtype, poison):
    z, v = (tensor(shape, dtype, offset=3, seed=i) for i in range(2))
    target = torch.arange(shape[0]) * 7 % shape[1]
    r = host_ops().softmax_residual(z, target)
    p = z.double().softmax(1)
    limit = tolerance("cuda", dtype)
    assert relative_error(r, p - torch.nn.functional.one_hot(target, shape[1])) <= limit
    grad = host_ops().softmax_residual_backward(z, v)
    dot = (p * v.double()).sum(1, keepdim=True)
    # p (v − ⟨p, v⟩) cancels: an error of ⟨p, v⟩ counts against the size of p v.
    error = (grad.double() - p * (v.double() - dot)).norm()
    assert error <= limit * ((p * v.double()).norm() + (p * dot).norm())
    target[-1] = shape[1]
    wrong = host_ops().softmax_residual(z, target)
    assert wrong[-1].isnan().all() and not wrong[:-1].isnan().any()


def test_softmax_residual_refusals():
    z = torch.randn(4, 3)
    assert host_ops().softmax_residual(z[:0], torch.arange(0)).shape == (0, 3)
    with pytest.raises(RuntimeError, match=r"target must be int64 \[N\]"):
        host_ops().softmax_residual(z, torch.arange(3))
    with pytest.raises(RuntimeError, match="v must have the shape"):
        host_ops().softmax_residual_backward(z, z[:3])
