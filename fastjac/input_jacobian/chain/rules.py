"""What the chain engine asks of one operation, by the operation's kind.

A rule is a set of functions of a node of the autograd graph. The node holds what torch saved in
the forward, ``node._saved_…``, and rules read it from there. For an operation ``out = f(a, θ)``
and its cotangents ``δ``, which autograd computes, a rule gives

    jvp         f_a u
    push        the same, and the gradients of ⟨δ, f_a u⟩ with respect to the saved tensors

The second gradients are the second-order terms of the double backward. They follow from the kind:

    `Linear`     linear in all inputs together: none
    `Products`   linear in each of two: the transposes at δ and u
    `Pointwise`  φ'' δ u
    `norms`      written out
    `by_autograd`  of any other operation, by autograd

The rule says which saved tensors have such a gradient (`targets`); a tensor that torch did not
save, because its gradient is not needed, is None.

K cotangents a sample are computed together: δ and u then have a first dimension of size K, which
the saved tensors do not have. ``lead`` is ``(K,)``, or ``()`` for a single cotangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastjac.torch_private import shape_of_node

Tangents = tuple[Tensor | None, ...]  # one of each input of a node; None is zero


class Unsupported(RuntimeError):
    """A graph, or a call, that the chain engine cannot take, and what to do about it."""

    def __init__(self, reason: str, advice: str = ". Use engine='autograd'") -> None:
        super().__init__(reason)
        self.advice = advice


class Rule:
    """The rule of one kind of operation."""

    output = 0  # which output of the operation `jvp` is of
    several = False  # whether `jvp` returns a tuple for all of them

    def takes(self, node: Any, inside: tuple[bool, ...]) -> bool:
        """Whether the rule holds for this node; ``inside`` says which inputs depend on x."""
        return True

    def targets(self, node: Any, inside: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        """The saved tensors that `push` returns gradients for, or None in their place."""
        return ()

    def jvp(self, node: Any, lead: tuple[int, ...], us: Tangents) -> Any:
        """The tangent of the output; of an operation with several outputs, a tuple."""
        raise NotImplementedError

    def push(
        self, node: Any, lead: tuple[int, ...], us: Tangents, delta: Tensor, wanted: bool
    ) -> tuple[Any, tuple[Tensor | None, ...]]:
        """`jvp`, None if it is not wanted, and the gradients for the targets.

        It is called only if there are targets that require grad.
        """
        raise NotImplementedError


RULES: dict[Any, Rule] = {}
"""By the name of the type of the node, or by the ``autograd.Function``."""


def add(names: str, rule: Rule) -> None:
    """Add a rule for nodes: ``"Sum.1"`` is ``SumBackward1``, and ``"Sum"`` ``SumBackward0``."""
    for name in names.split():
        stem, _, overload = name.partition(".")
        RULES[f"{stem}Backward{overload or 0}"] = rule


def signed(value: int) -> int:
    """A number that a node holds. Torch gives negative ones as unsigned numbers of 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def behind(dim: int, k: int) -> int:
    """A dimension that a node holds, of a tensor with k more dimensions in front."""
    dim = signed(dim)
    return dim + k if dim >= 0 else dim


def align(u: Tensor, lead: tuple[int, ...], dim: int) -> Tensor:
    """``[*lead, *shape]`` as a tensor that broadcasts with ``[*lead, <dim dimensions>]``."""
    if not lead or u.dim() > dim:
        return u
    return u.reshape(*lead, *(1,) * (dim + 1 - u.dim()), *u.shape[1:])


def whole(u: Tensor, lead: tuple[int, ...], shape: list[int]) -> Tensor:
    """u, broadcast to ``[*lead, *shape]``."""
    full = (*lead, *shape)
    return u if u.shape == full else align(u, lead, len(shape)).expand(full)


