"""The pullback of an MLP inside ``torch.compile``: a few ops in its graph (`ops.mlp`).

Everything in this file is traced by dynamo, so it is written in plain operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.activations import IDS, MAX_PARAMS
from fastjac.input_jacobian.by_autograd import AutogradPullback, Catch, run_model
from fastjac.input_jacobian.pullback import Pullback
from fastjac.nn import row_of
from fastjac.ops.dispatch import OPS
from fastjac.ops.in_graph import MLP_WEIGHT
from fastjac.ops.mlp import output_in_graph, pull_in_graph
from fastjac.ops.net import ACT, INPUT, LINEAR
from fastjac.per_sample import total

Layer = tuple[Tensor, Tensor | None, tuple[int, tuple[float, ...]] | None]
"""The weight and bias of a Linear, and the number and parameters of the activation after it."""


class TracedMlp(Pullback):
    """One run of a Sequential of Linear and activation modules; differentiable once."""

    def __init__(self, model: nn.Module, x: Tensor, layers: list[Layer]) -> None:
        self.model, self.x = model, x
        weights = [weight for weight, _, _ in layers]
        biases = [bias for _, bias, _ in layers if bias is not None]
        self.plan, self.weights = plan_of(layers), weights
        flat = x.flatten(1).contiguous()
        self.output, self.link, self.saved = output_in_graph(
            self.plan, len(weights), flat, *weights, *biases
        )

    @classmethod
    def of(cls, model: Any, x: Tensor) -> TracedMlp | None:
        """None if the ops cannot run the model, or if the compiler's own code is faster."""
        layers = layers_of(model, x)
        return None if layers is None else cls(model, x, layers)

    def _pull(self, w: Tensor) -> tuple[Tensor, Tensor]:
        k = w.shape[0]
        w = w.reshape(-1, w.shape[-1]).contiguous()
        # Detached: their gradients come from the backward of the output.
        weights = [weight.detach() for weight in self.weights]
        return pull_in_graph(self.plan, k, self.link, w, self.saved, *weights)

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        found = [
            self._pull(part)[0].view(part.shape[0], *self.x.shape)
            for part in w.split(chunk_size or w.shape[0])
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        return total(
            self._pull(part)[1].view(part.shape[0], -1)
            for part in w.split(chunk_size or w.shape[0])
        )

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        return self._by_autograd().jvp(u, chunk_size)

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        # Of f, which may depend on x and the targets in any way.
        return self._by_autograd().then(f)

    def _by_autograd(self) -> AutogradPullback:
        """A second run, in the ordinary way. The modules compute and do no more."""
        x, _, output = run_model(self.model, self.x, None)
        return AutogradPullback(x, output)


def layers_of(model: Any, x: Tensor) -> list[Layer] | None:
    """The layers of an MLP that the ops can run, and that they run faster than a compiler."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.dim() < 2:
        return None
    if torch.is_autocast_enabled("cpu") or x.shape[0] == 0:
        return None
    modules = _modules(model)
    if modules is None:
        return None
    layers: list[Layer] = []
    width = x.flatten(1).shape[1]
    flattened = x.dim() == 2
    for module in modules:
        if type(module) is nn.Flatten:
            if layers or (module.start_dim, module.end_dim) != (1, -1):
                return None
            flattened = True
        elif type(module) is nn.Linear:
            weight, bias = module.weight, module.bias
            if not (flattened and _fits(weight, x) and weight.shape[1] == width):
                return None
            if bias is not None and not _fits(bias, x):
                return None
            if weight.numel() > MLP_WEIGHT:
                return None
            layers.append((weight, bias, None))
            width = weight.shape[0]
        else:
            row = row_of(module)
            if row is None or not layers or layers[-1][2] is not None:
                return None
            layers[-1] = (layers[-1][0], layers[-1][1], (IDS[row[0]], row[1]))
    if len(layers) < 2 or layers[-1][2] is not None:
        return None
    impl = OPS["act"].select("auto", x.device, x.dtype)
    return layers if impl == "cpu" else None


def _modules(model: Any) -> list[nn.Module] | None:
    """The modules of a Sequential, perhaps nested, in order; None if a call of one does more."""
    if type(model) is not nn.Sequential:
        return None
    found: list[nn.Module] = []
    for module in (model, *model):
        if module._forward_pre_hooks or module._backward_hooks:
            return None
        if any([type(hook) is not Catch for hook in module._forward_hooks.values()]):
            return None
        if "forward" in module.__dict__:
            return None
        if module is model:
            continue
        if type(module) is nn.Sequential:
            inner = _modules(module)
            if inner is None:
                return None
            found += inner
        else:
            found.append(module)
    return found


def _fits(t: Tensor, x: Tensor) -> bool:
    if not isinstance(t, nn.Parameter) or t.dtype != x.dtype or t.device != x.device:
        return False
    return t.is_contiguous() and t.numel() > 0


def plan_of(layers: list[Layer]) -> list[float]:
    """The plan of `ops.net`, row by row."""
    steps: list[tuple[float, ...]] = [(INPUT, layers[0][0].shape[1])]
    biases = 0
    for number, (_, bias, act) in enumerate(layers):
        steps.append((LINEAR, len(steps) - 1, 0, number, -1 if bias is None else biases))
        biases += bias is not None
        if act is not None:
            steps.append((ACT, len(steps) - 1, 0, act[0], 0, *act[1]))
    plan: list[float] = []
    for step in steps:
        plan += [float(number) for number in step]
        plan += [0.0] * (5 + MAX_PARAMS - len(step))
    return plan
