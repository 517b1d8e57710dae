"""`fuse` puts fused activations into an existing model, and `unfuse` takes them out.

After ``fuse(model)``, ``autograd.grad(..., create_graph=True)`` uses the fused double backward.
Nothing else about the model changes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastjac import recognise
from fastjac.functional import FUNCTIONS
from fastjac.nn import Act, activation_of, recognised
from fastjac.ops.act_sizes import never
from fastjac.ops.dispatch import OPS


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
    pre-activation. Calling ``fuse`` a second time changes nothing. For a model without an
    activation module it warns.

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

    held = False
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None:
                parent._modules[name] = replacement(child)
        for name, value, fn in held_functions(parent):
            held = True
            if impl == "auto" and never(fn):
                continue
            setattr(parent, name, _Held(value, fn, impl))
    fused = replacement(model)
    if not held and not any(_is_activation(module) for module in fused.modules()):
        warnings.warn(
            f"fuse: {type(model).__name__} has no activation module that fastjac knows, so nothing "
            "was replaced: functions such as F.gelu in a forward are replaced by hand, by "
            "fastjac.gelu and so on; the penalties do not need it",
            stacklevel=2,
        )
    return fused


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, Act) or (activation_of(module) or recognised(module)) is not None


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
