"""Every penalty on modules of torch.nn and on functions is exact, or raises what the table says.

The truth are finite differences (`sweep_truth.py`), and the table is in `sweep_table.py`.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from sweep_cases import NOT_A_CASE, Between, Case, cases
from sweep_table import FAULTS, RAISES, Raises, is_fault, page, state_of
from sweep_truth import ENGINES, KINDS, Truth
from torch import Tensor, nn

from fastjac.input_jacobian import guards
from fastjac.input_jacobian.chain import norms, rules

pytestmark = pytest.mark.usefixtures("double")
PAGE = Path(__file__).resolve().parent.parent / "docs/LIMITS.md"
CASES = {case.name: case for case in cases()}

EQUAL, UNEQUAL = (3, 3, 3), (2, 4, 5)  # N, m and D; K is 1, 3 and m
AS_CHANNELS = (6, 3, 2)  # the size of most samples is 6, and so is their number
ALL = set(product(ENGINES, KINDS))
# The fast suite runs each engine with one and several cotangents and tangents, and each penalty.
# The slow one runs all cells.
FAST = {
    *product(("auto",), ("SpectReg(1)", "JacReg", "Sobolev", "GradientPenalty", "TangentProp(1)")),
    *product(("chain", "autograd"), ("SpectReg(1)", "FrobReg", "DataGrad", "TangentProp(3)")),
    ("graph", "SpectReg(3)"),
}


def wrong_cells(case: Case, model: nn.Module, x: Tensor, cells: set[tuple[str, str]]) -> list[str]:
    truth, wrong = Truth(model, x), []
    for engine, kind in sorted(cells):
        state = state_of(case, engine, kind)
        try:
            found = truth.wrong(kind, engine)
            if state is not None:
                found = f"does not raise {state.message!r}"
        except Exception as error:
            known = state is not None and state.message in str(error)
            found = None if known else f"raises {error!r}"
        if is_fault(case, engine, kind):
            found = None if found else "is mended: remove it from FAULTS"
        if found is not None:
            wrong.append(f"{engine} {kind}: {found}")
    return wrong


def check(case: Case, sizes: tuple[int, int, int], cells: set[tuple[str, str]]) -> None:
    n, m, d = sizes
    wrong = wrong_cells(case, Between(case, n, m, d), torch.randn(n, d, requires_grad=True), cells)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    check(CASES[name], EQUAL, FAST)


NORMS = [name for name in CASES if "norm" in name.lower()]


@pytest.mark.parametrize("sizes", [UNEQUAL, AS_CHANNELS], ids=["unequal", "as channels"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_other_sizes(name: str, sizes: tuple[int, int, int]) -> None:
    check(CASES[name], sizes, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL, AS_CHANNELS])
@pytest.mark.parametrize("name", CASES)
def test_all_cells(name: str, sizes: tuple[int, int, int]) -> None:
    check(CASES[name], sizes, ALL)


ACTIVATIONS = [n for n, case in CASES.items() if n.endswith(") on 6") and "Norm" not in n]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sequence(name: str) -> None:
    """A Sequential of Linear and activation modules is one call in C++."""
    case = CASES[name]
    between = Between(case, *EQUAL)
    model = nn.Sequential(between.before, between.inner, nn.Flatten(), between.after)
    cells = set(product(("auto", "chain"), ("SpectReg(1)", "FrobReg", "TangentProp(1)")))
    wrong = wrong_cells(case, model, torch.randn(3, 3, requires_grad=True), cells)
    assert not wrong, "\n".join(wrong)


# ---- operations at the ends of a model


class Alone(nn.Module):
    """The operation of a case between a shape and ``[N, m]``."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.shape, self.inner = case.shape, case.make().train(case.training)

    def forward(self, x: Tensor) -> Tensor:
        a = x * 1 if len(self.shape) == 1 else x.unflatten(1, self.shape)
        return self.inner(a).reshape(len(x), -1)


