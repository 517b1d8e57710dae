"""Traced calls as fewer ones. Each call costs a few µs on the host, and a pass over the memory.

A product that is only added to something becomes one operation with the sum (`add_products`), and
the derivative of a clamp is one operation (`join_clamps`). `benchmarks/NOTES.md` has the gains.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any, NamedTuple

import torch

from fastjac.input_jacobian.chain.calls import Call, Calls, Memory, Value, root_of, used

aten = torch.ops.aten


# ---- clamps


class _End(NamedTuple):
    """Of a range, to which the limit belongs or does not."""

    limit: float
    belongs: bool


class _Range(NamedTuple):
    """A mask, ``low <= x <= high`` or with ``<``; without an end if that is None."""

    x: int
    low: _End | None
    high: _End | None


# Whether the limit is the lower end, and whether it belongs to the range.
_COMPARISONS = {
    aten.ge.Scalar: (True, True),
    aten.le.Scalar: (False, True),
    aten.gt.Scalar: (True, False),
    aten.lt.Scalar: (False, False),
}

_ANDS = (
    *(aten.logical_and.default, aten.logical_and_.default),
    *(aten.bitwise_and.Tensor, aten.bitwise_and_.Tensor),
)


def join_clamps(traced: Calls) -> Calls:
    """The calls, with one in the place of the derivative of a clamp.

    The derivative is ``where(low <= x <= high, g, 0)``, and ``where(low < x < high, g, 0)`` from
    torch 2.14 on, which torch computes by three or five operations. ``threshold_backward`` and
    ``hardtanh_backward`` are one. Theirs is 0 at the limits, so where that of the clamp is 1 they
    are given the next numbers outside of them. The results are those of torch, unless x is infinite
    or NaN.
    """
    memory = traced.memory
    masks: dict[int, _Range] = {}
    zeros: set[int] = set()
    found: list[Call] = []
    for call in traced.calls:
        func, args, result = call.func, call.args, call.results[0] if call.results else -1
        if func in _ANDS and all([isinstance(a, Value) and a.number in masks for a in args]):
            a, b = (masks[n.number] for n in args)
            masks.pop(result, None)
            if a.x == b.x and a.high is b.low is None:
                masks[result] = _Range(a.x, a.low, b.high)
        elif written := {root_of(memory, n) for n in call.written()}:
            masks = {n: m for n, m in masks.items() if root_of(memory, n) not in written}
            zeros = {n for n in zeros if root_of(memory, n) not in written}
        elif func in _COMPARISONS and args[0].number < traced.inputs:
            lower, belongs = _COMPARISONS[func]
            end = _End(args[1], belongs)
            masks[result] = _Range(args[0].number, *((end, None) if lower else (None, end)))
        elif func is aten.scalar_tensor.default and args[0] == 0:
            zeros.add(result)
        elif func is aten.where.self and args[0].number in masks and args[2].number in zeros:
            call = _derivative(call, masks[args[0].number], memory) or call
        found.append(call)
    return traced._replace(calls=found)


def _derivative(call: Call, mask: _Range, memory: list[Memory | None]) -> Call | None:
    """The one operation for ``where(mask, g, 0)``; None if its operands are not of one kind."""
    g = call.args[1]
    x = memory[mask.x]
    if x is None or not x.like(memory[g.number]) or not x.dtype.is_floating_point:
        return None
    if mask.high is None:
        args = g, Value(mask.x), _outside(mask.low, -1, x.dtype)
        return Call(aten.threshold_backward.default, args, {}, call.results)
    limits = _outside(mask.low, -1, x.dtype), _outside(mask.high, 1, x.dtype)
    return Call(aten.hardtanh_backward.default, (g, Value(mask.x), *limits), {}, call.results)


def _outside(end: _End | None, sign: int, dtype: torch.dtype) -> float:
    """The first number outside of an end, upwards if the sign is positive; infinite for None."""
    if end is None:
        return sign * math.inf
    limit = torch.tensor(end.limit, dtype=dtype)
    if not end.belongs:
        return limit.item()
    if limit == 0:  # the next one is denormal, and counts as 0 after `torch.set_flush_denormal`
        return sign * torch.finfo(dtype).tiny
    return torch.nextafter(limit, torch.tensor(sign * math.inf, dtype=dtype)).item()


# ---- products that are added


def add_products(traced: Calls, outputs: list[Any]) -> Calls:
    """The calls, with one in the place of a product and the sum that alone reads it.

    ``x + a @ b`` becomes ``addmm``, ``x + a * b`` ``addcmul``, and ``x + c a`` with a number c
    ``add`` with ``alpha``. The gradient of each weight is a sum of the first kind: one term comes
    from the push, and one from the pass down the graph.
    """
    calls = used(traced, outputs)
    memory: list[Any] = list(traced.memory)
    products = _Products(calls, memory, outputs)
    known = {m: n for n, m in enumerate(memory[: traced.inputs])}
    found: list[Call] = []

    def transposed(value: Value) -> Value:
        turned = memory[value.number].transposed()
        if turned not in known:
            known[turned] = len(memory)
            memory.append(turned)
            found.append(Call(aten.t.default, (value,), {}, [known[turned]]))
        return Value(known[turned])

    for i, call in enumerate(calls):
        term, product, turned = products.added_by(i)
        if product is not None:
            func, (a, b) = product.func, product.args
            if func is aten.mm.default and turned:  # the transpose, in the memory order of `addmm`
                total = len(memory)
                memory.append(memory[call.results[0]].transposed())
                found.append(Call(aten.addmm.default, (transposed(term), a, b), {}, [total]))
                call = Call(aten.t.default, (Value(total),), {}, call.results)
            elif func is aten.mm.default:
                call = Call(aten.addmm.default, (term, a, b), {}, call.results)
            elif isinstance(b, Value):
                call = Call(aten.addcmul.default, (term, a, b), {}, call.results)
            else:
                call = Call(aten.add.Tensor, (term, a), {"alpha": b}, call.results)
        for n in call.results:
            known.setdefault(memory[n], n)
        found.append(call)
    return Calls(found, memory, traced.inputs)


class _Products:
    """Finds the sums of which one term is a product that nothing else reads."""

    def __init__(self, calls: list[Call], memory: Any, outputs: list[Any]) -> None:
        self.calls, self.memory = calls, memory
        self.made: dict[Any, int] = {}  # by root: the call that makes the memory
        self.users: dict[Any, list[int]] = {}  # by root: the calls, with an output as one more
        self.spans: dict[Any, int] = {}  # by root: its bytes
        self.writing = [i for i, call in enumerate(calls) if call.written()]
        for i, call in enumerate(calls):
            for root in {root_of(memory, n) for n in call.uses()}:
                self.users.setdefault(root, []).append(i)
            for n in call.results:
                self.made.setdefault(root_of(memory, n), i)
        for n in outputs:
            self.users.setdefault(root_of(memory, n), []).append(len(calls))
        for found in memory:
            if found is not None:
                self.spans[found.root] = max(found.size, self.spans.get(found.root, 0))

    def added_by(self, i: int) -> tuple[Any, Call | None, bool]:
        """The other term of a sum, the product, and whether its transpose is added.

        If both terms are products, one of matrices is preferred, and else the second term, which
        was computed last.
        """
        total = self.calls[i]
        found: tuple[Any, Call | None, bool] = None, None, False
        if total.func is not aten.add.Tensor or total.kwargs:
            return found
        result = self.memory[total.results[0]]
        for term, other in (total.args, total.args[::-1]):
            if not (isinstance(term, Value) and isinstance(other, Value)):
                break
            # Both in the strides of the sum: so ``p + p.t()`` does not take p for its own term.
            if term.number == other.number or not self.memory[term.number].like(result):
                continue
            product, turned = self._product(i, other)
            if product is None or (found[1] is not None and found[1].func is product.func):
                continue
            if found[1] is None or product.func is aten.mm.default:
                found = term, product, turned
        return found

    def _product(self, i: int, value: Value) -> tuple[Call | None, bool]:
        """The product that call i alone reads as this value, and whether it is transposed."""
        part = self.memory[value.number]
        start = self.made.get(part.root)
        if start is None or not part.like(self.memory[self.calls[i].results[0]]):
            return None, False
        call = self.calls[start]
        of_matrices = call.func is aten.mm.default
        if not of_matrices and (call.func is not aten.mul.Tensor or not _adds(call, part.dtype)):
            return None, False
        whole = self.memory[call.results[0]]
        if of_matrices and whole.strides != (whole.shape[1], 1):
            return None, False
        turned = of_matrices and part != whole and part == whole.transposed()
        if part != whole and not turned:
            return None, False
        # A factor without dimensions may be on another device.
        factors = [self.memory[n] for n in call.uses()]
        if any(factor.dtype != part.dtype or not factor.shape for factor in factors):
            return None, False
        *views, last = self.users[part.root]
        if last != i or any(not self.calls[j].func.is_view for j in views):
            return None, False
        # The product is computed later, and so from factors that nothing may have written to, and
        # that need no more memory than the product.
        written = bisect_left(self.writing, start) < bisect_left(self.writing, i)
        if written or self._kept(factors, i) > whole.size:
            return None, False
        return call, turned

    def _kept(self, factors: list[Memory], i: int) -> int:
        """The bytes of factors that live longer if the product is computed at call i.

        Calls of views between their last use and call i do not count: they need no memory.
        """
        return sum(
            self.spans[root]
            for root in {factor.root for factor in factors}
            if any(not call.func.is_view for call in self.calls[self.users[root][-1] + 1 : i])
        )


def _adds(product: Call, dtype: torch.dtype) -> bool:
    """Whether ``addcmul``, or ``add`` with ``alpha``, takes the factors of a product."""
    factor = product.args[1]
    if not dtype.is_floating_point:
        return False
    if isinstance(factor, Value):
        return True
    # ``alpha`` may be no bool, and no number that overflows in the dtype.
    return type(factor) in (int, float) and abs(factor) <= torch.finfo(dtype).max
