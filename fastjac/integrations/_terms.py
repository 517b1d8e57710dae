"""A penalty in the training loop of another library: its input, its weight schedule, its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastjac import arguments
from fastjac.input_jacobian.penalty import InputPenalty
from fastjac.integrations._timing import StepTimer
from fastjac.layerwise.penalty import LayerPenalty
from fastjac.model_output import Picked, part_of
from fastjac.penalties import Penalty
from fastjac.penalty import ModelPenalty
from fastjac.presets import WGANGP
from fastjac.schedules import WeightSchedule


class PenaltyTerm:
    """A penalty, and how to compute it in a training step that was not written for it.

    The caller attaches a layer-wise penalty to the model, ``PenaltyTerm(DREG(net))``, and it has no
    further options. An input-Jacobian penalty is computed by autograd, in the graph of the step's
    own forward pass: hooks make the input of ``module`` require grad and record its output.
    ``module`` must run exactly once per step with gradients on. In this pass
    ``scaled_dot_product_attention`` computes the matrix of its scores, which autograd can
    differentiate twice.

    Arguments:
        penalty: a penalty with ``reduction="mean"`` or ``"sum"``. If ``module`` returns several
            tensors, its option ``output`` names the one to penalise: ``SpectReg(output="logits")``.
        module: the name of the submodule that is penalised, or ``""`` for the whole model. Its only
            floating-point argument is ``x``.
        at: the name of a submodule of the model whose output is used as ``x``, such as the
            embedding of token inputs.
        targets: a function of the batch that returns the arguments of the penalty after
            ``x, output``: a tensor or a tuple.
        schedule: a function of the optimiser's step, such as `fastjac.Warmup`, that returns a
            factor of ``penalty.weight``.
        name: the name in the logs, ``fastjac/<name>``; by default the class of the penalty.
    """

    def __init__(
        self,
        penalty: Penalty,
        *,
        module: str = "",
        at: str | None = None,
        targets: Callable[[Any], Any] | None = None,
        schedule: Callable[[int], float] | None = None,
        name: str | None = None,
    ) -> None:
        if not isinstance(penalty, Penalty):
            what = f"the class {penalty.__name__}" if isinstance(penalty, type) else repr(penalty)
            raise TypeError(f"penalty is {what}: it must be a penalty, such as fastjac.SpectReg()")
        if penalty.reduction == "none":
            raise ValueError("penalty has reduction='none': it must be 'mean' or 'sum' in a loss")
        kind = type(penalty).__name__
        self.attached = isinstance(penalty, LayerPenalty)
        if isinstance(penalty, LayerPenalty):
            if not penalty.attached:
                raise ValueError(f"penalty is not attached to a model: pass {kind}(model)")
            if module or at is not None or targets is not None:
                raise ValueError(
                    f"penalty is {kind}, which is attached to its model: module, at and targets "
                    "are for penalties on the input Jacobian"
                )
        elif isinstance(penalty, ModelPenalty | WGANGP):
            raise TypeError(
                f"penalty is {kind}, which runs the model itself: call it in the training step, "
                "and add its value to the loss there"
            )
        elif isinstance(penalty, InputPenalty) and penalty.at is not None:
            raise ValueError(f"penalty has at={penalty.at!r}: pass at to PenaltyTerm instead")
        self.penalty, self.module, self.at = penalty, module, at
        self.targets = targets
        self.schedule = None if schedule is None else WeightSchedule(penalty, schedule)
        self.name = kind if name is None else name
        self._inputs: list[Tensor] = []
        self._outputs: list[tuple[Tensor, int]] = []  # with their versions

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Records the input and the output of the model's run in this block."""
        self._inputs, self._outputs = [], []
        try:
            with ExitStack() as handles:
                if not self.attached:
                    self._register(model, handles)
                yield
        except BaseException:  # the step has no loss
            self.clear()
            raise

    def _register(self, model: nn.Module, handles: ExitStack) -> None:
        if any(hasattr(part, "_orig_mod") for part in model.modules()):
            raise TypeError(
                "the model is compiled, and torch cannot differentiate compiled graphs twice: "
                "train it without torch.compile, or use a layer-wise penalty that is attached "
                "before compiling"
            )
        # The other kernels for attention have no second derivative.
        handles.enter_context(sdpa_kernel(SDPBackend.MATH))
        module = _submodule(model, "module", self.module) if self.module else model
        if self.at is None:
            handle = module.register_forward_pre_hook(self._enter, with_kwargs=True)
        else:
            hidden = _submodule(model, "at", self.at)
            handle = hidden.register_forward_hook(self._hidden)
        handles.callback(handle.remove)
        handle = module.register_forward_hook(self._leave)
        handles.callback(handle.remove)

    def clear(self) -> None:
        """Forgets the recorded run, which frees its graph."""
        self._inputs, self._outputs = [], []
        if isinstance(self.penalty, LayerPenalty):
            self.penalty.clear()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        args, kwargs = list(args), dict(kwargs)
        places: list[tuple[Any, Any]] = [(args, k) for k in range(len(args))]
        places += [(kwargs, k) for k in kwargs]
        places = [(p, k) for p, k in places if _is_floating(p[k])]
        if len(places) != 1:
            raise RuntimeError(
                f"module={self.module!r} was called with {len(places)} floating-point tensors: x "
                "must be the only one; otherwise pass at=, the name of the submodule whose output "
                "is x (for tokens the embedding)"
            )
        place, k = places[0]
        if not place[k].requires_grad:
            place[k] = place[k].detach().requires_grad_()
        self._inputs.append(place[k])
        return tuple(args), kwargs

    def _hidden(self, module: nn.Module, args: Any, hidden: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        hidden = arguments.floating(f"the output of at={self.at!r}", hidden)
        self._inputs.append(hidden if hidden.requires_grad else hidden.detach().requires_grad_())
        return self._inputs[-1].clone()  # in-place operations then change the copy

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            picked = part_of(output, self.penalty.output)
            self._outputs.append((picked, picked._version))

    def value(self, batch: Any) -> Tensor:
        """The penalty of the recorded run."""
        inputs, outputs = self._inputs, self._outputs
        self._inputs, self._outputs = [], []
        if self.attached:
            return self.penalty()
        for place, seen in ((f"module={self.module!r}", outputs), (f"at={self.at!r}", inputs)):
            if len(seen) != 1:
                whole = " (the whole model)" if place == "module=''" else ""
                raise RuntimeError(
                    f"{place}{whole} ran {len(seen)} times with gradients on in this training "
                    "step: it must run exactly once; pass the name of another submodule, such as "
                    f"PenaltyTerm({type(self.penalty).__name__}(), module='net'), or call the "
                    "penalty in the training step"
                )
        output, version = outputs[0]
        if output._version != version:  # autograd would differentiate the change too
            raise RuntimeError(
                f"the output of module={self.module!r} was changed in place after the module had "
                "returned it: use an out-of-place operation (out = out * 2 instead of out *= 2), "
                "or pass the name of a module that contains the change"
            )
        targets = () if self.targets is None else self.targets(batch)
        targets = targets if isinstance(targets, tuple) else (targets,)
        return self.penalty(inputs[0], Picked(output), *targets)


def _submodule(model: nn.Module, argument: str, name: str) -> nn.Module:
    found = dict(model.named_modules(remove_duplicate=False)).get(name)
    if found is None or name == "":
        names = ", ".join(n for n, _ in model.named_modules() if n)
        raise ValueError(
            f"{argument}={name!r} is not the name of a submodule of {type(model).__name__}: its "
            f"submodules are {names or 'none'}"
        )
    return found


def _is_floating(value: Any) -> bool:
    """Whether a value can be x; a number such as ``num_items_in_batch`` of Transformers cannot."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


class Terms:
    """The terms of one training loop: adds them to the loss, and times them."""

    def __init__(self, terms: Sequence[PenaltyTerm | Penalty], measure_every: int) -> None:
        if not terms:
            raise ValueError("penalties is empty: pass at least one penalty")
        self.terms = [t if isinstance(t, PenaltyTerm) else PenaltyTerm(t) for t in terms]
        names = [t.name for t in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(
                f"the names of the penalties are {names}: they must differ; pass name= to "
                "PenaltyTerm"
            )
        period = arguments.count("measure_every", measure_every, least=0)
        window = max(t.penalty.every for t in self.terms)
        self.timer = StepTimer(max(period, window) if period else 0, window)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for term in self.terms:
                stack.enter_context(term.watch(model))
            yield

    def set_step(self, step: int) -> None:
        """Sets the step of the optimiser in the schedules."""
        for term in self.terms:
            if term.schedule is not None:
                term.schedule.set_step(step)

    def values(self, batch: Any, loss: Tensor) -> dict[str, Tensor]:
        """The value of each penalty for the recorded run, by name, to be added to ``loss``."""
        values = {}
        try:
            for term in self.terms:
                with self.timer.call(term.name):
                    values[term.name] = term.value(batch)
                self.timer.backward(term.name, values[term.name], loss)
        except BaseException:
            self.clear()
            raise
        return values

    def clear(self) -> None:
        """Forgets the recorded run, if its step has no loss."""
        for term in self.terms:
            term.clear()

    def state_dict(self) -> dict[str, Any]:
        return {term.name: term.penalty.state_dict() for term in self.terms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counts of `every`; a term that the checkpoint does not have starts at 0."""
        for term in self.terms:
            term.penalty._calls = 0
            term.penalty.load_state_dict(state.get(term.name, {}), strict=False)
