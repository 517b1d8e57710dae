"""Every launch configuration gives the right results.

Triton's kernels run in the interpreter, CUDA's on the host (`slow`). What the compilers make of the
configurations: test_compile.py.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from host import host_ops, last_launch
from tuning_cases import (
    GELU,
    made_up_times,
    needs_compiler,
    needs_triton,
    operands,
    use_everywhere,
)  # fmt: skip

import fastjac
from fastjac import launch, launch_cache, tuning
from fastjac.cli.check import relative_error, tolerance
from fastjac.launch import CUDA_KERNELS, KERNELS
from fastjac.ops.act_stats import BIAS, NONE, SAMPLE
from fastjac.ops.dispatch import FLOAT_DTYPES, OPS

pytestmark = pytest.mark.usefixtures("untuned")


# ---- Triton's


@needs_triton
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_elementwise_results_are_the_same_bits(dtype, launched):
    from fastjac.kernels import act

    z, g, v, _ = operands(dtype, 5001)

    def call():
        return (
            act.act(z, None, 0, *GELU),
            act.act(z, g, 1, *GELU),
            *act.act_backward(z, g, v, 1, *GELU),
        )

    expected = call()
    truth = fastjac.act(z.double(), g.double(), 1, "gelu", impl="reference")
    assert relative_error(expected[1], truth) <= tolerance("triton", dtype)
    for config in KERNELS["triton act vjp"].configs_for(dtype):
        use_everywhere("triton", config)
        launched.clear()
        assert all(map(torch.equal, call(), expected)), config
        assert {(k["BLOCK"], k["num_warps"]) for k in launched} == {config}
        assert {k["grid"] for k in launched} == {(-(-5001 // config[0]),)}


# Strips that are split, where there are more than four tiles.
STATS_SHAPES = {"[N, C]": (301, 20), "[N, C, P]": (9, 2, 300), "[N, C, P] small": (210, 7, 5)}


@needs_triton
@pytest.mark.parametrize(
    ("label", "dtype"),
    [*((label, torch.float32) for label in STATS_SHAPES), ("[N, C]", torch.float64)],
)
def test_sums_in_order_are_the_same_bits_and_others_right(label, dtype, launched):
    from fastjac.kernels.act_stats import act_stats, act_stats_backward

    z, g, _, w = operands(dtype, *STATS_SHAPES[label])

    def ordered():
        forward = act_stats(z, None, 1, False, 0.3, True, *GELU)
        sample = act_stats(z, w, 1, True, 0.3, True, *GELU)
        return *forward, *sample, *act_stats_backward(z, g, None, w, 1, BIAS, 0.3, True, *GELU)

    def free():
        nothing = act_stats_backward(z, g, None, w, 1, NONE, 0.3, True, *GELU)
        atomic = act_stats(z, None, 1, False, 0.3, False, *GELU)
        backward = act_stats_backward(z, g, None, w, 1, SAMPLE, 0.3, False, *GELU)
        return nothing[0], atomic[0], backward[0], atomic[1], backward[1]

    in_order, rest = ordered(), free()
    for config in KERNELS["triton act_stats atomic rows"].configs_for(dtype):
        use_everywhere("triton", config)
        launched.clear()
        assert all(map(torch.equal, ordered(), in_order)), config
        assert {k["num_warps"] for k in launched} == {4}
        launched.clear()
        *results, atomic, backward = free()
        assert all(map(torch.equal, results, rest)), config
        assert {k["num_warps"] for k in launched} == {config[1]}
        tile = config[0] // (2 if dtype == torch.float64 else 1)
        assert all(k["ROWS"] * k["COLS"] <= tile for k in launched)
        for got, want in ((atomic, rest[3]), (backward, rest[4])):
            assert relative_error(got, want.double()) <= tolerance("triton", got.dtype)


@needs_triton
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_row_norms_are_the_same_bits(dtype, launched):
    from fastjac.kernels.row_sqnorm import row_sqnorm, row_sqnorm_backward

    weights = [
        torch.randn(shape, device=DEVICE).to(dtype) for shape in ((40, 7), (9, 700), (2, 5001))
    ]
    r = row_sqnorm(weights)
    expected = [torch.empty_like(w) for w in weights]
    row_sqnorm_backward(expected, weights, r, False)
    truth = 2 * r[-1].double() * weights[-1][-1].double()
    assert relative_error(expected[-1][-1], truth) <= tolerance("triton", dtype)
    for config in KERNELS["triton row_sqnorm_backward"].configs_for(dtype):
        use_everywhere("triton", config)
        launched.clear()
        assert torch.equal(row_sqnorm(weights), r)
        assert (launched[0]["TILE"] * weights[0].element_size(), launched[0]["num_warps"]) == (
            launch.ROWS
        )
        grads = [torch.full_like(w, float("nan")) for w in weights]
        row_sqnorm_backward(grads, weights, r, False)
        assert all(map(torch.equal, grads, expected)), config
        tile_bytes = launched[1]["TILE"] * weights[0].element_size()
        assert (tile_bytes, launched[1]["num_warps"]) == config


# ---- CUDA's, on the host


@pytest.fixture
def ops(monkeypatch):
    """CUDA's ops on CPU tensors; their table is set instead of a GPU's."""

    def set_launch(kernel, device, dtype, values):
        host_ops().set_launch(kernel, 0, dtype, values)

    monkeypatch.setattr(launch, "_set_cuda", set_launch)
    yield host_ops()
    for name in CUDA_KERNELS:
        for dtype in FLOAT_DTYPES:
            launch.use(name, -1, dtype, {})


def stats_calls(ops, shape, dtype, deterministic, statistic):
    """Forward and backward, sums of columns or rows by the shape."""
    z, g, _, w = operands(dtype, *shape, device="cpu")
    forward = ops.act_stats(z, None, 1, False, 0.3, deterministic, *GELU)
    backward = ops.act_stats_backward(z, g, None, w, 1, statistic, 0.3, deterministic, *GELU)
    return *forward, *backward


@needs_compiler
@pytest.mark.slow
def test_a_cuda_launch_takes_the_number_of_its_own_kernel(ops):
    z, g, _, w = operands(torch.float32, 3000, 12, device="cpu")
    rows = z.view(300, 3, 40)
    w_rows, weight, c = w[:3], torch.randn(8, 600), torch.randn(8)

    def none(z, w):
        return ops.act_stats_backward(z, z, None, w, 1, NONE, 1.0, True, *GELU)

    def atomic(z, w):
        return ops.act_stats_backward(z, z, None, w, 1, BIAS, 1.0, False, *GELU)

    # A call, a number for it, and what the launch then is.
    cases = {
        "act forward": (lambda: ops.act(z, None, 0, *GELU), 64, (141, 64)),
        "act vjp": (lambda: ops.act(z, g, 1, *GELU), 128, (71, 128)),
        "act_backward": (lambda: ops.act_backward(z, g, z, 1, *GELU), 32, (282, 32)),
        "act_stats atomic columns": (
            lambda: ops.act_stats(z, None, 1, False, 1.0, False, *GELU), 1, (4, 256)),
        "act_stats atomic rows": (
            lambda: ops.act_stats(rows, None, 1, False, 1.0, False, *GELU), 1, (4, 256)),
        "act_stats_backward atomic columns": (lambda: atomic(z, w), 1, (4, 256)),
        "act_stats_backward atomic rows": (lambda: atomic(rows, w_rows), 1, (4, 256)),
        "act_stats_backward none columns": (lambda: none(z, w), 1, (4, 256)),
        "act_stats_backward none rows": (lambda: none(rows, w_rows), 1, (4, 256)),
        "row_sqnorm_backward": (
            lambda: ops.row_sqnorm_backward([weight.clone()], [weight], c, False), 2, (4, 256)),
    }  # fmt: skip

    def launches():
        out = {}
        for name, (call, *_) in cases.items():
            call()
            out[name] = last_launch()
        return out

    assert [f"cuda {name}" for name in cases] == CUDA_KERNELS
    default = launches()
    assert default["act vjp"] == (36, 256) and default["row_sqnorm_backward"] == (2, 256)
    for name, (_, number, expected) in cases.items():
        with launch.using(f"cuda {name}", -1, torch.float32, (number,)):
            assert launches() == default | {name: expected}
        assert expected != default[name]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("shape", ((301, 12), (130, 3, 20), (2, 2, 4996)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_cuda_results_do_not_depend_on_the_configuration(shape, dtype, ops, poison):
    z, g, v, w = operands(dtype, *shape, device="cpu")
    weights = [z[:, :3].flatten(1).contiguous(), g.flatten(1)]

    def calls():
        torch.manual_seed(1)
        c = torch.randn(2 * len(z)).to(w)
        grads = [torch.empty_like(t) for t in weights]
        ops.row_sqnorm_backward(grads, weights, c, False)
        return (
            ops.act(z, None, 0, *GELU), ops.act(z, g, 1, *GELU),
            *ops.act_backward(z, g, v, 1, *GELU), *stats_calls(ops, shape, dtype, True, BIAS),
            ops.row_sqnorm(weights), *grads,
            stats_calls(ops, shape, dtype, True, NONE)[2],
        )  # fmt: skip

    def atomic():
        torch.manual_seed(1)
        a, s, grad, bias = stats_calls(ops, shape, dtype, False, BIAS)
        return (a, grad), (s, bias)

    expected, (results, sums) = calls(), atomic()
    for numbers in ((64, 1, 1), (32, 2, 2), (128, 16, 16), (256, 16384, 256)):
        for name, kernel in KERNELS.items():
            if kernel.impl == "cuda":
                which = ("threads", "blocks", "packs").index(kernel.parameters[0])
                launch.use(name, -1, dtype, {1: (numbers[which],)})
        assert all(map(torch.equal, calls(), expected)), numbers
        got, got_sums = atomic()
        assert all(map(torch.equal, got, results)), numbers
        for a, b in zip(got_sums, sums, strict=True):
            assert relative_error(a, b.double()) <= tolerance("cuda", a.dtype), numbers


@needs_compiler
@pytest.mark.slow
def test_tune_of_cuda_kernels(ops, monkeypatch):
    monkeypatch.setattr(tuning, "raw", lambda name: getattr(ops, name).default)
    monkeypatch.setattr(launch_cache, "backend", lambda name: SimpleNamespace(runs=True))
    for op in OPS.values():
        monkeypatch.setattr(op, "select", lambda *_: "cuda")
    seen, fast = [], {"cuda act vjp": (64,), "cuda row_sqnorm_backward": (16,)}
    made = tuning.tune(
        device="cpu", timer=made_up_times(fast, seen), dtypes=(torch.float32,), sizes=(1024,)
    )
    assert [choice.kernel for choice in made] == CUDA_KERNELS
    assert len(seen) == 2 * sum(len(KERNELS[name].configs) for name in CUDA_KERNELS)
    assert {c.kernel: c.config for c in made if c.ms == 1.0} == fast
    ops.act(torch.randn(1024), torch.randn(1024), 1, *GELU)
    assert last_launch() == (4, 64)


@needs_compiler
@pytest.mark.slow
def test_refusals_of_the_cuda_table():
    right = {"kernel": 0, "device": 0, "dtype": 0, "values": [0] * launch.SIZE_CLASSES}
    host_ops().set_launch(**right)
    host_ops().set_launch(**(right | {"device": 10**6}))  # beyond the table: its default
    for change, message in (
        ({"kernel": len(CUDA_KERNELS)}, "kernel must be 0 to 9, got 10"),
        ({"kernel": -1}, "kernel must be 0 to 9"),
        ({"device": -1}, "device must be the index of a GPU, got -1"),
        ({"dtype": 4}, "dtype must be 0 to 3, got 4"),
        ({"values": [0] * 64}, "one number for each of 65 size classes"),
        ({"values": [257] * 65}, "values must be 0 to 256, got 257"),
        ({"kernel": 3, "values": [-1] * 65}, "values must be 0 to 16384, got -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            host_ops().set_launch(**(right | change))