# Whether the others need a second derivative, and raise, depends on the penalty.
EXACT = [name for name, case in CASES.items() if not state_of(case, "auto", "SpectReg(1)")]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_alone(name: str) -> None:
    """Without layers around it: its cotangent and its tangent may be constants."""
    case = CASES[name]
    x = (0.3 * torch.randn(3, torch.Size(case.shape).numel())).requires_grad_()
    model = Alone(case)
    classes = model(x).shape[1] > 1
    cells = {cell for cell in FAST if classes or cell[1] not in ("DataGrad", "JacReg")}
    wrong = wrong_cells(case, model, x, cells)
    assert not wrong, "\n".join(wrong)


# ---- planted faults, which the cells must see


def no_terms(self: Any, node: Any, lead: Any, us: Any, delta: Tensor, wanted: bool) -> Any:
    """A rule without its second-order terms."""
    return self.jvp(node, lead, us), (None,) * len(self.targets(node, (True,) * 3))


def no_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_kinds", {})
    monkeypatch.setattr(guards, "_kind", lambda node: "")


def no_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in (norms.Norm, norms.LayerNorm, rules.Softmax, rules.Pointwise):
        monkeypatch.setattr(rule, "push", no_terms)


@pytest.mark.parametrize(
    ("fault", "name", "engine", "kind"),
    [
        (no_guards, "GroupNorm(1,3) on 3×3", "autograd", "FrobReg"),
        (no_guards, "GroupNorm(1,3) on 3×3", "graph", "SpectReg(3)"),
        (no_guards, "two_branches", "autograd", "TangentProp(1)"),
        (no_guards, "gradient_of_layer_norm", "graph", "SpectReg(1)"),
        (no_curvature, "BatchNorm1d(6) on 6", "chain", "TangentProp(1)"),
        (no_curvature, "LayerNorm(5) on 6×5", "chain", "SpectReg(1)"),
        (no_curvature, "a.softmax(1)", "chain", "SpectReg(1)"),
        (no_curvature, "a.sin() * a.cos() + a.tan()", "chain", "DataGrad"),
    ],
)
def test_planted_fault_is_seen(
    fault: Any, name: str, engine: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = Truth(Between(CASES[name], *EQUAL), torch.randn(3, 3, requires_grad=True))
    fault(monkeypatch)
    found = truth.wrong(kind, engine)
    assert found is not None and found.startswith("value" if "Group" in name else "gradient")


# ---- the table


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python tests/sweep_table.py docs/LIMITS.md"


@pytest.mark.parametrize("row", [*RAISES, *FAULTS])
def test_table_speaks_of_cases_that_exist(row: Raises) -> None:
    cells = set(product(ENGINES, KINDS))
    for pattern in row.cases:
        one = row._replace(cases=(pattern,))
        assert any(one.holds(name, *cell) for name in CASES for cell in cells), pattern


def test_every_module_of_torch_is_a_case() -> None:
    made = {type(module).__name__ for case in CASES.values() for module in case.make().modules()}
    kinds = {n: k for n, k in vars(nn).items() if isinstance(k, type) and issubclass(k, nn.Module)}
    assert kinds.keys() - made - NOT_A_CASE == set()


def test_default_engine_raises_only_where_all_do() -> None:
    for case, kind in product(CASES.values(), KINDS):
        if state_of(case, "auto", kind) is not None:
            assert all(state_of(case, engine, kind) is not None for engine in ENGINES)


RAISING = [name for name, case in CASES.items() if state_of(case, "auto", "SpectReg(1)")]


@pytest.mark.parametrize("name", RAISING)
def test_torch_raises_too(name: str) -> None:
    """Where the default engine raises, plain PyTorch raises or is wrong."""
    truth = Truth(Between(CASES[name], *EQUAL), torch.randn(3, 3, requires_grad=True))
    try:
        slope = truth.slope_by_torch()
    except (RuntimeError, NotImplementedError) as error:
        assert "not implemented" in str(error)
    else:
        assert abs(slope - truth.slopes["SpectReg(1)"]) > 1e-3 * abs(slope)
