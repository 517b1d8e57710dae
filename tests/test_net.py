"""The C++ sweeps through a program (`fastjac.ops.net`), against autograd in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from net_cases import PROGRAMS, Case, act, add, linear, norm
from torch import Tensor

from fastjac.ops.dispatch import why_not
from fastjac.ops.net import ACT, INPUT, rows

if why_not("cpu", "cpu", torch.float32):
    pytest.skip(why_not("cpu", "cpu", torch.float32), allow_module_level=True)
pytestmark = pytest.mark.usefixtures("two_threads")

OPS = torch.ops.fastjac


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Run:
    """The sweeps of a case."""

    def __init__(self, case: Case, tile: int, given: bool, slopes: bool, flat: bool) -> None:
        self.case, self.tile, self.flat = case, tile, flat
        self.n = len(case.x)
        self.saved: list[Tensor]
        self.weights = case.weights
        if given:
            self.weights = [w.t() for w in case.weights]  # as torch saves them
            case.plan[0, 3] = 1
            self.output, self.saved = None, case.given()
        else:
            found = OPS.net_forward(
                *(case.x, case.weights, case.biases, tile, slopes, slopes and flat, case.plan)
            )
            self.output, *self.saved = found
        found = OPS.net_pull(
            *(case.w.flatten(0, 1), self.weights, self.saved, self.n, tile, given and slopes),
            *(flat, case.plan),
        )
        self.v, self.norms, *found = found
        if given and slopes:
            self.saved.append(found.pop(0))
        self.deltas = found

    def push(self, u: Tensor, factor: Tensor | None, wanted: bool, deltas: Any) -> Any:
        case = self.case
        return OPS.net_push(
            *(u.flatten(0, 1), factor, self.weights, self.saved, deltas, self.n, self.tile),
            *(wanted, self.flat, case.plan),
        )

    def backward(self, u: Any, factor: Any, pushed: Any, wanted: list[int] | None = None) -> Any:
        case = self.case
        slots = len(self.weights) + len(case.biases) + 1
        flags = torch.tensor(wanted or [1] * slots, dtype=torch.float64)
        return OPS.net_backward(
            *(case.grad, None if u is None else u.flatten(0, 1), factor, case.x, self.weights),
            *(self.saved, self.deltas, pushed, self.n, self.tile, 1, len(case.plan), flags),
            case.plan,
        )


WAYS = {  # given tensors, φ' and φ'' kept, flat lists
    "slopes": (False, True, False),
    "flat": (False, True, True),
    "z": (False, False, False),
    "given": (True, False, True),
    "given, slopes": (True, True, True),
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tile", [13, 5], ids=["one tile", "tiles"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_sweeps_are_exact(name: str, way: str, tile: int, k: int) -> None:
    case = Case.of(name, k=k)
    truths = {u: case.truth(u) for u in ("none", "given", "factor")}
    run = Run(case, tile, *WAYS[way])
    truth = truths["given"]
    if run.output is not None:
        close(run.output, truth["output"])
    close(run.v.view(case.u.shape), truth["v"])
    close(run.norms, truth["v"].square().sum(2).flatten())
    close(run.push(case.u, None, True, [])[0].view(case.w.shape), truth["ju"])
    for u, of in ((None, "none"), (case.u, "given"), (run.v.view(case.u.shape), "factor")):
        factor = case.factor if of == "factor" else None
        results = [run.backward(u, factor, [])]
        if u is not None:
            out, *pushed = run.push(u, factor, of == "given", run.deltas)
            assert out.numel() == (of == "given") * case.w.numel()
            results.append(run.backward(u, factor, pushed))
        for found in results:
            for a, b in zip(found, truths[of]["grads"], strict=True):
                close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("tile", [450, 900], ids=["tiles", "one tile"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_float32(name: str, tile: int) -> None:
    """For a batch of which a sum has several parts, and whose rows threads divide.

    The error of torch in float32 is up to 1.2e-6 here, that of the kernels 0.8e-6, and 1.6e-6 for
    machines without fused multiplication and addition.
    """
    torch.manual_seed(0)
    exact = Case.of(name, n=900)
    found = Run(exact.to(torch.float32), tile, *WAYS["flat"]).backward(exact.u.float(), None, [])
    for a, b in zip(found, exact.truth("given")["grads"], strict=True):
        if b is not None:
            assert (a - b).norm() <= 4e-6 * b.norm()


@pytest.mark.parametrize("name", PROGRAMS)
def test_only_what_is_wanted(name: str) -> None:
    """Unwanted gradients are empty, and the others do not change."""
    case = Case.of(name)
    run = Run(case, 5, *WAYS["flat"])
    every = run.backward(case.u, None, [])
    for place in range(len(every)):
        for pushed in ([], run.push(case.u, None, False, run.deltas)[1:]):
            wanted = [0] * len(every)
            wanted[place] = 1
            found = run.backward(case.u, None, pushed, wanted)
            for i, (a, b) in enumerate(zip(found, every, strict=True)):
                if i == place:
                    close(a, b)
                else:
                    assert a.numel() == 0


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_gradient_of_the_output(name: str, k: int) -> None:
    """The loss is the penalty alone: None is the same as zeros."""
    case = Case.of(name, k=k)
    run = Run(case, 5, *WAYS["flat"])
    for pushed in ([], run.push(case.u, None, False, run.deltas)[1:]):
        case.grad = torch.zeros(13, 2, dtype=torch.float64)
        expected = run.backward(case.u, None, pushed)
        case.grad = None  # type: ignore[assignment]
        for a, b in zip(run.backward(case.u, None, pushed), expected, strict=True):
            close(a, b)
        for gradient in run.backward(None, None, []):
            assert not gradient.any()


RANGES = {
    "chain": ((6, 7), (4, 6), (3, 4), (1, 3)),
    "norms": ((10, 13), (8, 10), (7, 8), (3, 7), (2, 3), (1, 2)),
}


@pytest.mark.parametrize("way", ["slopes", "z"])
@pytest.mark.parametrize("name", RANGES)
def test_ranges_of_steps(name: str, way: str) -> None:
    """Layer by layer, from the last one, with the deltas of other layers gone."""
    case = Case.of(name, k=2)
    run = Run(case, 13, *WAYS[way])
    expected = run.backward(case.u, None, [])
    pushed = run.push(case.u, None, False, run.deltas)[1:]
    acts = [i for i, step in enumerate(case.steps, 1) if step[0] == ACT]
    wanted = torch.ones(len(expected), dtype=torch.float64)
    grad, total = case.grad, [torch.zeros_like(t) for t in expected]
    for start, stop in RANGES[name]:
        deltas = list(run.deltas)
        for place, step in enumerate(acts):
            if not start <= step < stop:
                deltas[place] = case.x.new_empty(0, 0)
        *found, grad = OPS.net_backward(
            *(grad, case.u.flatten(0, 1), None, case.x, case.weights, run.saved, deltas, pushed),
            *(13, 13, start, stop, wanted, case.plan),
        )
        for t, part in zip(total, found, strict=False):
            if part.numel():
                t += part
    total[-1] = grad
    for a, b in zip(total, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize(
    ("name", "stop", "error"),
    [("skip", 5, "reads a value of earlier steps"), ("chain", 5, "the activation of step 5")],
)
def test_ranges_that_do_not_fit(name: str, stop: int, error: str) -> None:
    case = Case.of(name)
    run = Run(case, 13, *WAYS["slopes"])
    wanted = torch.ones(len(case.weights) + len(case.biases) + 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=error):
        OPS.net_backward(
            *(case.x.new_empty(13, 5), None, None, case.x, case.weights, run.saved, [], []),
            *(13, 13, 1, stop, wanted, case.plan),
        )


@pytest.mark.parametrize("width", [1, 4])
def test_transposed_weights(width: int) -> None:
    """The plan says so, since a matrix with one row or column does not show it."""
    weights = [torch.randn(width, 3), torch.randn(4, width)]
    steps = [linear(0, 0), linear(1, 1)]
    x, w = torch.randn(2, 3), torch.randn(2, 4)
    plan = rows([(INPUT, 3, 0, 1), *steps])
    transposed = [weight.t() for weight in weights]
    a = OPS.net_pull(w, weights, [x.new_empty(0, 0)], 2, 2, False, True, rows([(INPUT, 3), *steps]))
    b = OPS.net_pull(w, transposed, [x.new_empty(0, 0)], 2, 2, False, True, plan)
    assert torch.equal(a[0], b[0])
    for wrong in (weights, [weight.t().contiguous() for weight in weights]):
        if width > 1:
            with pytest.raises(RuntimeError, match="a weight must"):
                OPS.net_pull(w, wrong, [x.new_empty(0, 0)], 2, 2, False, True, plan)


@pytest.mark.parametrize("slopes", [True, False])
def test_values_that_are_not_given(slopes: bool) -> None:
    """The gradient of a weight needs the value that the step reads, and φ(s) alone is computed."""
    case = Case.of("norms")
    case.plan[0, 3] = 1
    saved = case.given()
    acts = sum(step[0] == ACT for step in case.steps)
    saved[3 * acts] = case.x.new_empty(0, 0)  # the output of the first norm
    weights = [w.t() for w in case.weights]
    found = OPS.net_pull(case.w[0], weights, saved, 13, 13, slopes, True, case.plan)
    if slopes:
        saved.append(found.pop(2))
    for wanted in (0, 1):
        flags = torch.full((10,), float(wanted), dtype=torch.float64)
        arguments = (case.grad, case.u[0], None, case.x, weights, saved, found[2:], [], 13, 13, 1)
        if wanted:
            with pytest.raises(RuntimeError, match="the value that step 2 reads is not given"):
                OPS.net_backward(*arguments, len(case.plan), flags, case.plan)
        else:
            OPS.net_backward(*arguments, len(case.plan), flags, case.plan)


def test_infinite_cotangents_of_dead_units() -> None:
    """Zero times inf is zero where the derivative of ReLU is zero, as in torch."""
    x, w = torch.randn(6, 3, dtype=torch.float64), torch.randn(1, 6, 2, dtype=torch.float64)
    bias, grad = torch.tensor([-100.0, 100.0], dtype=torch.float64), w[0].clone()
    grad[:, 0] = torch.inf  # as of sqrt(relu(z))
    weight, u = torch.randn(2, 3, dtype=torch.float64), torch.randn(1, 6, 3, dtype=torch.float64)
    case = Case([linear(0, 0, 0), act(1, "relu")], [weight], [bias], x, w, u, grad, w[0, :, 0])
    for way in ("flat", "z"):
        for a in Run(case, 6, *WAYS[way]).backward(u, None, []):
            assert a.isfinite().all()


@pytest.mark.parametrize("n", [13, 700])
def test_same_bits_twice(n: int) -> None:
    case = Case.of("cat", n=n, k=2).to(torch.float32)
    first, second = (Run(case, n // 3, *WAYS["flat"]).backward(case.u, None, []) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 63, 64, 65, 130])
def test_products_of_all_widths(width: int, dtype: torch.dtype) -> None:
    """1 to 6 rows and 1 to 4 vectors, whole and not. With integers, the sums are exact."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, dtype=torch.float64)

    for n in (1, 2, 5, 6, 7, 20, 300):
        for c in (1, 3, 16, 33):
            exact = Case(
                [linear(0, 0, 0), act(1, "identity"), linear(2, 1, 1)],
                *([random(c, width), random(width, c)], [random(c), random(width)]),
                *(random(n, width), random(1, n, width), random(1, n, width), random(n, width)),
                random(n),
            )
            case, truth = exact.to(dtype), exact.truth("given")
            run = Run(case, n, *WAYS["flat"])
            found = [run.output, run.v, *run.backward(case.u, None, [])]
            for a, b in zip(found, [truth["output"], truth["v"][0], *truth["grads"]], strict=True):
                assert torch.equal(a.double(), b)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("widths", [(270, 300), (1030, 130)], ids=["300", "1030"])
