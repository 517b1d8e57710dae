"""Modules with fused activations, and `fuse`, which puts them into an existing model.

After ``fuse(model)``, ``autograd.grad(..., create_graph=True)`` uses the fused double backward.
Nothing else about the model changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import recognise
from fastjac.activations import TABLE, get
from fastjac.functional import FUNCTIONS
from fastjac.observers import activate
from fastjac.ops.act import act
from fastjac.ops.act_sizes import never
from fastjac.ops.dispatch import OPS


class Act(nn.Module):
    """φ(z) as a module: `fastjac.act` of order 0.

    Args:
        fn: the activation, a key of `fastjac.activations.TABLE`.
        impl: the implementation, as in `fastjac.act`. "auto" calls torch's function where that is
            at least as fast, as `fastjac.fuse` says.
        **params: the parameters of the activation.

    Shapes, dtypes, gradient orders and errors are those of `fastjac.act` with order 0. An unknown
    fn or parameter raises when the module is created, an unknown impl when it is called. The module
    has no parameters and no buffers, so the ``state_dict`` of a model does not change if it
    replaces a module of torch.

    Example:

        >>> z = torch.randn(4, 3)
        >>> torch.allclose(fastjac.Act("silu")(z), nn.functional.silu(z), atol=1e-6)
        True
    """

    def __init__(self, fn: str, *, impl: str = "auto", **params: float) -> None:
        super().__init__()
        get(fn).param_values(params)  # raises if a name or value is wrong
        self.fn, self.impl = fn, impl
        self.params: dict[str, Any] = params
        self._replaced: tuple[nn.Module, ...] = ()  # a tuple, so that it is not a submodule

    def forward(self, z: Tensor) -> Tensor:
        return activate(z, self.fn, self.impl, self.params)

    def derivative(self, z: Tensor, g: Tensor | None = None, order: int = 1) -> Tensor:
        """φ^(order)(z) · g, as `fastjac.act`. Attached penalties do not see this call."""
        return act(z, g, order, self.fn, impl=self.impl, **self.params)

    def extra_repr(self) -> str:
        options = [f"{name}={value}" for name, value in self.params.items()]
        if self.impl != "auto":
            options.append(f"impl={self.impl!r}")
        return ", ".join([self.fn, *options])


def hooked(*modules: dict[str, Any]) -> bool:
    """Whether a call of a module with these attributes runs more than its forward."""
    for state in modules:
        if state["_forward_hooks"] or state["_forward_pre_hooks"]:
            return True
        if state["_backward_hooks"] or state["_backward_pre_hooks"]:
            return True
    return False


def activation_of(module: nn.Module) -> Act | None:
    """The `Act` that computes the same as a torch module, or None if the table has no such row.

    Subclasses give None, because they may override the forward; see `recognised`.
    """
    if type(module) is Act:
        return module
    for row in TABLE.values():
        if row.module is None or type(module) is not getattr(nn, row.module):
            continue
        if all(getattr(module, name) == value for name, value in row.torch_kwargs.items()):
            return Act(row.name, **{name: getattr(module, name) for name in row.params})
    return None


def row_of(module: nn.Module) -> tuple[str, tuple[float, ...]] | None:
    """The name and the parameters of the row that a module of torch, or an `Act`, computes.

    None for an `Act` with an implementation of its own. Written so that dynamo can trace it.
    """
    if type(module) is Act:
        return (module.fn, _values(module.fn, module.params)) if module.impl == "auto" else None
    for name, kwargs in _ROWS.get(type(module), ()):
        if all([getattr(module, key) == value for key, value in kwargs.items()]):
            return name, _values(name, {p: getattr(module, p) for p in TABLE[name].params})
    return None


def _values(name: str, params: dict[str, Any]) -> tuple[float, ...]:
    return tuple([float(params.get(p, value)) for p, value in TABLE[name].params.items()])


_ROWS: dict[type, list[tuple[str, dict[str, Any]]]] = {}
for _row in TABLE.values():
    if _row.module is not None:
        _kind = getattr(nn, _row.module)
        _ROWS.setdefault(_kind, []).append((_row.name, dict(_row.torch_kwargs)))


def recognised(module: nn.Module) -> Act | None:
    """The `Act` that computes the same as a module of a foreign class, by what it computes."""
    found = recognise.recognise(module)
    return None if found is None else Act(found.fn)


def held_functions(module: nn.Module) -> list[tuple[str, Callable[..., Any], str]]:
    """The attributes of a module that are activation functions: (attribute, function, fn)."""
    found = []
    for name, value in vars(module).items():
        hashable = type(value).__hash__ is not None
        if callable(value) and not isinstance(value, nn.Module) and hashable:
            call = recognise.called(value, (), {}) if value in recognise.FUNCTIONS else None
            if call is not None and call.fn is not None and not call.writes:
                found.append((name, value, call.fn))
    return found


class LinearAct(nn.Linear):
    """``φ(x Wᵀ + b)``: ``nn.Linear`` with an activation. The GEMM is that of torch.

    If `fastjac.DREG` is attached to the model, one pass computes the activation and the statistic
    of the penalty, and one pass the gradients of both. ``nn.Linear`` followed by an activation
    module is computed in the same way.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``. Parameters, names in
            the ``state_dict`` and initialisation are the same too.
        fn, impl, **params: the activation, as in `Act`.

    Shapes: ``[N, ..., in_features]`` to ``[N, ..., out_features]``. Dtypes and errors are those of
    ``nn.Linear`` and `Act`, gradient orders those of `fastjac.act` with order 0.

    Example:

        >>> layer, x = fastjac.nn.LinearAct(3, 8, "tanh"), torch.randn(4, 3)
        >>> truth = torch.tanh(nn.functional.linear(x, layer.weight, layer.bias))
        >>> torch.allclose(layer(x), truth, atol=1e-6)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fn: str = "gelu",
        *,
        bias: bool = True,
        impl: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **params: float,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.act = Act(fn, impl=impl, **params)

    def pre_activation(self, x: Tensor) -> Tensor:
        """``x Wᵀ + b``."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.pre_activation(x))


class _ConvAct(nn.modules.conv._ConvNd):
    """``φ(W ∗ x + b)``: torch's convolution of the same number of dimensions with an activation.

    Args:
        in_channels, out_channels, kernel_size, **options: as in torch's module. Parameters, names
            in the ``state_dict`` and initialisation are the same too.
        fn, impl, params: the activation, as in `LinearAct`; its parameters are in a dictionary.

    Shapes: ``[N, in_channels, ...]`` to ``[N, out_channels, ...]``, as torch's module. For dtypes,
    gradient orders, errors and `fastjac.DREG` see `LinearAct`.

    Example:

        >>> layer, x = fastjac.nn.ConvAct2d(3, 8, 3, "relu"), torch.randn(2, 3, 5, 5)
        >>> truth = nn.functional.conv2d(x, layer.weight, layer.bias).relu()
        >>> torch.allclose(layer(x), truth, atol=1e-6)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        fn: str = "gelu",
        *,
        impl: str = "auto",
        params: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self.act = Act(fn, impl=impl, **(params or {}))

    def pre_activation(self, x: Tensor) -> Tensor:
        """``W ∗ x + b``."""
        return super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.pre_activation(x))


