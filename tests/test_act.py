"""`fastjac.act`: values and gradients of every implementation, and every way torch differentiates.

The ways are tested on the gradients of a penalty with respect to the parameters, because these are
wrong if the second-order term is missing.
"""

import copy

import pytest
import torch
from conftest import DEVICE, off_kinks
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacrev, jvp, vjp, vmap

import fastjac
from fastjac.activations import TABLE, get
from fastjac.ops.dispatch import OPS, why_not

IMPLS = [
    impl
    for impl in OPS["act"].implementations
    if impl != "reference" and why_not(impl, DEVICE, torch.float64) is None
]
NAMES = list(TABLE)


def test_some_implementation_besides_the_reference_runs():
    assert set(IMPLS) >= ({"cuda", "triton"} if DEVICE == "cuda" else {"cpu", "triton"})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_and_gradgradcheck(name, order, impl):
    z = off_kinks(name).requires_grad_()
    g = torch.randn_like(z).requires_grad_()

    def with_g(z, g):
        return fastjac.act(z, g, order, name, impl=impl)

    def without_g(z):
        return fastjac.act(z, None, order, name, impl=impl)

    assert gradcheck(with_g, (z, g), check_forward_ad=True, check_batched_grad=True)
    assert gradcheck(without_g, (z,))
    if order < 2:
        assert gradgradcheck(with_g, (z, g))
        assert gradgradcheck(without_g, (z,))


# For opcheck, rows differ only in the number of parameters and in the orders that are zero.
KINDS = {(len(row.params), row.zero_from): name for name, row in TABLE.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", KINDS.values())
@pytest.mark.parametrize("order", range(4))
def test_opcheck(name, order, impl):
    suffix = "_triton" if impl == "triton" else ""
    row = get(name)
    fn, params = NAMES.index(name), row.param_values({})
    z = off_kinks(name, 3).requires_grad_(order < 3)
    g = torch.randn_like(z).requires_grad_()
    act = getattr(torch.ops.fastjac, "act" + suffix).default
    torch.library.opcheck(act, (z, g, order, fn, params))
    torch.library.opcheck(act, (z, None, order, fn, params))
    if order < 3:
        backward = getattr(torch.ops.fastjac, "act_backward" + suffix).default
        v = torch.randn_like(g).requires_grad_()
        z = z.detach().requires_grad_(order < 2)
        torch.library.opcheck(backward, (z, g, v, order, fn, params))


@pytest.mark.parametrize("impl", IMPLS)
def test_past_the_last_order_raises(impl):
    z = torch.randn(3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    out = fastjac.act(z, order=3, fn="gelu", impl=impl)
    with pytest.raises(RuntimeError, match=r"act: a derivative of order 4 of 'gelu'.*reference"):
        out.sum().backward()
    out = fastjac.act(z, order=3, fn="relu", impl=impl)  # identically zero from order 2 on
    (grad,) = torch.autograd.grad(out.sum(), z)
    assert not grad.any()


# ---- the routes of torch, each on the parameters' gradients of loss + penalty


def network(act):
    """Two layers with parameters in float64; the penalty's gradient needs φ''."""
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), act, torch.nn.Linear(6, 5), copy.deepcopy(act), torch.nn.Linear(5, 3)
    ).to(DEVICE, torch.float64)


def penalty_by_autograd(model, x, w):
    x = x if x.requires_grad else x.detach().requires_grad_()
    out = model(x)
    (v,) = torch.autograd.grad(out, x, w, create_graph=True)
    return (v**2).sum() + out.square().sum()


def penalty_by_vjp(model, x, w):
    def f(x):
        return functional_call(model, dict(model.named_parameters()), (x,))

    out, pull = vjp(f, x)
    return (pull(w)[0] ** 2).sum() + out.square().sum()


def penalty_by_batched_cotangents(model, x, w):
    x = x.detach().requires_grad_()
    out = model(x)
    eye = torch.eye(3, dtype=x.dtype, device=x.device)
    rows = eye[:, None, :].expand(3, len(x), 3)
    (v,) = torch.autograd.grad(out, x, rows, is_grads_batched=True, create_graph=True)
    return (v**2).sum()


def penalty_by_jacrev(model, x, w):
    return (vmap(jacrev(model))(x) ** 2).sum()


def penalty_by_jvp(model, x, w):
    out, tangent = jvp(model, (x,), (torch.ones_like(x),))
    return (tangent**2).sum() + out.sum()


def penalty_by_functional_jacobian(model, x, w):
    jacobian = torch.autograd.functional.jacobian(model, x, create_graph=True, vectorize=True)
    return (jacobian**2).sum()


def penalty_under_checkpoint(model, x, w):
    x = x.detach().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    (v,) = torch.autograd.grad(out, x, w, create_graph=True)
    return (v**2).sum()


