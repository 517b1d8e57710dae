"""Base of the penalties on the gradient with respect to an input or hidden tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, distributed
from fastjac.input_jacobian import by_autograd, select
from fastjac.input_jacobian.compiled import engine
from fastjac.penalty import Penalty, PenaltyOptions


class InputOptions(PenaltyOptions, total=False):
    at: str | None
    engine: str


class ProjectionOptions(InputOptions, total=False):
    norm: str


class RandomOptions(ProjectionOptions, total=False):
    generator: torch.Generator | None
    chunk_size: int | None


class InputPenalty(Penalty):
    """Base of the penalties on the gradient with respect to an input or hidden tensor.

    ``at`` names a submodule: in the model form the gradient is taken with respect to its output
    instead of ``x`` (which may then be of an integer dtype). In the graph form pass the hidden
    tensor itself as ``x``.

    ``engine`` (model form): ``"chain"`` writes the double backward out, link by link, without
    ``create_graph``; ``"autograd"`` asks torch for it; ``"compiled"`` is ``torch.func.vjp`` inside
    ``torch.compile``. ``"auto"`` takes the chain engine for an ``nn.Module`` that it can record,
    else autograd, with a warning the first time; a named engine never falls back.
    ``explain_engine(model, x)`` says what runs and why. See `fastjac.input_jacobian.chain`.

    ``"compiled"`` is for models that torch traces as one graph, and is never chosen by ``"auto"``:
    it compiles for seconds at the first call, and anew for other shapes, dtypes and modes.
    The first run of what was compiled is compared with torch's own kernels, and raises if it is
    wrong. Differentiable once. Random numbers come from torch's global generator, as in the other
    engines; a ``generator`` of projections raises. So does what torch cannot trace (control flow
    that depends on numbers, hidden tensors that the model keeps), or would differentiate wrongly (a
    ``torch.autograd.Function``, ``.data``, hooks on tensors).
    """

    # Whether ``per_sample`` uses x only in calls of `by_autograd.vjp`: said by the class that has
    # it,
    # so that a subclass with another one runs on autograd.
    chain_ready = False
    draws_inside = True  # by its ``generator``, if it has one: in ``per_sample``

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "per_sample" in vars(cls) and "chain_ready" not in vars(cls):
            cls.chain_ready = False

    def __init__(
        self, *, at: str | None = None, engine: str = "auto", **options: Unpack[PenaltyOptions]
    ) -> None:
        super().__init__(**options)
        if at is not None and not isinstance(at, str):
            raise TypeError(f"at is {type(at).__name__}: it must be the name of a submodule")
        self.at = at
        self.engine = arguments.choice("engine", engine, select.ENGINES)

    def graph_form(self, x: Tensor, output: Tensor, *targets: Any, **named: Any) -> Tensor:
        if self.at is not None:
            raise ValueError(
                f"at={self.at!r} is for the model form: here pass the hidden tensor itself as x"
            )
        if self.engine in ("chain", "compiled"):
            raise ValueError(
                f"engine={self.engine!r} is for the model form, (model, x, ...): here the graph "
                "exists"
            )
        return self._checked(x, output, *targets, **named)

    def model_form(
        self, model: Callable[..., Any], x: Tensor, *targets: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        if distributed.tensor_parallel(model):
            raise RuntimeError(distributed.TENSOR_PARALLEL)
        if self.engine == "compiled":
            return engine.run(self, model, x, targets, named)
        if select.chain_wanted(self, model, x, (*targets, *named.values())):
            result = select.by_chain(self, model, x, targets, named)
            if result is not None:
                return result
        x, output = by_autograd.run_model(model, x, self.at)
        return output, self._checked(x, output, *targets, **named)

    def _checked(self, x: Tensor, output: Tensor, *targets: Any, **named: Any) -> Tensor:
        by_autograd.check_graph(x, output)
        distributed.check_graph(x, output)
        return self.per_sample(x, output, *targets, **named)

    def explain_engine(self, model: Callable[..., Any], x: Tensor) -> str:
        """Which engine ``penalty(model, x)`` would run, the links of the chain, or why not."""
        return select.explain(self, model, x)
