"""Runs a model that writes to its buffers inside ``torch.func``, which does not allow that.

The model runs on copies of the buffers. Afterwards the new values are written to the buffers, which
are then as after an ordinary run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.model_output import Part, call_model

Place = tuple[dict[str, Tensor | None], str, Tensor]
"""A dict that holds a buffer, the name of the buffer in it, and the buffer."""


def places_of(model: Any) -> list[Place]:
    """The places of all buffers of a module; a function has none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return [(m._buffers, k, b) for m in modules for k, b in m._buffers.items() if b is not None]


def copies_of(places: list[Place]) -> list[Tensor]:
    """A copy of the buffer in each place; one buffer in two places has one copy."""
    copies = {id(b): b.clone() for _, _, b in places}
    return [copies[id(b)] for _, _, b in places]


def run_on(
    copies: list[Tensor], model: Callable[..., Any], x: Tensor, part: Part
) -> tuple[Any, Tensor, list[Tensor], list[Tensor | None]]:
    """Runs the model inside the transform; returns the output and the buffers before and after.

    The output is given twice: what the model returned, and the tensor in it that ``part`` names.

    ``torch.func.functional_call`` would lose the buffers of a module that occurs twice in the model
    (torch 2.13).
    """
    inner: dict[Tensor, Tensor] = {}  # only copies made inside the transform can be written to
    for t in copies:
        if t not in inner:
            inner[t] = t.clone()
    before, places = [inner[t] for t in copies], places_of(model)
    try:
        for (holder, name, _), t in zip(places, before, strict=True):
            holder[name] = t
        whole, output = call_model(model, x, part)
        return whole, output, before, [holder[name] for holder, name, _ in places]
    finally:
        for holder, name, b in places:
            holder[name] = b


def change_of(before: Tensor, after: Tensor | None) -> str:
    """``"replaced"``, ``"written"``, or ``"perhaps"`` if that is unknown.

    batch_norm does not count its writes to the running statistics, so that graphs that saved them
    do not raise.
    """
    if after is not before:
        return "replaced"
    return "written" if len(_version_as_shape(before)) else "perhaps"


@torch.compiler.allow_in_graph
def _version_as_shape(t: Tensor) -> Tensor:
    """A tensor of length 1 if ``t`` was written to, else 0; to a tracer the shape is a constant."""
    return torch.empty(int(t._version > 0))


def write_back(places: list[Place], after: list[Any], changes: list[str]) -> None:
    """Write what the run left in the copies to the buffers."""
    if "written" in changes:
        _check_apart(places, changes)
    with torch.no_grad():
        for (holder, name, b), now, change in zip(places, after, changes, strict=True):
            if change == "replaced":
                holder[name] = now
            elif change == "written":
                b.copy_(now)
            elif not _expanded(b):
                b.data.copy_(now)  # without counting it as a write, as batch_norm does


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
    """Whether elements of ``t`` share memory, so that torch does not write to it."""
    return any(size > 1 and step == 0 for size, step in zip(t.shape, t.stride(), strict=True))
