"""The README says what the code does: its table is generated, its example runs."""

import re
import statistics
from pathlib import Path

import pytest
import torch

import fastjac.cli.support
from fastjac.bench import page
from fastjac.bench.records import load

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_support_table_and_stubs_are_those_of_the_registries():
    assert fastjac.cli.support.update(README) == README, "run: python -m fastjac.cli.support"
    for package, text in fastjac.cli.support.stubs().items():
        stub = ROOT / "fastjac" / package / "__init__.pyi"
        assert stub.read_text() == text, "run: python -m fastjac.cli.support"


@pytest.mark.parametrize("name", ("README.md", "benchmarks/README.md", "docs/COMPILE.md"))
def test_performance_tables_are_drawn_from_the_history(name):
    text = (ROOT / name).read_text()
    renewed = page.update(text, load(ROOT / page.HISTORY))
    assert renewed == text, f"run: python -m fastjac.bench.page {name}"


def test_examples_run(monkeypatch, capsys):
    """One after the other: the others go on with the first one's model."""
    projected, layer_wise, own, compiled = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert projected.count("\n") <= 11  # ten lines, and a blank one
    scope: dict = {}
    exec(projected, scope)
    assert scope["value"].item() > 0
    assert all(p.grad is not None for p in scope["model"].parameters())
    exec(layer_wise, scope)
    assert scope["penalty"].layers_found == ["0"]
    assert "DREG penalises 1 of 2 layers" in capsys.readouterr().out
    assert scope["loss"].item() > 0
    scope["penalty"].detach()
    exec(own, scope)
    x, truth = scope["x"].requires_grad_(), 0.0
    for logits in scope["model"](x).topk(2).values.T:
        (v,) = torch.autograd.grad(logits.sum(), x, retain_graph=True)
        truth = truth + 0.1 * v.square().sum(1).mean()
    torch.testing.assert_close(scope["value"], truth)
    scope["x"] = x.detach()
    scope["loader"] = [(scope["x"], scope["y"])]
    scope["optimizer"] = torch.optim.SGD(scope["model"].parameters(), lr=0.1)
    before = scope["model"][0].weight.detach().clone()
    # Not compiled here: when the globals of `exec` are deleted, dynamo (torch 2.13) raises.
    monkeypatch.setattr(fastjac, "compile", lambda f: f)
    exec(compiled, scope)
    assert not torch.equal(scope["model"][0].weight, before)
    torch._dynamo.reset()  # which writes to the scope


def rows_of(title: str) -> list[list[str]]:
    """The rows of the table under a title of the README, without the head."""
    section = README.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.split("\n") if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_what_the_table_of_tasks_says_runs():
    tasks = {task: text for task, text in rows_of("I want to…")}
    x = torch.randn(4, 6)

    def code(task: str, k: int = 0) -> str:
        return re.findall(r"`([^`]+)`", tasks[task])[k]

    energy, forces = torch.nn.Sequential(torch.nn.Linear(6, 1)), torch.randn(4, 6)
    scope = {"fastjac": fastjac, "model": energy, "positions": x, "F": forces}
    exec(code("train a force field on energies and forces `F`"), scope)
    gradient = energy[0].weight.expand(4, 6)  # of the energy: minus the force
    torch.testing.assert_close(scope["R"], (gradient + forces).square().sum(1).mean())
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    scope |= {"model": model, "x": x, "tangents": torch.randn(2, 4, 6)}
    exec(code("make the output constant in given directions, such as rotations"), scope)
    assert scope["R"].item() > 0
    for k in (0, 1):
        penalty = eval(code("train a signed distance field", k), scope)
        assert penalty(energy, x)[1].item() >= 0
    named = {
        "penalise tokens, or a hidden layer": ('fastjac.SpectReg(at="embedding")',),
        "run the penalty in every 16th step only": ("every=16",),
        "see which layer dominates DREG": ("penalty.explain()", "penalty.layer_values"),
    }
    for task, words in named.items():
        assert all(f"`{word}`" in tasks[task] for word in words)
    assert fastjac.SpectReg(at="embedding", every=16).every == 16
    attached = fastjac.DREG(model)
    model(x)
    attached()
    assert "100.0%" in attached.explain() and attached.layer_values[0][0] == "0"
    for k in (0, 1):
        scope["z"] = x
        assert eval(code("know why a call is slow, or what runs", k), scope)


