"""The links of a chain: what the double backward asks of one operation.

For an operation ``out = f(a, θ)`` the four sweeps of a step with an input-Jacobian penalty are

    forward     out = f(a, θ)
    vjp         δ_a = f_aᵀ δ                                          down, for v = Jᵀw
    push        u_out = f_a u,  and the gradients of ⟨δ, f_a u⟩ by a and θ      up
    backward    g_a = f_aᵀ g + that of a;  g_θ = f_θᵀ g + that of θ     down, loss and penalty

The gradient of ``⟨δ, f_a(a, θ) u⟩`` is what the second derivatives leave: ``φ''(z) δ u`` of an
activation, ``δᵀ u`` of a weight. A link keeps what its later sweeps need and drops it after use,
unless ``keep`` says that the backward will come again.

δ and u have ``K`` cotangents a sample, ``[K N, ...]``; a, g and the results for them ``[N, ...]``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjac.activations import IDS, get
from fastjac.ops.autograd import graph_nodes
from fastjac.ops.registration import raw
from fastjac.torch_private import below_autograd

aten = torch.ops.aten


class Unsupported(RuntimeError):
    """A model, or a call, that the chain engine cannot take."""

    early = False  # raised before the model computed anything


class Link:
    """One operation of the chain, with its state for one step."""

    inputs: tuple[int, ...] = ()  # indices of values
    output = -1
    idle = False  # no cotangent reaches it
    empty = False  # its output has no numbers
    parameters: tuple[Tensor, ...] = ()  # what beside the inputs needs a gradient

    def vjp(self, delta: Tensor) -> tuple[Tensor | None, ...]:
        """δ of each input."""
        raise NotImplementedError

    def jvp(self, tangents: list[Tensor | None]) -> Tensor | None:
        """u of the output, from those of the inputs; None is zero."""
        raise NotImplementedError

    def push(self, tangents: list[Tensor | None], keep: bool, out: bool) -> Tensor | None:
        """`jvp`, where ``out`` is wanted, after a `vjp` whose second-order terms it keeps."""
        raise NotImplementedError

    def backward(
        self, grad: Tensor | None, wanted: tuple[bool, ...], keep: bool
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """Gradients of the inputs and of the parameters."""
        raise NotImplementedError

    def describe(self) -> str:
        return type(self).__name__


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


def flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


class Weighted(Link):
    """An operation of one input with a weight and a bias, which may be missing or need no grad."""

    def __init__(self, a: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
        self.a: Any = a
        self.weight: Any = None if weight is None else weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.needs = tuple(t is not None and t.requires_grad for t in (weight, bias))
        self.parameters = self.needed(weight, bias)
        self.delta: Any = None
        self.weight_extra: Any = None  # the gradient of ⟨δ, f_a u⟩ by the weight

    def needed(self, *of_weight_and_bias: Any) -> tuple[Any, ...]:
        """Those of the two whose tensor requires grad."""
        return tuple(t for t, need in zip(of_weight_and_bias, self.needs, strict=True) if need)


class Linear(Weighted):
    """``out = a Wᵀ + b``."""

    def forward(self) -> Tensor:
        return torch.nn.functional.linear(self.a, self.weight, self.bias)

    @staticmethod
    def _add_product(total: Tensor | None, delta: Tensor, a: Tensor) -> Tensor:
        """``total + δᵀ a`` over all rows, in place."""
        left, right = flat(delta).t(), flat(a)
        return left.mm(right) if total is None else total.addmm_(left, right)

    def vjp(self, delta):
        self.delta = delta
        return (delta.matmul(self.weight),)

    def push(self, tangents, keep, out):
        (u,) = tangents
        if self.needs[0]:
            self.weight_extra = self._add_product(self.weight_extra, self.delta, u)
        if not keep:
            self.delta = None
        return self.jvp(tangents) if out else None

    def jvp(self, tangents):
        return tangents[0].matmul(self.weight.t())

    def backward(self, grad, wanted, keep):
        of_weight, self.weight_extra = self.weight_extra, None
        of_bias = into = None
        if grad is not None:
            if self.needs[0]:
                of_weight = self._add_product(of_weight, grad, self.a)
            of_bias = flat(grad).sum(0) if self.needs[1] else None
            into = grad.matmul(self.weight) if wanted[0] else None
        if not keep:
            self.a = None
        return (into,), self.needed(of_weight, of_bias)


class Convolution(Weighted):
    """``out = conv(a, W) + b``."""

    def __init__(
        self, a: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> None:
        super().__init__(a, weight, bias)
        self.options = options

    def forward(self) -> Tensor:
        return torch.convolution(self.a, self.weight, self.bias, *self.options)

    def _backward(self, grad: Tensor, a: Tensor, mask: list[bool]) -> Any:
        sizes = [len(self.weight)] if mask[2] else None
        return aten.convolution_backward(grad, a, self.weight, sizes, *self.options, mask)

    def _flipped(self, delta: Tensor) -> bool:
        """Whether the gradient by ``a`` is better taken as a convolution with the flipped taps.

        oneDNN's own has slow code for other numbers of output channels than multiples of 16:
        1 → 6 channels, 5×5 taps, [50, 6, 28, 28], 2 cores: 1.56 against 0.55 ms.
        """
        stride, padding, dilation, *_, groups = self.options
        taps = self.weight.shape[2:]
        return (
            delta.device.type == "cpu"
            and self.weight.shape[0] % 16 != 0
            and groups == max(stride) == max(dilation) == 1
            and all(p < k for p, k in zip(padding, taps, strict=True))
        )

    def _into(self, delta: Tensor) -> Tensor:
        """The gradient by ``a`` of as many samples as delta has."""
        if not self._flipped(delta):
            return self._backward(delta, of_shape(self.a, delta), [True, False, False])[0]
        taps = self.weight.shape[2:]
        padding = [k - 1 - p for p, k in zip(self.options[1], taps, strict=True)]
        flipped = self.weight.flip(list(range(2, 2 + len(taps)))).transpose(0, 1)
        ones = [1] * len(taps)
        return torch.convolution(delta, flipped, None, ones, padding, ones, False, ones, 1)

    def vjp(self, delta):
        self.delta = delta
        return (self._into(delta),)

    def push(self, tangents, keep, out):
        (u,) = tangents
        if self.needs[0]:
            product = self._backward(self.delta, u, [False, True, False])[1]
            self.weight_extra = plus_(self.weight_extra, product)
        if not keep:
            self.delta = None
        return self.jvp(tangents) if out else None

    def jvp(self, tangents):
        return torch.convolution(tangents[0], self.weight, None, *self.options)

    def backward(self, grad, wanted, keep):
        extra, self.weight_extra = self.weight_extra, None
        into = of_weight = of_bias = None
        if grad is not None:
            flipped = wanted[0] and self._flipped(grad)
            mask = [wanted[0] and not flipped, *self.needs]
            into, of_weight, of_bias = self._backward(grad, self.a, mask)
            into = self._into(grad) if flipped else into
        if not keep:
            self.a = None
        return (into,), self.needed(plus_(of_weight, extra), of_bias)


class Activation(Link):
    """``out = φ(z)`` of the table."""

    def __init__(self, z: Tensor, fn: str, params: dict[str, Any], suffix: str) -> None:
        self.z: Any = z
        self.fn = fn
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

    def describe(self) -> str:
        return f"Activation({self.fn})"


class Shape(Link):
    """``out``: the same numbers in another shape, sample by sample."""

    def __init__(self, a: Tensor, out: Tensor) -> None:
        self.before, self.after = a.shape[1:], out.shape[1:]

    def vjp(self, delta):
        return (delta.reshape(len(delta), *self.before),)

    def push(self, tangents, keep, out):
        return self.jvp(tangents)

    def jvp(self, tangents):
        (u,) = tangents
        return u.reshape(len(u), *self.after)

    def backward(self, grad, wanted, keep):
        return (None if grad is None else grad.reshape(len(grad), *self.before),), ()


class Add(Link):
    """``out = a + b`` of one shape."""

    def vjp(self, delta):
        return delta, delta

    def push(self, tangents, keep, out):
        return self.jvp(tangents)

    def jvp(self, tangents):
        a, b = tangents
        if a is None or b is None:
            return b if a is None else a
        return a + b

    def backward(self, grad, wanted, keep):
        return (grad, grad), ()


class Pool(Link):
    """Max and average pooling over two dimensions: linear in ``a`` where no maximum changes."""

    def __init__(self, a: Tensor, kind: str, options: tuple[Any, ...]) -> None:
        self.a: Any = a
        self.kind, self.options = kind, options
        self.index: Any = None  # of the maxima

    def _pool(self, a: Tensor) -> Any:
        if self.kind == "max":
            return aten.max_pool2d_with_indices(a, *self.options)
        return (aten.avg_pool2d if self.kind == "avg" else aten._adaptive_avg_pool2d)(
            a, *self.options
        )

    def forward(self) -> Tensor:
        out = self._pool(self.a)
        if self.kind != "max":
            return out
        out, self.index = out
        return out

    def _back(self, grad: Tensor) -> Tensor:
        a = of_shape(self.a, grad)
        if self.kind == "max":
            index = copies(self.index, grad)
            return aten.max_pool2d_with_indices_backward(grad, a, *self.options, index)
        if self.kind == "avg":
            return aten.avg_pool2d_backward(grad, a, *self.options)
        return aten._adaptive_avg_pool2d_backward(grad, a)

    def vjp(self, delta):
        return (self._back(delta),)

    def push(self, tangents, keep, out):
        return self.jvp(tangents)

    def jvp(self, tangents):
        (u,) = tangents
        if self.kind != "max":
            return self._pool(u)
        index = copies(self.index, u)
        return u.flatten(2).gather(2, index.flatten(2)).view(index.shape)

    def backward(self, grad, wanted, keep):
        into = None if grad is None or not wanted[0] else self._back(grad)
        if not keep:
            self.a = self.index = None
        return (into,), ()

    def describe(self) -> str:
        return f"Pool({self.kind})"
