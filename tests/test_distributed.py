"""Penalties on several processes: gradients as of the whole batch in one process.

The cases are in ``distributed_*.py``. One start of the processes, some seconds, serves all cases of
a module, so they are one test: it names those that failed.
"""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch.distributed as dist
from distributed_run import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

FAST = ["few"]
ON_FOUR = ["forms", "unused", "plans", "values", "positions", "with_fully_shard"]


def cases_of(module: str) -> list[str]:
    """The functions that a module of cases defines with the argument of a case."""
    return [
        name
        for name, f in vars(importlib.import_module(module)).items()
        if inspect.isfunction(f)
        and f.__module__ == module
        and list(inspect.signature(f).parameters) == ["here"]
        and name not in FAST
    ]


def check(world: int, module: str, names: list[str]) -> None:
    failed = {name: said for name, said in launch(world, module, names).items() if said}
    assert not failed, "\n".join(f"{name}: {said}" for name, said in failed.items())


def test_ddp_of_two():
    check(2, "distributed_ddp", FAST)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["distributed_ddp", "distributed_fsdp", "distributed_tp"])
@pytest.mark.parametrize("world", [2, 4])
def test_cases(world, module):
    names = cases_of(module)
    check(world, module, names if world == 2 else [n for n in names if n in ON_FOUR])
