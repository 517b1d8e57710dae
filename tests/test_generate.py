"""The functions that `chain/generate.py` writes, beside the sweeps that they repeat."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chain_cases import names_in
from torch import Tensor

from fastjac.input_jacobian.chain.generate import _IN_PLACE, _OUT
from fastjac.input_jacobian.chain.trace import Untraceable, trace

aten = torch.ops.aten


def source_of(sweep: Callable[[list[Any]], list[Any]], tensors: list[Tensor], n: int = 1) -> str:
    """The generated code, after it was found to repeat the sweep and to modify nothing."""
    given = [torch.randn(4, 4, dtype=tensors[0].dtype) for _ in range(n)]
    expected = [t.clone() for t in sweep([t.clone() for t in given])]
    function = trace("sweep", tensors, [t.clone() for t in given], sweep)
    before = [t.clone() for t in (*tensors, *given)]
    found = function([*tensors], [*given])
    for t, e in zip((*found, *tensors, *given), (*expected, *before), strict=True):
        torch.testing.assert_close(t, e)
        assert t.stride() == e.stride() or t.dim() == 1
    return names_in(function)


A, B, C = (torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))


@pytest.mark.parametrize(
    "sum_of",
    [
        lambda u: u * 2 + A @ u,
        lambda u: A @ u + u * 2,
        lambda u: (u @ A).t() + (B @ u).t(),
        lambda u: (u.t() @ A).t() + (A @ u).t(),
        lambda u: C + A @ u,
        lambda u: A @ u + B @ u + u @ C,
    ],
)
def test_a_product_that_is_added_is_addmm(sum_of: Any) -> None:
    source = source_of(lambda given: [sum_of(given[0])], [A, B, C])
    assert "addmm" in source
    assert " add " not in source and " add_ " not in source


@pytest.mark.parametrize(
    "sweep",
    [
        lambda given: [p := given[0] @ A, p + B],
        lambda given: [p := given[0] @ A, p.t() + B],
        lambda given: [(p := given[0] @ A).relu(), p + B],
        lambda given: [p := given[0] @ A, p + p.t()],
        lambda given: [(given[0] @ A).view(2, 8) + B.view(2, 8)],
        lambda given: [(given[0] @ A).select(0, 1) + B],
        lambda given: [f := given[0] * 2, p := f @ A, f.add_(1), p + B][2:],
    ],
)
def test_a_product_that_is_more_than_a_term_is_not_addmm(sweep: Any) -> None:
    source = source_of(sweep, [A, B])
    assert source.count(" mm ") == 1 and "addmm" not in source


def test_elementwise_products_are_added_in_one_pass() -> None:
    source = source_of(lambda given: [A * B + given[0] * C], [A, B, C])
    assert "addcmul_" in source
    source = source_of(lambda given: [A * B + given[0] * 3], [A, B])
    assert "alpha=3" in source and "mul_" not in source
    # Of another dtype, broadcast, or a number that may be on another device.
    wide, one = A.double(), A[0, 0].clone()
    assert "addcmul" not in source_of(lambda given: [A * B + given[0] * one], [A, B, one])
    assert "addcmul" not in source_of(lambda given: [wide * 2 + given[0] * wide], [A, wide])
    assert "addcmul" not in source_of(lambda given: [A * B + given[0][:1] * C[:1]], [A, B, C])


@pytest.mark.parametrize("func", [*_IN_PLACE, *_OUT], ids=str)
def test_an_operand_is_overwritten_that_nobody_needs(func: Any) -> None:
    extra = {
        **{aten.addcmul.default: (A, B), aten.addmm.default: (A, B), aten.neg.default: ()},
        aten.threshold_backward.default: (A, 0.5),
        aten.hardtanh_backward.default: (A, -0.5, 0.5),
    }
    others = extra.get(func, (A,))

    def sweep(given: list[Any]) -> list[Any]:
        kept = given[0] * 3
        view = (given[0] * 5).t()
        # The first operand is free, an input, kept, a view of what is kept.
        return [
            *(func(given[0].exp(), *others), func(given[0], *others), func(kept, *others), kept),
            *(func(view.t(), *others), view),
        ]

    source = source_of(sweep, [A, B])
    name = "grad_input=" if func in _OUT else f" {_IN_PLACE[func].__name__} "
    assert source.count(name) == 1


@pytest.mark.parametrize("factor", [True, False, 1e39, 2.0])
def test_a_number_that_alpha_does_not_take_is_a_factor(factor: Any) -> None:
    source = source_of(lambda given: [A * B + given[0] * factor], [A, B])
    assert ("alpha" in source) == (factor == 2.0)


def test_factors_of_a_view_count_with_the_memory_that_the_view_keeps() -> None:
    """If it were computed at the sum, the product would keep 100 times its memory for longer."""

    def sweep(given: list[Any]) -> list[Any]:
        (u,) = given
        product = u.repeat(1, 100)[:, :4] * A
        other = u.exp().sin()
        return [other + product, A * 3]

    assert "addcmul" not in source_of(sweep, [A])


@pytest.mark.parametrize(
    "sweep",
    [
        lambda given: [(c := A.cos(), c.mul_(2), given[0] * c)[2]],
        lambda given: [(y := A * 2, c := y.cos(), y.zero_(), given[0] * c)[3]],
    ],
)
def test_a_cosine_that_was_written_to_is_none(sweep: Any) -> None:
    source_of(sweep, [A])


def test_an_operand_is_kept_that_another_one_is_a_view_of() -> None:
    def sweep(given: list[Any]) -> list[Any]:
        fresh = given[0] * 2
        return [fresh * fresh.t()]

    assert "mul_" not in source_of(sweep, [A])


def test_memory_is_shared_by_what_is_no_view() -> None:
    """``_unsafe_view`` is none for torch, though its result is its operand in another shape."""

    def sweep(given: list[Any]) -> list[Any]:
        fresh = given[0] * 2
        same = aten._unsafe_view(fresh, (2, 8))
        return [same * 3, fresh + 1]

    source_of(sweep, [A])


@pytest.mark.parametrize(("dtype", "takes"), [(torch.float32, True), (torch.float64, False)])
def test_a_cosine_times_a_cotangent_is_one_kernel(dtype: torch.dtype, takes: bool) -> None:
    z = A.to(dtype) * 30
    source = source_of(lambda given: [given[0] * z.cos(), z.cos() * given[0][:, :1]], [z])
    assert source.count(" cos ") == (1 if takes else 2)


LIMITS = [(-0.5, 0.25), (0, 1), (0.1, 0.1), (None, 0.3), (None, 0), (0, None), (-1, None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("low", "high"), LIMITS)
def test_the_derivative_of_a_clamp_is_one_operation(
    low: float | None, high: float | None, dtype: torch.dtype
) -> None:
    """It is that of torch to the bit, at the limits and next to them, for infinite cotangents."""
    at = torch.tensor([v for v in (low, high) if v is not None], dtype=dtype)
    ends = torch.tensor([-torch.inf, torch.inf], dtype=dtype)
    beside = [torch.nextafter(at, end) for end in ends]
    # The next number to 0 is denormal, and counts as 0.
    beside = [torch.where(at == 0, end.sign() * 1e-3, n) for n, end in zip(beside, ends)]  # noqa: B905
    x = torch.cat([at, *beside, torch.randn(30).to(dtype)]).requires_grad_()
    clamped = x.clamp(low, high)

    def sweep(given: list[Any]) -> list[Any]:
        (from_torch,) = torch.autograd.grad(clamped, x, given[0], retain_graph=True)
        masks = []
        for ge, le in ((torch.ge, torch.le), (torch.gt, torch.lt)):  # torch 2.14 takes the second
            mask = torch.ones_like(x, dtype=torch.bool) if low is None else ge(x, low)
            masks += [mask if high is None else le(x, high) if low is None else mask & le(x, high)]
        return [from_torch, *(torch.where(mask, given[0], 0) for mask in masks)]

    given = torch.randn(len(x)).to(dtype)
    given[::5] = torch.inf
    expected = sweep([given])
    function = trace("sweep", [x], [given.clone()], sweep)
    source = names_in(function)
    gone = {"where", "ge", "le", "gt", "lt", "logical_and", "bitwise_and", "scalar_tensor"}
    assert not gone & {*source.split()}
    with torch.no_grad():
        for found, e in zip(function([x], [given]), expected, strict=True):
            torch.testing.assert_close(found, e, rtol=0, atol=0)


@pytest.mark.parametrize("limits", [(0, None), (None, 0), (0, 1)])
def test_a_clamp_at_0_where_denormal_numbers_count_as_0(limits: Any) -> None:
    x = torch.zeros(32).requires_grad_()  # enough for the vectorised code
    clamped = x.clamp(*limits)

    def sweep(given: list[Any]) -> list[Any]:
        return [*torch.autograd.grad(clamped, x, given[0], retain_graph=True)]

    function = trace("sweep", [x], [torch.ones(32)], sweep)
    assert " where " not in names_in(function)
    torch.set_flush_denormal(True)
    try:
        with torch.no_grad():
            (found,) = function([x], [torch.ones(32)])
    finally:
        torch.set_flush_denormal(False)
    assert found.eq(torch.autograd.grad(clamped.sum(), x)[0]).all()


@pytest.mark.parametrize(
    "sweep",
    [
        lambda given: [torch.where(A >= 0, given[0], 1)],
        lambda given: [torch.where((A >= 0) & (B <= 1), given[0], 0)],
        lambda given: [torch.where((A >= 0).logical_and_(B <= 1), given[0], 0)],
        lambda given: [torch.where((A >= 0) & (A >= 1), given[0], 0)],
        lambda given: [torch.where((A >= 0).logical_not_(), given[0], 0)],
        lambda given: [(m := A >= 0, m.view(16).zero_(), torch.where(m, given[0], 0))[2]],
        lambda given: [(m := A >= 0, m.logical_and_(B > 0), torch.where(m, given[0], 0))[2]],
        lambda given: [
            (z := torch.scalar_tensor(0.0), z.add_(1), torch.where(A >= 0, given[0], z))[2]
        ],
        lambda given: [torch.where(A[:1] >= 0, given[0], 0)],
        lambda given: [torch.where(A >= 0, given[0][:1], 0)],
        lambda given: [(y := A * 2, m := y >= 0, y.neg_(), torch.where(m, given[0], 0))[3]],
    ],
)
def test_another_choice_is_no_clamp(sweep: Any) -> None:
    assert " where " in source_of(sweep, [A, B])


def test_a_write_that_nobody_reads_is_dropped() -> None:
    def sweep(given: list[Any]) -> list[Any]:
        unread, read, seen = A * 2, A * 3, A * 4
        unread.add_(given[0])
        read.view(16).mul_(5)
        seen.t().neg_()
        return [read.exp(), seen]

    source = source_of(sweep, [A])
    assert " add_ " not in source and " mul_ " in source and " neg_ " in source


@pytest.mark.parametrize(
    "sweep",
    [
        lambda given: [given[0].add_(given[1])],
        lambda given: [torch.add(given[0], 1, out=given[1])],
        lambda given: [torch._foreach_add_([given[0]], 1), given[0] * 1][1:],
        lambda given: [given[0].t().neg_()],
    ],
)
def test_a_sweep_that_writes_to_its_input_has_no_program(sweep: Any) -> None:
    with pytest.raises(Untraceable, match="on a tensor that was saved"):
        trace("sweep", [], [A.clone(), B.clone()], sweep)


OPERATIONS: tuple[tuple[int, Callable[..., Any]], ...] = (
    *((2, torch.add), (2, torch.mul), (2, torch.sub), (2, torch.mm), (2, torch.mm)),
    *((1, torch.neg), (1, torch.t), (1, torch.cos), (1, lambda a: a * 0.5), (3, torch.addcmul)),
    *((2, aten.silu_backward), (2, aten.threshold_backward), (1, lambda a: a.view(4, 4))),
    *((2, lambda a, b: (a * 0.5).add_(b)), (1, lambda a: a[:, :1]), (1, lambda a: a.sum(0))),
    *((1, lambda a: torch.where(A >= 0.1, a, 0)), (2, lambda a, b: torch.where(a <= 0, b, 0))),
    (1, lambda a: torch.where((B >= -0.5).logical_and_(B <= 0.5), a, 0)),
    *((1, lambda a: aten._unsafe_view(a, a.shape)), (1, lambda a: a.split(2, 1)[1].t() @ a)),
)


@pytest.mark.parametrize("seed", range(300))
def test_random_programs(seed: int) -> None:
    """Straight-line programs of sums, products, views and writes."""
    rng = random.Random(seed)
    plan = [(rng.randrange(len(OPERATIONS)), [rng.random() for _ in range(3)]) for _ in range(30)]
    kept = [rng.random() for _ in range(3)]

    def sweep(given: list[Any]) -> list[Any]:
        values = [A, B, C, *given]
        for which, places in plan:
            count, operation = OPERATIONS[which]
            # The newest values more often, so that others die.
            chosen = [values[int(len(values) * p**0.5)] for p in places[:count]]
            try:
                options = (0.1,) if operation is aten.threshold_backward else ()
                values.append(operation(*chosen, *options).div(2))
            except (RuntimeError, IndexError):  # shapes that do not fit
                continue
        return [values[-1], *[values[int(len(values) * p)] for p in kept]]

    given = [torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)) for _ in range(2)]
    expected = [t.clone() for t in sweep([t.clone() for t in given])]
    function = trace("sweep", [A, B, C], [t.clone() for t in given], sweep)
    before = [t.clone() for t in (A, B, C, *given)]
    found = function([A, B, C], [*given])
    for t, e in zip((*found, A, B, C, *given), (*expected, *before), strict=True):
        torch.testing.assert_close(t, e, rtol=1e-4, atol=1e-4)
