"""Penalties on several processes: gradients as of the whole batch in one process."""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any

import distributed_ddp
import distributed_fsdp
import distributed_tp
import pytest
import torch.distributed as dist
from distributed_run import launch

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

FAST = ("few",)
ON_FOUR = ("forms", "unused", "plans", "values", "positions", "with_fully_shard")


def cases_of(module: ModuleType) -> list[str]:
    """The functions that a module of cases defines with the three arguments of a case."""
    return [
        name
        for name, f in vars(module).items()
        if inspect.isfunction(f)
        and f.__module__ == module.__name__
        and list(inspect.signature(f).parameters) == ["rank", "world", "device"]
    ]


@functools.cache
def results(world: int, module: str, names: tuple[str, ...]) -> dict[str, str]:
    """One start of the processes for all the cases."""
    return launch(world, module, list(names))


def parameters() -> list[Any]:
    modules = (distributed_ddp, distributed_fsdp, distributed_tp)
    return [
        pytest.param(world, module.__name__, name, id=f"{module.__name__}-{name}-{world}")
        for module in modules
        for world in (2, 4)
        for name in cases_of(module)
        if name not in FAST and (world == 2 or name in ON_FOUR)
    ]


def test_two_processes():
    said = results(2, "distributed_ddp", FAST)
    assert not any(said.values()), said


@pytest.mark.slow
@pytest.mark.parametrize(("world", "module", "name"), parameters())
def test_case(world, module, name):
    names = tuple(p.values[2] for p in parameters() if p.values[:2] == (world, module))
    said = results(world, module, names)[name]
    assert not said, said
