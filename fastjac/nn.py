"""The activation as a module, and `fuse`, which puts it into an existing model.

After ``fuse(model)``, ``autograd.grad(..., create_graph=True)`` runs the fused double backward.
Nothing else about the model or the code around it changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.activations import TABLE, get
from fastjac.functional import FUNCTIONS
from fastjac.observers import activate
from fastjac.ops import act
from fastjac.ops.dispatch import OPS


class Act(nn.Module):
    """φ(z) as a module: `fastjac.act` of order 0.

    Args:
        fn: the activation, a key of `fastjac.activations.TABLE`.
        impl: implementation, as in `fastjac.act`.
        **params: the activation's parameters.

    Shapes, dtypes, gradient orders and errors as `fastjac.act` of order 0; an unknown fn or
    parameter raises here, an impl when it is called. Has no parameters or buffers, so a
    ``state_dict`` does not change where it replaces torch's module.

    Example:

        >>> z = torch.randn(4, 3)
        >>> torch.allclose(fastjac.Act("silu")(z), nn.functional.silu(z), atol=1e-6)
        True
    """

    def __init__(self, fn: str, *, impl: str = "auto", **params: float) -> None:
        super().__init__()
        get(fn).param_values(params)  # raises on an unknown name
        self.fn, self.impl = fn, impl
        self.params: dict[str, Any] = dict(params)
        self._replaced: tuple[nn.Module, ...] = ()  # in a tuple: not a submodule

    def forward(self, z: Tensor) -> Tensor:
        return activate(z, self.fn, self.impl, self.params)

    def derivative(self, z: Tensor, g: Tensor | None = None, order: int = 1) -> Tensor:
        """φ^(order)(z) · g, `fastjac.act` of any order; penalties do not see it."""
        return act(z, g, order, self.fn, impl=self.impl, **self.params)

    def extra_repr(self) -> str:
        options = [f"{name}={value}" for name, value in self.params.items()]
        if self.impl != "auto":
            options.append(f"impl={self.impl!r}")
        return ", ".join([self.fn, *options])


def activation_of(module: nn.Module) -> Act | None:
    """The `Act` that computes what a torch activation module does; None if the table has none.

    Exact types only: a subclass may have changed the forward.
    """
    if type(module) is Act:
        return module
    for row in TABLE.values():
        if row.module is None or type(module) is not getattr(nn, row.module):
            continue
        if all(getattr(module, name) == value for name, value in row.torch_kwargs.items()):
            return Act(row.name, **{name: getattr(module, name) for name in row.params})
    return None


# The plain functions that a model may hold as an attribute (nn.TransformerEncoderLayer does).
_HELD: dict[Callable[..., Any], str] = {}
for _row in TABLE.values():
    for _function in (
        _row.torch_function_object(),
        getattr(torch, _row.name, None),
        getattr(nn.functional, _row.name, None),
    ):
        if _function is not None:
            _HELD.setdefault(_function, _row.name)


def held_functions(module: nn.Module) -> list[tuple[str, Callable[..., Any], str]]:
    """The torch activation functions that a module holds: (attribute, function, its row)."""
    found = []
    for name, value in vars(module).items():
        if callable(value) and not isinstance(value, nn.Module) and _hashable(value):
            fn = _HELD.get(value)
            if fn is not None:
                found.append((name, value, fn))
    return found


class LinearAct(nn.Linear):
    """``φ(x Wᵀ + b)``: ``nn.Linear`` with its activation; the GEMM is torch's.

    Under `fastjac.DREG` the activation, the penalty's statistic and the gradients of both are one
    pass each. In any other model ``nn.Linear`` followed by an activation module gets the same.

    Args:
        in_features, out_features, bias, device, dtype: as ``nn.Linear``, whose parameters, names
            in the ``state_dict`` and initialisation these are.
        fn, impl, **params: the activation, as `Act`.

    Shapes: ``[N, ..., in_features]`` to ``[N, ..., out_features]``. Dtypes as ``nn.Linear`` and
    `fastjac.act`, gradient orders as the latter of order 0, errors as `Act` and ``nn.Linear``.

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
    """``φ(W ∗ x + b)``: torch's convolution of the same number of dimensions with its activation.

    Args:
        in_channels, out_channels, kernel_size, **options: as torch's module, whose parameters,
            names in the ``state_dict`` and initialisation these are.
        fn, impl, params: the activation, as `LinearAct`; its parameters as a dictionary.

    Shapes: ``[N, in_channels, ...]`` to ``[N, out_channels, ...]``, positions as torch's module.
    Dtypes, gradient orders, errors and what `fastjac.DREG` makes of it as `LinearAct`.

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
    """Replaces the activations of a model, in place, by the fused ones; returns the model.

    Replaced are modules of exactly a ``torch.nn`` activation type of the table, wherever they are
    nested, and torch activation functions held as attributes (``nn.TransformerEncoderLayer``).
    Activations called as functions inside a ``forward`` cannot be seen: write ``fastjac.gelu(z)``
    there. Outputs, ``state_dict``, hooks and sharing of modules stay; ``inplace=True`` is dropped,
    since the pre-activation is kept for the derivatives. Calling it twice changes nothing.

    Args:
        model: any module; if it is itself an activation, its replacement is returned.
        impl: implementation that the activations will ask for, as in `fastjac.act`.

    Raises:
        TypeError: model is not a module.
        ValueError: unknown impl.

    Example:

        >>> model = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 2))
        >>> fastjac.fuse(model)[1]
        Act(gelu)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if impl not in ("auto", *OPS["act"].implementations):
        raise ValueError(
            f"impl={impl!r}; choose from {', '.join(('auto', *OPS['act'].implementations))}"
        )
    replaced: dict[nn.Module, nn.Module] = {}

    def replacement(module: nn.Module) -> nn.Module:
        if module not in replaced:
            new = None if isinstance(module, Act) else activation_of(module)
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
            setattr(parent, name, _Held(value, fn, impl))
    return replacement(model)


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes `fuse`: puts the replaced activations back, in place; returns the model.

    Hooks that came since and ``training`` go along; an `Act` that replaced nothing stays.

    Raises:
        TypeError: model is not a module.

    Example:

        >>> model = fastjac.fuse(nn.Sequential(nn.Linear(3, 8), nn.GELU()))
        >>> fastjac.unfuse(model)[1]
        GELU(approximate='none')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

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


class _Held:
    """A function attribute's stand-in; remembers what it replaced. Picklable."""

    def __init__(self, replaced: Callable[..., Any], fn: str, impl: str) -> None:
        self.replaced, self.fn, self.impl = replaced, fn, impl

    def __call__(self, z: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("inplace", None)  # z is kept for the derivatives, so it is not written over
        if args and isinstance(args[-1], bool):
            args = args[:-1]
        return FUNCTIONS[self.fn](z, *args, impl=self.impl, **kwargs)

    def __repr__(self) -> str:
        return f"fastjac.{self.fn}"


def _hashable(value: object) -> bool:
    return type(value).__hash__ is not None


def _share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Both modules hold the same hook dictionaries, so handles taken before still remove hooks.

    With the flag that says what kind of backward hooks they are.
    """
    for name, value in vars(old).items():
        if "hook" in name:
            vars(new)[name] = value
