"""What a study declares: its runs, and what is made of their records."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import tokenize
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pandas as pd

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

        The key is a hash of the setting and of the code that runs it, see `code_version`. That of
        fastjac does not count: a record has its version and commit. The order of the keys is the
        order of the runs. It mixes short and long ones, so that the estimate of the time left is
        fair, and shards of equal size take equally long.
        """
        version = [self.run.__name__, code_version(self.run.__module__)]
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

    Comments, docstrings and the breaks of lines do not count, so that the records of a thousand
    runs survive a better sentence.
    """
    found: dict[str, str] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        spec = _spec(name) if name not in found else None
        if spec is None or spec.origin is None:
            continue
        source = Path(spec.origin).read_text()
        found[name] = _code(source)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                todo += [alias.name for alias in node.names]
        todo = [name for name in todo if name.split(".")[0] == "studies"]
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # studies.data.split: a function of a module, not of a package
        return None


def _code(source: str) -> str:
    """The tokens of a module without comments and docstrings.

    An f-string is kept as it is written: Python 3.11 has one token for it and 3.12 several. The
    tree of ``ast`` would differ between versions too.
    """
    lines = source.splitlines(keepends=True)
    code: list[str] = []
    statement: list[str] = []
    start, depth = (0, 0), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":
            start = start if depth else token.start
            depth += 1
        elif kind == "FSTRING_END":
            depth -= 1
            if not depth:
                statement.append(_between(lines, start, token.end))
        elif depth or kind in ("COMMENT", "NL"):
            continue
        elif kind in ("INDENT", "DEDENT"):
            code.append(kind)
        elif kind == "NEWLINE":
            if len(statement) != 1 or not statement[0].endswith(("'", '"')):
                code.append(" ".join(statement))
            statement = []
        else:
            statement.append(token.string)
    return "\n".join(code)


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "".join([lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]])
