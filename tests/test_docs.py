"""The Python blocks of the pages and the examples of the docstrings run; links and paths exist."""

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
# These need Triton or other libraries, or are not Python.
NOT_IMPORTED = ("fastjac.kernels", "fastjac.integrations", "fastjac._cpu", "fastjac._cuda")
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(fastjac.__path__, "fastjac.")
    if not info.name.startswith(NOT_IMPORTED) and info.name.rpartition(".")[2] != "__main__"
)


PAGES = [page.name for page in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", sorted({*PAGES} - {"DISTRIBUTED.md"}))  # test_distributed.py's
def test_python_blocks_run(name):
    """The blocks of a page run one after the other, in one scope."""
    page = (ROOT / "docs" / name).read_text()
    scope: dict = {}
    for block in re.finditer(r"```python\n(.*?)```", page, re.DOTALL):
        line = page[: block.start()].count("\n") + 1
        exec(compile("\n" * line + block[1], name, "exec"), scope)


ALL_PAGES = [
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "examples", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.md"))
]


@pytest.mark.parametrize("name", ALL_PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/ARCHITECTURE.md"])
def test_paths_that_a_page_names_exist(name):
    """A path is a word in code that begins with a folder of the project; it may contain ``*``."""
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build"}
    code = re.findall(r"`+([^`]+)`+", (ROOT / name).read_text())
    words = {word for text in code for word in re.findall(r"[\w.*/-]+", text)}
    named = {word for word in words if "/" in word and word.split("/")[0] in folders}
    assert len(named) > 5
    assert [word for word in sorted(named) if not any(ROOT.glob(word))] == []


def test_pages_for_machines_can_be_read():
    yaml = pytest.importorskip("yaml")
    paths = [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"]
    assert len(paths) > 5
    for path in paths:
        assert yaml.safe_load(path.read_text()), path
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == fastjac.__version__


def test_changelog_has_this_version():
    assert f"## [{fastjac.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    scope = {"fastjac": fastjac, "torch": torch, "nn": torch.nn}
    assert doctest.testmod(importlib.import_module(name), extraglobs=scope).failed == 0


def test_what_is_public_has_an_example():
    """The penalties and the other functions that users call; the activations are torch's."""
    names = {spec.module.__name__ for spec in PENALTIES.values()}
    names |= {"Act", "act", "act_stats", "fuse", "row_sqnorm", "softmax_residual", "unfuse"}
    public = {name: getattr(fastjac, name) for name in names}
    public |= {name: getattr(fastjac.presets, name) for name in fastjac.presets.__all__}
    del public["r2"], public["wgan_gp"]  # they have the examples of r1 and WGANGP
    missing = [name for name, value in public.items() if ">>>" not in (value.__doc__ or "")]
    assert missing == []