def test_products_that_the_threads_share(
    widths: tuple[int, int], dtype: torch.dtype, k: int
) -> None:
    """Of large weights: by the kernels and, over 1024 columns, by BLAS. The sums are exact."""
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, dtype=torch.float64)

    (d, c), n = widths, 40
    exact = Case(
        [linear(0, 0, 0), act(1, "identity"), linear(2, 1), act(3, "relu"), linear(4, 2, 1)],
        *([random(c, d), random(d, c), random(9, d)], [random(c), random(9)], random(n, d)),
        *(random(k, n, 9), random(k, n, d), random(n, 9), random(k * n)),
    )
    case, truth = exact.to(dtype), exact.truth("given")
    run = Run(case, n, *WAYS["z"])
    out, *pushed = run.push(case.u, None, True, run.deltas)
    found = [run.output, run.v.view_as(case.u), out.view_as(case.w)]
    expected = [truth["output"], truth["v"], truth["ju"]]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.double(), b)
    for way in ([], pushed):
        gradients = run.backward(case.u, None, way)
        for a, b in zip(gradients, truth["grads"], strict=True):
            assert torch.equal(a.double(), b)


def test_raw_calls_that_do_not_fit_raise() -> None:
    """The ops check every operand before they read its memory."""
    case = Case.of("cat").to(torch.float32)
    n, weights, biases, plan = len(case.x), case.weights, case.biases, case.plan
    for flat in (True, False):
        run = Run(case, 5, False, True, flat)
        pushed = run.push(case.u, None, False, run.deltas)[1:]
        wanted = torch.ones(len(weights) + len(biases) + 1, dtype=torch.float64)
        w, u, factor = case.w[0], case.u[0], case.factor
        good: dict[str, list[Any]] = {
            "net_forward": [case.x, weights, biases, 5, True, flat, plan],
            "net_pull": [w, weights, run.saved, n, 5, True, flat, plan],
            "net_push": [u, factor, weights, run.saved, run.deltas, n, 5, True, flat, plan],
            "net_backward": [
                *(case.grad, u, factor, case.x, weights, run.saved, run.deltas, pushed, n, 5),
                *(1, len(plan), wanted, plan),
            ],
        }
        for name, arguments in good.items():
            op = getattr(OPS, name)
            op(*arguments)
            for place, right in enumerate(arguments):
                for number, wrong in enumerate(_wrong(right)):
                    if (name, place, number) in (("net_forward", 0, 2), ("net_forward", 6, 2)):
                        continue  # a smaller batch, or one step less, fits
                    optional = right is pushed or (right is run.deltas and name == "net_push")
                    if optional and not wrong:
                        continue  # the op pushes itself, or computes J u only
                    needed = name == "net_backward" or right is not run.saved or flat
                    if not needed and wrong and wrong[-1].shape[:1] == (0,):
                        continue  # a value
                    with pytest.raises(RuntimeError):
                        op(*arguments[:place], wrong, *arguments[place + 1 :])


