"""Modules with fused activations; `fastjac.fuse` puts them into an existing model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import recognise
from fastjac.activations import TABLE, get
from fastjac.observers import activate
from fastjac.ops.act import act
from fastjac.signatures import no_option


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


def _arguments_of(layer: type) -> list[str]:
    return list(inspect.signature(layer).parameters)


def _refuse_unknown(layer: nn.Module, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises for an option of a layer that neither it nor its activation has."""
    known = list(known)
    for name in given:
        if name not in known:
            raise no_option(type(layer).__name__, name, known)


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
        own = [p for p in _arguments_of(LinearAct) if p != "params"]
        _refuse_unknown(self, params, [*own, *get(fn).params])
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
        of_torch = next(c for c in type(self).__mro__ if c.__module__.startswith("torch."))
        own = [p for p in _arguments_of(_ConvAct) if p != "options"]
        _refuse_unknown(self, options, dict.fromkeys([*own, *_arguments_of(of_torch)]))
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
