"""`fastjac.act_stats`: values, gradients of every order, accuracy, layouts, refusals."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import DEVICE, off_kinks
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

import fastjac
from fastjac.activations import TABLE
from fastjac.cli.check import relative_error
from fastjac.ops.act_stats import BIAS, CHANNEL, NONE, SAMPLE
from fastjac.ops.dispatch import OPS, why_not

IMPLS = [
    impl
    for impl in OPS["act_stats"].implementations
    if impl != "reference" and why_not(impl, DEVICE, torch.float64) is None
]
NATIVE = [impl for impl in IMPLS if impl != "triton"]  # the interpreter is too slow for sweeps
LAYOUTS = {  # shape, dim
    "[N, C]": ((3, 4), -1),
    "[N, L, C]": ((2, 3, 2), -1),
    "[N, C, L]": ((2, 3, 4), 1),
    "[N, C, H, W]": ((2, 3, 2, 2), 1),
}


def sample(*shape):
    return 2 * torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def weights_of(per, shape, dim, dtype=torch.float64):
    size = shape[0] if per == "channel" else shape[dim]
    return torch.rand(size, dtype=dtype, device=DEVICE) + 0.5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per", ["channel", "sample"])
@pytest.mark.parametrize("name", TABLE)
def test_gradcheck_and_gradgradcheck(name, per, impl):
    inputs = [(off_kinks(name, 2), -1)]
    if name == "mish" and impl in NATIVE:
        inputs += [(sample(*shape), dim) for shape, dim in LAYOUTS.values()]
    for z, dim in inputs:
        z.requires_grad_()
        w = weights_of(per, z.shape, dim).requires_grad_()
        f = partial(fastjac.act_stats, fn=name, dim=dim, per=per, impl=impl)
        both = lambda z, w, f=f: f(z, weights=w)  # noqa: E731
        assert gradcheck(both, (z, w), check_forward_ad=True)
        assert gradcheck(lambda z, f=f: f(z)[1], (z,))
        assert gradcheck(lambda z, f=f: f(z)[0], (z,))
        assert gradgradcheck(both, (z, w))


def test_third_derivative_of_the_statistic_raises():
    z = sample(3, 4).requires_grad_()
    _, s = fastjac.act_stats(z, "gelu")
    (first,) = torch.autograd.grad(s.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match=r"act: a derivative of order 4 of 'gelu'.*reference"):
        torch.autograd.grad(second.sum(), z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per", ["channel", "sample"])
def test_opcheck(per, impl):
    suffix = "_triton" if impl == "triton" else ""
    z = sample(3, 4, 2).requires_grad_()
    fn, per_sample = list(TABLE).index("silu"), per == "sample"
    rest = (0.5, fn, ())
    w = weights_of(per, z.shape, 1)
    forward = getattr(torch.ops.fastjac, "act_stats" + suffix).default
    for weight in (None, w):
        torch.library.opcheck(forward, (z, weight, 1, per_sample, *rest))
    for order in ((2, 1, 0), (0, 2, 1), (1, 0, 2), (2, 0, 1)):  # strides that are no layout too
        inverse = sorted(range(3), key=order.__getitem__)
        other = z.detach().permute(order).contiguous().permute(inverse).requires_grad_()
        torch.library.opcheck(forward, (other, w, 1, per_sample, *rest))
    empty = torch.empty(0, 4, dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(forward, (empty, None, 1, per_sample, *rest))
    backward = getattr(torch.ops.fastjac, "act_stats_backward" + suffix).default
    ws, wc = weights_of("channel", z.shape, 1), weights_of("sample", z.shape, 1)
    for statistic in (NONE, CHANNEL, SAMPLE, BIAS):
        torch.library.opcheck(
            backward, (z.detach(), torch.randn_like(z), ws, wc, 1, statistic, *rest)
        )


def test_raw_ops_lose_no_derivative():
    z = sample(3, 4).requires_grad_()
    fn = list(TABLE).index("gelu")
    args = (None, 1, False, 1.0, fn, ())
    _, s = torch.ops.fastjac.act_stats(z, *args)
    _, truth = fastjac.act_stats(z, "gelu", scale=1.0)
    (a, b) = (torch.autograd.grad(t.sum(), z, create_graph=True)[0] for t in (s, truth))
    torch.testing.assert_close(a, b)
    (a, b) = (torch.autograd.grad(t.sum(), z)[0] for t in (a, b))
    torch.testing.assert_close(a, b)
    with pytest.raises(RuntimeError, match="act_stats_backward is not differentiable"):
        torch.ops.fastjac.act_stats_backward(
            z, None, None, torch.ones(4, dtype=torch.float64), 1, 0, 1.0, fn, ()
        )
    with pytest.raises(RuntimeError, match="cannot be transformed by torch.func"):
        torch.func.grad(lambda z: torch.ops.fastjac.act_stats(z, *args)[1].sum())(z.detach())


@pytest.mark.parametrize("impl", IMPLS)
def test_bias_is_the_sum_of_what_is_written(impl):
    """The scale of the statistic does not apply to it."""
    op = getattr(torch.ops.fastjac, "act_stats_backward" + ("_triton" if impl == "triton" else ""))
    fn = list(TABLE).index("gelu")
    for shape, dim in LAYOUTS.values():
        z, g = (torch.randn(shape, dtype=torch.float64, device=DEVICE) for _ in range(2))
        dim %= z.dim()
        q = weights_of("sample", shape, dim)
        grad, bias = op(z, g, None, q, dim, BIAS, 0.125, fn, ())
        torch.testing.assert_close(bias, grad.sum([d for d in range(z.dim()) if d != dim]))


def test_torch_func_and_batched_cotangents():
    z, t = sample(3, 4), torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    ours, truth = (
        partial(fastjac.act_stats, fn="mish", impl=impl) for impl in ("auto", "reference")
    )
    torch.testing.assert_close(jvp(ours, (z,), (t,)), jvp(truth, (z,), (t,)))
    stack = torch.stack([z, t])
    torch.testing.assert_close(vmap(ours)(stack), vmap(truth)(stack))
    results = []
    for f in (ours, truth):
        x = z.clone().requires_grad_()
        _, s = f(x)
        cotangents = torch.eye(4, dtype=torch.float64, device=DEVICE)
        (rows,) = torch.autograd.grad(s, x, cotangents, is_grads_batched=True, create_graph=True)
        results.append((rows, torch.autograd.grad(rows.square().sum(), x)[0]))
    torch.testing.assert_close(*results)


def eager(z, name, dim):
    """The same in eager torch."""
    phi = TABLE[name].torch_function()
    a = phi(z)
    (slope,) = torch.autograd.grad(a, z, torch.ones_like(a), create_graph=True)
    return a, slope.square().mean([d for d in range(z.dim()) if d != dim])


def all_of(f, z, g):
    """Value, statistic and gradient."""
    z = z.clone().requires_grad_()
    a, s = f(z)
    q = 1.5 + torch.cos(torch.arange(len(s))).to(s)
    outputs, cotangents = ((a, s), (g, q)) if s.requires_grad else ((a,), (g,))
    return a.detach(), s.detach(), torch.autograd.grad(outputs, z, cotangents)[0]


SHAPES = [((1, 1), 1), ((5, 3), 1), ((16384, 7), 1), ((7, 1030), 1), ((9, 3, 50), 1)]
SHAPES += [((33, 5, 70), 2), ((4, 6, 5, 5), 1)]


@pytest.mark.parametrize("impl", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TABLE)
def test_errors_are_not_larger_than_eager_torchs(name, dtype, impl):
    """Up to 2 eps of the result's dtype: an ulp of φ' makes two of its square, and a one-element
    tensor can be exact in torch by luck. Subnormal results have no relative accuracy."""
    generator = torch.Generator().manual_seed(0)
    for shape, dim in SHAPES:
        for scale in (1, 8, 1e4):
            z = (scale * torch.randn(shape, generator=generator)).to(DEVICE, dtype)
            g = torch.randn(shape, generator=generator).to(DEVICE, dtype)
            truth = all_of(
                partial(fastjac.act_stats, fn=name, dim=dim, impl="reference"),
                z.double(), g.double(),
            )  # fmt: skip
            ours = all_of(partial(fastjac.act_stats, fn=name, dim=dim, impl=impl), z, g)
            today = all_of(partial(eager, name=name, dim=dim), z, g)
            for which, (o, e, t) in zip("asz", zip(ours, today, truth, strict=True), strict=True):
                bound = max(relative_error(e, t), 2 * torch.finfo(o.dtype).eps)
                tiny = torch.linalg.vector_norm(t) < 1e3 * torch.finfo(o.dtype).tiny
                assert tiny or relative_error(o, t) <= bound, (which, shape, scale)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("per", ["channel", "sample"])
def test_layouts(per, impl):
    """The values are the same in every memory order, which the output keeps."""
    for shape, dim in (((6, 5), 1), ((4, 3, 5), 2), ((4, 5, 3), 1), ((2, 5, 3, 4), 1)):
        base = torch.randn(shape, dtype=torch.float64, device=DEVICE)
        truth = fastjac.act_stats(base, "silu", dim=dim, per=per, impl="reference")
        variants = [base, base.transpose(0, -1).contiguous().transpose(0, -1)]
        variants.append(torch.cat([base, torch.full_like(base, torch.nan)], -1)[..., : shape[-1]])
        variants.append(base.transpose(1, -1).contiguous().transpose(1, -1))
        if len(shape) == 4:
            variants.append(base.to(memory_format=torch.channels_last))
        for z in variants:
            z = z.detach().requires_grad_()
            a, s = fastjac.act_stats(z, "silu", dim=dim, per=per, impl=impl)
            torch.testing.assert_close((a, s), truth)
            (grad,) = torch.autograd.grad((a, s), z, (torch.ones_like(a), torch.ones_like(s)))
            wide = z.detach().clone().requires_grad_()
            pair = fastjac.act_stats(wide, "silu", dim=dim, per=per, impl="reference")
            (expected,) = torch.autograd.grad(pair, wide, [torch.ones_like(t) for t in pair])
            torch.testing.assert_close(grad, expected)
        assert a.stride() == z.stride()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("act", lambda z, g, v, w: (z, g, 1)),
        ("act_backward", lambda z, g, v, w: (z, g, v, 1)),
        ("act_double_backward", lambda z, g, v, w: (z, g, v, v, g, 1)),
        ("act_stats", lambda z, g, v, w: (z, w[:2], 1, False, 1.0)),
        ("act_stats_backward", lambda z, g, v, w: (z, g, None, w, 1, CHANNEL, 1.0)),
    ],
)
def test_memory_orders_of_the_operands_may_differ(name, given, impl):
    """As the tag says, for which inductor copies none of them."""
    if (name, impl) == ("act_double_backward", "triton"):
        pytest.skip("Triton has no kernel of its own for this op")
    op = getattr(torch.ops.fastjac, name + ("_triton" if impl == "triton" else "")).default
    assert torch.Tag.flexible_layout in op.tags
    fn, base = list(TABLE).index("silu"), [sample(2, 5, 3, 4) for _ in range(3)]
    w = torch.rand(5, dtype=torch.float64, device=DEVICE)
    truth = op(*given(*base, w), fn, ())
    orders = [
        lambda t: t,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    ]
    for shift in range(3):
        tensors = [orders[(i + shift) % 3](t) for i, t in enumerate(base)]
        torch.testing.assert_close(op(*given(*tensors, w), fn, ()), truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_and_single(impl):
    for shape, dim in (((0, 3), 1), ((3, 0), 1), ((2, 3, 0), 1), ((1, 1), 1), ((1, 1, 1, 1), 1)):
        for per in ("channel", "sample"):
            z = torch.full(shape, 0.5, dtype=torch.float64, device=DEVICE, requires_grad=True)
            a, s = fastjac.act_stats(z, "tanh", dim=dim, per=per, impl=impl)
            assert a.shape == shape
            assert s.shape == ((shape[0],) if per == "sample" else (shape[dim],))
            (grad,) = torch.autograd.grad(s.sum() + a.sum(), z)
            if z.numel():
                torch.testing.assert_close(s.detach(), (1 - a.detach().flatten() ** 2) ** 2)
            else:
                assert not s.any() and grad.shape == shape


@pytest.mark.parametrize("name", TABLE)
def test_infinities_and_nan_as_torch(name):
    """φ is as in torch for a column with ±inf or NaN, or the limit where torch's formula gives NaN
    (gelu on a CPU); the statistic is NaN only if torch's is."""
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0], device=DEVICE)
    z = torch.stack([values, torch.ones_like(values)])
    a, s = fastjac.act_stats(z, name)
    truth = TABLE[name].torch_function()(z)
    known = ~truth.isnan() | z.isnan()
    torch.testing.assert_close(a[known], truth[known], equal_nan=True)
    torchs = eager(z.clone().requires_grad_(), name, 1)[1]
    # The slopes at ±inf are limits, where torch computes inf - inf for some activations. In the
    # column with NaN, where the slope of elu and hardswish is 1 in torch, NaN is accepted.
    assert torch.isnan(s[2]) or not torch.isnan(torchs[2])
    finite = torch.isfinite(torchs) & ~torch.isnan(values)
    torch.testing.assert_close(s[finite], torchs[finite])


