"""`fastjac.compile`: objectives and whole steps, what is compiled when, and wrong code."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import close
from compiled_cases import MARKS, MODELS, WRONG_IN_TORCH, Counting, mlp, normed
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac.bench.networks import lenet, small_resnet
from fastjac.compiled import MODES
from fastjac.penalties import DREG, FrobReg, SpectReg

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:Not enough SMs:UserWarning"),
]
EAGER = {"backend": "aot_eager"}
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


class Step:
    """A step of a model with a penalty: its loss, whose backward is inside or after it."""

    def __init__(self, model: nn.Module, kind: Any, whole: bool, **options: Any) -> None:
        self.model, self.whole = model, whole
        self.attached = kind is DREG
        self.penalty = kind(model, **options) if self.attached else kind(**options)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.attached:
            output, value = self.penalty(self.model, x)
            return F.cross_entropy(output, y) + value
        loss = F.cross_entropy(self.model(x), y)
        return loss + self.penalty() if self.model.training else loss

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.loss(x, y)
        if not self.whole:
            return loss
        loss.backward()
        return loss.detach()

    def train(self, run: Callable[..., Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
        """The loss of ``run``, the gradients and the buffers."""
        self.model.zero_grad()
        loss = run(x, y)
        if not self.whole:
            loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        return [loss.detach(), *grads, *(b.double() for b in self.model.buffers())]


def batch(
    shape: tuple[int, ...] = (6, 4), classes: int = 3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(shape), torch.randint(classes, shape[:1])


def check(
    model: nn.Module, kind: Any, whole: bool, x: Tensor, y: Tensor, how: Any, limit: float = 1e-10
) -> None:
    """Three steps give what eager ones give. The comparison of the first run changes no buffer.

    ``limit`` is that of the errors relative to the size of a tensor, in the L2 norm.
    """
    plain, ours = (Step(m, kind, whole) for m in (copy.deepcopy(model), model))
    run = fastjac.compile(ours.__call__, **how)
    for seed in range(3):
        found = []
        for step, f in ((plain, plain), (ours, run)):
            torch.manual_seed(seed)
            found.append(step.train(f, x, y))
        largest = max(t.norm() for t in found[0])
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() <= limit * max(a.norm(), 1e-3 * largest)


# ---- the same results

SINGLE = 1e-3  # some hundred roundings of 6e-8, enlarged where a norm divides by a small spread


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", [SpectReg, DREG])
def test_steps(kind: Any, whole: bool) -> None:
    """SpectReg draws random numbers: those of eager mode. BatchNorm has buffers."""
    check(normed(), kind, whole, *batch(), EAGER)


class Checkpointed(nn.Sequential):
    """Its first three layers run in a checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        a = checkpoint(lambda x: self[2](self[1](self[0](x))), x, use_reentrant=False)
        return self[4](self[3](a))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.last = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gru(x.view(len(x), 2, 2))[0][:, -1])


def checkpointed() -> nn.Sequential:
    return Checkpointed(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 3))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("make", "kind"), [(checkpointed, SpectReg), (checkpointed, DREG), (Recurrent, SpectReg)]
)
def test_what_torch_compiles_by_a_setting(make: Any, kind: Any, whole: bool) -> None:
    check(make(), kind, whole, *batch(), EAGER)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", [SpectReg, DREG])
@pytest.mark.parametrize(
    ("make", "shape"), [(lenet, (4, 1, 28, 28)), (small_resnet, (2, 3, 32, 32)), (normed, (6, 4))]
)
def test_steps_by_inductor(make: Any, shape: tuple[int, ...], kind: Any, whole: bool) -> None:
    torch.set_default_dtype(torch.float32)
    classes = 3 if make is normed else 10
    check(make(), kind, whole, *batch(shape, classes), {}, SINGLE)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    torch.set_default_dtype(torch.float32)
    check(normed(), SpectReg, True, *batch(), {"mode": mode}, SINGLE)


