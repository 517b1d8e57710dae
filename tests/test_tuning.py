"""Tuning chooses and keeps what it should, and launches take it; times are made up.

On a GPU `test_tune_on_a_gpu` measures.
"""

import re

import pytest
import torch
from conftest import DEVICE
from tuning_cases import ACT, INDEX, MEASURED, made_up_times, needs_triton, tune

import fastjac
from fastjac import launch, launch_cache, tuning
from fastjac.launch import KERNELS
from fastjac.ops.dispatch import OPS

pytestmark = pytest.mark.usefixtures("untuned")


# ---- the table


def test_defaults_are_what_the_kernels_were_written_with():
    for name in ("act forward", "act vjp", "act_backward"):
        assert KERNELS[f"triton {name}"].default == (1024, 4)
        assert KERNELS[f"cuda {name}"].default == (256,)
    assert launch.STATS == (1024, 4, 2048) and launch.ROWS == (4096, 4)
    t = torch.empty(3, device=DEVICE)
    assert all(launch.config(name, t, 3) == kernel.default for name, kernel in KERNELS.items())


def test_candidates_are_few_and_differ():
    for kernel in KERNELS.values():
        assert 3 <= len(kernel.configs) <= 8 and len(set(kernel.configs)) == len(kernel.configs)
        assert all(len(config) == len(kernel.parameters) for config in kernel.configs)
        assert kernel.default not in kernel.not_float64
        assert OPS[kernel.op]


def test_a_launch_takes_what_was_chosen_at_the_nearest_size():
    name, t = "triton act vjp", torch.empty(1, device=DEVICE)
    launch.use(name, INDEX, torch.float32, {2**16: (512, 2), 2**20: (2048, 8)})
    for size in (0, 1, 2**16, 2**17, 2**18 - 1):
        assert launch.config(name, t, size) == (512, 2), size
    for size in (2**18, 2**20, 2**40, 2**63 - 1):
        assert launch.config(name, t, size) == (2048, 8), size
    # Another kernel, dtype or device keeps its default.
    assert launch.config("triton act_backward", t, 2**20) == (1024, 4)
    assert launch.config(name, t.double(), 2**20) == (1024, 4)
    launch.use(name, INDEX + 1, torch.float32, {1: (512, 4)})
    assert launch.config(name, t, 2**20) == (2048, 8)
    with launch.using(name, INDEX, torch.float32, (1024, 8)):
        assert launch.config(name, t, 2**20) == (1024, 8)
    assert launch.config(name, t, 2**20) == (2048, 8)
    launch.use(name, INDEX, torch.float32, {})
    assert launch.config(name, t, 2**20) == (1024, 4)


# ---- choosing


@needs_triton
def test_the_fastest_is_chosen_used_written_and_read_again(untuned, monkeypatch):
    seen = []
    made = tune(made_up_times(ACT, seen), ops=("act",))
    assert [(c.kernel, c.config, c.ms, c.default_ms) for c in made] == [
        ("triton act forward", (512, 2), 1.0, 2.0),
        ("triton act vjp", (1024, 4), 2.0, 2.0),
        ("triton act_backward", (2048, 8), 1.0, 2.0),
    ]
    assert str(made[0]) == "triton act forward, float32, 1024: block=512 warps=2, 1 ms, for 2"
    assert str(made[1]).endswith("block=1024 warps=4, 2 ms, the default")
    timed = [config for name, config in seen if name == "triton act vjp"]
    assert timed == [*KERNELS["triton act vjp"].configs] * 2
    t = torch.empty(1, device=DEVICE)
    assert launch.config("triton act forward", t, 10**6) == (512, 2)
    assert [path.name for path in untuned.iterdir()] == [tuning.cache_file(DEVICE).name]

    monkeypatch.setattr(launch, "_chosen", {})
    assert tuning.load(DEVICE) == 3
    assert launch.config("triton act forward", t, 10**6) == (512, 2)
    assert launch.config("triton act_backward", t, 1) == (2048, 8)
    assert launch.config("triton act vjp", t, 1) == (1024, 4)


@needs_triton
def test_all_kernels_are_measured_and_no_candidate_is_refused():
    seen = []
    made = tune(made_up_times({}, seen), dtypes=(torch.bfloat16,))
    wanted = {name: kernel for name, kernel in KERNELS.items() if kernel.impl == "triton"}
    assert [choice.kernel for choice in made] == list(wanted)
    assert all(choice.config == wanted[choice.kernel].default for choice in made)
    assert len(seen) == 2 * sum(len(kernel.configs) for kernel in wanted.values())