def over_lead(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    """The sum over the cotangents."""
    return t.sum(0) if lead else t


class Linear(Rule):
    """An operation that is linear in its one input, given as ``(node, u)`` for one cotangent.

    If ``leads``, it is given as ``(node, u, k)``, where u has k more dimensions in front, none or
    one. The others are mapped over them, which takes 35 µs a call.
    """

    def __init__(
        self, apply: Callable[..., Any], several: bool = False, leads: bool = False
    ) -> None:
        self.apply, self.several, self.leads = apply, several, leads

    def jvp(self, node, lead, us):
        (u,) = (u for u in us if u is not None)
        if self.leads:
            return self.apply(node, u, len(lead))
        if lead:
            return torch.vmap(lambda u: self.apply(node, u))(u)
        return self.apply(node, u)


class Sum(Rule):
    """``Σ_i c_i a_i``, with broadcasting; ``factors(node)`` gives the c_i."""

    def __init__(self, factors: Callable[[Any], tuple[float, ...]]) -> None:
        self.factors = factors

    def jvp(self, node, lead, us):
        total: Any = None
        shape = shape_of_node(node)
        for u, factor in zip(us, self.factors(node), strict=False):
            if u is None:
                continue
            u = align(u, lead, len(shape))
            if total is not None:
                total = total + u if factor == 1 else torch.add(total, u, alpha=factor)
            else:
                total = u if factor == 1 else u * factor
        return whole(total, lead, shape)


class Joined(Rule):
    """An operation that is linear in all inputs, given as ``(node, lead, tangents)``."""

    def __init__(self, join: Callable[..., Tensor], when: Callable[..., bool] | None = None):
        self.join, self.when = join, when

    def takes(self, node, inside):
        return self.when is None or self.when(node, inside)

    def jvp(self, node, lead, us):
        return self.join(node, lead, us)


class Matmul(Rule):
    """``a @ b``, of matrices or batches of them, and a constant or a tensor that is added."""

    def __init__(self, a: str, b: str, slots: tuple[int, int], added: bool = False) -> None:
        self.a, self.b, self.slots, self.added = f"_saved_{a}", f"_saved_{b}", slots, added

    def takes(self, node, inside):
        # `beta` and `alpha` of torch.addmm are for those who call it; layers leave them at 1.
        return not self.added or (node._saved_beta == node._saved_alpha == 1)

    def targets(self, node, inside):
        i, j = self.slots
        return inside[j] and getattr(node, self.a), inside[i] and getattr(node, self.b)

    def jvp(self, node, lead, us):
        i, j = self.slots
        total = None
        if us[i] is not None:
            total = us[i] @ getattr(node, self.b)
        if us[j] is not None:
            part = getattr(node, self.a) @ us[j]
            total = part if total is None else total + part
        if self.added and us[0] is not None:
            shape = shape_of_node(node)
            added = whole(us[0], lead, shape)
            total = added if total is None else total + added
        return total

    def push(self, node, lead, us, delta, wanted):
        of_a, of_b = us[self.slots[0]], us[self.slots[1]]
        out = self.jvp(node, lead, us) if wanted else None
        into_a = into_b = None
        if of_b is not None:
            into_a = over_lead(delta @ of_b.mT, lead)
        b = getattr(node, self.b)
        if of_a is not None and b.requires_grad:
            d, a = delta, of_a
            if lead and d.dim() == 3:  # matrices: one product for all cotangents
                d, a, lead = d.flatten(0, 1), a.flatten(0, 1), ()
            # In the memory order of torch's own gradient, to which it is added: that of b, for a
            # matrix. A sum of two orders takes 780 in place of 26 µs for 1024x256 numbers (AMD
            # EPYC, ``python -m benchmarks.host_costs``).
            by_columns = b.dim() == 2 and b.stride() == (1, b.shape[0])
            into_b = (d.mT @ a).mT if by_columns else over_lead(a.mT @ d, lead)
        return out, (into_a, into_b)


class Convolution(Rule):
    """All convolutions, transposed and not."""

    def takes(self, node, inside):
        return inside == (True, False, False)

    def targets(self, node, inside):
        return (node._saved_weight,)

    def _options(self, node: Any) -> tuple[Any, ...]:
        return (
            *(node._saved_stride, node._saved_padding, node._saved_dilation),
            *(node._saved_transposed, node._saved_output_padding, node._saved_groups),
        )

    def jvp(self, node, lead, us):
        u = us[0].flatten(0, 1) if lead else us[0]
        out = torch.convolution(u, node._saved_weight, None, *self._options(node))
        return out.unflatten(0, (*lead, -1)) if lead else out

    def push(self, node, lead, us, delta, wanted):
        u, d = (us[0].flatten(0, 1), delta.flatten(0, 1)) if lead else (us[0], delta)
        weight = node._saved_weight
        into = torch.ops.aten.convolution_backward(
            d, u, weight, None, *self._options(node), [False, True, False]
        )[1]
        return self.jvp(node, lead, us) if wanted else None, (into,)


class Mul(Rule):
    """``a * b``, with broadcasting."""

    def targets(self, node, inside):
        return inside[1] and node._saved_self, inside[0] and node._saved_other

    def jvp(self, node, lead, us):
        total: Any = None
        for u, other in zip(us, (node._saved_other, node._saved_self), strict=True):
            if u is not None:
                part = align(u, lead, max(other.dim(), u.dim() - len(lead))) * other
                total = part if total is None else total + part
        return whole(total, lead, shape_of_node(node))

    def push(self, node, lead, us, delta, wanted):
        a, b = node._saved_self, node._saved_other
        into_a = into_b = None
        dim = delta.dim() - len(lead)
        if us[1] is not None and a is not None and a.requires_grad:
            into_a = (delta * align(us[1], lead, dim)).sum_to_size(a.shape)
        if us[0] is not None and b is not None and b.requires_grad:
            into_b = (delta * align(us[0], lead, dim)).sum_to_size(b.shape)
        return self.jvp(node, lead, us) if wanted else None, (into_a, into_b)


class Div(Rule):
    """``a / b``, with broadcasting."""

    def takes(self, node, inside):
        return node._saved_self is not None or not inside[1]

    def targets(self, node, inside):
        return inside[1] and node._saved_self, node._saved_other

    def jvp(self, node, lead, us):
        a, b, shape = node._saved_self, node._saved_other, shape_of_node(node)
        total: Any = None
        if us[0] is not None:
            total = align(us[0], lead, len(shape)) / b
        if us[1] is not None:
            part = align(us[1], lead, len(shape)) * (-a / (b * b))
            total = part if total is None else total + part
        return whole(total, lead, shape)

    def push(self, node, lead, us, delta, wanted):
        a, b = node._saved_self, node._saved_other
        dim = delta.dim() - len(lead)
        u, t = (None if u is None else align(u, lead, dim) for u in us)
        scaled = delta / (b * b)
        into_a = into_b = None
        if t is not None and a.requires_grad:
            into_a = (-scaled * t).sum_to_size(a.shape)
        if b.requires_grad:
            total: Any = 0 if u is None else -scaled * u
            if t is not None:
                total = total + 2 * scaled * t * a / b
            into_b = total.sum_to_size(b.shape)
        return self.jvp(node, lead, us) if wanted else None, (into_a, into_b)


class Pointwise(Rule):
    """An elementwise operation whose derivative is a function of one saved tensor s.

    Args:
        saved: the name of s, which is the input or the output.
        apply: ``(node, u, s)``: the slope of the operation times u.
        bend: ``(node, s)``: the derivative of the slope with respect to s; None is zero.
    """

    def __init__(self, saved: str, apply: Any, bend: Any = None) -> None:
        self.saved, self.apply, self.bend = f"_saved_{saved}", apply, bend

    def targets(self, node, inside):
        return () if self.bend is None else (getattr(node, self.saved),)

    def jvp(self, node, lead, us):
        return self.apply(node, us[0], getattr(node, self.saved))

    def push(self, node, lead, us, delta, wanted):
        s = getattr(node, self.saved)
        extra = over_lead(delta * us[0], lead) * self.bend(node, s)
        return self.apply(node, us[0], s) if wanted else None, (extra,)


class Softmax(Rule):
    """``s = softmax(a)``, with the symmetric Jacobian ``S: u → s (u − Σ s u)``."""

    def targets(self, node, inside):
        return (node._saved_result,)

    def _dims(self, node: Any, lead: tuple[int, ...], u: Tensor) -> tuple[Any, int]:
        dim = signed(node._saved_dim)
        return node._saved_result, dim + len(lead) * (dim >= 0)

    def jvp(self, node, lead, us):
        s, dim = self._dims(node, lead, us[0])
        su = s * us[0]
        return torch.addcmul(su, s, su.sum(dim, keepdim=True), value=-1)

    def push(self, node, lead, us, delta, wanted):
        s, dim = self._dims(node, lead, us[0])
        u = us[0].to(delta.dtype)
        of_u = (s * u).sum(dim, keepdim=True)
        of_delta = (s * delta).sum(dim, keepdim=True)
        extra = over_lead(delta * (u - of_u) - u * of_delta, lead)
        return s * (u - of_u) if wanted else None, (extra,)


class LogSoftmax(Softmax):
    """``r = log softmax(a)``, with the JVP ``u − Σ s u`` and the VJP ``δ − s Σ δ``, s = exp r."""

    def jvp(self, node, lead, us):
        r, dim = self._dims(node, lead, us[0])
        return us[0] - (r.exp() * us[0]).sum(dim, keepdim=True)

    def push(self, node, lead, us, delta, wanted):
        r, dim = self._dims(node, lead, us[0])
        su = r.exp() * us[0].to(delta.dtype)
        extra = over_lead(-delta.sum(dim, keepdim=True) * su, lead)
        return us[0] - su.sum(dim, keepdim=True) if wanted else None, (extra,)
