"""Runs a model, and finds the tensor to penalise in what it returns; keeps the model's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastjac.torch_private import tree_leaves, tree_map

Part = str | int | Callable[[Any], Tensor] | None
"""Names a tensor in what a model returns: a key or an attribute, an index, or a function of it.
None stands for a model that returns a tensor."""


def check_part(argument: str, part: Any) -> Part:
    """Check that a value can name a part of what a model returns."""
    if isinstance(part, bool) or not (
        part is None or isinstance(part, str | int) or callable(part)
    ):
        raise TypeError(
            f"{argument} is {part!r}: it must be a key such as 'logits', an index, or a function "
            "that is given what the model returns"
        )
    return part


class Picked(NamedTuple):
    """The tensor that `part_of` has found already."""

    tensor: Tensor


def part_of(whole: Any, part: Part) -> Tensor:
    """The tensor that ``part`` names in what a model returned."""
    if isinstance(whole, Picked):
        return whole.tensor
    if part is None:
        if not isinstance(whole, Tensor):
            raise TypeError(
                f"output is {type(whole).__name__}: what the model returns must be a torch.Tensor, "
                "or the option output of the penalty must name one in it, by a key "
                "(output='logits'), an index (output=0) or a function"
            )
        return whole
    if callable(part):
        found = part(whole)
    elif isinstance(whole, Tensor):
        raise TypeError(
            f"output={part!r} names a part of what the model returns, and it returned a Tensor: "
            "leave output unset, or pass a function of the tensor"
        )
    else:
        found = _named(whole, part)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"output={part!r} of the {type(whole).__name__} that the model returned is "
            f"{type(found).__name__}: it must name a torch.Tensor"
        )
    return found


def _named(whole: Any, part: str | int) -> Any:
    # The outputs of transformers are mappings, whose indices are those of this tuple.
    values = whole.to_tuple() if hasattr(whole, "to_tuple") else whole
    if isinstance(part, int) and isinstance(values, Sequence):
        if -len(values) <= part < len(values):
            return values[part]
        known = f"{len(values)} values"
    elif isinstance(whole, Mapping):
        if part in whole:
            return whole[part]
        known = f"the keys {', '.join(map(repr, whole))}"
    else:
        if isinstance(part, str) and hasattr(whole, part):
            return getattr(whole, part)
        known = f"the attributes {', '.join(getattr(whole, '__dict__', ())) or 'of its class'}"
    raise ValueError(
        f"output={part!r} is not a part of the {type(whole).__name__} that the model returned, "
        f"which has {known}"
    )


def call_model(model: Callable[..., Any], x: Tensor, part: Part = None) -> tuple[Any, Tensor]:
    """What the model returns for x, and the tensor in it that ``part`` names."""
    whole = model(x)
    if part is None and isinstance(whole, Tensor):
        return whole, whole
    return whole, part_of(whole, part)


def tensors_of(whole: Any) -> list[Tensor] | None:
    """The tensors in what a model returned; None if it has an object that may hide some."""
    leaves = [leaf for leaf in tree_leaves(whole) if leaf is not None]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor | bool | int | float | str)]
    return None if others else tensors


def with_tensors(whole: Any, tensors: list[Tensor]) -> Any:
    """What a model returned, with other tensors in place of those of `tensors_of`."""
    left = iter(tensors)
    return tree_map(lambda leaf: next(left) if isinstance(leaf, Tensor) else leaf, whole)


def _modules_of(model: Any) -> list[nn.Module]:
    """The model, or the modules that a function closes over, or whose method it is."""
    if isinstance(model, nn.Module):
        return [model]
    held = [cell.cell_contents for cell in getattr(model, "__closure__", None) or ()]
    held += [getattr(model, "__self__", None), getattr(model, "func", None)]
    return [value for value in held if isinstance(value, nn.Module)]


class State:
    """The buffers of the model and the state of torch's random generators."""

    def __init__(self, model: Any, x: Tensor) -> None:
        # Those of a lazy module that has not run have no numbers.
        self.buffers = [
            (part._buffers, name, buffer, buffer.clone())
            for module in _modules_of(model)
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None and not is_lazy(buffer)
        ]
        self.cuda = x.device if x.is_cuda else None
        self.random = torch.get_rng_state()
        self.cuda_random = None if self.cuda is None else torch.cuda.get_rng_state(self.cuda)

    def restore(self) -> None:
        for buffers, name, buffer, before in self.buffers:
            buffers[name] = buffer
            if not torch.equal(buffer, before):
                # Without counting it as a write, since earlier graphs may hold the buffer.
                buffer.data.copy_(before)
        torch.set_rng_state(self.random)
        if self.cuda is not None and self.cuda_random is not None:
            torch.cuda.set_rng_state(self.cuda_random, self.cuda)
