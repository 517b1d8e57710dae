"""The sweeps of a Sequential of Linear and activation modules: one C++ call each (`ops.net`)."""

from __future__ import annotations

import functools
import itertools
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from fastjac.activations import IDS, get
from fastjac.input_jacobian.by_autograd import run_model
from fastjac.input_jacobian.chain.graph_run import GraphRun, check_versions
from fastjac.input_jacobian.chain.sweeps import FLAT, TILED, Sweeps, rows_of_a_thread
from fastjac.nn import Act, activation_of, hooked
from fastjac.ops import net
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import raw
from fastjac.torch_private import below_autograd

LARGE = 1 << 15
"""Elements of a layer from which on the backward goes layer by layer and frees each one at once.

The gradients of the weights take the freed memory. With tiles the weights are small, and the
backward is one call.
"""

_GLOBAL_HOOKS = tuple(
    value
    for name, value in vars(module_hooks).items()
    if name.startswith("_global_") and "hooks" in name and hasattr(value, "__len__")
)
_recipes: weakref.WeakKeyDictionary[nn.Module, Recipe] = weakref.WeakKeyDictionary()


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
        if type(self.module()) is not self.kind or "forward" in state or hooked(state):
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


def unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())


def places(tensors: list[Tensor]) -> dict[int, int]:
    """The places of tensors in a list, by their ids."""
    return {id(t): place for place, t in enumerate(tensors)}


def fit(layers: list[list[Any]]) -> bool:
    """Whether the C++ calls take the weights and biases of ``[weight, bias, activation]``."""
    first = layers[0][0]
    if first.dtype not in (torch.float32, torch.float64) or first.device.type != "cpu":
        return False
    width = first.shape[-1]
    for weight, bias, _ in layers:
        for t in (weight,) if bias is None else (weight, bias):
            if (t.dtype, t.device) != (first.dtype, first.device):
                return False
            if not t.is_contiguous() or t.numel() == 0:
                return False
        if weight.shape[1] != width:
            return False
        width = weight.shape[0]
    return OPS["act"].select("auto", first.device, first.dtype) == "cpu"


class Recipe:
    """The program of an MLP. `of` returns None if the model is not an MLP of the required form."""

    def __init__(self, parts: list[Part], layers: list[list[Any]]) -> None:
        """A layer is ``[weight, bias, activation]``; the bias and the activation may be None."""
        self.parts, self.layers = parts, layers
        self.flattens = any(part.kind is nn.Flatten for part in parts)
        # A module that occurs twice has one weight, whose gradients C++ adds.
        self.weights = unique(weight for weight, _, _ in layers)
        self.biases = unique(bias for _, bias, _ in layers if bias is not None)
        weights, biases = map(places, (self.weights, self.biases))
        steps: list[tuple[float, ...]] = [(net.INPUT, layers[0][0].shape[1])]
        self.starts: list[int] = []
        """The first step of each layer."""
        self.names: list[str] = []
        for weight, bias, act in layers:
            self.starts.append(len(steps))
            place = -1 if bias is None else biases[id(bias)]
            steps.append((net.LINEAR, len(steps) - 1, 0, weights[id(weight)], place))
            self.names.append(f"Linear({weight.shape[1]}, {weight.shape[0]})")
            if act is not None:
                name, params = act
                steps.append((net.ACT, len(steps) - 1, 0, IDS[name], 0, *params))
                self.names.append(name)
        self.plan = net.rows(steps)
        self.acts = sum(kind == net.ACT for kind, *_ in steps)
        self.slots = [*self.weights, *self.biases]
        self.widest = max(max(w.shape) for w in self.weights)
        self.numbers = sum(weight.shape[0] for weight, *_ in layers)
        self.size = sum(t.numel() for t in self.slots)
        self.tiled = max(w.numel() for w in self.weights) <= TILED
        self.trained: Any = None

    @classmethod
    def of(cls, model: Any) -> Recipe | None:
        if type(model) is not nn.Sequential:
            return None
        parts = [Part(module) for module in _walk(model)]
        layers: list[list[Any]] = []
        open_layer = False  # whether the last layer has no activation yet
        for place, part in enumerate(part for part in parts if part.kind is not nn.Sequential):
            module: Any = part.module()
            if part.kind is nn.Flatten and place == 0:
                if (module.start_dim, module.end_dim) != (1, -1):
                    return None
            elif part.kind is nn.Linear:
                if not {"weight", "bias"} <= part.parameters.keys():  # replaced by other tensors
                    return None
                layers.append([module.weight, module.bias, None])
                open_layer = True
            else:
                act = activation_of(module)
                if act is None or act.impl not in ("auto", "cpu") or not open_layer:
                    return None
                layers[-1][2] = act.fn, get(act.fn).param_values(act.params)
                open_layer = False
        if len(layers) < 2 or not open_layer or not fit(layers):  # it ends in an activation
            return None
        recipe = cls(parts, layers)
        return recipe if recipe.holds() else None

    def holds(self) -> bool:
        """Whether the model has not changed."""
        return all([part.holds() for part in self.parts])

    def fits(self) -> bool:
        """Whether the C++ calls take the weights."""
        return fit(self.layers)

    def takes(self, x: Tensor) -> bool:
        first = self.weights[0]
        if x.dtype is not first.dtype or x.device != first.device:
            return False
        if x.dim() != 2 and not (self.flattens and x.dim() > 2):
            return False
        return math.prod(x.shape[1:]) == first.shape[1]

    def free(self, layer: int, *lists: list[Tensor]) -> None:
        """Drop the tensors of a layer from ``saved``, ``deltas`` and ``pushed``."""
        saved, deltas, pushed = lists
        act = sum(activation is not None for *_, activation in self.layers[:layer])
        nothing = saved[0].new_empty(0, 0)
        if self.layers[layer][2] is not None:
            saved[3 * act : 3 * act + 3] = [nothing] * 3
            for of_acts in deltas, pushed:
                of_acts[act : act + 1] = [nothing] * len(of_acts[act : act + 1])
        if deltas:
            deltas[self.acts + layer] = nothing
        if layer > 0:
            saved[3 * self.acts + layer - 1] = nothing
            if pushed:
                pushed[self.acts + layer - 1] = nothing

    def prepare(self) -> None:
        """Sets ``parameters`` (that require grad) and ``places``; see `Sweeps`."""
        trained = [t.requires_grad for t in self.slots]
        if trained != self.trained:
            self.parameters = [t for t, wanted in zip(self.slots, trained, strict=True) if wanted]
            numbers = itertools.count()
            self.places = [next(numbers) if wanted else -1 for wanted in trained]
            self.trained = trained


