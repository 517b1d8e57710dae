"""Activations whose derivatives are computed from the output, and the third order in one pass."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, off_kinks
from torch import nn

import fastjac
from fastjac.activations import IDS, KERNEL_ROWS, ROWS, TABLE
from fastjac.cli.check import relative_error, tolerance
from fastjac.ops.dispatch import FLOAT_DTYPES, OPS, why_not
from fastjac.ops.registration import raw, suffix_of

IMPLS = [
    impl
    for impl in OPS["act"].implementations
    if impl != "reference" and why_not(impl, DEVICE, torch.float64) is None
]
OF_OUTPUT = [row.name for row in ROWS if row.slope is not None]
only_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="the op has a CPU kernel only")


def drawn(count, dtype=torch.float64, size=301):
    generator = torch.Generator().manual_seed(size)
    return [(2 * torch.randn(size, generator=generator)).to(DEVICE, dtype) for _ in range(count)]


def test_tanh_and_sigmoid_are_computed_from_the_output():
    assert OF_OUTPUT == ["tanh", "sigmoid"]
    assert [row.name for row in KERNEL_ROWS[len(TABLE) :]] == [
        "tanh_slope", "tanh_of_output", "sigmoid_slope", "sigmoid_of_output",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'tanh_slope' is not an activation"):
        fastjac.act(torch.randn(2), fn="tanh_slope")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OF_OUTPUT)
def test_derivatives_from_the_output(name, impl):
    """φ^(k) of z from a = φ(z), and ψ with φ'(z) = ψ(a), against the activation of z."""

    def of_z(g, order):
        return fastjac.act(z, g, order, name, impl="reference")

    def close(got, want):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)

    suffix = suffix_of(impl)
    act, backward = raw("act" + suffix), raw("act_backward" + suffix)
    z, g, v = drawn(3)
    a, output, slope = of_z(None, 0), IDS[f"{name}_of_output"], IDS[f"{name}_slope"]
    for order in range(4):
        close(act(a, g, order, output, []), of_z(g, order))
    for order in range(3):
        for got, want in zip(
            backward(a, g, v, order, output, []),
            (of_z(g * v, order + 1), of_z(v, order)),
            strict=True,
        ):
            close(got, want)
    close(act(a, g, 0, slope, []), of_z(g, 1))
    grad_a, grad_g = backward(a, g, v, 0, slope, [])
    close(act(a, grad_a, 0, slope, []), of_z(g * v, 2))
    close(grad_g, of_z(v, 1))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", OF_OUTPUT)
def test_what_is_saved(name, dtype):
    """The output, which the next layer saves too; in 16 bits z, which has the digits of 1 - a²."""
    z = drawn(1, dtype)[0].requires_grad_()
    a = fastjac.act(z, fn=name)
    saved = a.grad_fn.saved_tensors[0]
    assert saved.data_ptr() == (a if dtype.itemsize > 2 else z).data_ptr()
    gc.collect()
    gc.disable()
    try:
        node = weakref.ref(a.grad_fn)
        del a, saved
        assert node() is None, "the graph of an output that is saved is a cycle"
    finally:
        gc.enable()
    a = fastjac.act(z, fn=name)
    grad = torch.autograd.grad(a, z, torch.ones_like(a))[0]
    truth = fastjac.act(z.detach().double(), None, 1, name, impl="reference")
    assert relative_error(grad, truth) <= tolerance("cpu", dtype)


@pytest.mark.parametrize("name", OF_OUTPUT)
def test_any_number_of_derivatives(name):
    """u'''' of a network is possible: ψ is a polynomial, so no order is missing."""
    z = drawn(1, size=20)[0].requires_grad_()
    got, truth = fastjac.act(z, fn=name), TABLE[name].torch_function()(z)
    for _ in range(5):
        (got,) = torch.autograd.grad(got.sum(), z, create_graph=True)
        (truth,) = torch.autograd.grad(truth.sum(), z, create_graph=True)
        torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", OF_OUTPUT)
def test_a_changed_output_raises_as_in_torch(name):
    a = fastjac.act(drawn(1)[0].requires_grad_(), fn=name)
    a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        a.sum().backward()


# ---- the third order


@only_cpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", TABLE)
def test_third_order_in_one_pass(name, order, dtype):
    z, g, v, p, q = drawn(5, dtype)
    got = raw("act_double_backward")(z, g, v, p, q, order, IDS[name], TABLE[name].param_values({}))
    wide_z, wide_g, wide_v, wide_p, wide_q = (t.double() for t in (z, g, v, p, q))

    def of_z(factor, k):
        return fastjac.act(wide_z, factor, k, name, impl="reference")

    truth = (
        of_z(wide_g * wide_v * wide_p, order + 2) + of_z(wide_v * wide_q, order + 1),
        of_z(wide_v * wide_p, order + 1),
        of_z(wide_g * wide_p, order + 1) + of_z(wide_q, order),
    )
    for a, b in zip(got, truth, strict=True):
        assert relative_error(a, b) <= 2 * tolerance("cpu", dtype)  # sums of two results


