"""The benchmark's own claims: nothing wrong is timed, memory is measured, nobody is favoured."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from bench_cases import (
    CPU,
    FAST,
    NETWORKS,
    STEPS,
    OneLayerShort,
    SlopeConstant,
    StatisticsConstant,
    WithoutTheNorm,
    interrupting,
    layerwise_gradients,
    named,
    not_a_number,
    planted,
    slightly_off,
    tiny_activation,
    tiny_case,
    tiny_problem,
    without_second_order,
)
from torch import nn

import fastjac
from fastjac.activations import TABLE
from fastjac.bench import Contestant, measure, run
from fastjac.bench import cases as registry
from fastjac.bench import contestants as entrants
from fastjac.bench.gate import open_gate, relative_error
from fastjac.bench.layer_idioms import EagerDreg, WrittenOutDreg
from fastjac.bench.measure import Samples, interleave, order_of_round, peak_bytes
from fastjac.bench.problems import (
    TransformerClassifier,
    away_from_kinks,
    elementwise_problem,
    lenet,
    mlp,
    small_resnet,
    step_problem,
)
from fastjac.bench.runner import busy, contestants_of
from fastjac.functional import OBSERVERS


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Three buffers are enough where nothing is measured."""
    monkeypatch.setattr("fastjac.bench.problems.last_level_cache", lambda device: 0)


@pytest.mark.parametrize("penalty", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_every_contestant_passes_the_gate(penalty, dtype):
    options = replace(FAST, dtype=dtype)
    contestants = [c for c in entrants.all_contestants() if not c.compiles]
    outcome = run([tiny_case(penalty)], contestants, options)
    assert [(r.contestant, r.message) for r in outcome.bad] == []
    assert {"plain", "eager", "fastjac", "fastjac:reference"} <= {
        r.contestant for r in outcome.records
    }


@pytest.mark.parametrize("penalty", STEPS)
def test_the_compiled_form_is_one_graph_and_right(penalty):
    # aot_eager: what Dynamo and AOTAutograd make of the form, without seconds of code generation
    problem = tiny_problem(penalty)
    gate = open_gate(problem, torch.float32)
    prepared = entrants.compiled_step(problem, backend="aot_eager")
    error, limit = gate.error("compiled", prepared.gradients())
    assert error <= limit


def test_the_compiled_form_takes_batch_norm():
    network = functools.partial(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))
    )
    problem = step_problem(network, (5, 6), "spectreg", device=CPU, dtype=torch.float32, outputs=3)
    gate = open_gate(problem, torch.float32)
    error, limit = gate.error(
        "compiled", entrants.compiled_step(problem, backend="aot_eager").gradients()
    )
    assert error <= limit
    assert problem.model[1].running_mean is not None  # a copy was changed, not the problem


