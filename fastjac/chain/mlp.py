"""A Sequential of Linear and activation modules: its sweeps are one C++ call each (`ops.mlp`)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from fastjac.activations import IDS, TABLE, Activation, get
from fastjac.dispatch import OPS
from fastjac.nn import Act
from fastjac.ops import mlp as mlp  # registers the ops
from fastjac.ops._autograd import below_autograd
from fastjac.ops._library import raw

LARGE = 1 << 15
"""Elements of a layer from which the backward goes layer by layer, each freed before the next."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(
    value
    for name, value in vars(module_hooks).items()
    if name.startswith("_global_") and "hooks" in name and hasattr(value, "__len__")
)


def _rows() -> dict[type, list[Activation]]:
    found: dict[type, list[Activation]] = {}
    for row in TABLE.values():
        if row.module is not None:
            found.setdefault(getattr(nn, row.module), []).append(row)
    return found


ROWS = _rows()


def _activation(module: Any) -> tuple[int, float, float] | None:
    if type(module) is Act:
        if module.impl not in ("auto", "cpu"):
            return None
        return (IDS[module.fn], *get(module.fn).param_values(module.params))
    for row in ROWS.get(type(module), ()):
        if all(getattr(module, k) == v for k, v in row.torch_kwargs.items()):
            params = {k: getattr(module, k) for k in row.params}
            return (IDS[row.name], *row.param_values(params))
    return None


def _flatten(model: nn.Sequential) -> Iterator[Any]:
    for module in model._modules.values():
        if type(module) is nn.Sequential and "forward" not in vars(module) and not _hooked(module):
            yield from _flatten(module)
        else:
            yield module


def _hooked(module: Any) -> bool:
    state = vars(module)
    return "forward" in state or any(state[name] for name in _HOOKS)


@functools.lru_cache(maxsize=256)
def _table(key: tuple[Any, ...]) -> Tensor:
    """``plan`` of the ops, of the layers' activations and then whether each has a bias."""
    n = len(key) // 2
    return torch.tensor([(*key[i], key[n + i]) for i in range(n)], dtype=torch.float64)


@functools.lru_cache(maxsize=256)
def _wanted(flags: tuple[bool, ...]) -> Tensor:
    return torch.tensor(flags, dtype=torch.float64)


