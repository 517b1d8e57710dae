"""A model's buffers, for a run of it inside ``torch.func``, which refuses one that writes to them.

The run is on copies; afterwards the buffers get what it wrote, as an ordinary run leaves them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.penalty import call_model

Place = tuple[dict[str, Tensor | None], str, Tensor]
"""Where a buffer is held, its name there, and itself."""


def places_of(model: Any) -> list[Place]:
    """Of all buffers of a module; a function has none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [(m._buffers, k, b) for m in modules for k, b in m._buffers.items() if b is not None]


def copies_of(places: list[Place]) -> list[Tensor]:
    """One copy of each buffer, in as many places."""
    copies = {id(b): b.clone() for _, _, b in places}
    return [copies[id(b)] for _, _, b in places]


def run_on(
    copies: list[Tensor], model: Callable[..., Any], x: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Inside the transform: the output, and the buffers of the run, before and after it.

    Not by ``torch.func.functional_call``: it loses the buffers of a module that the model has twice
    (seen on torch 2.13).
    """
    inner: dict[Tensor, Tensor] = {}  # a copy made inside the transform may be written to
    for t in copies:
        if t not in inner:
            inner[t] = t.clone()
    before, places = [inner[t] for t in copies], places_of(model)
    try:
        for (holder, name, _), t in zip(places, before, strict=True):
            holder[name] = t
        output = call_model(model, x)
        return output, before, [holder[name] for holder, name, _ in places]
    finally:
        for holder, name, b in places:
            holder[name] = b


def change_of(before: Tensor, after: Tensor | None) -> str:
    """``"replaced"``, ``"written"``, or ``"perhaps"`` where torch does not tell.

    It does not for batch_norm, which does not count its writes to the running statistics, so that
    graphs that saved them do not raise.
    """
    if after is not before:
        return "replaced"
    return "written" if len(_version_as_shape(before)) else "perhaps"


@torch.compiler.allow_in_graph
def _version_as_shape(t: Tensor) -> Tensor:
    """Length 1 if ``t`` was written to. Runs while torch traces, where a shape is a constant."""
    return torch.empty(int(t._version > 0))


def write_back(places: list[Place], after: list[Any], changes: list[str]) -> None:
    """To the buffers, what the run left in their copies."""
    if "written" in changes:
        _check_apart(places, changes)
    with torch.no_grad():
        for (holder, name, b), now, change in zip(places, after, changes, strict=True):
            if change == "replaced":
                holder[name] = now
            elif change == "written":
                b.copy_(now)
            elif not _expanded(b):
                b.data.copy_(now)  # not counted as a write, as batch_norm does it


def _check_apart(places: list[Place], changes: list[str]) -> None:
    memory = [b.untyped_storage().data_ptr() for _, _, b in places]
    for (_, name, b), own, change in zip(places, memory, changes, strict=True):
        if change == "written" and any(
            own == other and b is not c for other, (_, _, c) in zip(memory, places, strict=True)
        ):
            raise RuntimeError(
                f"engine='compiled' cannot run this model: it writes to its buffer {name!r}, which "
                "shares memory with another one. Use engine='autograd'"
            )


def _expanded(t: Tensor) -> bool:
    """Whether elements share memory, so that nobody can have written to them."""
    return any(size > 1 and step == 0 for size, step in zip(t.shape, t.stride(), strict=True))