def _wrong(right: Any) -> list[Any]:
    if isinstance(right, bool):
        return []
    if isinstance(right, int):
        return [0, -1, -(2**62), *([2**62] if right == 1 else [])]
    if isinstance(right, list):
        bad = [[*right[:-1], wrong] for wrong in _wrong(right[-1])]
        return [[], *bad]
    other = torch.float32 if right.dtype == torch.float64 else torch.float64
    return [
        right.to(other),
        right[:0],
        right[:-1],
        right.unsqueeze(0),
        right.new_zeros(()),
        right.repeat(*[2] * right.dim())[tuple(slice(None, None, 2) for _ in right.shape)],
    ]


WRONG_STEPS: dict[str, list[tuple[float, ...]]] = {
    "an unknown kind": [(7, 0)],
    "an unknown weight of a norm": [linear(0, 0), norm(1, 1)],
    "a matrix as the weight of a norm": [linear(0, 0), norm(1, 0)],
    "two inputs": [(0, 3), linear(0, 0)],
    "a value of a later step": [act(2, "tanh"), linear(1, 0)],
    "a value that is not an integer": [(1, 0.5, 0, 0, -1)],
    "not a number": [(1, float("nan"), 0, 0, -1)],
    "an unknown weight": [linear(0, 1)],
    "an unknown bias": [linear(0, 0, 1)],
    "a weight of another width": [linear(0, 0), linear(1, 0)],
    "an unknown activation": [linear(0, 0), (2, 1, 0, 1e9)],
    "a sum of different widths": [linear(0, 0), add(0, 1)],
    "a value that no step reads": [linear(0, 0), linear(0, 0)],
    "no linear step": [act(0, "tanh")],
}


@pytest.mark.parametrize("name", WRONG_STEPS)
def test_programs_that_do_not_fit_raise(name: str) -> None:
    x, weights, biases = torch.randn(4, 3), [torch.randn(5, 3)], [torch.randn(5)]
    plan = rows([(INPUT, 3), linear(0, 0, 0)])
    OPS.net_forward(x, weights, biases, 4, True, True, plan)
    with pytest.raises(RuntimeError):
        plan = rows([(INPUT, 3), *WRONG_STEPS[name]])
        OPS.net_forward(x, weights, biases, 4, True, True, plan)
