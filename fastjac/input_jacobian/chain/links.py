"""The links of a chain: what the double backward asks of one operation, by the operation's kind.

For an operation ``out = f(a, θ)`` the four sweeps of a step with an input-Jacobian penalty are

    forward     out = f(a, θ)
    vjp         δ_a = f_aᵀ δ                                                 down, for v = Jᵀw
    push        u_out = f_a u, and the gradients of ⟨δ, f_a u⟩ with respect to a and θ      up
    backward    g_a = f_aᵀ g + that of a;  g_θ = f_θᵀ g + that of θ     down, loss and penalty

The gradient of ``⟨δ, f_a(a, θ) u⟩`` is the second-order term. It follows from the kind:

    `Map`, `Linear`  linear in one value, or in all operands together: none
    `Product`        linear in each of two: the transposes at δ and u
    `Elementwise`    φ''(z) δ u
    `norms`          written out
    `by_autograd`    of any other operation, by autograd

A link keeps what its later sweeps need and drops it after use, unless ``keep`` says that the
backward will come again. δ and u have K cotangents a sample, ``[K N, ...]``; a, g and the results
for them are ``[N, ...]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fastjac.activations import IDS, get
from fastjac.ops.autograd import graph_nodes
from fastjac.ops.registration import raw
from fastjac.torch_private import below_autograd


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
    # Not by len(), which torch has in Python: 0.4 µs a call for 0.1 µs, and each link asks often.
    k = rows.shape[0] // a.shape[0]
    return a if k == 1 else a.expand(k, *a.shape).flatten(0, 1)


def of_shape(a: Tensor, rows: Tensor) -> Tensor:
    """As `copies`, of which only the shape is looked at: no memory."""
    n = rows.shape[0]
    return a if a.shape[0] == n else a[:1].expand(n, *a.shape[1:])


class Operands(Link):
    """An operation of several operands: values of the chain, parameters and constants."""

    def __init__(self, operands: list[Any], inside: list[int], trained: list[int]) -> None:
        self.operands: Any = operands
        self.inside, self.trained = inside, trained  # which are values, and which parameters
        self.extras: list[Any] = [None] * len(operands)  # the second-order term of each

    def into(self, i: int, d: Tensor, total: Tensor | None = None) -> Tensor:
        """``total`` and the transpose of the operation in operand i at d."""
        raise NotImplementedError

    def vjp(self, delta):
        return tuple([self.into(i, delta) for i in self.inside])

    def backward(self, grad, wanted, keep):
        found, self.extras = self.extras, [None] * len(self.extras)
        if grad is not None:
            for i, want in zip(self.inside, wanted, strict=True):
                if want:
                    found[i] = self.into(i, grad, found[i])
            for i in self.trained:
                found[i] = self.into(i, grad, found[i])
        if not keep:
            self.operands = None
        return tuple([found[i] for i in self.inside]), tuple([found[i] for i in self.trained])


class LinearRow(NamedTuple):
    """What `rules.linear` explains."""

    transpose: Callable[..., Tensor]
    apply: Callable[..., Tensor] | None
    when: Callable[..., bool]
    forward: Callable[..., Any] | None
    arity: int


class Map(Link):
    """``out = A a + c``, linear in one value, of which only the shape is kept."""

    call: Any = None  # A, where the row has none

    def __init__(self, row: LinearRow, a: Tensor, args: Any, out: Tensor) -> None:
        self.row, self.args, self.before, self.after = row, args, a.shape[1:], out.shape[1:]

    def vjp(self, delta):
        return (self.row.transpose(delta, (delta.shape[0], *self.before), *self.args),)

    def jvp(self, tangents):
        (u,) = tangents
        if self.call is not None:
            return self.call(u)
        assert self.row.apply is not None
        return self.row.apply(u, (u.shape[0], *self.after), *self.args)

    def backward(self, grad, wanted, keep):
        into = None if grad is None or not wanted[0] else self.vjp(grad)[0]
        if not keep:
            self.args = self.call = None
        return (into,), ()


class Add(Link):
    """``out = a + b``, two values of one shape."""

    def vjp(self, delta):
        return delta, delta

    def jvp(self, tangents):
        return plus(*tangents)

    def backward(self, grad, wanted, keep):
        return (grad, grad), ()


class Linear(Operands):
    """``out = Σ_i A_i a_i + c``; only the shapes of the operands are kept."""

    def __init__(self, operands, inside, trained, row, args, out):
        super().__init__([t.shape for t in operands], inside, trained)
        self.row, self.args, self.after = row, args, out.shape[1:]

    def into(self, i, d, total=None):
        shape = self.operands[i]
        shape = (d.shape[0], *shape[1:]) if i in self.inside else shape
        return self.row.transpose(d, shape, i, self.operands, *self.args)

    def jvp(self, tangents):
        total = None
        for i, u in zip(self.inside, tangents, strict=True):
            if u is not None:
                shape = (u.shape[0], *self.after)
                total = plus(total, self.row.apply(u, shape, i, self.operands, *self.args))
        return total


class ProductRow(NamedTuple):
    """The functions of a product ``f(a, b)`` that is taken sample by sample.

    Attributes:
        apply: ``f``, called as ``apply(a, b, bias, *arguments)``. Only a layer, where b is the
            weight, has arguments and a bias that is not None.
        into: the transposes with respect to a and b, called as ``(d, other, like, *arguments)``,
            where ``other`` is the other operand and ``like`` has the shape of the result. A layer
            has a third one with respect to the bias, called as ``(d)``. None where ``f`` is not
            linear in the operand.
        core: how many dimensions of a and of b are not dimensions of samples.
        add_into: ``(total, d, a)``: adds the transpose with respect to b to ``total``, in place.
        arrange: maps the arguments of the call to those of the other functions.
    """

    apply: Callable[..., Tensor]
    into: tuple[Callable[..., Tensor] | None, ...]
    core: tuple[int, int] = (0, 0)
    add_into: Callable[..., Tensor] | None = None
    arrange: Callable[..., Any] | None = None


class Product(Operands):
    """``out = f(a, b)``, linear in a and in b.

    The gradient of ``⟨δ, f(u, b)⟩`` with respect to b is the transpose of f in b at δ and u.
    """

    def __init__(self, operands, inside, trained, row, samples, args):
        super().__init__(operands, inside, trained)
        self.row, self.args = row, args
        self.samples = samples  # whether a, b have samples: K cotangents need K copies of them
        self.delta: Any = None

    def into(self, i, d, total=None, other=None):
        row = self.row
        if other is None:
            other = self.operands[1 - i]
            if self.samples[1 - i]:
                other = copies(other, d)
        if total is not None and i == 1 and row.add_into is not None:
            return row.add_into(total, d, other)
        like = self.operands[i]
        if self.samples[i]:
            like = of_shape(like, d)
        found = row.into[i](d, other, like, *self.args)
        return found if total is None else total.add_(found)

    def vjp(self, delta):
        self.delta = delta
        if len(self.inside) == 1:
            return (self.into(self.inside[0], delta),)
        return self.into(0, delta), self.into(1, delta)

    def push(self, tangents, keep, out):
        for i, u in zip(self.inside, tangents, strict=True):
            j = 1 - i
            if u is None or not (j in self.inside or j in self.trained):
                continue
            if self.samples[j]:
                extra = self.into(j, self.delta, None, u).view(-1, *self.operands[j].shape).sum(0)
                self.extras[j] = plus_(self.extras[j], extra)
            else:
                self.extras[j] = self.into(j, self.delta, self.extras[j], u)
        if not keep:
            self.delta = None
        return self.jvp(tangents) if out else None

    def jvp(self, tangents):
        total, row = None, self.row
        for i, u in zip(self.inside, tangents, strict=True):
            if u is None:
                continue
            other = self.operands[1 - i]
            if self.samples[1 - i]:
                other = copies(other, u)
            a, b = (other, u) if i else (u, other)
            total = plus(total, row.apply(a, b, None, *self.args))
        return total


class Layer(Product):
    """A `Product` of a value and a weight, with a bias added or None.

    The formulas are those of `Product`, without its case distinctions: most operations of a network
    are layers, and a sweep through one costs a few microseconds.
    """

    def vjp(self, delta):
        self.delta = delta
        a, weight, _ = self.operands
        return (self.row.into[0](delta, weight, a, *self.args),)

    def push(self, tangents, keep, out):
        (u,) = tangents
        if 1 in self.trained:
            self.extras[1] = self.into(1, self.delta, self.extras[1], u)
        if not keep:
            self.delta = None
        return self.row.apply(u, self.operands[1], None, *self.args) if out else None

    def jvp(self, tangents):
        return self.row.apply(tangents[0], self.operands[1], None, *self.args)

    def backward(self, grad, wanted, keep):
        (a, weight, _), row, extra = self.operands, self.row, self.extras[1]
        self.extras[1] = into = of_bias = None
        if grad is not None:
            if 1 in self.trained:
                extra = self.into(1, grad, extra, a)
            if 2 in self.trained:
                of_bias = row.into[2](grad)
            if wanted[0]:
                into = row.into[0](grad, weight, a, *self.args)
        if not keep:
            self.operands = None
        return (into,), tuple([extra if i == 1 else of_bias for i in self.trained])


class Elementwise(Link):
    """``out = φ(z)`` of the activation table."""

    def __init__(self, z: Tensor, fn: str, params: dict[str, Any], suffix: str) -> None:
        self.z: Any = z
        self.args = (IDS[fn], get(fn).param_values(params))
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
        k = u.shape[0] // self.z.shape[0]
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
