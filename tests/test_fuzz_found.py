"""Faults that fuzzing has found; each has a test."""

import pytest
import torch
import torch.nn.functional as F
from fuzz_cases import exotic
from torch import nn

import fastjac
from fastjac.activations import IDS
from fastjac.layerwise.batch_norm import Normed, batch_norm_act, inverse_variance
from fastjac.ops.act_stats import composed
from fastjac.ops.net import INPUT, LINEAR, rows

OPS = torch.ops.fastjac
Z = torch.linspace(-2, 2, 6, dtype=torch.float64).view(2, 3)
META = Z.to("meta")
NOTHING = torch.empty(2**62, 0)
PLAN = rows([(INPUT, 3), (LINEAR, 0, 0, 0, -1)])
GELU = (IDS["gelu"], ())


@pytest.mark.parametrize("recorded", (False, True))
def test_batch_norm_whose_weight_has_strides(recorded):
    """Torch's own backward of a batch norm [N, C] reads such a weight as if it was contiguous."""
    gamma = torch.tensor([[0.5, 9.0], [2.0, 9.0]], dtype=torch.float64)[:, 0]
    z, eps = Z[:, :2].detach().requires_grad_(), 0.1

    def grad(a, t, **options):
        return torch.autograd.grad((a * Z[:, :2].cos()).sum() + t.sum(), z, **options)[0]

    y, mean, invstd = torch.native_batch_norm(z.detach(), gamma, None, None, None, True, 0.0, eps)
    got = batch_norm_act(z, gamma, None, Normed(y, 0, mean, invstd, eps), 0.5, *GELU)
    y = F.batch_norm(z, None, None, gamma.contiguous(), None, training=True, eps=eps)
    a, s = composed(y, None, 1, False, 0.5, "gelu", {}, "reference")
    want = grad(a, s * inverse_variance(z, eps))
    torch.testing.assert_close(grad(*got, create_graph=recorded).detach(), want)


def test_softmax_residual_in_half_precision_when_it_is_differentiated_again():
    """That backward was computed in bfloat16, and its error was more than a rounding."""
    z = torch.linspace(-3, 3, 40).view(4, 10).bfloat16().requires_grad_()
    v = torch.linspace(0.5, 1.5, 40).view(4, 10).bfloat16()
    r = fastjac.softmax_residual(z, torch.zeros(4, dtype=torch.int64))
    got = torch.autograd.grad(r, z, v, create_graph=True)[0].detach()
    p = z.detach().double().softmax(1)
    want = p * (v.double() - (p * v.double()).sum(1, keepdim=True))
    assert (got.double() - want).norm() <= 2**-8 * want.norm()


def test_orthogonal_projections_of_no_samples():
    model = nn.Linear(3, 2)
    value = fastjac.spectreg(model, torch.ones(0, 3), n_proj=2, distribution="orthogonal")[1]
    assert value == 0


@pytest.mark.parametrize(
    ("call", "message"),
    (
        # With one tensor on meta the result of the others was memory that was never written.
        (lambda: OPS.act(Z, META, 0, *GELU), "act are on cpu, meta"),
        (lambda: OPS.act_backward(Z, Z, META, 0, *GELU), "cpu, meta"),
        (lambda: OPS.softmax_residual_backward(Z, META), "cpu, meta"),
        (lambda: OPS.row_sqnorm([Z, META]), "cpu, meta"),
        (lambda: OPS.act(META, META[:1], 0, *GELU), "g must have the shape"),
        (lambda: OPS.act_stats(META, None, 5, False, 1.0, *GELU), "dim must be 1 to 1"),
        (lambda: OPS.act_stats(META, None, -1, False, 1.0, *GELU), "dim must be 1 to 1"),
        (lambda: OPS.softmax_residual_backward(None, META), "logits of .* is None"),
        # Sums of sizes that overflow, and sizes of dimensions that do not exist.
        (lambda: OPS.row_sqnorm([NOTHING, NOTHING]), "too many rows"),
        (lambda: OPS.net_forward(torch.ones(()), [], [], 1, True, True, PLAN), "must be a matrix"),
        (lambda: OPS.net_pull(Z[:0], [Z], [], 1, 1, True, True, PLAN), "w must have a row"),
        (lambda: OPS.net_pull(Z[0], [Z], [], 1, 1, True, True, PLAN), "w must be a matrix"),
    ),
)  # fmt: skip
def test_raw_ops_refuse(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    (
        # These read past the end of g, or numbers of another type.
        (lambda: OPS.act_triton(Z, Z[:1], 0, *GELU), "g must have the shape"),
        (lambda: OPS.act_triton(Z, Z.float(), 0, *GELU), "g must have the shape, dtype"),
        (lambda: OPS.act_backward_triton(Z, Z, Z[:1], 0, *GELU), "v must have the shape"),
        (lambda: OPS.act_triton(Z.long(), None, 0, *GELU), "not torch.int64"),
        (lambda: OPS.act_backward_triton(Z, Z, Z, 3, *GELU), "order must be 0 to 2"),
        (lambda: OPS.act_triton(Z, None, 0, -1, ()), "no activation with id -1"),
        (lambda: OPS.act_triton(Z, None, 0, 0, (1.0,)), "has 0 parameters, got 1"),
        (lambda: OPS.softmax_residual_backward_triton(Z.long(), Z.long()), "not torch.int64"),
    ),
)  # fmt: skip
def test_raw_triton_ops_refuse(call, message):
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match=message):
        call()


MODEL = nn.Linear(3, 3).double()
NESTED = exotic("nested", Z)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda: fastjac.act(Z.to_sparse()), TypeError, "z is a torch.sparse_coo tensor"),
        (lambda: fastjac.act(NESTED), TypeError, "z is a nested tensor"),
        (lambda: fastjac.act(Z, impl=[]), ValueError, r"impl=\[\]"),
        (lambda: fastjac.elu(Z, 10**400), ValueError, "alpha is an integer too large"),
        (lambda: fastjac.act_stats(Z, dim="1"), TypeError, "dim is str"),
        (lambda: fastjac.act_stats(Z, scale=[]), TypeError, "scale is list"),
        (lambda: fastjac.act_stats(Z, scale=10**400), ValueError, "scale is an integer too large"),
        (lambda: fastjac.row_sqnorm(7), TypeError, "weights is int"),
        (lambda: fastjac.SpectReg(weight=10**400), ValueError, "weight is 10+: it must be finite"),
        (lambda: fastjac.SpectReg(10**400), ValueError, "n_proj is 10+: .* less than 2\\*\\*63"),
        (lambda: fastjac.DREG(layer_weights=7), TypeError, "layer_weights is 7"),
        (lambda: fastjac.FrobReg()(MODEL, NESTED), TypeError, "x is a nested tensor"),
        (lambda: fastjac.FrobReg()(MODEL, Z.to_sparse()), TypeError, "x is a torch.sparse_coo"),
    ),
)  # fmt: skip
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