ROUTES = [
    penalty_by_autograd,
    penalty_by_vjp,
    penalty_by_batched_cotangents,
    penalty_by_jacrev,
    penalty_by_jvp,
    penalty_by_functional_jacobian,
    penalty_under_checkpoint,
]


def gradients(route, act, *, wrap=lambda f: f):
    model = network(act)
    x = torch.linspace(-1, 1, 28, dtype=torch.float64, device=DEVICE).reshape(7, 4)
    x.requires_grad_(route is penalty_by_autograd)  # dynamo refuses requires_grad_() in a region
    w = torch.cos(torch.arange(21.0, dtype=torch.float64, device=DEVICE)).reshape(7, 3)
    wrap(route)(model, x, w).backward()
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def assert_same_gradients(got, truth):
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("route", ROUTES)
def test_parameter_gradients_by_every_route(route, impl):
    truth = gradients(route, torch.nn.GELU())
    assert_same_gradients(gradients(route, fastjac.Act("gelu", impl=impl)), truth)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("route", [penalty_by_vjp, penalty_by_autograd])
def test_parameter_gradients_under_compile(route, backend, no_stale_graphs):
    """The whole penalty in one graph: torch.func inside, or autograd.grad with dynamo's flag."""
    truth = gradients(route, torch.nn.GELU())

    def compiled(f):
        return torch.compile(f, backend=backend, fullgraph=True)

    with torch._dynamo.config.patch(trace_autograd_ops=route is penalty_by_autograd):
        got = gradients(route, fastjac.Act("gelu"), wrap=compiled)
    assert_same_gradients(got, truth)


@pytest.mark.slow
def test_compiled_forward_and_backward_of_a_plain_step(no_stale_graphs):
    def route(model, x, w):
        return (torch.compile(model, fullgraph=True)(x) * w).sum()

    def eager(model, x, w):
        return (model(x) * w).sum()

    assert_same_gradients(gradients(route, fastjac.Act("silu")), gradients(eager, torch.nn.SiLU()))


@pytest.mark.parametrize("impl", IMPLS)
def test_hessian(impl):
    z = torch.randn(5, dtype=torch.float64, device=DEVICE)
    got = hessian(lambda z: fastjac.act(z, fn="mish", impl=impl).square().sum())(z)
    truth = hessian(lambda z: torch.nn.functional.mish(z).square().sum())(z)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-13)


def test_raw_op_is_differentiable_too():
    """torch.ops.fastjac.* called directly, past the Functions: no silently missing gradient."""
    z = torch.randn(4, dtype=torch.float64, requires_grad=True)
    raw = torch.ops.fastjac.act.default
    assert gradgradcheck(lambda z: raw(z, None, 0, NAMES.index("gelu"), ()), (z,))


# ---- values: shapes, layouts, dtypes, special values


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", fastjac.ops.dispatch.FLOAT_DTYPES)
def test_check_passes_for(impl, dtype):
    name = str(dtype).removeprefix("torch.")
    records = fastjac.check.run(op=["act"], impl=[impl], dtype=[name], device=[DEVICE])
    assert len(records) == len(TABLE)
    assert [r for r in records if not r["ok"]] == []


LAYOUTS = {
    "scalar": lambda t: t[0, 0, 0, 0],
    "empty": lambda t: t[:0],
    "one": lambda t: t[:1, :1, 0, 0],
    "transposed": lambda t: t.transpose(0, 2),
    "strided": lambda t: t[:, ::2, 1:, ::3],
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "expanded": lambda t: t[:1].expand(4, *t.shape[1:]),
    "offset": lambda t: t.flatten()[1:],
    "odd": lambda t: t.flatten()[:1237],
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout, impl, dtype):
    z = LAYOUTS[layout](torch.randn(4, 6, 8, 10, device=DEVICE).to(dtype))
    g = torch.randn(z.shape, device=DEVICE).to(dtype)  # contiguous: strides differ from z's
    z_in, g_in = z.detach().requires_grad_(), g.requires_grad_()
    out = fastjac.act(z_in, g_in, 1, "silu", impl=impl)
    grads = torch.autograd.grad(out, (z_in, g_in), torch.ones_like(out))
    wide = z.double(), g.detach().double()
    truth = fastjac.act(*wide, 1, "silu", impl="reference")
    truth_z = fastjac.act(*wide, 2, "silu", impl="reference")
    truth_g = fastjac.act(wide[0], None, 1, "silu", impl="reference")
    assert out.stride() == torch.empty_like(z).stride()  # what the fake kernel promises
    for got, want in zip((out, *grads), (truth, truth_z, truth_g), strict=True):
        assert got.shape == z.shape and got.dtype == dtype
        bound = fastjac.check.tolerance(impl, dtype)
        assert fastjac.check.relative_error(got.detach(), want) <= bound


