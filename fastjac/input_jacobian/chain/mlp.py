"""The sweeps of a Sequential of Linear and activation modules: one C++ call each (`ops.mlp`)."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from fastjac.activations import IDS, MAX_PARAMS, TABLE, get
from fastjac.input_jacobian.by_autograd import run_model
from fastjac.input_jacobian.chain.graph_run import GraphRun
from fastjac.nn import Act, activation_of
from fastjac.ops import mlp as mlp  # registers the ops
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import raw
from fastjac.torch_private import below_autograd

LARGE = 1 << 15
"""Elements of a layer from which on the backward goes layer by layer and frees each one at once.

The gradients of the weights take the freed memory. With tiles the weights are small, and the
backward is one call.
"""

TILED = 1 << 16
"""Elements of a weight up to which each thread takes a tile of the rows through all layers.

Compared with threads that share each GEMM, a step takes 0.7 to 0.85 of the time (2 threads, width
64, batch 100 to 2048), and 0.9 at width 256. From width 512 on there is no gain, and each thread
needs memory for weight gradients of its own.
"""


_GLOBAL_HOOKS = tuple(
    value
    for name, value in vars(module_hooks).items()
    if name.startswith("_global_") and "hooks" in name and hasattr(value, "__len__")
)
_IDENTITY: tuple[int, tuple[float, ...]] = (IDS["identity"], ())

_recipes: weakref.WeakKeyDictionary[nn.Module, Recipe] = weakref.WeakKeyDictionary()


def rows_of_a_thread(n: int) -> int:
    return max(-(-n // torch.get_num_threads()), 16)


def _hooked(state: dict[str, Any]) -> bool:
    """Whether a call of the module with these attributes runs more than its class's forward."""
    return bool(
        "forward" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
    )


class Part:
    """A module of the model as it was when the recipe was made."""

    def __init__(self, module: nn.Module) -> None:
        # A weak reference, since the first part is the model, which is the key of `_recipes`.
        self.module, self.kind = weakref.ref(module), type(module)
        self.state = vars(module)
        self.children = list(module._modules.values())
        self.parameters = dict(module._parameters)
        # Its options, such as the slope of a LeakyReLU. Other attributes do not matter.
        self.options = [
            (name, dict(value) if name == "params" else value)
            for name, value in self.state.items()
            if isinstance(value, int | float | str) or (name == "params" and self.kind is Act)
            if name != "training" and self.kind is not nn.Sequential
        ]

    def holds(self) -> bool:
        state = self.state
        if type(self.module()) is not self.kind or _hooked(state):
            return False
        if self.children and list(state["_modules"].values()) != self.children:
            return False
        if self.parameters:
            now = state["_parameters"]
            return all([now.get(name) is p for name, p in self.parameters.items()])
        return all([state.get(name) == value for name, value in self.options])


def _walk(model: nn.Module) -> Iterator[nn.Module]:
    yield model
    if type(model) is nn.Sequential:
        for child in model._modules.values():
            if child is not None:
                yield from _walk(child)