class ConvAct1d(_ConvAct, nn.Conv1d):
    __doc__ = str(_ConvAct.__doc__)


class ConvAct2d(_ConvAct, nn.Conv2d):
    __doc__ = str(_ConvAct.__doc__)


class ConvAct3d(_ConvAct, nn.Conv3d):
    __doc__ = str(_ConvAct.__doc__)


ConvAct = ConvAct2d


def fuse(model: nn.Module, *, impl: str = "auto") -> nn.Module:
    """Replace the activations of a model by fused ones, in place, and return the model.

    A fused activation is at least as fast as torch's in the forward and backward, the double
    backward and the third order, and often faster. Where it would be slower, it is not used: ReLU,
    LeakyReLU, ReLU6, Hardtanh and Hardswish are not replaced, and the others call torch's function
    on CPU tensors that are too small for the gain to pay for the call. The table
    `fastjac.ops.act_sizes.FROM` has the sizes, by activation and dtype. A named ``impl`` replaces
    all and is used at any size. Hardsigmoid, which torch cannot differentiate twice, is always
    replaced.

    This replaces all submodules whose type is a ``torch.nn`` activation of the table; modules of
    other classes without parameters, buffers and submodules that compute a row of the table (the
    ``NewGELUActivation`` of Hugging Face, ``GELU`` of timm), which are run once to see it; and
    torch activation functions that are attributes of modules (``nn.TransformerEncoderLayer`` has
    one). It cannot replace a function that is called inside a
    ``forward``: write ``fastjac.gelu(z)`` there. Outputs, ``state_dict``, hooks and the sharing of
    modules do not change. ``inplace=True`` is ignored, because the derivatives need the
    pre-activation. Calling ``fuse`` a second time changes nothing.

    Args:
        model: any module; if it is an activation itself, its replacement is returned.
        impl: the implementation that the activations use, as in `Act`.

    Raises:
        TypeError: model is not a module.
        ValueError: impl is unknown.

    Example:

        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> fastjac.fuse(model)[1]
        Act(gelu)
    """
    _check_module(model)
    known = ("auto", *OPS["act"].implementations)
    if impl not in known:
        raise ValueError(f"impl={impl!r} is not an implementation; choose from {', '.join(known)}")
    replaced: dict[nn.Module, nn.Module] = {}

    def replacement(module: nn.Module) -> nn.Module:
        if module not in replaced:
            new = None
            if not isinstance(module, Act):
                new = activation_of(module) or recognised(module)
            if new is not None and impl == "auto" and never(new.fn):
                new = None
            if new is not None:
                new.impl, new._replaced = impl, (module,)
                new.training = module.training
                _share_hooks(module, new)
            replaced[module] = new or module
        return replaced[module]

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name] = replacement(child)
        for name, value, fn in held_functions(parent):
            if impl == "auto" and never(fn):
                continue
            setattr(parent, name, _Held(value, fn, impl))
    return replacement(model)


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse`: put the replaced activations back, in place, and return the model.

    Hooks that were registered since, and ``training``, are kept. An `Act` that was not made by
    `fuse` stays.

    Raises:
        TypeError: model is not a module.

    Example:

        >>> model = fastjac.fuse(nn.Sequential(nn.Linear(3, 8), nn.GELU()))
        >>> fastjac.unfuse(model)[1]
        GELU(approximate='none')
    """
    _check_module(model)

    def original(module: nn.Module) -> nn.Module:
        if isinstance(module, Act) and module._replaced:
            old = module._replaced[0]
            old.training = module.training
            _share_hooks(module, old)
            return old
        return module

    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name] = original(child)
        for name, value in list(vars(parent).items()):
            if isinstance(value, _Held):
                setattr(parent, name, value.replaced)
    return original(model)


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


class _Held:
    """The replacement of an attribute that is a function. It can be pickled."""

    def __init__(self, replaced: Callable[..., Any], fn: str, impl: str) -> None:
        self.replaced, self.fn, self.impl = replaced, fn, impl

    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("inplace", None)  # the derivatives need z, so it is not overwritten
        if args and isinstance(args[-1], bool):
            args = args[:-1]
        return FUNCTIONS[self.fn](z, *args, impl=self.impl, **kwargs)

    def __repr__(self) -> str:
        return f"fastjac.{self.fn}"


def _share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let both modules have the same dictionaries of hooks, so existing handles can remove hooks.

    The flag for the kind of backward hooks is copied too.
    """
    for name, value in vars(old).items():
        if "hook" in name:
            vars(new)[name] = value