SPECIAL = [0.0, -0.0, 1e-45, -1e-38, 1e-20, 88.0, -88.0, -104.0, 1e4, -1e4, 3e38, -3e38]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
def test_special_values(name, impl):
    """Subnormal and huge |z| against float64; ±inf and NaN as in torch, or the limit if it has NaN.

    sine is not tested at 3e38, where rounding the argument changes it by many periods, nor is z²,
    which is no float32 there.
    """
    largest = {"sine": 1e4, "relu_squared": 1e19}.get(name, float("inf"))
    values = [v for v in SPECIAL if abs(v) <= largest]
    z = torch.tensor(values, device=DEVICE)
    got = fastjac.act(z, fn=name, impl=impl).double()
    truth = fastjac.act(z.double(), fn=name, impl="reference")
    # Half a float32 ulp of slack for subnormal results, which some devices flush to zero.
    torch.testing.assert_close(got, truth, rtol=1e-6, atol=1.2e-38)
    edge = torch.tensor([float("inf"), -float("inf"), float("nan")], device=DEVICE)
    for order in (0, 1):
        got = fastjac.act(edge, order=order, fn=name, impl=impl)
        torchs = fastjac.act(edge, order=order, fn=name, impl="reference")
        # elu' of NaN is 1 in torch and NaN here, which is accepted because the input is NaN.
        same = (got == torchs) | torchs.isnan() | (edge.isnan() & got.isnan())
        assert same.all(), (order, got, torchs)
    assert fastjac.act(edge, fn=name, impl=impl)[2].isnan()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", range(3))
def test_finite_for_every_finite_input(name, order):
    """No intermediate value overflows: φ^(k) is finite for any finite z, if it is a float32."""
    z = torch.tensor([1e3, -1e3, 1e6, -1e6, 1e19, -1e19, 3e38, -3e38])
    z = z[:6] if name == "relu_squared" else z
    assert fastjac.act(z, order=order, fn=name, impl="auto").isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_twice_and_at_any_thread_count(impl):
    z, found = torch.randn(100_003, device=DEVICE), []
    threads = torch.get_num_threads()
    try:
        for n in (2, 2, 1):
            torch.set_num_threads(n)
            found.append(fastjac.act(z, fn="gelu", impl=impl))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ---- errors


BAD = [
    (lambda z: fastjac.act([1.0]), TypeError, "z is list: it must be a torch.Tensor"),
    (lambda z: fastjac.act(z.long()), TypeError, "z has dtype torch.int64.*embeddings"),
    (lambda z: fastjac.act(z, 1.0), TypeError, "g is float: it must be a torch.Tensor or None"),
    (lambda z: fastjac.act(z, z[:1]), ValueError, r"g has shape \(1, 3\) and z has \(2, 3\)"),
    (lambda z: fastjac.act(z, z.double()), TypeError, "g has dtype torch.float64 and z has"),
    (
        lambda z: fastjac.act(z, order=4),
        ValueError,
        "order is 4: it must be an integer",
    ),
    (lambda z: fastjac.act(z, order=1.0), ValueError, r"order is 1\.0"),
    (lambda z: fastjac.act(z, fn="swish"), ValueError, "fn='swish' is not an activation.*silu"),
    (lambda z: fastjac.act(z, impl="gpu"), ValueError, "impl='gpu' is not an implementation.*cuda"),
    (lambda z: fastjac.act(z, impl="cuda"), RuntimeError, "impl='cuda' cannot run act.*auto"),
    (lambda z: fastjac.act(z, fn="elu", beta=1.0), TypeError, "'elu' has no parameter 'beta'"),
    (
        lambda z: fastjac.act(z.to(torch.float8_e4m3fn), impl="cpu"),
        RuntimeError,
        "the kernels take float32.*float8",
    ),
    (lambda z: fastjac.act(z, z.to("meta")), ValueError, "g is on meta and z is on cpu"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(2, 3))


def test_raw_ops_refuse_what_they_cannot_run():
    z = torch.randn(2, 3)
    act = torch.ops.fastjac.act.default
    for call, message in (
        (lambda: act(z, z[:1], 0, 0, ()), "g must have the shape"),
        (lambda: act(z, z.double(), 0, 0, ()), "g must have z's dtype"),
        (lambda: act(z, None, 0, 999, ()), "no activation with id 999"),
        (lambda: act(z, None, 0, NAMES.index("elu"), ()), "has 1 parameters, got 0"),
        (lambda: act(z, None, 0, 0, (1.0,)), "has 0 parameters, got 1"),
        (lambda: act(z, None, 7, 0, ()), "derivative of order 7"),
        (lambda: act(z, None, -1, 0, ()), "derivative of order -1"),
        (lambda: act(z.long(), None, 0, 0, ()), "z must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
