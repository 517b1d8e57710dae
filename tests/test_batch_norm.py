"""``batch_norm_act``: activation, statistic and norm in one node, against the parts in float64."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import cpu_only
from layer_cases import Model
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac.activations import IDS, TABLE
from fastjac.cli.check import relative_error, tolerance
from fastjac.layerwise import statistics
from fastjac.layerwise.batch_norm import Normed, batch_norm_act
from fastjac.ops.dispatch import FLOAT_DTYPES, accumulate_dtype, why_not
from fastjac.penalties import DREG

if why_not("cpu", "cpu", torch.float32):
    pytest.skip(why_not("cpu", "cpu", torch.float32), allow_module_level=True)

EPS = 1e-5
SHAPES = [(6, 5), (1500, 3), (40, 1100), (4, 3, 7), (3, 5, 4, 6), (2, 3, 40, 33), (2, 3, 2, 2, 2)]
MEMORY = {4: torch.channels_last, 5: torch.channels_last_3d}


def fused(z: Tensor, gamma: Tensor | None, beta: Tensor | None, name: str) -> tuple[Any, Any]:
    y = F.batch_norm(z, None, None, gamma, beta, training=True, eps=EPS)
    wide = z.to(accumulate_dtype(z.dtype))  # without γ torch keeps statistics in 16 bit
    _, mean, invstd = torch.native_batch_norm(wide, None, None, None, None, True, 0.1, EPS)
    normed = Normed(y.detach(), 0, mean.detach(), invstd.detach(), EPS)
    params = TABLE[name].param_values({})
    return batch_norm_act(z, gamma, beta, normed, 0.3, IDS[name], params)


def parts(z: Tensor, gamma: Tensor | None, beta: Tensor | None, name: str) -> tuple[Any, Any]:
    y = F.batch_norm(z, None, None, gamma, beta, training=True, eps=EPS)
    a, s = fastjac.act_stats(y, name, dim=1, scale=0.3, impl="reference")
    others = [d for d in range(z.dim()) if d != 1]
    return a, s / (z.var(others, unbiased=False) + EPS)


def operands(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    z = torch.randn(shape, dtype=torch.float64) * 2 + 1
    gamma = torch.randn(shape[1], dtype=torch.float64)
    gamma[0] = 0  # the zero-initialised last norm of a residual block
    beta = torch.randn(shape[1], dtype=torch.float64)
    wide = accumulate_dtype(dtype)
    return [z.to(dtype), gamma.to(wide), beta.to(wide)]


def gradients(run: Any, inputs: list[Any], name: str, g: Tensor, q: Tensor) -> list[Tensor]:
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    a, s = run(*leaves, name)
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad((a, s), wanted, (g.to(a.dtype), q.to(s.dtype)))
    return [a.detach(), s.detach(), *grads]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_parts(shape: Any, affine: bool, dtype: torch.dtype) -> None:
    """Values and gradients in each layout; in 16 bit also the rounding of ∂y to storage."""
    inputs = operands(shape, dtype)
    inputs = inputs if affine else [inputs[0], None, None]
    g = torch.randn(shape, dtype=torch.float64).to(dtype).double()
    q = torch.randn(shape[1], dtype=torch.float64)
    truth = gradients(parts, [t if t is None else t.double() for t in inputs], "gelu", g, q)
    # A sum of n terms in float32 rounds to √n eps of their size, here of order one each.
    bound = 4 * tolerance("cpu", dtype)
    memories = [torch.contiguous_format]
    memories += [MEMORY[len(shape)]] if len(shape) in MEMORY else []
    for memory in memories:
        z = inputs[0].contiguous(memory_format=memory)
        ours = gradients(fused, [z, *inputs[1:]], "gelu", g, q)
        assert ours[0].stride() == ours[2].stride() == z.stride()
        for got, want in zip(ours, truth, strict=True):
            assert relative_error(got, want) <= bound


@pytest.mark.parametrize("name", TABLE)
def test_activations(name: str) -> None:
    inputs = operands((6, 5, 3))
    g, q = torch.randn(6, 5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    ours, truth = (gradients(run, inputs, name, g, q) for run in (fused, parts))
    for got, want in zip(ours, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [(0, 1, 2), (0,), (1, 2)], ids=str)
def test_differentiable_twice(training: tuple[int, ...]) -> None:
    inputs = operands((5, 3, 2))
    for i in training:
        inputs[i].requires_grad_()
    run = partial(fused, name="silu")
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


def test_one_cotangent() -> None:
    inputs = [t.requires_grad_() for t in operands((5, 3))]
    for k in range(2):
        ours, truth = (
            torch.autograd.grad(run(*inputs, "gelu")[k].square().sum(), inputs, allow_unused=True)
            for run in (fused, parts)
        )
        for got, want in zip(ours, truth, strict=True):
            want = torch.zeros_like(got) if want is None else want
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_same_bits_for_any_number_of_threads() -> None:
    inputs = operands((8, 6, 40, 40), torch.float32)
    g, q = torch.randn(8, 6, 40, 40), torch.randn(6)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            # The statistics are torch's, and differ between numbers of threads.
            if not results:
                _, mean, invstd = torch.native_batch_norm(*inputs, None, None, True, 0.1, EPS)
                s = torch.rand(6)
            args = (inputs[0], g, mean, invstd, *inputs[1:], s, q, 1.0, IDS["gelu"], ())
            results.append(torch.ops.fastjac.batch_norm_act_backward(*args))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_raw_op() -> None:
    inputs = operands((4, 3, 5))
    vectors = [torch.rand(3, dtype=torch.float64) for _ in range(4)]
    args = (inputs[0], inputs[0], *vectors[:2], *inputs[1:], *vectors[2:], 1.0, 0, ())
    op = torch.ops.fastjac.batch_norm_act_backward
    torch.library.opcheck(op, args)
    with pytest.raises(RuntimeError, match="mean must have shape"):
        op(*args[:2], vectors[0][:2], *args[3:])
    with pytest.raises(RuntimeError, match="is not differentiable"):
        op(inputs[0].requires_grad_(), *args[1:])


# ---- in a model


def network(forward: Any = None) -> nn.Module:
    model = Model(
        forward or (lambda m, x: m.head(m.act(m.norm(m.fc(x))))),
        **{"fc": nn.Linear(4, 5), "norm": nn.BatchNorm1d(5), "act": nn.GELU()},
        head=nn.Linear(5, 2),
    )
    return model.double()


def used(monkeypatch: Any) -> list[int]:
    """How often the node ran."""
    calls: list[int] = []

    def run(*args: Any) -> Any:
        calls.append(1)
        return batch_norm_act(*args)

    monkeypatch.setattr(statistics, "batch_norm_act", run)
    return calls


@cpu_only
def test_dreg_takes_it(monkeypatch: Any) -> None:
    calls, x = used(monkeypatch), torch.randn(6, 4, dtype=torch.float64)
    for options, times in ({}, 1), ({"reduction": "none"}, 0), ({"use_weight": False}, 0):
        calls.clear()
        model = network()
        penalty = DREG(model, **options)
        model(x)
        penalty()
        assert len(calls) == times, options


def test_a_checkpointed_norm_sees_as_many_batches_as_without_the_penalty() -> None:
    """To read what the norm's node saved would make the checkpoint run the model again."""
    x = torch.randn(6, 4, dtype=torch.float64)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(checkpoint(lambda t: m.act(m.norm(m.fc(t))), x, use_reentrant=False))

    counts = []
    for attach in (False, True):
        model = network(forward)
        penalty = DREG(model) if attach else None
        loss = model(x).sum()
        (loss if penalty is None else loss + penalty()).backward()
        counts.append(int(model.norm.num_batches_tracked))
    assert counts[0] == counts[1]


def test_writes_between_norm_and_activation() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)

    def writing(name: str) -> Any:
        def forward(m: Any, x: Tensor) -> Tensor:
            z = m.fc(x)
            y = m.norm(z)
            with torch.no_grad():
                {"z": z, "weight": m.norm.weight, "bias": m.norm.bias}[name].mul_(2)
            return m.head(m.act(y))

        return forward

    for name in ("z", "weight"):
        model = network(writing(name))
        penalty = DREG(model)
        with pytest.raises(RuntimeError, match="modified"):
            (model(x).sum() + penalty()).backward()
    # The norm's backward needs no bias, so torch allows this.
    model = network(writing("bias"))
    nn.init.ones_(model.norm.bias)
    penalty = DREG(model)
    (model(x).sum() + 0 * penalty()).backward()
    plain = network(writing("bias"))
    plain.load_state_dict(model.state_dict())
    nn.init.ones_(plain.norm.bias)
    plain(x).sum().backward()
    torch.testing.assert_close(model.fc.weight.grad, plain.fc.weight.grad)
