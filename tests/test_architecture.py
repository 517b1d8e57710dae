"""Imports run down the rooms of the package only, and in no circle (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "fastjac"

# From the top to the bottom; those of one line do not import each other.
ROOMS = [
    ("cli",),
    ("bench",),
    ("integrations",),
    ("presets", "explain"),
    ("penalties",),
    ("layerwise", "input_jacobian", "schedules"),
    ("compiled",),
    ("penalty",),
    ("distributed",),
    ("per_sample", "arguments", "model_output", "modes", "fusing"),
    ("nn",),
    ("functional",),
    ("observers",),
    ("kernels",),  # `ops` runs them by name
    ("ops", "recognise"),
    ("activations", "reference", "codegen", "torch_private", "signatures", "_version"),
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """The modules of the package that one imports anywhere, for its types alone too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from fastjac.ops import act`: the module act, or a name of the package.
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {part if part in MODULES else node.module for part in parts}
    return {m for m in found if m in MODULES} - {name}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_imports_run_down() -> None:
    wrong = []
    for name in MODULES:
        for other in imports(name):
            here, there = room(name), room(other)
            if here and there not in (here, "") and FLOOR[there] <= FLOOR[here]:
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(sorted(wrong))


def test_every_room_has_its_floor() -> None:
    assert {room(name) for name in MODULES} - {""} == FLOOR.keys()


def test_no_module_is_in_a_circle() -> None:
    graph = {name: imports(name) - {"fastjac"} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
