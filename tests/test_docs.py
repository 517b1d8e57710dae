"""What the documentation says is what the code does: its Python blocks and docstrings run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastjac
from fastjac.penalties import PENALTIES

ROOT = Path(__file__).resolve().parent.parent
#: need Triton, other libraries, or are no Python
NOT_IMPORTED = ("fastjac.kernels", "fastjac.integrations", "fastjac._cpu", "fastjac._cuda")
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(fastjac.__path__, "fastjac.")
    if not info.name.startswith(NOT_IMPORTED) and info.name.rpartition(".")[2] != "__main__"
)


PAGES = [page.name for page in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", sorted({*PAGES} - {"DISTRIBUTED.md"}))  # test_distributed.py's
def test_python_blocks_run(name):
    """One after the other, in one scope."""
    page = (ROOT / "docs" / name).read_text()
    scope: dict = {}
    for block in re.finditer(r"```python\n(.*?)```", page, re.DOTALL):
        line = page[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], name, "exec"), scope)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = (ROOT / "docs" / name).read_text()
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page):
        assert (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    scope = {"fastjac": fastjac, "torch": torch, "nn": torch.nn}
    assert doctest.testmod(importlib.import_module(name), extraglobs=scope).failed == 0


def test_what_is_public_has_an_example():
    """Of the penalties and of what else users call; activations are torch's."""
    names = {spec.module.__name__ for spec in PENALTIES.values()}
    names |= {"Act", "act", "act_stats", "fuse", "row_sqnorm", "softmax_residual", "unfuse"}
    public = {name: getattr(fastjac, name) for name in names}
    public |= {name: getattr(fastjac.presets, name) for name in fastjac.presets.__all__}
    del public["r2"], public["wgan_gp"]  # r1 at other points; the function of WGANGP
    missing = [name for name, value in public.items() if ">>>" not in (value.__doc__ or "")]
    assert missing == []
