"""Checks of penalties that are defined outside of fastjac: what their methods return and ask for.

They stand above the engines, which take cotangents and values as they come. The penalties of
fastjac are tested instead, and do not pass through here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac import arguments
from fastjac.input_jacobian.pullback import Pullback
from fastjac.signatures import shown


def _wrong(value: Any) -> type[Exception]:
    """The type of the error of a value that is no tensor, or one of another shape."""
    return ValueError if isinstance(value, Tensor) else TypeError


def _like(what: str, name: str, t: Tensor, other: str, like: Tensor) -> None:
    """Check that a tensor has the dtype and the device of another one."""
    for kind, found, wanted in (
        ("dtype", t.dtype, like.dtype),
        ("device", t.device, like.device),
    ):
        if found != wanted:
            raise ValueError(
                f"{what} has {kind} {found} and {other} has {wanted}: pass "
                f"{name}.to({other}.{kind})"
            )


NOT_IN_THE_GRAPH = ("does not require grad", "to not have been used in the graph")
"""In the errors of ``torch.autograd.grad``."""


class ByHand(RuntimeError):
    """``per_sample`` differentiates the output without the pullback: a call for autograd."""


def values(penalty: Any, pull: Pullback, targets: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    """What ``per_sample`` returns, if that is a tensor ``[N]`` in the graph of the model."""
    name, n = type(penalty).__name__, pull.output.shape[0]
    checked = Checked(pull, name)
    if torch.compiler.is_compiling():  # which cannot leave a block with try in its middle
        found = penalty.per_sample(checked, *targets, **named)
    else:
        try:
            found = penalty.per_sample(checked, *targets, **named)
        except RuntimeError as error:
            if any(words in str(error) for words in NOT_IN_THE_GRAPH):
                raise ByHand(
                    f"{name}.per_sample differentiates pull.output with respect to pull.x itself, "
                    "and they are not in one graph with engine='chain': use the products "
                    "pull.vjp(w), pull.jvp(u) and pull.squared_norms(w)"
                ) from error
            if "used in an in-place operation" in str(error):
                raise RuntimeError(
                    f"{name}.per_sample writes to pull.output or pull.x in place: use the "
                    "out-of-place operation"
                ) from error
            raise
    if not isinstance(found, Tensor) or found.shape != (n,):
        hint = ""
        if found is None:
            hint = ". Is a return statement missing?"
        elif isinstance(found, Tensor):
            hint = ". Sum over all dimensions but that of the samples"
            if found.dim() == 0:
                hint = ". fastjac takes the mean over the samples itself (reduction)"
            elif found.dim() == 1:
                hint = ""
        raise _wrong(found)(
            f"{name}.per_sample returned {shown(found)}: it must return a tensor of shape [{n}], "
            f"one number for each sample{hint}"
        )
    if not found.is_floating_point():
        raise TypeError(
            f"{name}.per_sample returned a tensor of dtype {found.dtype}: it must return a "
            "floating-point tensor"
        )
    lost = any(product.requires_grad for product in checked.products)
    if not checked.products and not torch.compiler.is_compiling():
        # Without products a value of 0 is that of a penalty that begins later.
        lost = pull.output.requires_grad and bool(found.detach().any())
    if lost and not found.requires_grad:
        raise RuntimeError(
            f"{name}.per_sample returned a tensor that does not require grad: it must return a "
            "differentiable function of pull.output and of the products, without detach(), item() "
            "and torch.no_grad(); torch.autograd.grad needs create_graph=True"
        )
    return found


class Checked(Pullback):
    """A pullback that checks what it is asked for."""

    def __init__(self, pull: Pullback, name: str, products: list[Tensor] | None = None) -> None:
        self.pull, self.name, self.output = pull, name, pull.output
        self.products: list[Tensor] = [] if products is None else products

    @property
    def x(self) -> Tensor:  # type: ignore[override]
        return self.pull.x

    def __getattr__(self, attribute: str) -> Any:
        raise AttributeError(
            f"the pullback that {vars(self).get('name')}.per_sample is given has no attribute "
            f"{attribute!r}: it has x, output, vjp(w), jvp(u), squared_norms(w) and then(f)"
        )

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        self._check("vjp(w)", "w", w, "output", self.output, chunk_size)
        return self._noted(self.pull.vjp(w, chunk_size))

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        self._check("squared_norms(w)", "w", w, "output", self.output, chunk_size)
        return self._noted(self.pull.squared_norms(w, chunk_size))

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        given: Any = self.pull  # the chain engine makes a leaf of x for those that ask for it
        x = given.given if hasattr(given, "given") else given.x
        self._check("jvp(u)", "u", u, "x", x, chunk_size)
        return self._noted(self.pull.jvp(u, chunk_size))

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        n = self.output.shape[0]

        def checked(output: Tensor) -> Tensor:
            found = f(output)
            if not isinstance(found, Tensor) or found.dim() == 0 or found.shape[0] != n:
                raise _wrong(found)(
                    f"the function that {self.name} passes to pull.then returned {shown(found)}: "
                    f"it must return a tensor of shape [{n}, ...], with the same samples as output"
                )
            return found

        return Checked(self.pull.then(checked), self.name, self.products)

    def _noted(self, product: Tensor) -> Tensor:
        self.products.append(product)
        return product

    def _check(
        self, call: str, name: str, t: Any, other: str, like: Tensor, chunk_size: int | None
    ) -> None:
        arguments.chunk_size(chunk_size)
        shape = tuple(like.shape)
        if not isinstance(t, Tensor) or t.dim() == 0 or t.shape[1:] != shape or t.shape[0] == 0:
            wanted = ", ".join(["K", *map(str, shape)])
            hint = ""
            if isinstance(t, Tensor) and t.shape == shape:
                hint = f"; for K = 1 pass {name}.unsqueeze(0)"
            raise _wrong(t)(
                f"pull.{call} in {self.name} was given {shown(t)}: {name} must be a tensor of "
                f"shape [K, *{other}.shape] with K of at least 1, here [{wanted}]{hint}"
            )
        _like(f"{name} of pull.{call} in {self.name}", name, t, other, like)
        if not torch.is_grad_enabled():
            raise RuntimeError(
                f"pull.{call} was called under torch.no_grad() in {self.name}, so the value would "
                "have no gradient: call it with gradients on"
            )


def cotangents(penalty: Any, found: Any, logits: Tensor) -> tuple[Tensor, Any]:
    """What ``cotangents`` returns, if that is ``(w, scale)``."""
    name, (n, m) = type(penalty).__name__, logits.shape
    must = (
        "it must return (w, scale): w is a tensor of shape [K, N, m] with K of at least 1, here "
        f"[K, {n}, {m}], and scale the factor of the sum over K, a number"
    )
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise TypeError(f"{name}.cotangents returned {shown(found)}: {must}")
    w, scale = found
    if not isinstance(w, Tensor) or w.dim() != 3 or w.shape[1:] != (n, m) or w.shape[0] == 0:
        raise _wrong(w)(f"{name}.cotangents returned {shown(w)} as w: {must}")
    _like(f"w of {name}.cotangents", "w", w, "output", logits)
    one = isinstance(scale, Tensor) and scale.shape in ((), (n,))
    if not one and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise TypeError(f"{name}.cotangents returned {shown(scale)} as scale: {must}")
    return w, scale


def draw(penalty: Any, found: Any, k: int, logits: Tensor) -> Tensor:
    """What ``draw`` returns, if that is a tensor ``[k, N, m]`` or ``[k, 1, m]``."""
    n, m = logits.shape
    if not isinstance(found, Tensor) or found.shape not in ((k, n, m), (k, 1, m)):
        raise _wrong(found)(
            f"{type(penalty).__name__}.draw returned {shown(found)}: it must return a tensor of "
            f"shape [k, N, m], here [{k}, {n}, {m}], or [k, 1, m] if the samples share it"
        )
    found = found.to(logits.dtype)  # the caller does this too
    _like(f"w of {type(penalty).__name__}.draw", "w", found, "output", logits)
    return found


def scales(penalty: Any, found: Any) -> tuple[float, float]:
    """What ``scales`` returns, if that is a pair of numbers."""
    if (
        not isinstance(found, tuple | list)
        or len(found) != 2
        or not all(isinstance(number, int | float) for number in found)
    ):
        raise TypeError(
            f"{type(penalty).__name__}.scales returned {shown(found)}: it must return two numbers, "
            "the factor of the mean over the projections and that of the exact value"
        )
    return found[0], found[1]
