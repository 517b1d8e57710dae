"""Benchmark cases of a user's own model: what `fastjac.bench_model` and ``bench --model`` run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastjac import arguments
from fastjac.bench.cases import Case, unknown
from fastjac.bench.gate import short
from fastjac.bench.idioms import IDIOMS, LayerWise
from fastjac.bench.problems import Loss, StepProblem, computed, copied
from fastjac.bench.random_numbers import InEval, draws, unchanged_generators, without_dropout
from fastjac.model_output import Part, part_of

#: Of a user's model. JacobianReg is a loop over the eager idiom, and JAX cannot run the model.
CONTESTANTS = ("plain", "plain-compiled", "eager", "compiled", "fastjac", "fastjac+compile")

NO_COMPILED = (
    "With at=, the PyTorch idiom under torch.compile takes no part: torch.func would need the "
    "model in two parts."
)


@dataclass
class OwnModel:
    """A model and a batch, as the user gives them; all are copied.

    Modules that are in training mode, and those in eval mode in them, stay so. A model that is in
    eval mode is put into training mode.

    Attributes:
        model, x: The model, and a batch that it is called with.
        target: The second argument of the loss, or None.
        loss: ``loss(output, target) -> scalar``; None for `default_loss`.
        output, at: See `fastjac.Penalty` and `fastjac.InputPenalty`.
        notes: What was changed in order to compare gradients.
        inside: What the names of the submodules start with, if the model had to be wrapped.
        picked: An expression for the tensor that ``output`` names in ``output = model(x)``.
    """

    model: nn.Module
    x: Tensor
    target: Tensor | None = None
    loss: Loss | None = None
    output: Part = None
    at: str | None = None
    notes: list[str] = field(default_factory=list)
    inside: str = ""
    picked: str = "output"

    def __post_init__(self) -> None:
        check_model(self.model)
        self.x = arguments.tensor("x", self.x).detach().clone()
        if not len(self.x):
            raise ValueError("x has no samples: its dimension 0 is 0")
        if self.target is not None:
            self.target = arguments.tensor("target", self.target).detach().clone()
        if self.loss is not None and not callable(self.loss):
            raise TypeError(
                f"loss is {self.loss!r}: it must be a function loss(output, target), such as "
                "torch.nn.functional.mse_loss"
            )
        self.name = type(self.model).__name__
        try:
            self.model = copied(self.model)
            self.loss = copied(self.loss) if isinstance(self.loss, nn.Module) else self.loss
        except Exception as error:
            raise ValueError(
                f"model or loss cannot be copied, and the benchmark runs copies: {_said(error)}. "
                "Remove the attribute that copy.deepcopy refuses, or create it in forward"
            ) from error
        if not self.model.training:
            self.model.train()
        parts = [name for name, _ in self.model.named_modules() if name]
        if self.at is not None and self.at not in parts:
            raise ValueError(unknown("submodule at", self.at, parts))
        with unchanged_generators():
            self._run()
            if draws(self.problem("plain"), advancing=True):
                self._without_random_numbers()
        if self.keeps:
            self.notes.append(
                f"The model keeps tensors that it computes in forward ({', '.join(self.keeps)}). "
                "torch.compile refuses a whole step of such a model. Instead of "
                "torch.nn.utils.weight_norm and spectral_norm use those of "
                "torch.nn.utils.parametrizations."
            )

    def _without_random_numbers(self) -> None:
        self.model = without_dropout(self.model)
        self._run()
        if draws(self.problem("plain")):  # in its own forward, not in that of a submodule
            self.model, self.inside = InEval(self.model), "model."
            self._run()
            if draws(self.problem("plain")):
                raise ValueError(
                    "model draws random numbers in eval mode too, so the gradients of two runs "
                    "cannot be compared: pass a model that does not"
                )
        self.notes.append(
            "The model draws random numbers, as dropout does. It was run without them, so that "
            "gradients can be compared: all modules but norms were in eval mode."
        )

    def _run(self) -> None:
        """Run the model and the loss once, and see what they return."""
        given = f"x of shape {list(self.x.shape)} and {self.x.dtype}"
        model = copied(self.model)
        try:
            whole = model(self.x)
        except Exception as error:
            raise ValueError(
                f"model(x) raised {_said(error)}. It was called with {given}, and nothing else: a "
                "model with more arguments needs a module around it that holds them"
            ) from error
        output = arguments.batch("output", part_of(whole, self.output), "x", len(self.x))
        arguments.floating("output", output)
        self.keeps = [name.removeprefix(self.inside) for name, _ in computed(model)]
        self.shape, self.output_dtype = output.shape, output.dtype
        if callable(self.output):
            self.picked = "part(output)"
        elif self.output is not None:
            item = isinstance(self.output, int) or isinstance(whole, Mapping)
            self.picked = f"output[{self.output!r}]" if item else f"output.{self.output}"
        problem = self.problem("plain")
        of = f"an output of shape {list(self.shape)}"
        if self.target is not None:
            of += f" and a target of shape {list(self.target.shape)} and {self.target.dtype}"
        try:
            value = problem.loss(output, problem.target)
        except Exception as error:
            name, needs = "loss(output, target)", "they must fit each other"
            if self.loss is None:
                name = "the default loss"
                needs = (
                    "it needs class indices (int64) for outputs [N, classes], or numbers of the "
                    "shape of the output; pass another loss otherwise"
                )
            raise ValueError(f"{name} raised {_said(error)}, for {of}: {needs}") from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = type(value).__name__
            if isinstance(value, Tensor):
                what = f"a tensor of shape {list(value.shape)}"
            raise TypeError(
                f"loss returned {what}: it must return a tensor with one number, such as the "
                "mean over the batch"
            )
        if not value.requires_grad:
            raise ValueError(
                "the loss does not depend on the parameters of the model: check that neither the "
                "model nor the loss detaches the output"
            )
        if not value.isfinite():
            raise ValueError(f"the loss of this batch is {value.item()}: it must be finite")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def problem(self, penalty: str, device: Any = None, dtype: Any = None) -> StepProblem:
        """The training step with a penalty. It has the mode of the modules of the model.

        A dtype other than that of the first parameter is given to all parameters and tensors. Else
        each keeps its own.
        """
        device, dtype = device or self.device, dtype or self.dtype
        kept = dtype == self.dtype
        n, m = len(self.x), self.shape[1:].numel()
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(1, n, m, generator=generator) / m**0.5

        def there(value: Any) -> Any:
            floating = isinstance(value, nn.Module) or value.is_floating_point()
            return value.to(device) if kept or not floating else value.to(device, dtype)

        loss = self.loss or (mean_square if self.target is None else default_loss)
        return StepProblem(
            there(copied(self.model)),
            there(self.x),
            there(torch.zeros(n) if self.target is None else self.target),
            there(copied(loss)) if isinstance(loss, nn.Module) else loss,
            penalty,
            projection.to(device, self.output_dtype if kept else dtype),
            output=self.output,
            at=None if self.at is None else f"{self.inside}{self.at}",
            own=True,
        )

    def case(self, penalty: str) -> Case:
        """The case of a penalty.

        Raises:
            ValueError: The benchmark does not have the penalty, or the batch does not fit it.
        """
        if penalty not in IDIOMS:
            raise ValueError(unknown("penalty", penalty, [*IDIOMS]))
        layer_wise = isinstance(IDIOMS[penalty], LayerWise)
        if not layer_wise:
            self._check_input(penalty)
        # torch.func.vjp differentiates with respect to an argument of the model.
        split = self.at is not None and not layer_wise
        ways = tuple(name for name in CONTESTANTS if not (split and name == "compiled"))
        if split and NO_COMPILED not in self.notes:
            self.notes.append(NO_COMPILED)
        return Case(
            f"{penalty}-{self.name}"[:24],  # so that the table fits on a terminal
            penalty,
            "step",
            ("own",),
            functools.partial(self.problem, penalty),
            quick=ways,
            only=ways,
        )

    def _check_input(self, penalty: str) -> None:
        if self.at is None:
            arguments.floating("x", self.x)
        if penalty == "datagrad" and (
            self.target is None or self.target.dtype != torch.int64 or len(self.shape) != 2
        ):
            raise ValueError(
                f"penalty datagrad needs class indices [{len(self.x)}] as target (on the command "
                f"line --target classes:K), and an output [{len(self.x)}, K]; the output has shape "
                f"{list(self.shape)}"
            )


def _said(error: Exception) -> str:
    return short(error).rstrip(".!")


def check_model(model: Any) -> None:
    """Check what of a model can be seen before it runs.

    Raises:
        TypeError, ValueError: It is no module that can be trained and compared.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}: it must be an nn.Module")
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise TypeError(
            "model, or a part of it, is compiled: pass the module before torch.compile, which the "
            "benchmark calls itself"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError("model, or a part of it, is TorchScript: pass the nn.Module that it is of")
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ValueError("model has lazy modules that have not run: call model(x) once before")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model has no parameter that requires grad, so there is no step")


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    """The loss of a model without a target."""
    return output.square().mean()


def default_loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy for class indices, over the last dimension; else the mean squared error."""
    if target.is_floating_point():
        return F.mse_loss(output.reshape(target.shape), target)
    if target.dim() == output.dim() - 1 and target.shape[1:] == output.shape[1:-1]:
        return F.cross_entropy(output.flatten(0, -2), target.flatten())
    return F.cross_entropy(output, target)  # [N, classes, ...]
