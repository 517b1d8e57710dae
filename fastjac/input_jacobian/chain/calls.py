"""What a trace consists of: calls of torch, whose tensors are numbered values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch


class Value:
    """A tensor among the arguments of a call, by its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"v{self.number}"


class Memory(NamedTuple):
    """Where the numbers of a value are.

    The root stands for the memory that an input or the result of an operation begins: an address
    or a negative number for inputs, ``("result", n)`` for results. What is no input shares memory
    only with values of its own root, so the memory is free when all of them are.
    """

    root: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def like(self, other: Memory | None) -> bool:
        return other is not None and self[2:] == other[2:]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def transposed(self) -> Memory:
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])


class Call(NamedTuple):
    func: Any  # the overload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[int]

    def uses(self) -> list[int]:
        return values_in((self.args, *self.kwargs.values()))

    def written(self) -> list[int]:
        """What it writes to."""
        return [
            n
            for k, argument in enumerate(self.func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for n in values_in(
                self.args[k] if k < len(self.args) else self.kwargs.get(argument.name)
            )
        ]


class Calls(NamedTuple):
    """What was traced. The first ``inputs`` values are those that the function is given."""

    calls: list[Call]
    memory: list[Memory | None]  # by number; None for None among the inputs
    inputs: int


def used(traced: Calls, outputs: list[Any]) -> list[Call]:
    """The calls without those whose results nothing uses."""
    memory = traced.memory
    needed = {*outputs}
    roots = {root_of(memory, n) for n in outputs}
    found = []
    for call in reversed(traced.calls):
        written = {root_of(memory, n) for n in call.written()}
        if roots.intersection(written) or needed.intersection(call.results):
            needed.update(call.uses())
            roots.update([root_of(memory, n) for n in call.uses()])
            found.append(call)
    return found[::-1]


def root_of(memory: list[Memory | None], number: int | None) -> Any:
    found = None if number is None else memory[number]
    return None if found is None else found.root


def values_in(arguments: Any) -> list[int]:
    if isinstance(arguments, Value):
        return [arguments.number]
    if isinstance(arguments, tuple | list):
        return [n for a in arguments for n in values_in(a)]
    return []
