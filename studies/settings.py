"""The setting of a run, and the crossing of factors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """All that decides the result of a run. A study has a subclass with a field for each factor."""

    seed: int = 0


S = TypeVar("S", bound=Setting)


def cross(kind: type[S], **factors: Sequence[Any]) -> Iterator[S]:
    """The settings of all combinations of the levels of the factors.

    Raises:
        TypeError: ``kind`` has no field of that name.
    """
    unknown = set(factors) - {field.name for field in fields(kind)}
    if unknown:
        raise TypeError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    for levels in itertools.product(*factors.values()):
        yield kind(**dict(zip(factors, levels, strict=True)))
