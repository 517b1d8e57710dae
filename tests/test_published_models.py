"""The table of published models: the script runs on two, and its parts see what is wrong."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastjac
from benchmarks.published_models import measure
from benchmarks.published_models.__main__ import main
from benchmarks.published_models.models import MODELS, Siren
from benchmarks.published_models.pairs import count

PAGE = Path(__file__).resolve().parent.parent / "docs" / "MODELS.md"


def names_in(text: str) -> list[str]:
    rows = [line.split("|")[1].strip() for line in text.split("\n") if line.startswith("| ")]
    return rows[2:]


def test_page_lists_the_forty_models() -> None:
    assert len(MODELS) == 40
    assert names_in(PAGE.read_text()) == [model.name for model in MODELS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_script(tmp_path: Path) -> None:
    # Whatever the reason: a torchvision that was built for another torch breaks this import too.
    pytest.importorskip("transformers.models.gpt2.modeling_gpt2", exc_type=Exception)
    names = ["SIREN", "GPT2Model"]
    threads = torch.get_num_threads()
    page, records = tmp_path / "page.md", tmp_path / "records.csv"
    rows = main(
        ["--quick", "--threads", "1", "--only", *names, "--to", str(page), "--csv", str(records)]
    )
    torch.set_num_threads(threads)
    assert names_in(page.read_text()) == names
    assert "right in 2" in page.read_text()
    with records.open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == names
    for row in rows:
        assert row.failures.keys() <= {"DREG time"}, row  # DREG may find no layer
        assert row.engine == "chain"
        assert 0 < row.error <= measure.TOLERANCE
        assert row.speedup and row.spectreg_cost  # how large they are depends on what else runs


def test_unknown_name(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "resnet19"])
    assert "no model resnet19; choose from resnet18" in capsys.readouterr().err


class Mixed(nn.Module):
    """Pairs through a norm, a view, a factor and a composed activation, and what is no pair."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.up, self.down, self.gate = nn.Linear(12, 8), nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu_(self.norm(self.conv(x))).flatten(1)  # a pair
        z = self.up(a)
        a = 0.5 * z * (1 + torch.tanh(0.8 * (z + 0.04 * z**3)))  # one
        b = self.down(a)
        b = b.view(-1, 2, 2).flatten(1) + a[:, :4]
        b = torch.relu(b)  # none: after a sum
        return torch.sin(30 * self.gate(b)) * torch.sigmoid(b.sum(1, True) * 2)  # one, none


def test_pairs_are_counted_from_the_graph() -> None:
    found = count(Mixed(), torch.randn(3, 2, 4, 4))
    assert found.activations == 5
    assert sorted(found.layers) == ["conv", "gate", "up"]


def test_attention_is_no_layer() -> None:
    """A product of two tensors that depend on x has no weight."""

    class Products(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            z = super().forward(x)
            return torch.relu(z @ z.T).sum(1, keepdim=True)

    assert count(Products(4, 4), torch.randn(3, 4)) == (1, [])


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_wrong_gradient_is_seen(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One term that is one per cent off."""
    torch.manual_seed(0)
    real = fastjac.SpectReg.per_sample

    def wrong(self: Any, pull: Any, **named: Any) -> Tensor:
        values = real(self, pull, **named)
        return factor * values + (1 - factor) * values.detach()

    monkeypatch.setattr(fastjac.SpectReg, "per_sample", wrong)
    x = torch.randn(3, 2, dtype=torch.float64)
    error = measure._error(Siren(16, 3).double(), x)
    assert (error <= measure.TOLERANCE) is (factor == 1)


def test_failure_is_a_cell(capsys: Any) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no run\nof this model")

    model = MODELS[-1].__class__("broken", "torch", lambda library: Broken(), (2,))
    row = measure.measured(model, measure.Options(threads=1, budget_s=0.0, min_rounds=1))
    assert row.failures["engine"] == "RuntimeError: no run"
    assert re.search("no run", str(row.failures["pairs"]))
