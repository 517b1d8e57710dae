"""Models for the tests of the layer-wise penalties, and what their layers see."""

from __future__ import annotations

import copy
from collections import Counter
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastjac import reference
from fastjac.penalties import DREG

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


class Model(nn.Module):
    """A network given by modules and a forward function."""

    def __init__(self, forward: Any, **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Counting(TorchDispatchMode):
    """Counts the operations, which on a GPU are launches, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(
        4, 2, dim_feedforward=6, dropout=0.0, activation=F.gelu, batch_first=True
    )


def one_layer(act: nn.Module, forward: Any = lambda m, x: m.head(m.act(m.fc(x)))) -> Model:
    return Model(forward, fc=nn.Linear(4, 5), act=act, head=nn.Linear(5, 2))


def recorded(model: nn.Module, x: Tensor, pairs: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """Output and the reference's stack, seen by plain hooks.

    ``pairs`` names Linear → φ, or (φ, a function of the module that makes the weight).
    """
    stack = []

    def hook(pair: Any, module: Any, args: Any, z: Tensor) -> None:
        phi, weight = pair if isinstance(pair, tuple) else (pair, lambda m: m.weight)
        stack.append((z.clone(), weight(module), phi))  # as it is before an in-place activation

    handles = [
        model.get_submodule(name).register_forward_hook(partial(hook, phi))
        for name, phi in pairs.items()
    ]
    output = model(x)
    for handle in handles:
        handle.remove()
    return output, stack


def check(
    model: nn.Module,
    x: Tensor,
    pairs: dict[str, Any],
    *,
    steps: Any = (None, None),
    run: Any = None,
    plain: nn.Module | None = None,
    **options: Any,
) -> DREG:
    """Value, output and the gradients of everything against the reference, in float64.

    In the first step and in one after it, when the penalty knows the layers. Before each step its
    function of ``steps`` is called with the model. ``run`` is how the attached model is run;
    ``plain`` is what it is compared with, where that is not its copy.
    """
    penalty = DREG(model, **options)
    for before in steps:
        other = copy.deepcopy(model) if plain is None else plain
        for net in (other, model):
            if before is not None:
                before(net)
            net.zero_grad()
        output, stack = recorded(other, x, pairs)
        truth = reference.dreg(stack, **options).mean()
        (output.square().mean() + truth).backward()
        ours = model(x) if run is None else run(model, x)
        value = penalty()
        close(ours, output)
        close(value, truth)
        (ours.square().mean() + value).backward()
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
    return penalty
