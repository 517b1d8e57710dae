"""The functions that `chain/generate.py` writes, beside the sweeps that they repeat."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from chain_cases import names_in
from torch import Tensor

from fastjac.input_jacobian.chain.generate import _IN_PLACE, _OUT
from fastjac.input_jacobian.chain.trace import trace

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
        lambda given: [(f := given[0] * 2, p := f @ A, f.add_(1), p + B)[3]],
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
    extra = {aten.addcmul.default: (A, B), aten.addmm.default: (A, B), aten.neg.default: ()}
    others = extra.get(func, (A, 0.5) if func is aten.threshold_backward.default else (A,))

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


OPERATIONS: tuple[tuple[int, Callable[..., Any]], ...] = (
    *((2, torch.add), (2, torch.mul), (2, torch.sub), (2, torch.mm), (2, torch.mm)),
    *((1, torch.neg), (1, torch.t), (1, torch.cos), (1, lambda a: a * 0.5), (3, torch.addcmul)),
    *((2, aten.silu_backward), (2, aten.threshold_backward), (1, lambda a: a.view(4, 4))),
    *((2, lambda a, b: (a * 0.5).add_(b)), (1, lambda a: a[:, :1]), (1, lambda a: a.sum(0))),
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