@functools.lru_cache(maxsize=256)
def _wanted(flags: tuple[bool, ...]) -> Tensor:
    return torch.tensor(flags, dtype=torch.float64, device="cpu")


class Mlp(Sweeps):
    """One run of an MLP. `of` returns None if the model or x does not fit.

    The forward runs in C++ too, and builds no graph.
    """

    own_output = True

    def __init__(self, model: nn.Module, recipe: Recipe, x: Tensor) -> None:
        self.model, self.given, self.recipe = model, x, recipe
        n = self.n = len(x)
        self.x = x if x.dim() == 2 and x.is_contiguous() else x.detach().flatten(1).contiguous()
        # Detached, since `p.data = t` before the backward puts another tensor in the place of p's.
        self.weights, self.plan = [w.detach() for w in recipe.weights], recipe.plan
        recipe.prepare()
        self.places, self.parameters = recipe.places, recipe.parameters
        self.of_x = x.requires_grad
        self.wanted = _wanted((*recipe.trained, x.requires_grad))
        self.used = [x, *recipe.slots]
        self.versions = [t._version for t in self.used]
        self.large = not recipe.tiled and n * recipe.widest >= LARGE
        self.tile = n
        if recipe.tiled:
            self.tile = rows_of_a_thread(n, recipe.size, n * recipe.numbers)
        # φ' and φ'' are kept if the threads have tiles. Otherwise z takes less memory.
        self.flat = recipe.tiled and n * recipe.numbers <= FLAT
        with below_autograd():
            self.output, *self.saved = raw("net_forward")(
                *(self.x, self.weights, recipe.biases, self.tile, recipe.tiled, self.flat),
                self.plan,
            )
        self.shape, self.output_shape = x.shape, self.output.shape
        self.deltas, self.pushes = [], []

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
        check_versions(self.used, self.versions)
        self.pushes = []

    def as_graph(self) -> GraphRun:
        """The run in the ordinary way. Nothing acts twice: the modules compute and do no more."""
        x, _, output = run_model(self.model, self.given, None)
        return GraphRun(x, output)

    def gradients_of(self, grad: Tensor | None, push: Any, last: bool) -> list[Any]:
        u, factor, deltas, pushed = push
        if not self.large or (u is not None and not pushed):
            return super().gradients_of(grad, push, last)
        saved, deltas, pushed = list(self.saved), list(deltas), list(pushed)
        if last:  # `free` below then drops each tensor after its last use
            self.saved = []
            for tensors in push[2:]:
                tensors.clear()
        ends = [*self.recipe.starts, len(self.plan)]
        grads: list[Any] = [None] * len(self.recipe.slots)
        for layer in reversed(range(len(ends) - 1)):
            with below_autograd():
                *found, grad = raw("net_backward")(
                    *(grad, u, factor, self.x, self.weights, saved, deltas, pushed, self.n),
                    *(self.tile, ends[layer], ends[layer + 1], self.wanted, self.plan),
                )
            for place, gradient in enumerate(found):
                if gradient.numel():
                    before = grads[place]
                    grads[place] = gradient if before is None else before + gradient
            self.recipe.free(layer, saved, deltas, pushed)
        return [*grads, grad]

    def describe(self) -> list[str]:
        return ["one C++ call per sweep:", *self.recipe.names]
