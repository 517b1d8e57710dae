"""The entries of the registry, and the small examples that tests and benchmarks run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastjac.penalty import ModelPenalty, Penalty
from fastjac.signatures import functional_of

Kind = Literal["layer-wise", "input-jacobian", "output"]


def graph_arguments(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """``(x, output)``, the arguments of the references of the input-Jacobian penalties."""
    return x, model(x)


def model_arguments(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """``(model, x)``."""
    return model, x


@dataclass(frozen=True)
class Example:
    """One small call: ``penalty(model, x, *targets, **options)``.

    ``reference_arguments(model, x)`` returns the arguments of the reference before ``*targets``;
    ``x`` must require grad if the reference differentiates with respect to it.
    """

    model: nn.Module
    x: Tensor
    targets: tuple[Tensor, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    reference_arguments: Callable[[nn.Module, Tensor], tuple[Any, ...]] = graph_arguments

    def to(self, device: torch.device | str) -> Example:
        """The same call on another device; the model is moved in place."""
        targets = tuple(t.to(device) for t in self.targets)
        return replace(self, model=self.model.to(device), x=self.x.to(device), targets=targets)


@dataclass(frozen=True)
class PenaltySpec:
    """An entry of the registry.

    * ``name``: the name of the functional and of the reference.
    * ``functional``, ``module``, ``reference``: the three forms of the penalty.
    * ``source``: the publication of the penalty.
    * ``kind``: ``"input-jacobian"`` (has a graph form and a model form), ``"layer-wise"`` (model
      form only) or ``"output"`` (a function of the output alone).
    * ``example(dtype, generator)``: returns an :class:`Example` with numbers from the generator.
    * ``cases``: sets of options that the reference has too; tests run each of them.
    """

    name: str
    functional: Callable[..., Any]
    module: type[Penalty]
    reference: Callable[..., Tensor]
    source: str
    kind: Kind
    example: Callable[[torch.dtype, torch.Generator], Example]
    cases: tuple[dict[str, Any], ...]

    @property
    def place(self) -> tuple[int, str]:
        """The sort key of the registry: the kind, then the name."""
        return get_args(Kind).index(self.kind), self.name

    @classmethod
    def of(
        cls,
        module: type[Penalty],
        reference: Callable[..., Tensor],
        *,
        source: str,
        example: Callable[[torch.dtype, torch.Generator], Example],
        kind: Kind = "input-jacobian",
        cases: tuple[dict[str, Any], ...] = (),
    ) -> PenaltySpec:
        """Derives the name from the reference, and the functional from the module."""
        name = reference.__name__
        functional = functional_of(module, name)
        return cls(name, functional, module, reference, source, kind, example, ({}, *cases))


def randn(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, drawn in float64 so that they are the same for each dtype."""
    options: Any = {"generator": generator, "device": generator.device}
    return torch.randn(*shape, dtype=torch.float64, **options).to(dtype)


def mlp(
    widths: Sequence[int], activation: type[nn.Module], dtype: torch.dtype, gen: torch.Generator
) -> nn.Sequential:
    """Linear layers of these widths with activations between; does not use the global RNG."""
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise(widths):
        linear = nn.Linear(c_in, c_out, device="meta", dtype=dtype).to_empty(device=gen.device)
        with torch.no_grad():
            linear.weight.copy_(randn((c_out, c_in), dtype, gen) / c_in**0.5)
            linear.bias.copy_(randn((c_out,), dtype, gen) / 2)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def logits_example(dtype: torch.dtype, generator: torch.Generator) -> Example:
    """Three samples, three logits, no target."""
    return Example(mlp((4, 5, 3), nn.Tanh, dtype, generator), randn((3, 4), dtype, generator))


def classifier_example(dtype: torch.dtype, generator: torch.Generator) -> Example:
    """The same with class indices."""
    target = torch.randint(3, (3,), generator=generator, device=generator.device)
    return replace(logits_example(dtype, generator), targets=(target,))


def critic_example(dtype: torch.dtype, generator: torch.Generator) -> Example:
    """Scalar outputs ``[N, 1]``; two hidden layers, since gradients of one are often near 1."""
    model = mlp((4, 5, 5, 1), nn.Softplus, dtype, generator)
    return Example(model, randn((3, 4), dtype, generator))


def layered_example(dtype: torch.dtype, generator: torch.Generator) -> Example:
    """Two hidden layers of different widths; the reference gets a list of the layers."""
    model = mlp((4, 5, 3, 2), nn.GELU, dtype, generator)
    x = randn((3, 4), dtype, generator)
    return Example(model, x, reference_arguments=lambda model, x: (sequential_layers(model, x),))


def pushed_example(dtype: torch.dtype, generator: torch.Generator) -> Example:
    """The same; the reference gets the activations as a function of the input."""

    def arguments(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
        return lambda inputs: [a for _z, _w, _phi, a in walk(model, inputs)], x

    example = layered_example(dtype, generator)
    return replace(example, reference_arguments=arguments)


def walk(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor, nn.Module | None, Tensor]]:
    """``(z, W, φ, a)`` of each linear layer of an :func:`mlp`; no activation after the last."""
    modules = list(model.children())
    steps: list[tuple[Tensor, Tensor, nn.Module | None, Tensor]] = []
    a = x
    for linear, phi in zip(modules[::2], [*modules[1::2], None], strict=True):
        z = linear(a)
        a = z if phi is None else phi(z)
        weight = linear.weight
        assert isinstance(weight, Tensor)
        steps.append((z, weight, phi, a))
    return steps


def sequential_layers(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor, nn.Module | None]]:
    """``(z, W, φ)`` of each linear layer of an :func:`mlp`."""
    return [(z, weight, phi) for z, weight, phi, _a in walk(model, x)]


def call_forms(cls: type[Penalty]) -> list[str]:
    """The arguments of each call form of a penalty, ``"x, output, target"``."""
    _, _, *more = cls.call_parameters()
    positional = [p for p in more if p.kind is not p.KEYWORD_ONLY]
    rest = "".join(", …" if p.kind is p.VAR_POSITIONAL else f", {p.name}" for p in positional)
    forms = ["model, x"] if issubclass(cls, ModelPenalty) else ["x, output", "model, x"]
    return [form + rest for form in forms]
