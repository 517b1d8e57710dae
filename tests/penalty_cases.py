"""The cases of the registry as pytest parameters, and a call of one case."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastjac.penalties import PENALTIES, Example, PenaltySpec


def takes(spec: PenaltySpec, option: str) -> bool:
    return option in inspect.signature(spec.functional).parameters


SPECS = [pytest.param(spec, id=name) for name, spec in PENALTIES.items()]
CASES = [
    pytest.param(spec, options, id=f"{name}-{k}" + "".join(f"-{o}" for o in options))
    for name, spec in PENALTIES.items()
    for k, options in enumerate(spec.cases)
]


def engines_of(spec: PenaltySpec) -> list[str | None]:
    """Values of ``engine`` for the model form; None if the penalty has no such option."""
    if not takes(spec, "engine"):
        return [None]
    return ["autograd", "chain"]


def by_engine(cases: list[Any]) -> list[Any]:
    """The same pytest parameters with every engine that can run them."""
    return [
        pytest.param(*case.values, engine, id=f"{case.id}-{engine}" if engine else case.id)
        for case in cases
        for engine in engines_of(case.values[0])
    ]


# Both sides sum the same few dozen float64 products in another order: about ten roundings of
# 1.1e-16. Gradients may cancel, so their absolute tolerance is relative to numbers of order 1.
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)
close_gradients = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-13)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def specs_with(option: str) -> list[Any]:
    return [p for p in SPECS if takes(p.values[0], option)]


@dataclass
class Call:
    """One example of a penalty with one set of options, in float64; ``x`` requires grad."""

    spec: PenaltySpec
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    dtype: torch.dtype = torch.float64
    engine: str | None = None

    def __post_init__(self) -> None:
        self.example: Example = self.spec.example(self.dtype, seeded(self.seed))
        self.options = {**self.example.options, **self.options}
        self.model = self.example.model
        self.x = self.example.x.clone().requires_grad_()
        self.targets = self.example.targets

    @property
    def inputs(self) -> list[Tensor]:
        """The inputs of the gradients: ``x`` and all parameters."""
        return [self.x, *self.model.parameters()]

    def random(self) -> dict[str, Any]:
        """A new generator with the same seed, if the penalty takes one."""
        return {"generator": seeded(7)} if takes(self.spec, "generator") else {}

    def own(self) -> dict[str, Any]:
        """The options of the case, with a generator and the engine if the penalty takes them."""
        return {**self.options, **self.random(), **({"engine": self.engine} if self.engine else {})}

    def model_form(self, **options: Any) -> tuple[Tensor, Tensor]:
        options = {"reduction": "none", **self.own(), **options}
        return self.spec.functional(self.model, self.x, *self.targets, **options)

    def values(self, **options: Any) -> Tensor:
        return self.model_form(**options)[1]

    def module(self, **options: Any) -> Any:
        return self.spec.module(**{**self.own(), **options})

    def reference(self, **options: Any) -> Tensor:
        arguments = (*self.example.reference_arguments(self.model, self.x), *self.targets)
        return self.spec.reference(*arguments, **{**self.options, **self.random(), **options})


def gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of the sum of a value; zeros if it does not depend on an input."""
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(value.sum(), inputs, **options))
