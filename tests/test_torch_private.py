"""Private names of torch are in one file, and this torch has all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastjac import torch_private

ROOT = Path(__file__).resolve().parent.parent
PRIVATE = re.compile(
    r"torch\._(?!_version|foreach)|torch(\.\w+)+\._[a-z]|from torch(\.\w+)*\._"
    r"|forward_ad\._|_pytree"
)


def test_this_torch_has_every_name() -> None:
    lacking = [
        f"{n.path}: needed {n.why}; without it, {n.without}" for n in torch_private.missing()
    ]
    assert not lacking, "\n".join(lacking)


def test_a_name_that_torch_lacks_is_listed_and_raises_at_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_private, "NAMES", [])
    lacking = torch_private._private("torch._C._no_such", "to test", "nothing")
    assert [name.path for name in torch_private.missing()] == ["torch._C._no_such"]
    with pytest.raises(RuntimeError, match="has no torch._C._no_such, which fastjac needs to test"):
        lacking()


def test_no_other_file_names_one() -> None:
    found = []
    for path in sorted((ROOT / "fastjac").rglob("*.py")):
        if path.name == "torch_private.py":
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if PRIVATE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "move these to fastjac/torch_private.py:\n" + "\n".join(found)
