"""The base of all penalties: options, the two call forms and the reduction.

A penalty defines values per sample, ``R_n``; a call returns ``weight * reduce_n R_n``. The function
of a penalty and the signatures are derived from the class, so that an option is declared once, in
an ``__init__``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Self

from fastjac import arguments, distributed, torch_private
from fastjac.model_output import Part, call_model, check_part, part_of
from fastjac.modes import check_modes, check_not_recomputed, check_not_repeated
from fastjac.ops.autograd import refuse_inference
from fastjac.per_sample import attached_zeros
from fastjac.signatures import (
    Accepted,
    names_of,
    options_of,
    parameters_of,
    shown,
    undefined,
    with_base_called,
    wrong_call,
    wrong_options,
)

REDUCTIONS = ("mean", "sum", "none")


MISSING: Any = object()
"""Stands for an argument that was not passed."""


class PenaltyOptions(TypedDict, total=False):
    weight: float | Tensor
    reduction: str
    every: int
    output: Part


class Penalty(nn.Module):
    """Base of the penalties: ``weight * reduce_n R_n``.

    There are two call forms. The first argument decides which one is meant:

    * a tensor: ``penalty(x, output, *targets) -> value``, if the graph from ``x`` to ``output``
      exists already;
    * a callable: ``penalty(model, x, *targets) -> (output, value)`` runs the model. If ``x`` does
      not require grad, a detached copy of it that does is used.

    Options of every penalty:

    * ``weight``: factor of the value, a number of at least 0, or a floating-point tensor without
      dimensions, whose sign is not checked. The attribute can be assigned, by a schedule for
      example. A tensor is read at each call and in each replay of a CUDA graph, so it can be
      changed in place; its dtype does not change that of the value, and the gradient with respect
      to it is that of a product. A CUDA graph keeps a number that it was captured with: assigning
      another one then raises.
    * ``reduction``: ``"mean"`` over the samples, ``"sum"``, or ``"none"`` for a value ``[N]``. The
      value of an empty batch is 0.
    * ``every``: with ``every=k`` and in training mode, only calls 1, 1 + k, 1 + 2k, … of this
      module compute the value, which is multiplied by k. The other calls cost nothing and return a
      zero that depends on ``output``. In ``eval()`` mode every call computes the value, and
      nothing is multiplied. A training step under ``torch.compile`` is compiled k times
      (``recompile_limit`` is 8). In the capture of a CUDA graph, which cannot count calls, k > 1
      raises.
    * ``output``: names the tensor to penalise, if the model returns several: a key or attribute
      (``"logits"``), an index, or a function that is given what the model returns and returns a
      tensor. The penalty then takes what the model returns: ``penalty(model, x)`` returns it
      unchanged, with the value, and the graph form is ``penalty(x, model(x))``.

    The value has the dtype of the gradient that it measures; half precision is promoted to float32.
    A penalty has no parameters. Its ``state_dict`` holds the number of calls (``calls``, 0-dim
    int64) if k > 1 and is empty otherwise; copies and pickles hold it as well. A weight that is a
    tensor is no buffer: ``to()`` does not move it and the ``state_dict`` does not hold it; deep
    copies and pickles hold a copy of it.
    """

    output: Part
    needs_grad = True
    # Whether the penalty needs the weights of the model after its forward pass, when FSDP2 frees
    # them: to differentiate the output, for instance.
    needs_weights_afterwards = True
    # The weight that a WeightSchedule has set last, and the base weight that it started from.
    _scheduled: tuple[float, float] | None = None
    # Whether a CUDA graph was captured with the weight that is set.
    _captured = False
    _accepted: Accepted
    # Whether the class is not of fastjac: what its methods return is checked.
    _outside = False

    def __new__(cls, *args: Any, **options: Any) -> Self:
        if (args or options) and cls._accepted.refuses(args, options):
            raise wrong_options(cls, args, options)
        return super().__new__(cls)

    def __init__(
        self,
        *,
        weight: float | Tensor = 1.0,
        reduction: str = "mean",
        every: int = 1,
        output: Part = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise wrong_options(type(self), (), unknown)
        super().__init__()
        self._set_weight(arguments.weight("weight", weight))
        self.reduction = arguments.choice("reduction", reduction, REDUCTIONS)
        self.every = arguments.count("every", every)
        # By vars(), so that a module that is used as a function is no submodule.
        vars(self)["output"] = check_part("output", output)
        # Modulo `every`: torch.compile treats the number as a constant and compiles k graphs.
        self._calls = 0

    @property
    def weight(self) -> float | Tensor:
        """The factor of the value."""
        return self._weight

    @weight.setter
    def weight(self, value: float | Tensor) -> None:
        old, value = self._weight, arguments.weight("weight", value)
        if self._captured and value is not old:
            if isinstance(old, Tensor):
                raise RuntimeError(
                    "weight was assigned after a CUDA graph had captured the penalty, and the "
                    "graph still reads the tensor that was the weight: change that tensor in "
                    "place, penalty.weight.fill_(value)"
                )
            if not isinstance(value, Tensor) and value != old:
                raise RuntimeError(
                    f"weight was set from {old} to {value} after a CUDA graph had captured the "
                    "penalty, and the graph keeps the first number: make weight a tensor on the "
                    "device of the model, penalty.weight = torch.tensor(0.1, device='cuda'), "
                    "capture the graph again, and change the tensor in place, "
                    "penalty.weight.fill_(value), or by a WeightSchedule"
                )
            self._captured = not isinstance(value, Tensor)  # with a tensor: to be captured again
        self._set_weight(value)

    def _set_weight(self, value: float | Tensor) -> None:
        self._weight = value
        # For code of torch.compile, to which an attribute that is a number is a constant.
        if not isinstance(value, Tensor):
            # With a dimension: of one without, dynamo reads the number, and traces a second time.
            value = torch.tensor([value], dtype=torch.float64, device="cpu")
        self._number = value

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_captured"}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._outside = not cls.__module__.startswith("fastjac.")
        if cls._outside:
            with_base_called(cls, "_weight")
        first = [p for p in parameters_of(cls.__init__) if p.kind is p.POSITIONAL_ONLY]
        cls.__signature__ = inspect.Signature([*first, *options_of(cls)])  # type: ignore[attr-defined]
        cls._accepted = Accepted(cls)

    def forward(
        self, model_or_x: Any = MISSING, x_or_output: Any = MISSING, *targets: Any, **named: Any
    ) -> Tensor | tuple[Any, Tensor]:
        """``(x, output, *targets) -> value`` or ``(model, x, *targets) -> (output, value)``."""
        if torch.compiler.is_compiling():  # which cannot leave a block with try in its middle
            return self._called(model_or_x, x_or_output, *targets, **named)
        try:
            return self._called(model_or_x, x_or_output, *targets, **named)
        except RuntimeError as error:
            names = names_of(type(self), isinstance(model_or_x, Tensor))
            tensors = [*zip(names, (model_or_x, x_or_output, *targets), strict=False)]
            refuse_inference(error, [*tensors, *named.items()], model_or_x)
            if "a leaf Variable that requires grad" in str(error):
                raise RuntimeError(
                    "the model modifies x, or a parameter, in place (an activation with "
                    "inplace=True, for instance), and autograd needs it: use the out-of-place "
                    f"operation. The error of torch: {error}"
                ) from error
            raise
        except TypeError as error:
            given = tuple(t for t in (model_or_x, x_or_output, *targets) if t is not MISSING)
            wrong = wrong_call(type(self), given, named)
            if wrong is None:
                raise
            raise wrong from error

    def _called(
        self, model_or_x: Any, x_or_output: Tensor, *targets: Any, **named: Any
    ) -> Tensor | tuple[Any, Tensor]:
        graph = isinstance(model_or_x, Tensor)
        if x_or_output is MISSING:
            raise TypeError("the penalty needs (model, x, ...) or (x, output, ...)")
        if not graph and not callable(model_or_x):
            raise TypeError(
                f"the first argument is {type(model_or_x).__name__}: pass x (a Tensor, followed by "
                "output) or a model (a callable, followed by x)"
            )
        if self.every > 1 and self.training:
            check_not_recomputed()
        due = self.due()
        if due and self.needs_grad:
            check_modes()
        if not due:
            whole = x_or_output if graph else model_or_x(x_or_output)
            value = self._reduce(attached_zeros(part_of(whole, self.output)))
        elif graph:
            whole = x_or_output
            output = part_of(whole, self.output)
            value = self._reduce(self.graph_form(model_or_x, output, *targets, **named))
        else:

            def body(model: Any, x: Any) -> tuple[Any, Tensor]:
                found = self.model_form(model, x, *targets, **named)
                if self._outside and not (isinstance(found, tuple) and len(found) == 2):
                    raise TypeError(
                        f"{type(self).__name__}.model_form returned {shown(found)}: it must return "
                        "(output, R_n), what the model returned and a tensor of shape [N]"
                    )
                whole, values = found
                return whole, self._reduce(values)

            whole, value = distributed.run(
                body, model_or_x, x_or_output, weights_afterwards=self.needs_weights_afterwards
            )
        self.count_call()
        value = distributed.attached(value, whole)
        return value if graph else (whole, value)

    def explain(self, *call: Any) -> str:
        """A text on how ``penalty(model, x)`` runs; see `fastjac.explain`."""
        raise TypeError(
            f"{type(self).__name__} has no engines and no layers to explain: "
            f"fastjac.explain({type(self).__name__!r}), without a model, shows its definition"
        )

    def due(self) -> bool:
        """Whether this call computes the value (see ``every``)."""
        if self.every == 1 or not self.training:
            return True
        check_not_repeated()
        return self._calls == 0

    def count_call(self) -> None:
        if self.every > 1 and self.training:
            self._calls = (self._calls + 1) % self.every

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.every > 1:
            destination[prefix + "calls"] = torch.tensor(self._calls, device="cpu")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *others: Any,
    ) -> None:
        calls = state_dict.pop(prefix + "calls", None)  # ignored with every=1
        if self.every > 1 and calls is None and strict:
            missing_keys.append(prefix + "calls")
        elif self.every > 1 and calls is not None:
            self._calls = int(calls) % self.every
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *others
        )

    def graph_form(self, x: Tensor, output: Tensor, *targets: Any, **named: Any) -> Tensor:
        """Returns ``R_n``, ``[N]``, for an ``x`` and an ``output`` in one graph."""
        what = "graph_form(self, x, output, *targets), which returns R_n, a tensor of shape [N]"
        raise undefined(self, "graph_form", what)

    def model_form(
        self, model: Callable[..., Any], x: Tensor, *targets: Any, **named: Any
    ) -> tuple[Any, Tensor]:
        """Runs the model; returns what it returned and ``R_n``, ``[N]``."""
        whole, output = call_model(model, arguments.tensor("x", x), self.output)
        return whole, self.graph_form(x, output, *targets, **named)

    @classmethod
    def call_parameters(cls) -> list[inspect.Parameter]:
        """The parameters of a call; the first two are ``x, output`` or ``model, x``."""
        return parameters_of(cls.graph_form)

    def _factor(self, values: Tensor) -> float | Tensor:
        """What ``values`` are multiplied by: the weight, times ``every`` in training."""
        compiling = torch.compiler.is_compiling()
        # Code of torch.compile is compiled again if a number that it has read changes.
        factor = self._number.view(()) if compiling else self._weight
        if not compiling and torch_private.capturing_now():
            if isinstance(factor, Tensor) and factor.device != values.device:
                raise RuntimeError(
                    f"weight is a tensor on {factor.device} and the value is on {values.device}: a "
                    "CUDA graph would keep the number that it has now; create the tensor on "
                    f"{values.device}, torch.tensor(0.1, device='{values.device}')"
                )
            self._captured = True
        if isinstance(factor, Tensor):
            factor = factor.to(values.dtype)  # of two tensors without dimensions the wider one wins
        every = self.every if self.training else 1
        return factor if every == 1 else factor * every

    def _reduce(self, values: Any) -> Tensor:
        if self._outside and not (isinstance(values, Tensor) and values.dim() == 1):
            raise TypeError(
                f"{type(self).__name__} computed {shown(values)} as R_n: its method must return a "
                "tensor of shape [N], one number for each sample"
            )
        factor = self._factor(values)
        if self.reduction == "none":
            return factor * values
        # The mean over no samples would be 0/0.
        mean = self.reduction == "mean" and values.shape[0] > 0
        value = values.mean() if mean else values.sum()
        return value if not isinstance(factor, Tensor) and factor == 1 else factor * value

    def _is_no_value(self, *others: Any, **named: Any) -> Any:
        """Raises where a penalty is used in place of the value that its call returns."""
        name = type(self).__name__
        raise TypeError(
            f"{name} is a module, and not a value that can be added or differentiated: call it, "
            f"{self._how_to_call}, and use the value that it returns"
        )

    _how_to_call = "output, value = penalty(model, x, ...)"
    __add__ = __radd__ = __mul__ = __rmul__ = backward = item = _is_no_value

    def extra_repr(self) -> str:
        """The options that are not at their defaults."""
        shown = []
        for option in options_of(type(self)):
            value = getattr(self, option.name)
            if isinstance(value, Tensor) or value != option.default:
                shown.append(f"{option.name}={value!r}")
        return ", ".join(shown)


Penalty._accepted = Accepted(Penalty)


class ModelPenalty(Penalty):
    """Base of the penalties that must run the model themselves and have no graph form."""

    def graph_form(self, x: Tensor, output: Tensor, *targets: Any, **named: Any) -> Tensor:
        raise TypeError(
            f"the first argument is a Tensor: {type(self).__name__} runs the model itself and has "
            "no graph form; pass (model, x, ...)"
        )

    def model_form(
        self, model: Callable[..., Any], x: Tensor, *targets: Any, **named: Any
    ) -> tuple[Any, Tensor]:
        what = "model_form(self, model, x, *targets), which returns (output, R_n)"
        raise undefined(self, "model_form", what)

    @classmethod
    def call_parameters(cls) -> list[inspect.Parameter]:
        return parameters_of(cls.model_form)
