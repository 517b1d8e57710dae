"""`InputPenalty`, the base of the penalties on an input gradient or Jacobian."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, distributed
from fastjac.input_jacobian import by_autograd, select, slips
from fastjac.input_jacobian.pullback import Pullback
from fastjac.penalty import Penalty, PenaltyOptions
from fastjac.signatures import parameters_of, undefined


class InputOptions(PenaltyOptions, total=False):
    at: str | None
    engine: str


class InputPenalty(Penalty):
    """Base of the penalties on the gradient with respect to an input or hidden tensor.

    A subclass defines ``per_sample(pull, *targets)``, which returns ``R_n`` as ``[N]`` from a
    :class:`~fastjac.input_jacobian.pullback.Pullback`: the output of the model and products with
    its Jacobian.

    ``uses_jvp = True`` in a subclass says that it calls ``pull.jvp``; ``"auto"`` then takes the
    chain engine in the first call too, since torch differentiates the JVP of some norms wrongly.

    ``at`` names a submodule: in the model form the gradient is taken with respect to its output
    instead of ``x`` (which may then be of an integer dtype). In the graph form pass the hidden
    tensor itself as ``x``.

    ``engine`` (model form) is one of

    * ``"chain"``: computes the double backward operation by operation, from the autograd graph of
      the run and without ``create_graph``. Its second call with the same operations and shapes is
      traced, and later ones repeat the calls of torch that it made. With ``create_graph=True`` the
      value is computed once more, by autograd, unless the model has kept a hidden tensor: then the
      value is differentiable once;
    * ``"autograd"``: ``torch.autograd.grad`` with ``create_graph=True``;
    * ``"auto"`` (default): the chain engine where it can read the graph, else autograd. If x has
      fewer than 32,768 elements, autograd runs the first call with the same operations and shapes.

    The model runs once, in the ordinary way, and the engine is chosen after the run, for this call
    alone. If a named engine cannot run a call, it raises. If autograd
    must run a model whose ``scaled_dot_product_attention`` torch cannot differentiate twice, the
    model runs under ``SDPBackend.MATH``; with ``"auto"`` its first call runs it a second time then,
    from the same random numbers and buffers.
    ``explain(model, x)`` returns which engine runs and why.

    Inside ``torch.compile`` (see `fastjac.compile`) the products are traced as those of autograd,
    and become a part of the graph of the step; the value is differentiable once, and so is that of
    the graph form. ``"chain"`` raises there, and so does a model that calls a
    ``torch.autograd.Function``, whose second derivative torch would lose.
    """

    uses_jvp = False  # whether `per_sample` calls `Pullback.jvp`
    by_hand = False  # whether `per_sample` was seen to call torch.autograd.grad itself

    def __init__(
        self, *, at: str | None = None, engine: str = "auto", **options: Unpack[PenaltyOptions]
    ) -> None:
        super().__init__(**options)
        if at is not None and not isinstance(at, str):
            raise TypeError(f"at is {type(at).__name__}: it must be the name of a submodule")
        self.at = at
        self.engine = arguments.choice("engine", engine, select.ENGINES)

    def per_sample(self, pull: Pullback, *targets: Any, **named: Any) -> Tensor:
        """``R_n``, ``[N]``."""
        what = "per_sample(self, pull, *targets), which returns R_n, a tensor of shape [N]"
        raise undefined(self, "per_sample", what)

    @classmethod
    def call_parameters(cls) -> list[inspect.Parameter]:
        return cls._with_targets(cls.per_sample)

    @staticmethod
    def _with_targets(method: Callable[..., Any]) -> list[inspect.Parameter]:
        """``x, output``, and the parameters of a method after its first one."""
        return parameters_of(Penalty.graph_form)[:2] + parameters_of(method)[1:]

    def graph_form(self, x: Tensor, output: Tensor, *targets: Any, **named: Any) -> Tensor:
        if self.at is not None:
            raise ValueError(
                f"at={self.at!r} is for the model form: in the graph form pass the hidden tensor "
                "itself as x"
            )
        if self.engine == "chain":
            raise ValueError(
                f"engine={self.engine!r} is for the model form, (model, x, ...): in the graph form "
                "the graph exists already"
            )
        by_autograd.check_graph(arguments.floating("x", x), output)
        distributed.check_graph(x, output)
        pull = by_autograd.AutogradPullback(x, output)
        if self._outside:
            return slips.values(self, pull, targets, named)
        return self.per_sample(pull, *targets, **named)

    def model_form(
        self, model: Callable[..., Any], x: Tensor, *targets: Any, **named: Any
    ) -> tuple[Any, Tensor]:
        if distributed.tensor_parallel(model):
            raise RuntimeError(distributed.TENSOR_PARALLEL)
        return select.run(self._request(*targets, **named), model, x)

    def explain(self, model: Callable[..., Any], x: Tensor) -> str:
        """Returns a text that says which engine ``penalty(model, x)`` would run, and why."""
        return select.explain(self._request(), model, x)

    def _request(self, *targets: Any, **named: Any) -> select.Request:
        return select.Request(self, targets, named)
