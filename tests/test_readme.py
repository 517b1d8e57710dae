"""The README says what the code does: its table is generated, its example runs."""

import re
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


def test_examples_run(monkeypatch):
    """One after the other: the others go on with the first one's model."""
    projected, layer_wise, compiled = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict = {}
    exec(projected, scope)
    assert scope["value"].item() > 0
    assert all(p.grad is not None for p in scope["model"].parameters())
    exec(layer_wise, scope)
    assert scope["penalty"].layers_found == ["0"]
    assert scope["loss"].item() > 0
    scope["penalty"].detach()
    scope["loader"] = [(scope["x"], scope["y"])]
    scope["optimizer"] = torch.optim.SGD(scope["model"].parameters(), lr=0.1)
    before = scope["model"][0].weight.detach().clone()
    # Not compiled here: when the globals of `exec` are deleted, dynamo (torch 2.13) raises.
    monkeypatch.setattr(fastjac, "compile", lambda f: f)
    exec(compiled, scope)
    assert not torch.equal(scope["model"][0].weight, before)
    torch._dynamo.reset()  # which writes to the scope


def test_quick_start_is_two_one_line_commands_and_ci_runs_the_second():
    blocks = re.findall(r"```sh\n(.*?)```", README.split("## Quick start")[1], re.DOTALL)
    assert all(block.count("\n") == 1 for block in blocks[:2])
    assert blocks[0].rstrip().endswith("fastjac bench --quick") and "pytest" in blocks[1]
    assert "block 2" in (ROOT / ".ci/run").read_text()


def test_public_names_have_docstrings():
    for name in fastjac.__all__:
        value = getattr(fastjac, name)
        assert name.startswith("__") or isinstance(value, dict) or value.__doc__, name