def test_claims_that_no_other_test_holds():
    """The sentences of the README on what raises and what is silent."""
    for words in (
        "a number of at least 0 or a 0-dim tensor",
        "Do not pass a compiled model to a penalty on the input Jacobian: it raises an error",
        "a batch mean raises an error",
        "for the modules alone",
        "a fourth derivative is right or raises an error",
        "Every penalty but AccumulatedDREG runs inside `torch.compile",
    ):
        assert words in " ".join(README.split()), words
    model, x, y = torch.nn.Linear(3, 2), torch.randn(4, 3), torch.randint(2, (4,))
    with pytest.raises(ValueError, match="weight is -1"):
        fastjac.SpectReg(weight=-1)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(Exception, match="fastjac.compile"):
        fastjac.spectreg(compiled, x)
    with pytest.raises(ValueError, match="one loss per sample"):
        fastjac.igpen(model, x, y, loss_fn=torch.nn.functional.cross_entropy)
    with pytest.raises(TypeError, match="every"):
        fastjac.spectreg(model, x, every=2)
    z = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value = fastjac.act(z, fn="silu").sum()
    for _ in range(3):
        (slope,) = torch.autograd.grad(value, z, create_graph=True)
        value = slope.sum()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(value, z)
    torch._dynamo.reset()


def test_numbers_of_other_machines_and_of_published_models():
    """Those of the first screen that are in no table of the README."""
    places = page.by_machine(load(ROOT / page.HISTORY))
    ours, eager = [], []
    for place, cases in places.items():
        steps = [f for f in cases.values() if "fastjac" in f and f["fastjac"].kind == "step"]
        mine = [
            found
            for found in steps
            if found["fastjac"].penalty in ("spectreg", "datagrad", "gradient-penalty")
            and not found["fastjac"].axes
            and "networks" not in found["fastjac"].suite
        ]
        if place.startswith("Intel") and mine:
            ours.append(statistics.median(found["fastjac"].overhead for found in mine))
            eager.append(statistics.median(f["eager"].overhead for f in mine if "eager" in f))
    text = " ".join(README.split())
    for values in (ours, eager):
        assert " and ".join(f"{value:.2f}" for value in values) in text, values
    models = (ROOT / "docs/MODELS.md").read_text().split("\n")
    rows = [line.strip("|").split("|") for line in models if line.startswith("| ")][2:]

    def column(k: int) -> list[float]:
        found = [re.match(r"\s*([\d.]+)×", row[k]) for row in rows]
        return [float(number[1]) for number in found if number]

    for k, words in (
        (4, "takes {} to {} times as long (median {:.2f})"),
        (8, "is {} to {} times as fast as in eager PyTorch (median {:.2f})"),
    ):
        values = column(k)
        assert words.format(min(values), max(values), statistics.median(values) + 1e-9) in text
    assert len(rows) == 40 and "forty published models" in text
    small = places["AMD EPYC, 2 threads, float32"]["spectreg-mlp-b100-w64"]
    memory = f"({small['fastjac'].peak_mb:.2f} MB against {small['eager'].peak_mb:.2f} MB"
    assert memory in text


def test_numbers_of_the_readme():
    assert len(fastjac.penalties.PENALTIES) == 18 and "Eighteen penalties" in README
    for page_name in re.findall(r"\]\((docs/[A-Z_]+\.md)\)", README):
        assert (ROOT / page_name).exists()
    pages = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert pages == {*re.findall(r"docs/[A-Z_]+\.md", README)}  # each page is named


def test_quick_start_is_two_one_line_commands_and_ci_runs_the_second():
    blocks = re.findall(r"```sh\n(.*?)```", README.split("## Quick start")[1], re.DOTALL)
    assert all(block.count("\n") == 1 for block in blocks[:2])
    assert blocks[0].rstrip().endswith("fastjac bench --quick") and "pytest" in blocks[1]
    assert "block 2" in (ROOT / ".ci/run").read_text()


def test_public_names_have_docstrings():
    for name in fastjac.__all__:
        value = getattr(fastjac, name)
        assert name.startswith("__") or isinstance(value, dict) or value.__doc__, name