@pytest.mark.parametrize("name", TABLE)
def test_third_order_is_the_same_recorded_or_not(name):
    z = off_kinks(name, 4).requires_grad_()
    w, u, r = (torch.randn_like(z).requires_grad_() for _ in range(3))
    (v,) = torch.autograd.grad(fastjac.act(z, fn=name), z, w, create_graph=True)
    grads = torch.autograd.grad(v, (z, w), u, create_graph=True, materialize_grads=True)
    grads = [t for t in grads if t.requires_grad]

    def third(**options):
        cotangents = [options.pop("cotangent", r)] * len(grads)
        return torch.autograd.grad(
            grads, (z, w, u), cotangents, retain_graph=True, materialize_grads=True, **options
        )

    def close(got, want):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)

    recorded, plain = third(create_graph=True), third()
    close(plain, recorded)
    (truth,) = torch.autograd.grad(TABLE[name].torch_function()(z), z, w, create_graph=True)
    truth = torch.autograd.grad(truth, (z, w), u, create_graph=True, materialize_grads=True)
    truth = [t for t in truth if t.requires_grad]
    cotangents = [r] * len(truth)
    close(plain, torch.autograd.grad(truth, (z, w, u), cotangents, materialize_grads=True))
    rows = torch.stack((r, 2 * r)).detach()
    batched = third(cotangent=rows, is_grads_batched=True)
    wanted = [torch.stack((t, 2 * t)) for t in plain]
    close([b.expand_as(t) for b, t in zip(batched, wanted, strict=True)], wanted)


@only_cpu
def test_third_order_raw_op():
    z, g, v, p, q = drawn(5)
    op, rest = raw("act_double_backward"), (1, IDS["gelu"], [])
    torch.library.opcheck(op, (z, g, v, p, q, *rest))
    strided = [t.expand(3, 301).T for t in (z, g, v, p, q)]
    for got, want in zip(op(*strided, *rest), op(z, g, v, p, q, *rest), strict=True):
        assert torch.equal(got, want[:, None].expand(301, 3))
    with pytest.raises(RuntimeError, match="not differentiable: differentiate .*act_backward"):
        op(z.requires_grad_(), g, v, p, q, *rest)
    with pytest.raises(RuntimeError, match="p must have the shape"), torch.no_grad():
        op(z, g, v, p[:1], q, *rest)
    with pytest.raises(RuntimeError, match="derivative of order 2"), torch.no_grad():
        op(z, g, v, p, q, 2, *rest[1:])


@only_cpu
def test_third_order_of_infinite_cotangents_is_zero_where_the_derivative_is():
    z, g, v, q = -torch.ones(4), *drawn(3, torch.float32, 4)
    p = torch.full((4,), float("inf"))
    for t in raw("act_double_backward")(z, g, v, p, q, 0, IDS["relu"], []):
        assert not t.any()


# ---- the rows that torch defines with a clamp


def test_hardsigmoid_has_a_second_derivative():
    """Torch's own raises; MobileNetV3 is made of it."""
    z = drawn(1)[0].requires_grad_()
    w = torch.randn_like(z).requires_grad_()
    torch.testing.assert_close(fastjac.hardsigmoid(z), F.hardsigmoid(z))
    for impl in (*IMPLS, "reference"):
        a = fastjac.hardsigmoid(z, impl=impl)
        (v,) = torch.autograd.grad(a, z, w, create_graph=True)
        grad_z, grad_w = torch.autograd.grad(v.square().sum(), (z, w), materialize_grads=True)
        inside = (z.abs() < 3).double()
        torch.testing.assert_close(grad_w, 2 * w * inside / 36, rtol=1e-14, atol=0)
        assert not grad_z.any()


def test_hardsigmoid_of_torch_on_the_chain():
    """The chain engine takes torch's own call, and computes what torch cannot."""

    class Clamp(nn.Module):
        def forward(self, z):
            return F.relu6(z + 3) / 6

    found = []
    x = torch.linspace(-4, 4, 15, dtype=torch.float64, device=DEVICE).reshape(5, 3)
    for phi, engine in ((nn.Hardsigmoid(), "chain"), (Clamp(), "autograd")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), phi, nn.Linear(6, 2)).to(DEVICE, torch.float64)
        fastjac.FrobReg(engine=engine)(model, x)[1].backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    # Torch's slope, which an MLP on the CPU does not use, is that of float32.
    rtol = 1e-8 if DEVICE == "cpu" else 2**-23
    for got, want in zip(*found, strict=False):
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("impl", IMPLS)
def test_hardtanh_between_other_bounds(impl):
    z = torch.tensor([-9.0, -0.5, -0.4, 0.0, 2.9, 3.0, 9.0], dtype=torch.float64, device=DEVICE)
    z.requires_grad_()
    got = fastjac.hardtanh(z, -0.5, 3.0, impl=impl)
    truth = F.hardtanh(z, -0.5, 3.0)
    assert torch.equal(got, truth)
    grads = [torch.autograd.grad(t.sum(), z)[0] for t in (got, truth)]
    assert torch.equal(*grads)