def test_arguments_of_all_kinds() -> None:
    """Tensors in lists and dicts, by position and by name, numbers, and results of any kind."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, penalty, backend = mlp(), FrobReg(), Counting()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)

        def step(
            xs: list[Tensor],
            *,
            more: dict[str, Tensor],
            scale: float,
            model: Any = model,
            penalty: Any = penalty,
        ) -> dict[str, Any]:
            output, value = penalty(model, xs[0])
            loss = F.cross_entropy(output, more["y"]) + scale * value
            loss.backward()
            return {"loss": loss.detach(), "scale": scale}

        run = fastjac.compile(step, backend=backend) if compiled else step
        for n in (6, 5, 6):
            x, y = batch((n, 4))
            opt.zero_grad()
            result = run([x], more={"y": y}, scale=0.5)
            opt.step()
        assert result["scale"] == 0.5 and backend.compilations == int(compiled)
        found.append([result["loss"], *(p.detach() for p in model.parameters())])
    close(found[1], found[0])


# ---- what is compiled, and when


def weight(value: float) -> Callable[[Step], None]:
    return lambda step: setattr(step.penalty, "weight", value)


def size(n: int) -> Callable[[Step], int]:
    return lambda step: n


def same_batch(step: Step) -> None:
    pass


def mode(train: bool) -> Callable[[Step], None]:
    return lambda step: step.model.train(train) and None


def half(step: Step) -> None:
    step.model.half()


@dataclass(frozen=True)
class Counted:
    """Steps, each after a change, and how many graphs are compiled for all of them."""

    row: str  # of docs/COMPILE.md
    graphs: int
    changes: list[Callable[[Step], Any]]
    kinds: tuple[Any, ...] = (SpectReg, DREG)
    model: Callable[[], nn.Module] = mlp
    options: dict[str, Any] = field(default_factory=dict)  # of the penalty
    accumulate: bool = False


LAST = [size(n) for n in (6, 6, 3, 6, 1)]  # the last batch of an epoch is smaller
OTHERS = [size(n) for n in (6, 6, 3, 3, 4, 6, 4)]
TENSOR = {"weight": torch.tensor(0.5, dtype=torch.float32)}
FILLED = [lambda step, w=w: step.penalty.weight.fill_(w) and None for w in (0.1, 0.3, 1.0)]
MODES_IN_TURN = [mode(train) for train in (True, False, True, False)]
COUNTS = [
    Counted("another weight, also 0", 1, [weight(0.0), weight(0.1), weight(1.0)]),
    Counted("the number in a weight that is a float32 tensor", 1, FILLED, options=TENSOR),
    Counted("a last smaller batch", 1, LAST),
    Counted("other batch sizes", 2, OTHERS),
    Counted(
        "other batch sizes, several projections by autograd",
        3,
        OTHERS,
        (SpectReg,),
        options={"n_proj": 2, "engine": "autograd"},
    ),
    Counted("other batch sizes, input-Jacobian, BatchNorm", 3, OTHERS, (SpectReg,), normed),
    Counted("`train()` and `eval()` in turn", 2, MODES_IN_TURN, model=normed),
    Counted("`every=3`", 3, [same_batch] * 7, options={"every": 3}),
    Counted("another dtype", 2, [same_batch, half, same_batch]),
    Counted("gradients that are not None before the step", 2, [same_batch] * 3, accumulate=True),
]


@pytest.mark.parametrize("counted", COUNTS, ids=lambda c: c.row)
def test_compilations(counted: Counted) -> None:
    for kind in counted.kinds:
        torch._dynamo.reset()
        step = Step(counted.model(), kind, True, **counted.options)
        backend = Counting()
        run = fastjac.compile(step.__call__, backend=backend)
        for change in counted.changes:
            if not counted.accumulate:
                step.model.zero_grad()
            x, y = batch((change(step) or 6, 4))
            run(x.to(next(step.model.parameters()).dtype), y)
        assert backend.compilations == counted.graphs


def test_the_page_has_these_counts() -> None:
    page = (Path(__file__).parents[1] / "docs/COMPILE.md").read_text()
    rows = [f"| {counted.row} | {counted.graphs} |" for counted in COUNTS]
    assert "\n".join(["| what changes | graphs |", "| --- | --- |", *rows, ""]) in page


def test_the_usual_size_is_that_of_the_first_call_without_an_error() -> None:
    model, backend = mlp(), Counting()
    objective = fastjac.compile(lambda x: FrobReg()(model, x)[1], backend=backend)
    with pytest.raises(Exception, match="(?i)shape|size"):
        objective(torch.ones(9, 7))
    objective(torch.ones(6, 4))
    assert backend.compilations == 1


def test_a_weight_that_requires_grad() -> None:
    """Its gradient is that of eager mode, also if it was assigned without gradients."""
    model, (x, _), penalty, found = mlp(), batch(), FrobReg(), []
    weight = torch.tensor(0.5, requires_grad=True)
    with torch.no_grad():
        penalty.weight = weight

    def step(x: Tensor) -> None:
        penalty(model, x)[1].backward()

    for run in (step, fastjac.compile(step, **EAGER)):
        weight.grad = None
        run(x)
        assert weight.grad is not None
        found.append(weight.grad.clone())
    close(*found)


class Ran:
    """A backend that notes which graph runs, by the order of compilation; "eager" if none."""

    def __init__(self) -> None:
        self.graphs, self.ran = 0, ["eager"]

    def __call__(self, graph: Any, inputs: Any) -> Any:
        number, run = self.graphs, aot_eager(graph, inputs)
        self.graphs += 1

        def call(*args: Any) -> Any:
            self.ran.append(f"graph {number}")
            return run(*args)

        return call


def test_a_batch_size_has_code_of_its_own() -> None:
    """A single other size has none. The usual size keeps its own when others have got theirs."""
    model, backend, found = mlp(), Ran(), []
    objective = fastjac.compile(lambda x: FrobReg()(model, x)[1], backend=backend)
    for n in (6, 3, 6, 3, 4, 5, 6, 6, 5):
        backend.ran = ["eager"]
        x, _ = batch((n, 4))
        close(objective(x), FrobReg()(model, x)[1])
        found.append(backend.ran[-1])
    usual, other = "graph 0", "graph 1"
    assert found == [usual, "eager", usual, "eager", other, other, usual, usual, other]


def test_a_weight_that_changes_is_used() -> None:
    model, (x, _), penalty = mlp(), batch(), FrobReg()
    objective = fastjac.compile(lambda x: penalty(model, x)[1], **EAGER)
    truth = FrobReg()(model, x)[1]
    for weight in (1.0, 0.25, 1 / 3, torch.tensor(0.5), torch.tensor(2.0, dtype=torch.float64)):
        penalty.weight = weight
        close(objective(x), weight * truth)


# ---- wrong code


def broken(change: Callable[[list[Tensor], list[Any]], None]) -> Callable[..., Any]:
    """A backend whose code changes what the graph returned, or what it was given."""

    def backend(graph: Any, inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            outputs = list(graph(*args))
            change(outputs, list(args))
            return outputs

        return call

    return backend


def scaled(t: Tensor) -> Tensor:
    return 1.001 * t


def value(outputs: list[Tensor], args: list[Any]) -> None:
    outputs[0] = scaled(outputs[0])


def gradient(outputs: list[Tensor], args: list[Any]) -> None:
    """Of an objective; the value stays."""
    outputs[0] = outputs[0].detach() + scaled(outputs[0] - outputs[0].detach())


def last(outputs: list[Tensor], args: list[Any]) -> None:
    """The last output of a whole step is a gradient."""
    outputs[-1] = scaled(outputs[-1])


def buffer(outputs: list[Tensor], args: list[Any]) -> None:
    for a in args:
        if isinstance(a, Tensor) and not a.requires_grad and a.shape == (5,):
            a.data.mul_(1.001)
            return


@pytest.mark.parametrize(
    ("change", "whole", "named"),
    [
        (value, False, "output 0 of the graph"),
        (value, True, "output 0 of the graph"),
        (gradient, False, "the gradient with respect to .*"),
        (last, True, "the gradient with respect to .*"),
        (buffer, False, "what is written to .*running_mean.*"),
        (buffer, True, "what is written to .*running_mean.*"),
    ],
)
def test_wrong_code_is_refused(change: Any, whole: bool, named: str) -> None:
    """In each call, not in the first one alone; and nothing of the step has happened."""
    step = Step(normed(), FrobReg, whole)
    before = copy.deepcopy(step.model.state_dict())
    run = fastjac.compile(step.__call__, backend=broken(change))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"torch compiled is wrong: {named} differs"):
            run(*batch())
    for name, t in step.model.state_dict().items():
        assert torch.equal(t, before[name]), name
    assert all(p.grad is None for p in step.model.parameters())
    right = fastjac.compile(step.__call__, backend=broken(lambda outputs, args: None))
    right(*batch())


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(*c, marks=[pytest.mark.slow] * (c[1] == "inductor"))
        for c in sorted(WRONG_IN_TORCH)
    ],
)
def test_what_torch_compiles_wrongly_is_refused(name: str, backend: str) -> None:
    """With no penalty too. If this test fails, torch is right now: `compiled_cases`."""
    torch.manual_seed(0)
    model, x = MODELS[name](), torch.randn(6, 4)
    plain, found = copy.deepcopy(model), []
    for m, run in ((plain, plain), (model, torch.compile(model, backend=backend))):
        run(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() > 1e-5 * found[0].norm()
    for objective in (lambda x: model(x).square().sum(), lambda x: FrobReg()(model, x)[1]):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="torch compiled is wrong: the gradient with respe"):
            fastjac.compile(objective, backend=backend)(x)


def test_a_first_run_with_nan_shows_nothing() -> None:
    """The second one is compared."""
    model, penalty = mlp(), FrobReg()
    run = fastjac.compile(lambda x: penalty(model, x)[1], backend=broken(value))
    assert run(torch.full((6, 4), torch.nan)).isnan()
    with pytest.raises(RuntimeError, match="torch compiled is wrong"):
        run(torch.ones(6, 4))


# ---- arguments


def test_arguments() -> None:
    with pytest.raises(TypeError, match="f is int: it must be a function of tensors"):
        fastjac.compile(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode is 'fast': it must be one of 'default'"):
        fastjac.compile(mlp(), mode="fast")
    assert "max-autotune-no-cudagraphs" in MODES
    named = fastjac.compile(partial(torch.add, 1), **EAGER)
    torch.testing.assert_close(named(torch.ones(3)), torch.full((3,), 2.0))


def test_name_and_docstring_are_those_of_the_function() -> None:
    def objective(x: Tensor) -> Tensor:
        """Says what it is."""
        return x.sum()

    compiled = fastjac.compile(objective, **EAGER)
    assert compiled.__name__ == "objective" and compiled.__doc__ == "Says what it is."


def test_errors_of_torch_are_passed_on() -> None:
    model = mlp()
    step = fastjac.compile(lambda x: SpectReg(engine="chain")(model, x)[1], **EAGER)
    with pytest.raises(Exception, match="engine='chain' cannot run .*Use engine='autograd'"):
        step(torch.ones(6, 4))
