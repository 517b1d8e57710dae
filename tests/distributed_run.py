"""Runs cases on several processes, and tells what each of them met.

A case is a function ``(here) -> None`` in a module of the tests; it raises if something is wrong.
All cases of one number of processes share the processes, each with a process group of its own:
nccl where there are as many GPUs, else gloo on the CPU.
"""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = timedelta(minutes=5)  # of one collective


@dataclass(frozen=True)
class Here:
    """What a case knows of the process that it runs in."""

    rank: int
    world: int
    device: torch.device

    def own(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """This process's share of a batch."""
        return [t.chunk(self.world)[self.rank].to(self.device) for t in tensors]

    def all(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The whole batch, on this process's device."""
        return [t.to(self.device) for t in tensors]


def launch(world: int, module: str, names: list[str]) -> dict[str, str]:
    """What went wrong in each case, by its name: ``""`` if nothing did."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])  # torch is imported once
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, folder, module, names)
        ranks = [context.Process(target=_rank, args=(r, *arguments)) for r in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        return {
            name: "\n".join(_said(folder, name, r, ranks[r].exitcode) for r in range(world)).strip()
            for name in names
        }


def _said(folder: str, name: str, rank: int, exitcode: int | None) -> str:
    path = Path(folder) / f"{name}.{rank}"
    return path.read_text() if path.exists() else f"rank {rank} ended with exit code {exitcode}"


def _rank(rank: int, world: int, folder: str, module: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", world)
    for name in names:
        said = ""
        dist.init_process_group(
            "nccl" if gpus else "gloo",
            store=dist.PrefixStore(name, store),
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
        )
        try:
            torch.manual_seed(rank)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
                warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
                # A double backward gives a weight [1, 5] the strides (1, 1): only slower.
                warnings.filterwarnings("ignore", message="Grad strides do not match")
                getattr(importlib.import_module(module), name)(Here(rank, world, device))
        except Exception:
            said = f"rank {rank}: {traceback.format_exc(limit=-4)}"
        dist.destroy_process_group()
        (Path(folder) / f"{name}.{rank}").write_text(said)