class Recipe:
    """The layers of an MLP. `of` returns None if the model is not an MLP of the required form."""

    def __init__(self, parts: list[Part], layers: list[tuple[Tensor, Any, Any]]) -> None:
        self.parts = parts
        self.flattens = any(part.kind is nn.Flatten for part in parts)
        self.weights = [weight for weight, _, _ in layers]
        self.biases = [bias for _, bias, _ in layers if bias is not None]
        self.activations = [activation for _, _, activation in layers]
        self.plan = torch.tensor(
            [
                (fn, bias is not None, *params, *[0.0] * (MAX_PARAMS - len(params)))
                for _, bias, (fn, params) in layers
            ],
            dtype=torch.float64,
            device="cpu",  # C++ reads it, also if torch.set_default_device names a GPU
        )
        # The order of the gradients: weight 0, bias 0, weight 1, ...
        self.slots = [t for weight, bias, _ in layers for t in (weight, bias)]
        self.widest = max(max(w.shape) for w in self.weights)
        self.tiled = max(w.numel() for w in self.weights) <= TILED
        self.trained: Any = None

    @classmethod
    def of(cls, model: Any) -> Recipe | None:
        if type(model) is not nn.Sequential:
            return None
        parts = [Part(module) for module in _walk(model)]
        layers: list[tuple[Tensor, Any, Any]] = []
        open_layer = False  # whether the last layer has no activation yet
        for place, part in enumerate(part for part in parts if part.kind is not nn.Sequential):
            module: Any = part.module()
            if part.kind is nn.Flatten and place == 0:
                if (module.start_dim, module.end_dim) != (1, -1):
                    return None
            elif part.kind is nn.Linear:
                if not {"weight", "bias"} <= part.parameters.keys():  # replaced by other tensors
                    return None
                layers.append((module.weight, module.bias, _IDENTITY))
                open_layer = True
            else:
                act = activation_of(module)
                if act is None or act.impl not in ("auto", "cpu") or not open_layer:
                    return None
                found = (IDS[act.fn], get(act.fn).param_values(act.params))
                layers[-1] = (*layers[-1][:2], found)
                open_layer = False
        if len(layers) < 2 or not open_layer:  # the model ends in an activation
            return None
        recipe = cls(parts, layers)
        return recipe if recipe.holds() and recipe.fits() else None

    def holds(self) -> bool:
        """Whether the model has not changed."""
        return all([part.holds() for part in self.parts])

    def fits(self) -> bool:
        """Whether the C++ calls take the weights."""
        kind = self.weights[0].dtype, self.weights[0].device
        if kind[0] not in (torch.float32, torch.float64) or kind[1].type != "cpu":
            return False
        width = self.weights[0].shape[-1]
        for t in self.slots:
            if t is None:
                continue
            if (t.dtype, t.device) != kind or not t.is_contiguous() or t.numel() == 0:
                return False
            if t.dim() == 2:
                if t.shape[1] != width:
                    return False
                width = t.shape[0]
        return OPS["act"].select("auto", kind[1], kind[0]) == "cpu"

    def takes(self, x: Tensor) -> bool:
        first = self.weights[0]
        if x.dtype is not first.dtype or x.device != first.device:
            return False
        if x.dim() != 2 and not (self.flattens and x.dim() > 2):
            return False
        return math.prod(x.shape[1:]) == first.shape[1]

    def prepare(self) -> None:
        """Sets ``parameters`` (that require grad) and their ``places`` among the gradients."""
        trained = [t is not None and t.requires_grad for t in self.slots]
        if trained == self.trained:
            return
        places: dict[int, list[int]] = {}
        for place, t in enumerate(self.slots):
            if trained[place]:
                places.setdefault(id(t), []).append(place)
        self.places = list(places.values())
        self.parameters = [self.slots[first] for first, *_ in self.places]
        self.trained = trained


@functools.lru_cache(maxsize=256)
def _wanted(flags: tuple[bool, ...]) -> Tensor:
    return torch.tensor(flags, dtype=torch.float64, device="cpu")


