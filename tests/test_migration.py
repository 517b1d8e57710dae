"""Both columns of the README's table "Coming from…" are run and compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
import torch.nn.functional as F
from penalty_cases import close, close_gradients, gradients, seeded
from torch import Tensor, nn

import fastjac

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()
TABLE = README.split("## Coming from…")[1].split("\n## ")[0]
ROWS = re.findall(r"^\| ([^|`]+) \| `([^`]+)` \| `([^`]+)` \|$", TABLE, re.MULTILINE)


def scope() -> dict[str, Any]:
    """The names that the lines use, with the same values in each call."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 3))
    critic = nn.Sequential(
        nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, 1)
    )
    field = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    autoencoder = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 4))
    z = torch.randn(3, 4, generator=seeded(1)).requires_grad_()
    return {
        "torch": torch,
        "F": F,
        "fastjac": fastjac,
        "grad": torch.autograd.grad,
        "JacobianReg": peers.JacobianReg,
        "jac_loss_estimate": peers.jac_loss_estimate,
        "x": torch.randn(3, 4, generator=seeded(2)).requires_grad_(),
        "y": torch.tensor([0, 2, 1]),
        "fake": torch.randn(3, 4, generator=seeded(3)),
        "e": torch.randn(3, 4, generator=seeded(4)),
        "z": z,
        "dz": field(z),
        "model": model,
        "D": critic,
        "f": field,
        "autoencoder": autoencoder,
        "W": autoencoder[0].weight,
        "b": autoencoder[0].bias,
        "gamma": 3.7,
        "step": 0,
    }


def run(code: str) -> tuple[Tensor, list[Tensor]]:
    """``R`` and its gradients with respect to all inputs and parameters in the scope."""
    names = scope()
    modules = [m for m in names.values() if isinstance(m, nn.Module)]
    inputs = [names["x"], names["z"], *(p for m in modules for p in m.parameters())]
    torch.manual_seed(5)
    exec(code, names)
    return names["R"], gradients(names["R"], inputs)


def test_each_row_of_the_table_is_found() -> None:
    assert len(ROWS) == 9 == TABLE.count("\n| ") - 2


@pytest.mark.parametrize(("theirs", "ours"), [row[1:] for row in ROWS], ids=[r[0] for r in ROWS])
@pytest.mark.usefixtures("double")
def test_both_columns_are_equal(theirs: str, ours: str) -> None:
    assert "fastjac" in ours
    (value, of_value), (truth, of_truth) = run(ours), run(theirs)
    assert truth.abs().min() > 1e-6
    assert sum(g.abs().sum() for g in of_truth) > 0
    close(value, truth)
    close_gradients(of_value, of_truth)
