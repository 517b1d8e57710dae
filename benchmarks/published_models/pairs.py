"""Counts the pairs of layer and activation of a model from the autograd graph of its output.

It shares nothing with what the layer-wise penalties do while a model runs. A pair is an activation
whose input is, through views, factors and shifts that are numbers, and at most one norm, the result
of a product with parameters. An activation that is composed of other functions (a GELU by tanh)
counts once, at its nonlinear node.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

ACTIVATIONS = [
    "Relu",
    "Gelu",
    "Silu",
    "Hardswish",
    "Hardsigmoid",
    "Hardtanh",
    "Tanh",
    "Sigmoid",
    "Sin",
    "Erf",
    "LeakyRelu",
    "Elu",
    "Mish",
    "Softplus",
    "LogSigmoid",
    "PreluKernel",
    "Threshold",
    "Softshrink",
    "Hardshrink",
]
VIEWS = [
    "View",
    "UnsafeView",
    "ReshapeAlias",
    "Transpose",
    "T",
    "Permute",
    "Unsqueeze",
    "Squeeze",
    "Clone",
    "Slice",
    "Split",
    "SplitWithSizes",
    "Select",
    "AsStrided",
    "Unbind",
    "Movedim",
    "Alias",
    "ToCopy",
    "Contiguous",
    "Expand",
    "Flatten",
]
NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "NativeLayerNorm", "NativeGroupNorm")
SCALED = ("Mul", "Div", "Add", "Sub", "Rsub", "Neg", "Pow")
WEIGHT = {"Convolution": 1, "Addmm": 2, "Mm": 1, "Linear": 1, "Bmm": 1, "Baddbmm": 2}
"""Which of the inputs of a product is the weight of a layer."""


class Count(NamedTuple):
    """The number of activations, and of each pair the name of the layer's module."""

    activations: int
    layers: list[str]


def kind(node: Any) -> str:
    return node.name().rpartition("::")[2].split("Backward")[0]


def count(model: nn.Module, x: Tensor) -> Count:
    """Runs the model once, on a copy of x that requires grad."""
    x = x.detach().requires_grad_()
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    activations, layers, seen = 0, [], set()
    todo = [_output(model(x)).grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        if kind(node) in ACTIVATIONS:
            activations += 1
            layer = _layer(node.next_functions[0][0], 1)
            name = None if layer is None else _parameter(layer, x, names)
            if name is not None:
                layers.append(name.partition(".parametrizations.")[0].rpartition(".")[0])
    return Count(activations, layers)


def _output(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"the model returns {type(output).__name__}")
    return output


def _layer(node: Any, norms: int) -> Any:
    """The product whose result is the input of an activation, or None."""
    if node is None or kind(node) in WEIGHT:
        return node
    inputs = [following for following, _ in node.next_functions if following is not None]
    if kind(node) in VIEWS:
        return _layer(inputs[0], norms)
    if kind(node) in NORMS and norms:
        return _layer(node.next_functions[0][0], norms - 1)
    if kind(node) in SCALED and _by_numbers(node):
        # Of a composed activation, several paths lead to the same product.
        found = [_layer(following, norms) for following in inputs]
        return found[0] if found and all(one is found[0] for one in found) else None
    return None


def _by_numbers(node: Any) -> bool:
    """Whether what the node multiplies by and does not differentiate is a number."""
    if len([1 for following, _ in node.next_functions if following is not None]) > 1:
        return True
    if kind(node) == "Pow":  # of a tensor, to the power of a number
        return True
    others = [getattr(node, f"_saved_{name}", None) for name in ("self", "other")]
    return all(not isinstance(other, Tensor) or other.numel() == 1 for other in others)


def _parameter(layer: Any, x: Tensor, names: dict[int, str]) -> str | None:
    """The name of the parameter that the weight of a product is computed from, if not from x."""
    todo, seen, found = [layer.next_functions[WEIGHT[kind(layer)]][0]], set(), None
    while todo:
        node = todo.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is x:
            return None
        if found is None and variable is not None:
            found = names.get(id(variable))
        todo += [following for following, _ in node.next_functions]
    return found