class Mlp:
    """One run of an MLP. `of` returns None if the model or x does not fit."""

    one_product = True  # `pull` leaves the state of a single product in the stacks
    own_output = True  # the forward runs in C++ and builds no graph
    end = None

    def __init__(self, model: nn.Module, recipe: Recipe, x: Tensor) -> None:
        self.model, self.given = model, x
        n = self.n = len(x)
        self.shape = x.shape
        self.x = x if x.dim() == 2 and x.is_contiguous() else x.detach().flatten(1).contiguous()
        # Detached, since `p.data = t` before the backward puts another tensor in the place of p's.
        self.weights, self.plan = [w.detach() for w in recipe.weights], recipe.plan
        self.activations = recipe.activations
        recipe.prepare()
        self.places, self.parameters = recipe.places, recipe.parameters
        self.of_x = x.requires_grad
        self.wanted = _wanted((*recipe.trained, x.requires_grad))
        self.versions = [(t, t._version) for t in (x, *recipe.slots) if t is not None]
        self.large = not recipe.tiled and n * recipe.widest >= LARGE
        self.tile = rows_of_a_thread(n) if recipe.tiled else n
        with below_autograd():
            *self.stacks, self.output = raw("mlp_forward")(
                self.x, self.weights, recipe.biases, self.tile, self.plan
            )
        self.deltas: list[Tensor] = []
        self.u: Tensor | None = None
        self.factor: Tensor | None = None  # if given, 2 factor u is pushed
        self.waiting = False  # whether mlp_down has to push u
        self.pushed: tuple[list[Tensor], list[Tensor]] | None = None  # stacks, deltas of mlp_push

    @classmethod
    def of(cls, model: Any, x: Tensor) -> Mlp | None:
        if type(model) is not nn.Sequential or any(map(len, _GLOBAL_HOOKS)):
            return None
        recipe = _recipes.get(model)
        if recipe is None or not recipe.holds():
            recipe = Recipe.of(model)
            if recipe is None:
                _recipes.pop(model, None)
                return None
            _recipes[model] = recipe
        if not recipe.takes(x):
            return None
        try:
            return cls(model, recipe, x)
        except RuntimeError:
            del _recipes[model]
            if recipe.fits():
                raise
            return None  # the memory of a weight was replaced by one that does not fit

    def begin(self) -> None:
        """Start a backward. Raises if the model or x was modified since the forward."""
        for t, version in self.versions:
            if t._version != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(t.shape)} that the model used was modified in place "
                    "before the backward: call backward() before optimizer.step(), or use the "
                    "out-of-place operation"
                )

    def as_graph(self) -> GraphRun:
        """The run in the ordinary way. Nothing acts twice: the modules compute and do no more."""
        x, output = run_model(self.model, self.given, None)
        return GraphRun(x, output)

    def pull(self, w: Tensor) -> Tensor:
        v, _ = self._pull(w)
        return v.view(len(w), *self.shape)

    def norms(self, w: Tensor) -> tuple[Tensor, Tensor]:
        v, norms = self._pull(w)
        v = v.view(len(w), *self.shape)
        return v, norms if len(w) == 1 else norms.view(len(w), -1).sum(0)

    def _pull(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.tile < self.n < len(w) * self.n:  # several cotangents need a single tile
            self.stacks, self.tile = list(map(self._pre_activation, self.stacks)), self.n
        with below_autograd():
            *self.deltas, v, norms = raw("mlp_pull")(
                *(w.flatten(0, 1).contiguous(), self.weights, self.stacks, self.n, self.tile),
                self.plan,
            )
        return v, norms

    def _pre_activation(self, stack: Tensor) -> Tensor:
        """``z_l`` of a hidden layer, from the stack of `mlp_forward`, which is in tiles."""
        return torch.cat([part[len(part) // 2 :] for part in stack.split(2 * self.tile)])

    def jvp(self, u: Tensor) -> Tensor:
        """``J u``, with two operations per layer."""
        k = len(u)
        u = u.reshape(k, self.n, -1)
        with torch.no_grad():
            for weight, activation, stack in zip(
                self.weights, self.activations, [*self.stacks, None], strict=True
            ):
                u = u.matmul(weight.t())
                if stack is not None:
                    z = self._pre_activation(stack).expand(u.shape).contiguous()
                    with below_autograd():
                        u = raw("act")(z, u, 1, *activation)
        return u

    def push(
        self, u: Tensor, keep: bool, wanted: bool, factor: Tensor | None = None
    ) -> Tensor | None:
        if keep and factor is not None:
            u = u.clone()
        k = u.numel() // self.x.numel()
        self.u = u.detach().reshape(k * self.n, -1).contiguous()
        self.factor = None if factor is None else factor.repeat(k) if k > 1 else factor.contiguous()
        stacks, deltas = self.stacks, self.deltas
        if keep:
            deltas = [d.clone() for d in deltas]
        if keep or k != 1:
            stacks = [self._stack(t, k) for t in stacks]
        self.pushed = stacks, deltas
        self.waiting = not (wanted or self.large)
        if self.waiting:
            return None
        with below_autograd():
            t = raw("mlp_push")(
                *(self.u, self.factor, self.weights, stacks, deltas, self.n, self.tile),
                *(wanted, self.plan),
            )
        self.factor = None
        return t.view(k, *self.output.shape) if wanted else None

    def _stack(self, t: Tensor, k: int) -> Tensor:
        """A copy of a stack with room for k cotangents."""
        if k == 1 and len(t) == 2 * self.n:
            return t.clone()
        new = t.new_empty((k + 1) * self.n, t.shape[1])
        new[k * self.n :] = t[-self.n :]
        return new

    def down(self, grad: Tensor | None, keep: bool) -> list[Tensor | None]:
        (u, self.u), (factor, self.factor) = (self.u, None), (self.factor, None)
        push, self.waiting = self.waiting, False
        weights = list(self.weights)
        if self.pushed is not None:
            stacks, deltas = map(list, self.pushed)
        else:
            stacks = [self._stack(t, 1) for t in self.stacks] if keep else list(self.stacks)
            deltas = [self.x.new_empty(self.n, len(w)) for w in weights]
        self.pushed = None
        if not keep:
            self.stacks, self.deltas = [], []
        grad = self.x.new_zeros(self.n, len(weights[-1])) if grad is None else grad.contiguous()
        grads: list[Any] = [None] * (2 * len(weights) + 1)
        while weights:
            start = len(weights) - 1 if self.large else 0
            with below_autograd():
                found = raw("mlp_down")(
                    *(grad, u, factor, self.x, weights, stacks, deltas, self.n, self.tile),
                    *(start, push, self.wanted, self.plan),
                )
            grads[2 * start : 2 * len(weights)] = found[2 * start : -1]
            grads[-1] = found[-1]
            grad = None
            del weights[start:], deltas[start:], stacks[max(start - 1, 0) :]
        result: list[Tensor | None] = [grads[-1].view(self.shape) if self.of_x else None]
        for first, *others in self.places:
            total = grads[first]
            for place in others:
                total = total + grads[place]
            result.append(total)
        return result

    def describe(self) -> list[str]:
        names = list(TABLE)
        found = []
        for w, (fn, *_) in zip(self.weights, self.activations, strict=True):
            found += [f"Linear({w.shape[1]}, {w.shape[0]})", names[fn]]
        return ["one C++ call per sweep:", *found[:-1]]
