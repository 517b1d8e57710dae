"""The runs of DREG's sweep, and its report."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fastjac
from studies.dreg import plain, report, training
from studies.dreg.hypotheses import MEAN, both_readings, hypotheses
from studies.dreg.study import STUDY
from studies.dreg.training import STRENGTHS, VARIANTS, Run, train
from studies.gradient_regularization.study import STUDY as OTHER
from studies.networks import ACTIVATIONS, network
from studies.page import write_report
from studies.records import Records

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_sweep_is_960_runs_and_no_run_is_declared_twice():
    declared = {experiment.name: experiment for experiment in STUDY.experiments(False, None)}
    assert len(declared["sweep"].settings) == 4 * 6 * 8 * 5 == 960
    assert len(declared["scarcity"].settings) == 2 * 960
    assert declared["cost"].alone
    trainings = [e for e in declared.values() if e.name != "cost"]
    # Where there is one position, its mean is the default; these runs are in both.
    twice = {"options", "mean"}
    settings = [s for e in trainings if e.name not in twice for s in e.settings]
    assert len(settings) == len(set(settings))


@pytest.mark.parametrize("name", sorted(STRENGTHS))
def test_every_regularizer_is_applied(name):
    """One long step differs from that without a regularizer, in the first weights or the output."""
    usual = train(Run(data="cancer", regularizer="none", steps=40))
    found = train(
        Run(data="cancer", regularizer=name, steps=40, scale=30.0 if name != "dropout" else 3.0)
    )
    assert (found["loss"] != usual["loss"]) == (name != "none")


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variant_is_applied(variant):
    usual = train(Run(data="mnist1d", regularizer="DREG", steps=10))
    found = train(Run(data="mnist1d", regularizer="DREG", steps=10, variant=variant))
    assert (found["loss"] != usual["loss"]) == (variant != "default")


def test_runs_of_a_seed_share_samples_weights_and_batches(monkeypatch):
    seen = {}

    def spy(run, model, strength):
        weights = [p.detach().clone() for p in model.parameters()]
        forward = original(run, model, strength)
        batches = []
        seen[run.regularizer] = weights, batches

        def watched(x, y):
            batches.append((x.detach().clone(), y))
            return forward(x, y)

        return watched

    original = training._regularized
    monkeypatch.setattr(training, "_regularized", spy)
    for name in STRENGTHS:
        train(Run(data="cancer", regularizer=name, steps=12))
    weights, batches = seen.pop("none")
    for other_weights, other_batches in seen.values():
        for a, b in zip(weights, other_weights, strict=True):
            assert torch.equal(a, b)
        for (x, y), (other_x, other_y) in zip(batches, other_batches, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)


@pytest.mark.parametrize("shape", [(5,), (1, 9), (1, 12, 12)])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_plain_penalties_are_those_of_fastjac(shape, activation):
    torch.manual_seed(0)
    model = network(torch.Size(shape), 3, activation).double()
    x, y = torch.randn(4, *shape, dtype=torch.float64), torch.tensor([0, 1, 2, 1])

    def gradients(value):
        return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)

    pairs = (
        (plain.dreg(model, x, 0.3), fastjac.dreg(model, x, weight=0.3)),
        (plain.igpen(model, x.clone(), y, 0.3), fastjac.datagrad(model, x, y, weight=0.3)),
    )
    for (_, a), (_, b) in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
        torch.testing.assert_close(gradients(a), gradients(b), rtol=1e-9, atol=1e-12)


def test_both_ways_train_the_same_network():
    for name in STRENGTHS:
        run = Run(data="digits", regularizer=name, steps=30)
        ours, theirs = train(run), train(replace(run, way="torch"))
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3), name


def test_a_loss_that_is_not_finite_raises():
    with pytest.raises(FloatingPointError, match="the loss is (nan|inf) at step 100"):
        train(Run(data="cancer", regularizer="DREG", scale=1e42, steps=100))


def test_noise_costs_accuracy_and_the_norms_are_of_the_input_gradient():
    found = train(Run(data="digits", steps=200))
    assert found["noise_1.0"] < found["noise_0.1"] <= found["test"] + 1
    assert found["test"] > 90
    assert found["gradient"] > 0
    assert found["tail"] > 1


def test_the_mean_over_positions_replaces_only_the_networks_that_have_positions():
    import pandas as pd

    def rows(variant, **levels):
        base = {"activation": "relu", "seed": 0, "fraction": 1.0, "variant": variant}
        return [
            base | {"data": d, "regularizer": r} | levels
            for d in ("a", "b")
            for r in ("none", "DREG")
        ]

    sweep = pd.DataFrame(rows("default", test=1.0))
    mean = pd.DataFrame([row for row in rows("mean", test=2.0) if row["data"] == "a"][1:])
    scarcity = sweep.assign(fraction=0.1)
    mean = pd.concat([mean, mean.assign(fraction=0.1, test=3.0)])
    frames = {"sweep": sweep, "scarcity": scarcity, "mean": mean}
    for name, value in (("sweep", 2.0), ("scarcity", 3.0)):
        tests = both_readings(frames, name).set_index(["data", "regularizer"])["test"].to_dict()
        assert len(tests) == 6
        assert tests[("a", MEAN)] == value
        del tests[("a", MEAN)]
        assert set(tests.values()) == {1.0}


def test_a_planted_advantage_holds_and_its_reverse_does_not():
    import pandas as pd

    def frames(gain):
        rows = []
        for number in range(8 * 4):
            for name in STRENGTHS:
                test = 80 + number * 0.1 + gain * (name == "DREG") * (1 + number / 100)
                cell = {
                    "data": number // 4,
                    "activation": ["relu", "gelu", "silu", "tanh"][number % 4],
                }
                noisy = {f"noise_{level}": test for level in training.NOISE}
                rows.append({**cell, "regularizer": name, "seed": 0, "test": test, **noisy})
        return {
            name: pd.DataFrame(rows if name == "sweep" else None)
            for name in ("sweep", "scarcity", "mean")
        }

    better = {claim.text: claim.verdict for claim in hypotheses(frames(1.0))}
    assert better["The highest accuracy without noise"] == "holds"
    assert better["The best under GELU"] == "holds"
    assert better["Spectral normalisation is more robust than DREG"] == "does not hold"
    worse = {claim.text: claim.verdict for claim in hypotheses(frames(-1.0))}
    assert worse["The highest accuracy without noise"] == "does not hold"
    assert worse["Spectral normalisation is more robust than DREG"] == "holds"


def test_spectral_normalisation_is_on_every_layer():
    model = network(torch.Size((1, 12, 12)), 3, "relu")
    training._regularized(Run(regularizer="spectral norm"), model, 0.0)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 4
    assert all(hasattr(layer, "parametrizations") for layer in layers)


def frames_of_the_records():
    experiments = STUDY.experiments(False, None)
    return {e.name: Records(STUDY.folder / "records", e.name).frame(e) for e in experiments}


def test_the_readme_has_the_numbers_of_the_records():
    frames = frames_of_the_records()
    assert len(frames["sweep"]) == 960
    table = report.cost(frames, Path())
    lines = ([cell.strip() for cell in line.split("|")[1:]] for line in table.splitlines())
    rows = {line[0]: line for line in lines}
    dreg, igpen, whole = (rows[name][4] for name in ("DREG", "IGPen", "all"))
    minutes = round(float(rows["all"][5]))
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"sweep take {minutes} minutes of one core" in text
    assert f"those with DREG take {dreg} times as long" in text
    assert f"penalty {igpen} times, and all together {whole} times" in text


@pytest.mark.slow
@pytest.mark.parametrize("study", [STUDY, OTHER], ids=["dreg", "gradient_regularization"])
def test_the_report_is_that_of_the_records(study, tmp_path):
    """Also that the code of the runs is that of the records: `Experiment.keys`."""
    experiments = study.experiments(False, None)
    frames = {e.name: Records(study.folder / "records", e.name).frame(e) for e in experiments}
    for experiment in experiments:
        assert len(frames[experiment.name]) == len(experiment.settings), experiment.name
    before = (study.folder / "README.md").read_text()
    (tmp_path / "README.md").write_text(before)
    write_report(study, frames, tmp_path)
    assert (tmp_path / "README.md").read_text() == before


@pytest.mark.slow
def test_quick_writes_the_full_report(tmp_path):
    command = [sys.executable, "-m", "studies.dreg", "--quick", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    text = (tmp_path / "README.md").read_text()
    assert "There are no records" not in text
    for name in STUDY.sections:
        assert f"<!-- study: {name} -->" in text
    names = {path.name for path in (tmp_path / "pictures").glob("*.png")}
    assert names == {"claims.png", "ranks.png", "noise.png", "scarcity.png"}
    assert all(f"pictures/{name}" in text for name in names)
