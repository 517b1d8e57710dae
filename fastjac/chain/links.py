"""The links of a chain: what the double backward asks of one operation.

For an operation ``out = f(a, θ)`` the four sweeps of a step with an input-Jacobian penalty are

    forward     out = f(a, θ)
    vjp         δ_a = f_aᵀ δ                                          down, for v = Jᵀw
    jvp         u_out = f_a u,  and the gradients of ⟨δ, f_a u⟩ by a and θ      up
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
from fastjac.ops._autograd import below_autograd
from fastjac.ops._library import raw

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

    def jvp(self, tangents: list[Tensor | None], keep: bool, out: bool) -> Tensor | None:
        """u of the output, where ``out`` is wanted."""
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
    seen, left = set(), [t.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise Unsupported(f"{what} a tensor of shape {tuple(leaf.shape)} that requires grad")
        left += [following for following, _ in node.next_functions]


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def flat(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


class Linear(Link):
    """``out = a Wᵀ + b``."""

    def __init__(self, a: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.a: Any = a
        self.weight, self.bias = weight.detach(), bias
        self.parameters = tuple(t for t in (weight, bias) if t is not None and t.requires_grad)
        self.needs = weight.requires_grad, bias is not None and bias.requires_grad
        self.delta: Any = None
        self.product: Tensor | None = None  # δᵀ u

    def forward(self) -> Tensor:
        bias = None if self.bias is None else self.bias.detach()
        return torch.nn.functional.linear(self.a, self.weight, bias)

    def vjp(self, delta):
        self.delta = delta
        return (delta.matmul(self.weight),)

    def jvp(self, tangents, keep, out):
        (u,) = tangents
        if self.needs[0]:
            a, b = flat(self.delta).t(), flat(u)
            self.product = a.mm(b) if self.product is None else self.product.addmm_(a, b)
        if not keep:
            self.delta = None
        return u.matmul(self.weight.t()) if out else None

    def backward(self, grad, wanted, keep):
        product = self.product
        self.product = None
        grads: list[Tensor | None] = []
        a = self.a
        if not keep:
            self.a = None
        if self.needs[0]:
            if grad is None:
                grads.append(product)
            elif product is None:
                grads.append(flat(grad).t().mm(flat(a)))
            else:
                grads.append(product.addmm_(flat(grad).t(), flat(a)))
        if self.needs[1]:
            grads.append(None if grad is None else flat(grad).sum(0))
        into = grad.matmul(self.weight) if wanted[0] and grad is not None else None
        return (into,), tuple(grads)


class Convolution(Link):
    """``out = conv(a, W) + b``."""

    def __init__(
        self, a: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> None:
        self.a: Any = a
        self.weight, self.bias, self.options = weight.detach(), bias, options
        self.parameters = tuple(t for t in (weight, bias) if t is not None and t.requires_grad)
        self.needs = weight.requires_grad, bias is not None and bias.requires_grad
        self.delta: Any = None
        self.product: Tensor | None = None

    def forward(self) -> Tensor:
        bias = None if self.bias is None else self.bias.detach()
        return torch.convolution(self.a, self.weight, bias, *self.options)

    def _backward(self, grad: Tensor, a: Tensor, mask: list[bool]) -> Any:
        sizes = [len(self.weight)] if mask[2] else None
        return torch.ops.aten.convolution_backward(grad, a, self.weight, sizes, *self.options, mask)

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
            return self._backward(delta, _of_shape(self.a, delta), [True, False, False])[0]
        taps = self.weight.shape[2:]
        padding = [k - 1 - p for p, k in zip(self.options[1], taps, strict=True)]
        flipped = self.weight.flip(list(range(2, 2 + len(taps)))).transpose(0, 1)
        ones = [1] * len(taps)
        return torch.convolution(delta, flipped, None, ones, padding, ones, False, ones, 1)

    def vjp(self, delta):
        self.delta = delta
        return (self._into(delta),)

    def jvp(self, tangents, keep, out):
        (u,) = tangents
        if self.needs[0]:
            product = self._backward(self.delta, u, [False, True, False])[1]
            self.product = plus(self.product, product)
        if not keep:
            self.delta = None
        return torch.convolution(u, self.weight, None, *self.options) if out else None

    def backward(self, grad, wanted, keep):
        product, self.product = self.product, None
        if grad is None:
            weight_grad, into, bias_grad = product, None, None
        else:
            flipped = wanted[0] and self._flipped(grad)
            mask = [wanted[0] and not flipped, *self.needs]
            into, weight_grad, bias_grad = self._backward(grad, self.a, mask)
            into = self._into(grad) if flipped else into
            if product is not None:
                weight_grad.add_(product)
        if not keep:
            self.a = None
        grads = [t for t, need in zip((weight_grad, bias_grad), self.needs, strict=True) if need]
        return (into,), tuple(grads)


class Activation(Link):
    """``out = φ(z)`` of the table."""

    def __init__(self, z: Tensor, fn: str, params: dict[str, Any], suffix: str) -> None:
        self.z: Any = z
        self.fn = fn
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

    def _z(self, rows: Tensor) -> Tensor:
        k = len(rows) // len(self.z)
        return self.z if k == 1 else self.z.expand(k, *self.z.shape).reshape(rows.shape)

    def vjp(self, delta):
        self.delta = delta if self.curved else None
        return (self.run(self.act, self._z(delta), delta, 1, *self.args),)

    def jvp(self, tangents, keep, out):
        (u,) = tangents
        z = self._z(u)
        if not self.curved:
            return self.run(self.act, z, u, 1, *self.args)
        extra, u = self.run(self.act_backward, z, self.delta, u, 1, *self.args)
        k = len(u) // len(self.z)
        extra = extra if k == 1 else extra.view(k, *self.z.shape).sum(0)
        self.extra = extra if self.extra is None else self.extra.add_(extra)
        if not keep:
            self.delta = None
        return u

    def backward(self, grad, wanted, keep):
        z, extra = self.z, self.extra
        self.extra = None
        if not keep:
            self.z = None
        if grad is None:
            return (extra,), ()
        into = self.run(self.act, z, grad, 1, *self.args)
        return (into if extra is None else into.add_(extra),), ()

    def describe(self) -> str:
        return f"Activation({self.fn})"


class Shape(Link):
    """``out``: the same numbers in another shape, sample by sample."""

    def __init__(self, a: Tensor, out: Tensor) -> None:
        self.before, self.after = a.shape[1:], out.shape[1:]

    def vjp(self, delta):
        return (delta.reshape(len(delta), *self.before),)

    def jvp(self, tangents, keep, out):
        (u,) = tangents
        return u.reshape(len(u), *self.after)

    def backward(self, grad, wanted, keep):
        return (None if grad is None else grad.reshape(len(grad), *self.before),), ()


class Add(Link):
    """``out = a + b`` of one shape."""

    def vjp(self, delta):
        return delta, delta

    def jvp(self, tangents, keep, out):
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
        k = len(grad) // len(self.a)
        a = _of_shape(self.a, grad)
        if self.kind == "max":
            index = self.index if k == 1 else self.index.repeat(k, 1, 1, 1)
            return aten.max_pool2d_with_indices_backward(grad, a, *self.options, index)
        if self.kind == "avg":
            return aten.avg_pool2d_backward(grad, a, *self.options)
        return aten._adaptive_avg_pool2d_backward(grad, a)

    def vjp(self, delta):
        return (self._back(delta),)

    def jvp(self, tangents, keep, out):
        (u,) = tangents
        if self.kind != "max":
            return self._pool(u)
        k = len(u) // len(self.a)
        index = self.index if k == 1 else self.index.repeat(k, 1, 1, 1)
        return u.flatten(2).gather(2, index.flatten(2)).view(index.shape)

    def backward(self, grad, wanted, keep):
        into = None if grad is None or not wanted[0] else self._back(grad)
        if not keep:
            self.a = self.index = None
        return (into,), ()

    def describe(self) -> str:
        return f"Pool({self.kind})"


def _of_shape(a: Tensor, rows: Tensor) -> Tensor:
    """``a``, or a tensor with as many samples as ``rows``, of which only the shape is looked at."""
    return a if len(a) == len(rows) else a[:1].expand(len(rows), *a.shape[1:])