@pytest.mark.parametrize("case", NETWORKS)
def test_all_forms_find_the_same_layers(case):
    problem = tiny_problem(case)
    names = {module: name for name, module in problem.model.named_modules()}
    penalty = fastjac.DREG(problem.model)
    problem.model(problem.x)
    penalty()
    penalty.detach()
    eager = [names[layer] for layer, _, _ in EagerDreg(problem.model).layers]
    assert penalty.layers_found == eager
    assert len(eager) == {"dreg-resnet": 4, "dreg-transformer": 2}[case]


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ("dreg-resnet", WithoutTheNorm),
        ("dreg-resnet", StatisticsConstant),
        *((case, fault) for case in NETWORKS for fault in (OneLayerShort, SlopeConstant)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_wrong_layer_wise_penalty_is_caught(case, fault, dtype):
    problem = tiny_problem(case, dtype)
    gate = open_gate(problem, dtype)
    error, limit = gate.error("right", layerwise_gradients(problem))
    assert error <= limit
    error, limit = gate.error("planted", layerwise_gradients(problem, fault))
    assert error > limit


def test_layer_wise_idioms_refuse_what_they_cannot_do():
    relu = mlp([3, 4, 2], nn.ReLU)
    with pytest.raises(ValueError, match="followed by a GELU"):
        EagerDreg(relu)
    with pytest.raises(TypeError, match="exact GELU only, not ReLU"):
        WrittenOutDreg(relu)(torch.zeros(2, 3))


def test_no_penalty_stays_attached():
    before = list(OBSERVERS)
    closed = []

    def setup(problem):
        wrong = replace(problem, weight=2 * problem.weight)
        prepared = entrants.fastjac_step(wrong)

        def close():
            closed.append(1)
            prepared.close()

        return replace(prepared, close=close)

    contestants = [*named("fastjac", "fastjac:cpu"), Contestant("planted", setup)]
    outcome = run([tiny_case("dreg")], contestants, FAST)
    assert [r.contestant for r in outcome.bad] == ["planted"]
    assert closed == [1] and before == OBSERVERS


def test_plain_computes_no_input_gradient():
    problem = tiny_problem("spectreg")
    seen = []
    problem.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    entrants.plain_step(problem).step()
    assert seen == [False]


@pytest.mark.parametrize("phase", registry.PHASES)
@pytest.mark.parametrize("fn", [fn for fn in TABLE if fn != "identity"])
def test_every_activation_passes_the_gate(fn, phase):
    outcome = run([tiny_activation(fn, phase)], named("eager", "fastjac"), FAST)
    assert [(r.contestant, r.message) for r in outcome.bad] == []
    assert [r.contestant for r in outcome.records] == ["plain", "eager", "fastjac"]


@pytest.mark.parametrize("phase", ["backward", "double"])
def test_no_forward_is_timed(phase):
    calls = []
    problem = elementwise_problem(
        *("gelu", TABLE["gelu"].torch_function(), phase),
        device=CPU,
        dtype=torch.float32,
        shape=(4, 3),
    )
    phi = problem.phi

    def counting(z):
        calls.append(1)
        return phi(z)

    prepared = entrants.autograd_phase(problem, counting)
    before = len(calls)
    for _ in range(7):
        prepared.step()
    assert before == len(problem.z) and len(calls) == before


def test_buffers_are_used_in_turn():
    problem = elementwise_problem(
        *("gelu", TABLE["gelu"].torch_function(), "forward"),
        device=CPU,
        dtype=torch.float32,
        shape=(4, 3),
    )
    seen = []

    def spy(z):
        seen.append(z.data_ptr())
        return z

    prepared = entrants.forward_phase(problem, spy)
    for _ in range(2 * len(problem.z)):
        prepared.step()
    pointers = [z.data_ptr() for z in problem.z]
    assert seen == 2 * pointers and len(set(pointers)) >= 3


def test_compiled_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    (compiled,) = (c for c in entrants.all_contestants() if c.name == "compiled")
    assert "compiler" in (compiled.why_not(tiny_case(), CPU, torch.float32) or "")


@pytest.mark.parametrize("gradients", [without_second_order, slightly_off, not_a_number])
def test_a_wrong_contestant_is_caught_and_never_timed(gradients):
    contestants = [*named("eager"), planted("planted", gradients)]
    outcome = run([tiny_case()], contestants, FAST)
    (bad,) = outcome.bad
    assert (bad.case, bad.contestant, bad.status) == ("spectreg-tiny", "planted", "wrong")
    assert bad.median_ms is None and not bad.rel_err <= bad.rel_err_limit
    assert [r.contestant for r in outcome.records if r.median_ms] == ["plain", "eager"]


def test_a_failing_contestant_leaves_the_others_alone():
    def setup(problem):
        raise RuntimeError("no such kernel\nsecond line")

    outcome = run([tiny_case()], [*named("eager"), Contestant("broken", setup)], FAST)
    (bad,) = outcome.bad
    assert (bad.contestant, bad.status) == ("broken", "failed")
    assert "no such kernel" in bad.message and "\n" not in bad.message
    assert [r.contestant for r in outcome.records if r.status == "ok"] == ["plain", "eager"]


@pytest.mark.parametrize("penalty", STEPS)
def test_penalty_and_loss_weigh_alike(penalty):
    problem = tiny_problem(penalty, torch.float64)
    open_gate(problem, torch.float64)
    loss = entrants.plain_step(problem).gradients()
    both = entrants.eager_step(problem).gradients()
    shares = [sum(float(g.square().sum()) for g in gs) ** 0.5 for gs in (loss, both)]
    added = sum(float((b - a).square().sum()) for a, b in zip(loss, both, strict=True)) ** 0.5
    assert 0.7 < added / shares[0] < 1.42


def test_the_limit_is_eagers_own_error_or_rounding():
    gate = open_gate(tiny_problem("spectreg", torch.bfloat16), torch.bfloat16)
    assert 1e-4 < gate.limit < 0.1  # eager's own in bfloat16, twice
    assert open_gate(tiny_problem("spectreg"), torch.float32).limit == 1e-6


def test_relative_error():
    truth = [torch.tensor([3.0, 4.0], dtype=torch.float64)]
    assert relative_error([torch.tensor([3.0, 4.5])], truth) == pytest.approx(0.1)
    assert relative_error([torch.tensor([3.0, float("nan")])], truth) == float("inf")
    with pytest.raises(ValueError, match="shapes"):
        relative_error([torch.zeros(3)], truth)


def test_rounds_are_interleaved_and_rotated():
    order = []
    steps = {name: functools.partial(order.append, name) for name in "abc"}
    samples = Samples()
    interleave(
        *(steps, CPU),
        budget_s=0,
        min_rounds=4,
        max_rounds=4,
        sample_s=0,
        samples=samples,
    )
    assert {name: len(s) for name, s in samples.seconds.items()} == {"a": 4, "b": 4, "c": 4}
    # repeats within a sample are adjacent; between samples the contestants take turns
    turns = [name for k, name in enumerate(order) if k == 0 or order[k - 1] != name]
    assert "".join(turns).endswith("abc" + "bca" + "cab" + "abc")
    assert [order_of_round("abc", k) for k in (0, 1, 2)] == [list("abc"), list("bca"), list("cab")]


def test_a_sample_is_long_enough(monkeypatch):
    seen = []
    timed = measure.timed
    monkeypatch.setattr(measure, "timed", lambda *args: seen.append(args[1]) or timed(*args))
    samples = Samples()
    interleave(
        *({"short": lambda: None}, CPU),
        budget_s=0,
        min_rounds=2,
        max_rounds=2,
        sample_s=5e-3,
        samples=samples,
    )
    first, second = seen[-2:]
    # 5 ms of a call that takes well under 10 us
    assert first == second > 500


def test_quantiles_of_complete_rounds_only():
    samples = Samples({"a": [1.0, 2.0, 3.0, 4.0, 100.0], "b": [1.0] * 4})
    assert samples.n_rounds == 4
    p20, median, p80 = samples.quantiles_ms("a")
    assert (p20, median, p80) == pytest.approx((1600, 2500, 3400))


def test_peak_memory_of_a_known_pattern():
    mb = 1 << 20

    def step():
        a = torch.empty(4 * mb, dtype=torch.uint8)
        b = torch.empty(2 * mb, dtype=torch.uint8)
        del a
        c = torch.empty(1 * mb, dtype=torch.uint8)
        return b, c

    assert peak_bytes(step, CPU) == 6 * mb


def test_peak_memory_sees_the_cpp_backward():
    x = torch.randn(1 << 18, requires_grad=True)  # 1 MiB

    def step():
        x.grad = None
        x.exp().sum().backward()  # saves exp(x), then allocates the gradient in C++

    step()
    x.grad = None
    assert 2 << 20 <= peak_bytes(step, CPU) < (2 << 20) + 4096


def test_peak_memory_counts_no_block_from_before():
    kept = []

    def allocate():
        kept.extend(torch.empty(4096, dtype=torch.uint8) for _ in range(64))

    peak_bytes(allocate, CPU)
    seen = {block.data_ptr() for block in kept}
    kept.clear()  # torch's profiler does not see that, and still has their sizes
    allocate()
    assert seen & {block.data_ptr() for block in kept}

    def step():
        kept.clear()
        return torch.empty(1 << 20, dtype=torch.uint8)

    assert peak_bytes(step, CPU) == 1 << 20


def test_peak_memory_of_the_attached_penalty():
    problem = step_problem(
        *(functools.partial(mlp, [64, 64, 64, 64, 64, 10]), (256, 64), "dreg"),
        device=CPU,
        dtype=torch.float32,
    )
    peaks = {}
    for contestant in named("eager", "fastjac"):
        prepared = contestant.setup(problem)
        prepared.step()
        prepared.release()
        peaks[contestant.name] = peak_bytes(prepared.step, CPU)
        prepared.release()
        assert abs(peak_bytes(prepared.step, CPU) - peaks[contestant.name]) <= 64  # kept numbers
        prepared.close()
    hidden = 256 * 64 * 4  # bytes of one pre-activation
    assert peaks["plain"] <= peaks["fastjac"] <= peaks["plain"] + 2.5 * hidden
    assert peaks["fastjac"] + 2 * hidden < peaks["eager"]


def test_peak_memory_leaves_stderr_alone(capfd):
    peak_bytes(lambda: torch.empty(10), CPU)
    print("after", file=__import__("sys").stderr)
    assert capfd.readouterr().err == "after\n"


def test_ctrl_c_keeps_finished_cases():
    cases = [tiny_case(name="first"), tiny_case(name="second"), tiny_case(name="third")]
    seen = []

    def setup(problem):
        seen.append(problem)
        return interrupting(1 if len(seen) == 2 else 10**9).setup(problem)

    outcome = run(cases, [*named("eager"), Contestant("interrupting", setup)], FAST)
    assert outcome.interrupted
    assert {r.case for r in outcome.records} == {"first"}
    assert all(r.median_ms and r.peak_mb is not None for r in outcome.records)


def test_ctrl_c_keeps_the_current_case_once_it_has_rounds():
    options = replace(FAST, min_rounds=50, max_rounds=50, sample_s=0)
    outcome = run([tiny_case()], [*named("eager"), interrupting(30)], options)
    assert outcome.interrupted
    assert {r.contestant for r in outcome.records} == {"plain", "eager", "interrupting"}
    assert all(3 <= r.n_rounds < 50 and r.median_ms for r in outcome.records)


def test_a_busy_machine_is_warned_about(monkeypatch):
    monkeypatch.setattr("fastjac.bench.runner.available_cores", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (2.5, 0, 0))
    assert busy(2) is None
    assert "load 2.5, 4 cores, 3 threads" in (busy(3) or "")


def test_settings_are_restored():
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    run([tiny_case()], named("plain"), replace(FAST, threads=before[0] + 1))
    assert (torch.get_num_threads(), torch.backends.cudnn.allow_tf32) == before


def test_registered_names():
    names = {case.name for case in registry.all_cases()}
    assert len(names) == len(registry.all_cases())
    steps = """
        spectreg-mlp-b512-w2048 spectreg-mlp-b128-w512 spectreg-mlp-b100-w64 datagrad-mlp-b128-w512
        frobreg-mlp-b128-w512 jacreg-mlp-b128-w512 dreg-mlp-b128-w512 dreg-mlp-b512-w1024
        dreg-mlp-b4096-w256 gradient-penalty-mlp-b128-w512 spectreg-relu-mlp-b128-w512
        spectreg-lenet spectreg-resnet dreg-resnet dreg-transformer
    """
    assert set(steps.split()) <= names
    assert {
        f"act-{fn}-{phase}" for fn in TABLE if fn != "identity" for phase in registry.PHASES
    } <= names
    assert [c.name for c in entrants.all_contestants()] == [
        *("plain", "eager", "compiled", "jacobianreg", "fastjac"),
        *("fastjac:reference", "fastjac:cpu", "fastjac:triton", "fastjac:cuda"),
    ]


def test_one_suite_has_the_layer_wise_cases():
    assert [case.name for case in registry.select_cases(suite="layer-wise")] == [
        *("dreg-mlp-b128-w512", "dreg-mlp-b512-w1024", "dreg-mlp-b4096-w256"),
        *("dreg-resnet", "dreg-transformer"),
    ]


def test_quick_suite_runs_its_own_contestants():
    options = replace(FAST, quick=True)
    quick = registry.select_cases(suite="quick")
    assert all(case.quick for case in quick)
    compiled = 0
    for case in quick:
        entered = [c.name for c in contestants_of(case, entrants.all_contestants(), options)]
        assert {"plain", "eager", "fastjac"} <= set(entered)
        compiled += "compiled" in entered
    assert 1 <= compiled <= 4  # each costs ten seconds


def test_select_cases():
    assert [c.name for c in registry.select_cases(["act-gelu-*"])] == [
        f"act-gelu-{phase}" for phase in registry.PHASES
    ]
    with pytest.raises(ValueError, match=r"did you mean dreg-mlp-b128-w512.*valid names"):
        registry.select_cases(["dreg-mlp-b128-w51"])
    with pytest.raises(ValueError, match="the suites are step, input-jacobian, quick"):
        registry.select_cases(suite="all")
    with pytest.raises(ValueError, match="not in the suite"):
        registry.select_cases(["spectreg-lenet"], "act")
    with pytest.raises(ValueError, match="valid names are: plain, eager"):
        entrants.select_contestants(["torch"])
    assert [c.name for c in named("fastjac")] == ["plain", "fastjac"]


def test_networks():
    assert sum(p.numel() for p in lenet().parameters()) == 61706  # the paper's count
    assert lenet()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert small_resnet()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert TransformerClassifier()(torch.zeros(2, 3, 256)).shape == (2, 10)
    widths = [m.out_features for m in mlp([784, 512, 512, 10]) if isinstance(m, nn.Linear)]
    assert widths == [512, 512, 10]


def test_problems_are_seeded_and_leave_the_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = tiny_problem("spectreg"), tiny_problem("spectreg")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.x, second.x) and torch.equal(first.projection, second.projection)
    assert torch.equal(first.model[0].weight, second.model[0].weight)


def test_samples_at_a_kink_are_dropped():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0]]))
    at_kink = torch.tensor([[1.0, 1.0], [2.0, 2.0 + 1e-7]])
    clear = torch.tensor([[1.0, 0.5], [0.7, 0.1]])
    candidates = torch.stack([at_kink[0], clear[0], at_kink[1], clear[1]])
    assert torch.equal(away_from_kinks(model, candidates, 2), clear)
