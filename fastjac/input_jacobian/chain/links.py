"""The links of a chain: what the double backward asks of one operation, by the operation's kind.

For an operation ``out = f(a, θ)`` the four sweeps of a step with an input-Jacobian penalty are

    forward     out = f(a, θ)
    vjp         δ_a = f_aᵀ δ                                                 down, for v = Jᵀw
    push        u_out = f_a u, and the gradients of ⟨δ, f_a u⟩ with respect to a and θ      up
    backward    g_a = f_aᵀ g + that of a;  g_θ = f_θᵀ g + that of θ     down, loss and penalty

The gradient of ``⟨δ, f_a(a, θ) u⟩`` is the second-order term. It follows from the kind:

    `Linear`, `Sum`     linear in its inputs: none
    `Product`           linear in each of two operands: the two transposes, at δ and u
    `Elementwise`       φ''(z) δ u
    `norms`             written out
    `by_autograd`       any other operation

A link keeps what its later sweeps need and drops it after use, unless ``keep`` says that the
backward will come again. δ and u have K cotangents a sample, ``[K N, ...]``; a, g and the results
for them are ``[N, ...]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjac.activations import IDS, get
from fastjac.ops.autograd import below_autograd, graph_nodes
from fastjac.ops.registration import raw


class Unsupported(RuntimeError):
    """A model, or a call, that the chain engine cannot take."""

    early = False  # raised before the model computed anything


class Link:
    """One operation of the chain, with its state for one step."""

    name = ""  # of the operation
    inputs: tuple[int, ...] = ()  # indices of values
    output = -1
    idle = False  # no cotangent reaches it
    empty = False  # its output has no numbers
    parameters: tuple[Tensor, ...] = ()  # the tensors beside the inputs that require grad

    def vjp(self, delta: Tensor) -> tuple[Tensor | None, ...]:
        """δ of each input."""
        raise NotImplementedError

    def jvp(self, tangents: list[Tensor | None]) -> Tensor | None:
        """u of the output, from those of the inputs; None is zero."""
        raise NotImplementedError

    def push(self, tangents: list[Tensor | None], keep: bool, out: bool) -> Tensor | None:
        """`jvp`, where ``out`` is wanted, after a `vjp` whose second-order terms it keeps."""
        return self.jvp(tangents)

    def backward(
        self, grad: Tensor | None, wanted: tuple[bool, ...], keep: bool
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Gradients of the inputs and of the parameters."""
        raise NotImplementedError

    def describe(self) -> str:
        return self.name


