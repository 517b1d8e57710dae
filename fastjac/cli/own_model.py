"""``fastjac bench --model``: makes the model and the batch that the command line names."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from fastjac.bench.contestants import Contestant
from fastjac.bench.measure import Options
from fastjac.bench.model import DEFAULT_PENALTIES, ModelBench, run
from fastjac.bench.own_model import OwnModel
from fastjac.bench.records import Record
from fastjac.cli.console import Names, usage_error


def bench_model(
    name: str,
    batch: Batch,
    penalties: Names,
    options: Options,
    contestants: Sequence[Contestant],
    save: Callable[[Sequence[Record]], None],
) -> ModelBench:
    """Makes the model and measures; a wrong option ends the command."""
    try:
        make = function_of(name)
    except ValueError as error:
        usage_error(error)
    made = make()  # what it raises is not ours, and needs its traceback
    try:
        own = own_model(name, made, batch)
        options = replace(
            options,
            keep_going=True,
            device=own.device if batch.keeps_device else options.device,
            dtype=own.dtype if batch.keeps_dtype else options.dtype,
        )
        chosen = penalties or DEFAULT_PENALTIES
        return run(own, chosen, options, contestants, save, Console(stderr=True))
    except (ValueError, TypeError, RuntimeError) as error:
        usage_error(error)


class Batch(NamedTuple):
    """The options of the command on the batch, as they were given.

    ``keeps_device`` and ``keeps_dtype`` say that the model runs as it was made.
    """

    input_shape: str | None = None
    target: str | None = None
    output: str | None = None
    at: str | None = None
    keeps_device: bool = True
    keeps_dtype: bool = True


def function_of(name: str) -> Callable[[], Any]:
    """The function that ``MODULE:FUNCTION`` names, or one that returns the model it names.

    Raises:
        ValueError: There is none.
    """
    path, colon, attribute = name.partition(":")
    if not (path and colon and attribute):
        raise ValueError(
            f"--model {name}: it must be MODULE:FUNCTION, such as mymodule:make_model for a "
            "function make_model() in mymodule.py"
        )
    sys.path.insert(0, os.getcwd())  # a console script does not look there
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"--model {name}: there is no module {error.name}; the command looks in the current "
            "folder and in the installed packages"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(f"--model {name}: the module {path} has no function {attribute}")
    return (lambda: found) if isinstance(found, nn.Module) else found


def own_model(name: str, made: Any, batch: Batch) -> OwnModel:
    """The model, with the batch and target that the function returned, or random ones.

    Raises:
        ValueError, TypeError: An option is wrong, or does not fit what the function returned.
        Exception: What the model raises for the batch.
    """
    given: tuple[Any, ...] = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(given) <= 3 or not isinstance(given[0], nn.Module):
        raise TypeError(
            f"--model {name}: it returned {', '.join(type(v).__name__ for v in given)}: it must "
            "return an nn.Module, or (model, x), or (model, x, target)"
        )
    if len(given) > 1 and batch.input_shape is not None:
        raise ValueError(f"--input: {name} returns the input itself: leave the option out")
    if len(given) == 1 and batch.input_shape is None:
        raise ValueError(
            "--input is missing: give the shape of a batch, such as --input 128,784, or let "
            f"{name} return (model, x) or (model, x, target), for token indices for example"
        )
    if len(given) == 3 and batch.target is not None:
        raise ValueError(f"--target: {name} returns the target itself: leave the option out")
    generator = torch.Generator().manual_seed(0)
    x = given[1] if len(given) > 1 else _batch(batch.input_shape or "", generator)
    y = given[2] if len(given) == 3 else _target(batch.target, x, generator)
    like = next((p for p in given[0].parameters() if p.is_floating_point()), None)
    if like is not None:  # what was made here
        x = x.to(like) if len(given) == 1 else x
        y = y if y is None or len(given) == 3 else y.to(like if y.is_floating_point() else x.device)
    part = batch.output
    index = part is not None and part.lstrip("-").isdigit()
    return OwnModel(given[0], x, y, None, int(part or 0) if index else part, batch.at)


def _batch(shape: str, generator: torch.Generator) -> Tensor:
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"--input {shape}: it must be the shape of a batch, numbers of at least 1 that are "
            "separated by commas, such as 128,784"
        )
    return torch.randn(sizes, generator=generator)


def _target(target: str | None, x: Tensor, generator: torch.Generator) -> Tensor | None:
    """Random class indices for ``classes:10``, random numbers ``[N, 3]`` for ``values:3``."""
    if target is None:
        return None
    kind, _, number = target.partition(":")
    if kind not in ("classes", "values") or not number.isdigit() or int(number) < 1:
        raise ValueError(
            f"--target {target}: it must be classes:K for class indices below K, or values:K for "
            "K numbers of each sample"
        )
    if kind == "classes":
        return torch.randint(int(number), (len(x),), generator=generator)
    return torch.randn(len(x), int(number), generator=generator)
