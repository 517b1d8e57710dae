"""What a study declares: its runs, and what is made of their records."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd

import fastjac
from studies.settings import Metrics, Setting

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Experiment:
    """A function and the settings that it runs with.

    Attributes:
        name: The name of the file of records.
        run: ``run(setting) -> metrics``, a function of a module. It may draw from the generators of
            torch, NumPy and Python, which are seeded with ``setting.seed`` before each run.
        settings: The settings. One that occurs twice runs once.
        alone: Whether one run at a time is made, because its metrics are times.
        extra: Keyword arguments of ``run`` that do not change its result, such as the directory in
            which somebody keeps the data.
    """

    name: str
    run: Callable[..., Metrics]
    settings: Sequence[Setting]
    alone: bool
    extra: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        name: str,
        run: Callable[..., Metrics],
        settings: Iterable[Setting],
        *,
        alone: bool = False,
        **extra: object,
    ) -> Experiment:
        return cls(name, run, tuple(dict.fromkeys(settings)), alone, extra)

    @cached_property
    def keys(self) -> dict[str, Setting]:
        """The settings by the key of their record, sorted by it.

        The key is a hash of the setting, of the code that runs it (`code_version`) and of the
        version of fastjac. Its order is the order of the runs. That mixes short and long runs, so
        that the estimate of the time left is fair, and shards of equal size take equally long.
        """
        version = [fastjac.__version__, self.run.__name__, code_version(self.run.__module__)]
        keys = {}
        for setting in self.settings:
            text = json.dumps([*version, asdict(setting)], sort_keys=True)
            keys[hashlib.sha256(text.encode()).hexdigest()[:16]] = setting
        return dict(sorted(keys.items()))


#: The frames of records of a study, by the name of the experiment.
Frames = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class Study:
    """A study, as ``studies.command.main`` runs it.

    Attributes:
        name: The name of its folder in ``studies``.
        title: The heading of its report.
        experiments: ``experiments(quick, data)``, where ``data`` is the directory of ``--data``.
        sections: The parts of the report: the name between the markers of the page, and a function
            of the records and the folder for pictures that returns Markdown. A section whose
            experiments have no records returns an empty text.
    """

    name: str
    title: str
    experiments: Callable[[bool, Path | None], Sequence[Experiment]]
    sections: Mapping[str, Callable[[Frames, Path], str]]

    @property
    def folder(self) -> Path:
        return ROOT / "studies" / self.name


@cache
def code_version(module: str) -> str:
    """A hash of the code of a module and of all modules of ``studies`` that it imports.

    Comments, docstrings and the layout do not count, so that a study of a thousand runs survives a
    better sentence.
    """
    trees = {}
    todo = [module]
    while todo:
        name = todo.pop()
        spec = importlib.util.find_spec(name) if name not in trees else None
        if spec is None or spec.origin is None:
            continue
        tree = ast.parse(Path(spec.origin).read_text())
        trees[name] = ast.dump(_without_docstrings(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
        todo = [name for name in todo if name.split(".")[0] == "studies" and _is_module(name)]
    return hashlib.sha256(json.dumps(sorted(trees.items())).encode()).hexdigest()[:16]


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # studies.data.split: a function of a module, not of a package
        return False


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:]
    return tree