PROGRAM = """
import hashlib, sys, torch, fastjac
torch.set_num_threads(int(sys.argv[1]))
h = hashlib.sha256()
for shape, dim in (((700, 130), 1), ((9, 40, 77), 1), ((9, 40, 77), 2), ((3, 5000), 1)):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for per in ("channel", "sample"):
        x = z.clone().requires_grad_()
        a, s = fastjac.act_stats(x, "mish", dim=dim, per=per)
        (grad,) = torch.autograd.grad((a, s), x, (torch.cos(z), torch.ones_like(s)))
        for t in (a, s, grad):
            h.update(t.detach().numpy().tobytes())
print(h.hexdigest())
"""


def test_same_bits_for_any_number_of_threads():
    digests = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM, threads], capture_output=True, text=True, check=True
        ).stdout
        for threads in "1223"
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda z: fastjac.act_stats(z[0]),
            ValueError,
            r"z has shape \(4,\): it must have",
        ),
        (lambda z: fastjac.act_stats(z.long()), TypeError, "z has dtype torch.int64"),
        (lambda z: fastjac.act_stats(z, dim=0), ValueError, "dim is 0: it must be 1 or the last"),
        (lambda z: fastjac.act_stats(z, dim=7), ValueError, "dim is 7"),
        (
            lambda z: fastjac.act_stats(z, per="row"),
            ValueError,
            "per is 'row': it must be",
        ),
        (lambda z: fastjac.act_stats(z, "sin"), ValueError, "sin"),
        (lambda z: fastjac.act_stats(z, impl="best"), ValueError, "impl='best' is not"),
        (
            lambda z: fastjac.act_stats(z, weights=torch.ones(4)),
            ValueError,
            r"weights has shape \(4,\): with per='channel' .* one number for each sample: \[3\]",
        ),
        (
            lambda z: fastjac.act_stats(z, weights=torch.ones(3).double()),
            TypeError,
            "weights has dtype torch.float64 and z has torch.float32; pass weights.to",
        ),
        (
            lambda z: fastjac.act_stats(z, weights=3.0),
            TypeError,
            "weights is float: it must be a torch.Tensor or None",
        ),
        (lambda z: fastjac.act_stats(z, impl="cuda"), RuntimeError, "impl='cuda' cannot run"),
    ],
)
def test_refusals(call, error, message):
    if DEVICE == "cuda" and "cuda" in message:
        pytest.skip("a GPU is here")
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4))
