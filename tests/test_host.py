"""The CUDA kernels themselves, run on the CPU: values against the float64 reference."""

import shutil

import pytest
import torch
from host import host_ops

import fastjac
from fastjac.activations import TABLE
from fastjac.check import relative_error, tolerance

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


@pytest.mark.parametrize("dtype", fastjac.dispatch.FLOAT_DTYPES)
@pytest.mark.parametrize("name", TABLE)
def test_act_kernels(name, dtype):
    fn, params = list(TABLE).index(name), TABLE[name].param_values({})
    # One element past a 16-byte pack, and an operand that does not start at a 16-byte address.
    for size, offset in ((0, 0), (1, 0), (129, 0), (77, 1)):
        z, g, v = inputs(dtype, size, offset)
        wide = [t.double() for t in (z, g, v)]
        for order in range(4):
            for factor in (g, None):
                got = host_ops().act(z, factor, order, fn, *params)
                wide_factor = None if factor is None else wide[1]
                truth = fastjac.act(wide[0], wide_factor, order, name, impl="reference")
                assert relative_error(got, truth) <= tolerance("cuda", dtype), (size, order)
        for order in range(3):
            grad_z, grad_g = host_ops().act_backward(z, g, v, order, fn, *params)
            truth_z = fastjac.act(wide[0], wide[1] * wide[2], order + 1, name, impl="reference")
            truth_g = fastjac.act(wide[0], wide[2], order, name, impl="reference")
            assert relative_error(grad_z, truth_z) <= tolerance("cuda", dtype), (size, order)
            assert relative_error(grad_g, truth_g) <= tolerance("cuda", dtype), (size, order)


def test_layouts_and_refusals():
    z = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    g = torch.randn(2, 3, 4, 5)
    got = host_ops().act(z, g, 1, list(TABLE).index("silu"), 0.0, 0.0)
    assert got.stride() == z.stride()
    torch.testing.assert_close(got, fastjac.act(z, g, 1, "silu", impl="reference"))
    with pytest.raises(RuntimeError, match="order must be 0 to 3, got 4"):
        host_ops().act(z, g, 4, 0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="no activation with id 99"):
        host_ops().act(z, g, 0, 99, 0.0, 0.0)