def check_leaves(t: Tensor, known: set[int], what: str) -> None:
    """Raise if t depends on a leaf that is not among the known ones: its gradient would be lost."""
    for node in graph_nodes(t):
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise Unsupported(f"{what} a tensor of shape {tuple(leaf.shape)} that requires grad")


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def plus_(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """`plus` in the memory of a, which nobody else may hold."""
    return b if a is None else a if b is None else a.add_(b)


def copies(a: Tensor, rows: Tensor) -> Tensor:
    """``[K N, ...]`` of ``a`` ``[N, ...]``, K so that it has as many samples as ``rows``."""
    k = len(rows) // len(a)
    return a if k == 1 else a.expand(k, *a.shape).flatten(0, 1)


def of_shape(a: Tensor, rows: Tensor) -> Tensor:
    """As `copies`, of which only the shape is looked at: no memory."""
    return a if len(a) == len(rows) else a[:1].expand(len(rows), *a.shape[1:])


class Linear(Link):
    """``out = A a + c`` of one input. Without ``row.apply``, A is the call itself."""

    def __init__(self, row: Any, call: Any, a: Tensor, out: Tensor, args: Any) -> None:
        self.row, self.call, self.args = row, call, args
        self.before, self.after = a.shape[1:], out.shape[1:]

    def vjp(self, delta):
        return (self.row.transpose(delta, (len(delta), *self.before), *self.args),)

    def jvp(self, tangents):
        (u,) = tangents
        apply = self.row.apply
        return self.call(u) if apply is None else apply(u, (len(u), *self.after), *self.args)

    def backward(self, grad, wanted, keep):
        into = (None,) if grad is None or not wanted[0] else self.vjp(grad)
        if not keep:
            self.call = self.args = None
        return into, ()


class Joint(Link):
    """An operation of several operands, which are values of the chain, parameters or constants."""

    def __init__(
        self, row: Any, operands: list[Any], inside: list[int], trained: list[int], args: Any
    ) -> None:
        self.row, self.operands, self.args = row, operands, args
        self.inside, self.trained = inside, trained  # which of them are values, and parameters
        self.extras: list[Any] = [None] * len(operands)  # the second-order term of each

    def into(self, i: int, grad: Tensor, total: Tensor | None = None) -> Tensor:
        """``total`` and the transpose of the operation in operand i at ``grad``."""
        raise NotImplementedError

    def vjp(self, delta):
        return tuple([self.into(i, delta) for i in self.inside])

    def backward(self, grad, wanted, keep):
        found, self.extras = self.extras, [None] * len(self.extras)
        if grad is not None:
            needed = [i for i, want in zip(self.inside, wanted, strict=True) if want]
            for i in (*needed, *self.trained):
                found[i] = self.into(i, grad, found[i])
        if not keep:
            self.operands = []
        return tuple([found[i] for i in self.inside]), tuple([found[i] for i in self.trained])


class Sum(Joint):
    """``out = Σ_i A_i a_i``. Of the operands the shapes are kept."""

    def __init__(self, row, operands, inside, trained, args, out):
        shapes = [tuple(t.shape) for t in operands]
        super().__init__(row, shapes, inside, trained, args)
        self.after = out.shape[1:]

    def into(self, i, grad, total=None):
        shape = self.operands[i]
        shape = (len(grad), *shape[1:]) if i in self.inside else shape
        return self.row.into(i, grad, shape, self.operands, *self.args)

    def jvp(self, tangents):
        given: list[Any] = [None] * len(self.operands)
        for i, u in zip(self.inside, tangents, strict=True):
            given[i] = u
        n = next(len(u) for u in tangents if u is not None)
        return self.row.apply(given, (n, *self.after), self.operands, *self.args)


class Product(Joint):
    """``out = f(a, b)``, linear in a and in b; ``f(a, b) + c`` where there is a bias.

    The gradient of ``⟨δ, f(u, b)⟩`` with respect to b is the transpose of f in b at δ and u.
    """

    def __init__(self, row, operands, inside, trained, args, out):
        super().__init__(row, operands, inside, trained, args)
        # Which operands have samples, so that K cotangents a sample need K copies of them.
        self.samples = [
            i in inside or row.has_samples(i, t, out) for i, t in enumerate(operands[:2])
        ]
        self.delta: Any = None

    def into(self, i, grad, total=None, other=None):
        if i == 2:
            return self.row.into[2](grad, self.operands[2])
        operand, row = self.operands[i], self.row
        if other is None:
            other = self.operands[1 - i]
            other = copies(other, grad) if self.samples[1 - i] else other
        if total is not None and i == 1 and row.add_into is not None:
            return row.add_into(total, grad, other)
        operand = of_shape(operand, grad) if self.samples[i] else operand
        return plus_(total, row.into[i](grad, other, operand, *self.args))

    def vjp(self, delta):
        self.delta = delta
        return super().vjp(delta)

    def push(self, tangents, keep, out):
        for place, u in zip(self.inside, tangents, strict=True):
            i = 1 - place  # the operand whose gradient this tangent gives
            if u is None:
                continue
            if i in self.trained:
                self.extras[i] = self.into(i, self.delta, self.extras[i], u)
            elif i in self.inside:
                extra = self.into(i, self.delta, None, u)
                extra = extra.view(-1, *self.operands[i].shape).sum(0)
                self.extras[i] = plus_(self.extras[i], extra)
        if not keep:
            self.delta = None
        return self.jvp(tangents) if out else None

    def jvp(self, tangents):
        total = None
        for i, u in zip(self.inside, tangents, strict=True):
            if u is not None:
                other = self.operands[1 - i]
                other = copies(other, u) if self.samples[1 - i] else other
                pair = (other, u) if i else (u, other)
                total = plus(total, self.row.apply(*pair, *self.row.no_bias, *self.args))
        return total


class Elementwise(Link):
    """``out = φ(z)`` of the activation table."""

    def __init__(self, z: Tensor, fn: str, params: dict[str, Any], suffix: str) -> None:
        self.z: Any = z
        self.args = (IDS[fn], *get(fn).param_values(params))
        self.curved = get(fn).derivatives[2] != "0"
        self.act, self.act_backward = raw("act" + suffix), raw("act_backward" + suffix)
        self.delta: Any = None
        self.extra: Tensor | None = None  # Σ_k φ''(z) δ_k u_k

    @staticmethod
    def run(op: Any, *args: Any) -> Any:
        with below_autograd():  # past the op's own derivative, which is written in Python
            return op(*args)

    def forward(self) -> Tensor:
        return self.run(self.act, self.z, None, 0, *self.args)

    def vjp(self, delta):
        self.delta = delta if self.curved else None
        return (self.run(self.act, copies(self.z, delta), delta, 1, *self.args),)

    def push(self, tangents, keep, out):
        (u,) = tangents
        if not self.curved:
            return self.jvp(tangents)
        z = copies(self.z, u)
        extra, u = self.run(self.act_backward, z, self.delta, u, 1, *self.args)
        k = len(u) // len(self.z)
        extra = extra if k == 1 else extra.view(k, *self.z.shape).sum(0)
        self.extra = plus_(self.extra, extra)
        if not keep:
            self.delta = None
        return u

    def jvp(self, tangents):
        (u,) = tangents
        return self.run(self.act, copies(self.z, u), u, 1, *self.args)

    def backward(self, grad, wanted, keep):
        z, extra = self.z, self.extra
        self.extra = None
        if not keep:
            self.z = None
        into = None if grad is None else self.run(self.act, z, grad, 1, *self.args)
        return (plus_(into, extra),), ()
