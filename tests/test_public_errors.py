"""What a newcomer writes by mistake, and the error that it gets: the table `public_errors.txt`.

An entry is the code that was written, and the error, indented, in full. An error says what was
wrong, with what value, and what to do (CONTRIBUTING.md). ``python tests/test_public_errors.py``
writes the errors that are raised now into the table; read the difference.
"""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastjac
from fastjac.input_jacobian.projections import ExactPenalty, RandomPenalty

TABLE = Path(__file__).with_name("public_errors.txt")


class Net(nn.Module):
    """A model that is no plain Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def names() -> dict[str, Any]:
    """What the code of an entry sees."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 4))
    x, y = torch.randn(8, 6), torch.randint(4, (8,))
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    return {
        **{"torch": torch, "np": np, "nn": nn, "F": F, "fastjac": fastjac, "Net": Net},
        **{"RandomPenalty": RandomPenalty, "ExactPenalty": ExactPenalty},
        **{"InputPenalty": fastjac.InputPenalty, "Penalty": fastjac.Penalty},
        **{"model": model, "x": x, "y": y, "leaf": leaf, "output": output, "net": Net()},
        **{"loss": F.cross_entropy(output, y), "penalty": fastjac.SpectReg()},
        **{"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "__name__": "theirs"},
    }


class Entry(NamedTuple):
    code: str
    error: str  # "TypeError: text"


def entries() -> list[Entry]:
    found = []
    for block in TABLE.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if not line.startswith("# ")]
        ends = [i for i, line in enumerate(lines) if line.startswith("    -> ")]
        if ends:
            first = ends[0]
            error = " ".join(line.strip() for line in lines[first:]).removeprefix("-> ")
            found.append(Entry("\n".join(lines[:first]), error))
    return found


def raised(code: str) -> str:
    """The error of the code of an entry. No warning may come with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            exec(code, names())
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return "nothing"


ENTRIES = entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.code for entry in ENTRIES])
def test_error(entry: Entry) -> None:
    assert raised(entry.code) == entry.error


def written() -> str:
    """The table with the errors that are raised now."""
    blocks = []
    for block in TABLE.read_text().strip().split("\n\n"):
        code = block.split("\n    ->")[0]
        if code != block:
            error = textwrap.wrap(
                f"-> {raised(code)}",
                width=110,
                initial_indent="    ",
                subsequent_indent="    ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            block = "\n".join([code, *error])
        blocks.append(block)
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    TABLE.write_text(written())