@needs_triton
def test_what_was_chosen_before_is_kept_beside():
    tune(made_up_times(ACT), ops=("act",))
    tune(made_up_times({"triton act forward": (512, 4)}), ops=("act",), sizes=(4096,))
    launch._chosen.clear()
    tune(made_up_times({"triton act forward": (1024, 8)}), ops=("act",), sizes=(4096,))
    launch._chosen.clear()
    assert tuning.load(DEVICE) == 6
    t = torch.empty(1, device=DEVICE)
    assert launch.config("triton act forward", t, 1024) == (512, 2)
    assert launch.config("triton act forward", t, 4096) == (1024, 8)


@needs_triton
def test_a_difference_of_noise_keeps_the_default():
    def timer(calls):
        return 1.0 if MEASURED[2] == (1024, 4) else 0.98

    assert {choice.config for choice in tune(timer, ops=("act",))} == {(1024, 4)}


@needs_triton
def test_a_candidate_that_fails_or_differs_is_not_taken(monkeypatch):
    from fastjac.kernels import act

    right = act.act_kernel

    class Wrong:
        def __getitem__(self, grid):
            def launch(z, g, out, *args, BLOCK, **kwargs):
                if BLOCK == 2048:
                    raise RuntimeError("out of resource: registers")
                right[grid](z, g, out, *args, BLOCK=BLOCK, **kwargs)
                if BLOCK == 512:
                    out[3] += 1

            return launch

    monkeypatch.setattr(act, "act_kernel", Wrong())
    seen = []
    fast = {"triton act forward": (512, 2), "triton act vjp": (2048, 8)}
    made = tune(made_up_times(fast, seen), ops=("act",))
    assert [choice.config for choice in made] == [(1024, 4)] * 3
    assert {config for name, config in seen if name == "triton act vjp"} == {
        (1024, 4), (1024, 8)
    }  # fmt: skip

    def broken(calls):
        raise RuntimeError("the default does not run")

    with pytest.warns(UserWarning, match="keeps what it has.*the default does not run") as caught:
        assert tune(broken, ops=("act",)) == []
    assert len(caught) == 3


@needs_triton
def test_the_budget_and_an_interrupt_keep_what_is_done():
    assert tune(made_up_times(ACT), budget_s=-1.0) == []
    assert not tuning.cache_file(DEVICE).exists()
    times = made_up_times(ACT)

    def interrupted(calls):
        if MEASURED[0] == "triton act vjp":
            raise KeyboardInterrupt
        return times(calls)

    with pytest.raises(KeyboardInterrupt):
        tune(interrupted)
    assert launch._chosen == {("triton act forward", INDEX, torch.float32): ((512, 2),) * 65}
    launch._chosen.clear()
    assert tuning.load(DEVICE) == 1


@needs_triton
@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"ops": ("softmax",)}, "ops: 'softmax' has no candidates; choose from act, act_stats"),
        ({"impls": ("tritn",)}, "impl='tritn' is not an implementation of act"),
        ({"dtypes": (torch.int32,)}, "dtypes: torch.int32 is not supported; choose from float32"),
        ({"sizes": (1000,)}, "sizes: 1000 is not a power of two from 1024 on"),
        ({"sizes": (2.0**16,)}, "sizes: 65536.0 is not a power of two"),
    ),
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tune(made_up_times({}), **options)


@needs_triton
def test_refusals(monkeypatch, untuned):
    def never(calls):
        raise AssertionError("measured")

    with pytest.raises(RuntimeError, match="device=cpu: tune\\(\\) measures GPUs"):
        tuning.tune(device="cpu")
    if DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="nothing to measure: of what impls="):
            tune(never, impls=("auto",))
    untuned.write_text("a file where the folder should be")
    with pytest.raises(RuntimeError, match="cannot write to .*cache.*set FASTJAC_CACHE_DIR"):
        tune(never)
    untuned.unlink()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="inside a CUDA-graph capture: call it before"):
        tune(never)
    assert not untuned.exists()


@needs_triton
def test_a_call_never_tunes_nor_writes(monkeypatch, untuned, launched):
    for name in ("tune", "_measure", "gpu_ms"):
        monkeypatch.setattr(tuning, name, None)
    monkeypatch.setattr(launch_cache, "read", None)
    for capturing in (False, True):
        if DEVICE == "cpu":  # on a GPU the answer would be believed
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)  # noqa: B023
        z = torch.randn(40, 30, device=DEVICE, requires_grad=True)
        a, s = fastjac.act_stats(z, "gelu", impl="triton")
        (a.sum() + s.sum()).backward()
        fastjac.gelu(z, impl="triton")
    half = len(launched) // 2
    assert launched[:half] == launched[half:] and not untuned.exists()


@pytest.mark.gpu
def test_tune_on_a_gpu():
    made = tuning.tune(impls=("triton",), ops=("row_sqnorm", "act"), sizes=(2**20,))
    assert len(made) == 8 and all(0 < choice.ms <= choice.default_ms < 10 for choice in made)
    launch._chosen.clear()
    assert tuning.load() == 8
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="inside a CUDA-graph capture"):
            tuning.tune()
