"""The torch functions that a running model calls, as far as they belong to a layer.

Many models write ``F.relu(self.fc(x))``, compute a norm as ``F.batch_norm(...)``, or have weights
that are in no module for layers. While a pass looks, `Calls` sees each function of torch that the
model calls. It reports products, norms and activations to the pass, as the forwards of modules do,
and follows the output of a layer through views, numbers as factors, and constants that are added.

This costs 1 to 2 µs of Python a function. So most passes of a model that consists of modules do not
look (`sight`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastjac import recognise
from fastjac.layerwise.follow import FOLLOWED, first, methods, note
from fastjac.layerwise.layers import Layer, LayerCall, Nonlinearity, Norm
from fastjac.layerwise.passes import Pass
from fastjac.layerwise.products import GROUPS, KINDS, version_of
from fastjac.torch_private import checkpoint_frame, transforms_active

_TENSORS = (Tensor, tuple, list)


class Calls(TorchFunctionMode):
    """In this block the functions that the model calls are reported to the pass."""

    def __init__(self, seen: Pass, again: Callable[[], Pass | None] | None = None) -> None:
        super().__init__()
        self.seen = seen
        self.again = again  # returns the pass of a recomputation by a checkpoint

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        seen = self.seen
        if seen.inside or (not seen.compiling and torch.compiler.is_compiling()):
            return func(*args, **kwargs)  # the second: a part of the model is compiled by itself
        handler = HANDLERS.get(func)
        if handler is not None:
            y = handler(seen, func, args, kwargs)
            if y is not None:
                if not seen.compiling and self.again is not None:
                    self.recomputed()
                return y
        y = func(*args, **kwargs)
        if isinstance(y, _TENSORS) and not seen.compiling:
            note(seen, func, args, y)
        return y

    def recomputed(self) -> None:
        """Has a checkpoint around this call look too when it recomputes, as it must."""
        frame = checkpoint_frame()
        if frame is not None and not isinstance(frame.recompute_fn, _Recompute):
            frame.recompute_fn = _Recompute(frame.recompute_fn, self.again)


class _Recompute:
    def __init__(self, function: Callable[..., Any], again: Any) -> None:
        self.function, self.again = function, again

    def __call__(self, *args: Any) -> Any:
        seen = self.again()
        if seen is None:
            return self.function(*args)
        with Calls(seen, self.again):
            return self.function(*args)


# A handler returns the result of the function, or None if it is not one of the pass's: the function
# is then called as if nobody looked.


def activation(seen: Pass, func: Any, args: Any, kwargs: Any) -> Any:
    z = first(args, kwargs)
    call = seen.find(z)
    if call is None or not counts(seen, call, z):
        return None
    if len(args) == 1 and not kwargs:
        phi = PLAIN.get(func)
    else:
        phi = phi_of(func, args[1:], {k: v for k, v in kwargs.items() if k != "input" or args})
    if phi is None:
        return None
    call.function = True
    # The pass of another penalty, which this one is nested in, must see z too.
    a = func(*args, **kwargs) if seen.within else None
    return seen.activate(call, phi, a)


def counts(seen: Pass, call: LayerCall, z: Tensor) -> bool:
    """Whether an activation that is a function belongs to the penalty.

    A module after a layer must; where its rows are not the samples, or it has no gradient, it
    raises. But a function may be a part of something else: a loss, a teacher, a log.
    """
    if not seen.fits(call):
        return False
    if seen.compiling or not seen.grad or transforms_active():
        return True
    return torch.is_grad_enabled() and (z.requires_grad or not call.weight.requires_grad)


def phi_of(func: Any, rest: Any, named: Any) -> Nonlinearity | None:
    """What ``func(z, *rest, **named)`` computes; None if an argument is not understood."""
    computes = recognise.called(func, rest, named)
    if computes is None:
        return None
    run = functools.partial(_run, func, rest, named) if rest or named else func
    if computes.fn is None:
        return Nonlinearity(run=run, writes=computes.writes, function=run)
    return Nonlinearity(computes.fn, params=computes.params, run=run, writes=computes.writes)


def _run(func: Any, rest: Any, named: Any, z: Tensor) -> Tensor:
    return func(z, *rest, **named)


PLAIN = {func: phi_of(func, (), {}) for func in recognise.FUNCTIONS}
"""The same for calls with z alone."""


def norm(kind: str, names: tuple[str, ...]) -> Callable[..., Any]:
    """Handles a norm, given the names of its arguments after the input."""

    def handle(seen: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        call = seen.find(first(args, kwargs), True)
        if call is None or call.norm is not None:
            return None
        given = {**dict(zip(names, args[1:], strict=False)), **kwargs}
        weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", 1e-5)
        groups, var = 1, None
        if kind == "layer":
            if len(given["normalized_shape"]) != 1:
                return None
        elif kind == "group":
            groups = given["num_groups"]
        elif kind == "instance":
            if not given.get("use_input_stats", True):
                return None
            groups = call.shape[1]
        elif not given.get("training", False):
            var = given["running_var"]
        kept = "group" if kind == "instance" else kind
        computes = Norm(kept, weight, bias, eps, var, groups)
        if not computes.fits(call):
            return None
        y = func(*args, **kwargs)
        seen.norm_ran(call, computes, y, function=True)
        return y

    return handle


def product_ran(
    seen: Pass,
    layer: Layer,
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv: Any,
    groups: int,
) -> None:
    """A function of torch has computed z from x, outside of the modules for layers."""
    if seen.compiling:
        call = LayerCall(layer, weight, version_of(z), -1, -1, groups)
    else:
        # The same object in each pass, since it remembers what the statistic has decided.
        layer = seen.products.setdefault((layer.name, layer.kind, layer.plain), layer)
        versions = z._version, weight._version, x._version
        call = LayerCall(layer, weight, *versions, groups)
        seen.pending[id(z)] = call
    call.x, call.z, call.bias, call.conv, call.function = x, z, bias, conv, True
    seen.calls.append(call)


def product(kind: str) -> Callable[..., Any]:
    def handle(seen: Pass, func: Any, args: Any, kwargs: Any) -> Any:
        if seen.in_layer:
            return None
        x = first(args, kwargs)
        weight = args[1] if len(args) > 1 else kwargs["weight"]
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        conv, groups, plain = None, 1, True
        if kind != "linear":
            groups = args[GROUPS] if len(args) > GROUPS else kwargs.get("groups", 1)
            conv = _conv_options(args[3:], kwargs, weight.dim() - 2)
            plain = kind == "convolution" and conv is not None
        z = func(*args, **kwargs)
        if not seen.compiling:
            note(seen, func, (x,), z)
        layer = Layer(None, named(seen, func, weight), plain, kind=kind)
        product_ran(seen, layer, x, z, weight, bias, conv, groups)
        return z

    return handle


def named(seen: Pass, func: Any, weight: Tensor) -> str:
    """The name of the layer that a product with this weight is."""
    owner = weight if seen.compiling or weight._base is None else weight._base
    name, module = seen.owners.get(owner, ("", None))  # type: ignore[call-overload]
    if module is not None:
        seen.ran.add(module)
    if name:
        return name
    count = sum([call.layer.module is None for call in seen.calls])
    return f"F.{func.__name__} ({count + 1})"


def _conv_options(rest: Any, kwargs: Any, taps: int) -> Any:
    names = ("stride", "padding", "dilation", "groups")
    given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    given |= dict(zip(names, rest, strict=False))
    given |= {name: kwargs[name] for name in names if name in kwargs}
    if isinstance(given["padding"], str):
        return None
    stride, padding, dilation = (
        (value,) * taps if isinstance(value, int) else tuple(value)
        for value in (given["stride"], given["padding"], given["dilation"])
    )
    return stride, padding, dilation, False, (0,) * taps, given["groups"]


def matmul(seen: Pass, func: Any, args: Any, kwargs: Any) -> Any:
    """``x @ W`` and ``torch.addmm(b, x, W)`` with a parameter W, ``[C_in, C]``."""
    if seen.in_layer or kwargs or len(args) != (3 if func in _ADDMM else 2):
        return None
    *bias, x, weight = args
    if not _parameter(seen, weight) or weight.dim() != 2 or not isinstance(x, Tensor):
        return None
    if x.dim() < 2 or (bias and bias[0].dim() != 1):
        return None
    z = func(*args)
    if not seen.compiling:
        note(seen, func, (x,), z)
    layer = Layer(None, named(seen, func, weight), False, kind="linear")
    product_ran(seen, layer, x, z, weight.t(), None, None, 1)
    return z


def _parameter(seen: Pass, weight: Any) -> bool:
    if isinstance(weight, nn.Parameter):
        return True
    if seen.compiling or not isinstance(weight, Tensor):
        return False
    return isinstance(weight._base, nn.Parameter)


_ADDMM = (torch.addmm, Tensor.addmm)

HANDLERS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(recognise.FUNCTIONS, activation),
    **{function: product(kind) for function, kind in KINDS.items()},
    **dict.fromkeys((*_ADDMM, *methods("matmul", "mm", "__matmul__")), matmul),
    F.layer_norm: norm("layer", ("normalized_shape", "weight", "bias", "eps")),
    F.group_norm: norm("group", ("num_groups", "weight", "bias", "eps")),
    F.batch_norm: norm(
        "batch",
        ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    ),
    F.instance_norm: norm(
        "instance",
        ("running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    ),
    **FOLLOWED,
}
"""What `Calls` does with a function."""
