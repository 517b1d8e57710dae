"""Benchmark cases of a user's own model: what `fastjac.bench_model` and ``bench --model`` run."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac import arguments
from fastjac.bench.cases import Case, unknown
from fastjac.bench.gate import relative_error
from fastjac.bench.idioms import IDIOMS, LayerWise
from fastjac.bench.problems import Loss, StepProblem
from fastjac.model_output import Part, part_of

#: Of a user's model. JacobianReg is a loop over the eager idiom, and JAX cannot run the model.
CONTESTANTS = ("plain", "plain-compiled", "eager", "compiled", "fastjac", "fastjac+compile")


@dataclass
class OwnModel:
    """A model and a batch, as the user gives them.

    Attributes:
        model, x: The model, and a batch that it is called with.
        target: The second argument of the loss, or None.
        loss: ``loss(output, target) -> scalar``; None for `default_loss`.
        output, at: See `fastjac.Penalty` and `fastjac.InputPenalty`.
        notes: What was changed in order to compare gradients.
    """

    model: nn.Module
    x: Tensor
    target: Tensor | None = None
    loss: Loss | None = None
    output: Part = None
    at: str | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TypeError(f"model is {type(self.model).__name__}: it must be an nn.Module")
        if hasattr(self.model, "_orig_mod"):
            raise TypeError("model is compiled: pass the module before torch.compile")
        arguments.tensor("x", self.x)
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("model has no parameter that requires grad, so there is no step")
        self.model = copy.deepcopy(self.model).train()
        output = part_of(self.model(self.x), self.output)
        arguments.batch("output", output, "x", len(self.x))
        self.shape = output.shape
        if _draws(self.problem("plain")):
            self.model = without_dropout(self.model)
            self.notes.append(
                "The model draws random numbers, as dropout does. It was run without them, so that "
                "gradients can be compared: all modules but norms were in eval mode."
            )
            if _draws(self.problem("plain")):
                raise ValueError(
                    "model draws random numbers in eval mode too, so the gradients of two runs "
                    "cannot be compared: pass a model that does not"
                )

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @functools.cached_property
    def name(self) -> str:
        return type(self.model).__name__

    def problem(self, penalty: str, device: Any = None, dtype: Any = None) -> StepProblem:
        """The training step with a penalty. It has the mode of the modules of the model."""
        device, dtype = device or self.device, dtype or self.dtype
        n, m = len(self.x), self.shape[1:].numel()
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(1, n, m, generator=generator) / m**0.5

        def there(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype if tensor.is_floating_point() else None)

        return StepProblem(
            copy.deepcopy(self.model).to(device, dtype),
            there(self.x),
            there(torch.zeros(n) if self.target is None else self.target),
            self.loss or (mean_square if self.target is None else default_loss),
            penalty,
            there(projection),
            output=self.output,
            at=self.at,
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
                f"penalty datagrad needs class indices [{len(self.x)}] as target, and an output "
                f"[{len(self.x)}, classes]; the output has shape {list(self.shape)}"
            )


def without_dropout(model: nn.Module) -> nn.Module:
    """A copy in training mode, whose modules are in eval mode but for the norms."""
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if module is not model and "norm" not in type(module).__name__.lower():
            module.training = False
    return model


def _draws(problem: StepProblem) -> bool:
    """Whether the gradients of two runs from different random states differ by 0.1% or more."""

    def run(seed: int) -> list[Tensor]:
        model = copy.deepcopy(problem.model)
        torch.manual_seed(seed)
        problem.task_loss(model(problem.x)).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    devices = [problem.x.device] if problem.x.is_cuda else []
    with torch.random.fork_rng(devices):
        return relative_error(run(0), run(1)) > 1e-3


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