class Mlp:
    """One run. `of` returns None where the model is something else."""

    def __init__(
        self, x: Tensor, weights: list[Tensor], biases: list[Any], activations: list[Any]
    ) -> None:
        self.x = x.detach().flatten(1).contiguous()
        self.n = len(x)
        self.weights = weights
        self.shape = x.shape
        self.plan = _table((*activations, *(b is not None for b in biases)))
        # Each parameter's places among the gradients: weight 0, bias 0, weight 1, ...
        slots = [t for pair in zip(weights, biases, strict=True) for t in pair]
        places: dict[int, list[int]] = {}
        wanted = [t is not None and t.requires_grad for t in slots]
        for place, t in enumerate(slots):
            if wanted[place]:
                places.setdefault(id(t), []).append(place)
        self.places = list(places.values())
        self.parameters = [slots[first] for first, *_ in self.places]
        self.wanted = _wanted((*wanted, x.requires_grad))
        self.versions = [(t, t._version) for t in (x, *slots) if t is not None]
        self.activations = activations
        given = [b for b in biases if b is not None]
        with below_autograd():
            *self.stacks, self.output = raw("mlp_forward")(self.x, self.weights, given, self.plan)
        self.deltas: list[Tensor] = []
        self.u: Tensor | None = None
        self.pushed: tuple[list[Tensor], list[Tensor]] | None = None  # as mlp_push left them

    @classmethod
    def of(cls, model: Any, x: Tensor) -> Mlp | None:
        if type(model) is not nn.Sequential or _hooked(model) or any(map(len, _GLOBAL_HOOKS)):
            return None
        weights: list[Tensor] = []
        biases: list[Any] = []
        activations: list[Any] = []
        kind = (x.dtype, x.device)
        if x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu":
            return None
        width = x.shape[1] if x.dim() == 2 else -1
        identity = (IDS["identity"], 0.0, 0.0)
        for place, module in enumerate(_flatten(model)):
            if module is None or _hooked(module):
                return None
            if place == 0 and type(module) is nn.Flatten:
                if (module.start_dim, module.end_dim) != (1, -1) or x.dim() < 2:
                    return None
                width = x[:1].numel()
                continue
            if type(module) is nn.Linear:
                if not {"weight", "bias"} <= module._parameters.keys():
                    return None  # somebody has put plain tensors there
                weight: Any = module._parameters["weight"]
                bias = module._parameters["bias"]
                if weight is None:
                    return None
                fits = weight.shape[1] == width and weight.is_contiguous()
                if not fits or (weight.dtype, weight.device) != kind:
                    return None
                if bias is not None and (bias.dtype, bias.device) != kind:
                    return None
                width = weight.shape[0]
                if len(weights) > len(activations):
                    activations.append(identity)
                weights.append(weight)
                biases.append(bias)
                continue
            found = _activation(module)
            if found is None or len(activations) == len(weights):
                return None
            activations.append(found)
        if len(weights) < 2 or len(activations) == len(weights):  # ends in an activation
            return None
        if any(w.numel() == 0 for w in weights):
            return None
        if OPS["act"].select("auto", x.device, x.dtype) != "cpu":
            return None
        return cls(x, weights, biases, [*activations, identity])

    def pull(self, w: Tensor) -> Tensor:
        with below_autograd():
            *self.deltas, v = raw("mlp_pull")(
                w.contiguous(), self.weights, self.stacks, self.n, self.plan
            )
        return v.view(-1, *self.shape[1:])

    def push(self, u: Tensor, keep: bool, wanted: bool) -> Tensor | None:
        self.u = u.reshape(len(u), -1).contiguous()
        k = len(u) // self.n
        stacks, deltas = self.stacks, self.deltas
        if keep:
            deltas = [d.clone() for d in deltas]
        if keep or k != 1:
            stacks = [self._stack(t, k) for t in stacks]
        with below_autograd():
            t = raw("mlp_push")(self.u, self.weights, stacks, deltas, self.n, wanted, self.plan)
        self.pushed = stacks, deltas
        return t if wanted else None

    def _stack(self, t: Tensor, k: int) -> Tensor:
        new = t.new_empty((k + 1) * self.n, t.shape[1])
        new[k * self.n :] = t[-self.n :]
        return new

    def down(self, grad: Tensor | None, keep: bool) -> list[Tensor | None]:
        u, self.u = self.u, None
        weights = list(self.weights)
        if self.pushed is not None:
            stacks, deltas = map(list, self.pushed)
        else:
            stacks = [self._stack(t, 1) for t in self.stacks] if keep else list(self.stacks)
            deltas = [self.x.new_empty(self.n, len(w)) for w in weights]
        self.pushed = None
        if not keep:
            self.stacks, self.deltas = [], []
        grad = self.x.new_zeros(self.n, len(weights[-1])) if grad is None else grad
        grads: list[Any] = [None] * (2 * len(weights) + 1)
        large = self.n * max(map(len, weights)) >= LARGE
        while weights:
            start = len(weights) - 1 if large else 0
            with below_autograd():
                found = raw("mlp_down")(
                    grad, u, self.x, weights, stacks, deltas, self.n, start, self.wanted, self.plan
                )
            for i in range(2 * start, 2 * len(weights)):
                grads[i] = found[i]
            if start == 0:
                grads[-1] = found[-1]
            grad = None
            del weights[start:], deltas[start:], stacks[max(start - 1, 0) :]
        result: list[Tensor | None] = [grads[-1].view(self.shape) if self.wanted[-1] else None]
        for places in self.places:
            total = grads[places[0]]
            for place in places[1:]:
                total = total + grads[place]
            result.append(total)
        return result

    def describe(self) -> list[str]:
        names = list(TABLE)
        found = []
        for w, (fn, *_) in zip(self.weights, self.activations, strict=True):
            found += [f"Linear({w.shape[1]}, {w.shape[0]})", f"Activation({names[fn]})"]
        return ["one C++ call a sweep:", *found[:-1]]
