"""Cases, suites and contestants, and the networks and data behind them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import CPU, FAST, named, tiny_case, tiny_op, tiny_problem
from torch import nn

from benchmarks.gpu import steps as steps_of_the_gpu_run
from fastjac.activations import TABLE
from fastjac.bench import cases as registry
from fastjac.bench import contestants as entrants
from fastjac.bench.cases import Case, select_cases
from fastjac.bench.idioms import IDIOMS
from fastjac.bench.networks import lenet
from fastjac.bench.problems import PHASES, away_from_kinks
from fastjac.bench.records import load

HISTORY = Path(__file__).resolve().parent.parent / "benchmarks" / "history.csv"


def entered(case: Case, options=FAST) -> list[str]:
    everyone = entrants.all_contestants()
    return [c.name for c in entrants.contestants_of(case, everyone, options)]


def test_compiled_needs_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    (compiled,) = (c for c in entrants.all_contestants() if c.name == "compiled")
    assert "compiler" in (entrants.why_not(compiled, tiny_case(), FAST) or "")


@pytest.mark.parametrize("name", ["plain-compiled", "fastjac+compile"])
def test_compiled_steps_need_a_torch_that_traces_the_backward(name, monkeypatch):
    monkeypatch.setattr(entrants, "dynamo_config", lambda: object())
    (compiled,) = (c for c in entrants.all_contestants() if c.name == name)
    step = next(case for case in registry.all_cases() if case.kind == "step")
    assert "does not trace loss.backward()" in (entrants.why_not(compiled, step, FAST) or "")


def test_registered_names():
    names = [case.name for case in registry.all_cases()]
    assert len({*names}) == len(names)
    recorded = load(HISTORY)
    assert all(r.status == "ok" and r.median_ms for r in recorded)
    assert {r.case for r in recorded} <= {*names}  # what is recorded can be run again
    for fn in TABLE:
        found = {name for name in names if name.startswith(f"act-{fn}-")}
        assert found == ({f"act-{fn}-{p}" for p in PHASES} if fn != "identity" else set())


def test_suites_hold_what_their_names_say():
    by_penalty = {
        suite: {c.penalty for c in select_cases(suite=suite)} for suite in registry.SUITES
    }
    assert by_penalty["layer-wise"] == {"dreg", "act_stats"}
    assert by_penalty["input-jacobian"] | {"dreg"} == {*IDIOMS}
    assert by_penalty["elementwise"] == {"act", "act_stats"}
    assert select_cases(suite="all") == list(registry.all_cases())
    for case in registry.all_cases():
        assert case.suites and {*case.suites} <= {*registry.SUITES}


def test_scaling_moves_one_axis_at_a_time():
    moved: dict[str, list[int]] = {axis: [] for axis in registry.SCALING_AXES}
    for case in select_cases(suite="scaling"):
        point = {k: int(v) for k, v in (part.split("=") for part in case.axes.split())}
        away = {k: v for k, v in point.items() if v != registry.SCALING_BASE[k]}
        assert len(away) == (case.name != "scale-base")
        for axis, value in away.items():
            moved[axis].append(value)
    assert moved["projections"] == [2, 4, 8, 16] and moved["width"] == [64, 1024, 4096]
    (case,) = select_cases(["scale-projections-4"])
    assert case.build(CPU, torch.float32).projection.shape == (4, 128, 10)
    assert entered(case) == ["plain", "eager", "compiled", "fastjac"]


def test_host_cases_are_tiny_and_have_one_thread():
    cases = select_cases(suite="host")
    assert {case.penalty for case in cases} == {"spectreg", "dreg"}
    for case in cases:
        assert (case.kind, case.threads, case.suites) == ("host", 1, ("host",))
        names = [name for name in entered(case) if name != "jax"]
        assert [name for name in names if "compile" not in name] == ["plain", "eager", "fastjac"]
        assert {*names} >= {"plain-compiled", "compiled", "fastjac+compile"}
        problem = case.build(CPU, torch.float32)
        assert problem.x.numel() <= 32 and len(problem.x) == 2
        assert max(p.numel() for p in problem.model.parameters()) <= 64
    on_gpu = entered(cases[0], replace(FAST, device=torch.device("cuda")))
    assert on_gpu[-2:] == ["graphed-eager", "graphed-fastjac"] and "jax" not in on_gpu


def test_twelve_networks_with_one_projection():
    cases = select_cases(suite="networks")
    assert len(cases) == 12
    for case in cases:
        assert case.penalty == "spectreg" and entered(case) == ["plain", "eager", "fastjac"]
        assert case.build(CPU, torch.float32).projection.shape[0] == 1


def test_engines_are_for_input_jacobians_and_implementations_for_the_rest():
    def ours(case):
        return [name for name in entered(case) if name.startswith("fastjac")]

    assert ours(tiny_case("datagrad")) == ["fastjac", "fastjac-autograd", "fastjac+compile"]
    assert ours(tiny_case("dreg"))[:3] == ["fastjac", "fastjac+compile", "fastjac:reference"]
    assert ours(tiny_op())[:2] == ["fastjac", "fastjac:reference"]
    for case in (tiny_case("dreg"), tiny_op()):
        assert "fastjac-autograd" not in ours(case)
    assert "plain-compiled" in entered(tiny_case()) and "plain-compiled" not in entered(tiny_op())


def test_a_graph_holds_a_step_on_a_gpu():
    graphed = [c for c in entrants.all_contestants() if c.name.startswith("graphed-")]
    assert [c.name for c in graphed] == ["graphed-eager", "graphed-fastjac"]
    on_gpu = replace(FAST, device=torch.device("cuda"))
    for contestant in graphed:
        for case in (tiny_case("spectreg"), tiny_case("dreg")):
            assert entrants.why_not(contestant, case, on_gpu) is None
            assert "CUDA graph" in (entrants.why_not(contestant, case, FAST) or "")
        assert "CUDA graph" in (entrants.why_not(contestant, tiny_op(), on_gpu) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("penalty", ["spectreg", "dreg"])
def test_a_replay_gives_the_gradients_of_the_step(penalty):
    case = steps_of_the_gpu_run.case_of(penalty, 512, 512)
    problem = case.build(torch.device("cuda"), torch.float32)
    for contestant, of in (("graphed-eager", "eager"), ("graphed-fastjac", "fastjac")):
        (graphed,), (step,) = ([c for c in named(n) if c.name == n] for n in (contestant, of))
        replayed, wanted = graphed.setup(problem), step.setup(problem)
        for _ in range(2):
            replayed.step()
        for mine, other in zip(replayed.gradients(), wanted.gradients(), strict=True):
            torch.testing.assert_close(mine, other)


def test_quick_suite_runs_its_own_contestants():
    quick = [entered(case, replace(FAST, quick=True)) for case in select_cases(suite="quick")]
    assert all({"plain", "eager", "fastjac"} <= {*names} for names in quick)
    assert 1 <= sum("compiled" in names for names in quick) <= 4  # each costs ten seconds


def test_selection():
    found = [c.name for c in select_cases(["act-gelu-*"])]
    assert found == [f"act-gelu-{phase}" for phase in PHASES]
    with pytest.raises(ValueError, match="is in the suite"):
        select_cases(["spectreg-lenet"], "elementwise")
    assert [c.name for c in named("fastjac")] == ["plain", "fastjac"]


def test_the_lenet_has_as_many_parameters_as_in_the_paper():
    assert sum(p.numel() for p in lenet().parameters()) == 61706


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
