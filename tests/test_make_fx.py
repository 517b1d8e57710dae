"""Penalties and ops in symbolic ``make_fx``, with which force fields compile second derivatives.

The graph is recorded at one batch size and replayed at others. The truth is the same function in
eager mode, which all other tests compare with the definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from penalty_cases import CASES, SPECS, close, close_gradients, seeded, takes
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastjac
from fastjac.ops.dispatch import OPS
from fastjac.penalties import Example, PenaltySpec

TRACED, REPLAYED = 7, (7, 11, 1)
"""Batch sizes. make_fx takes equal sizes for the same symbol, so they differ from all others."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, of torch.jit
    pytest.mark.usefixtures("double"),
]


def resized(t: Tensor, n: int) -> Tensor:
    """An input of an example, repeated along the dimension of its three samples."""
    dim = list(t.shape).index(3)
    return t.index_select(dim, torch.arange(n) % 3)


class Step(nn.Module):
    """The value of a penalty in one of its forms."""

    def __init__(self, model: nn.Module, penalty: nn.Module, form: str) -> None:
        super().__init__()
        self.model, self.penalty, self.form = model, penalty, form

    def forward(self, x: Tensor, *targets: Tensor) -> Tensor:
        if self.form == "graph":
            return self.penalty(x, self.model(x), *targets)
        if self.form == "attached":
            self.model(x)
            return self.penalty()
        model = self.model if self.form == "module" else lambda t: self.model(t)
        return self.penalty(model, x, *targets)[1]


def value_and_gradients(step: Step) -> Callable[..., tuple[Tensor, ...]]:
    """A function of the state of a step and its inputs, as ``make_fx`` needs it."""

    def traced(state: dict[str, Tensor], x: Tensor, *targets: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        state = {name: t.clone() for name, t in state.items()}
        named = {name: state[name].requires_grad_() for name, _ in step.named_parameters()}
        value = torch.func.functional_call(step, {**state, **named}, (x, *targets))
        inputs = [x, *named.values()]
        unused: Any = {"allow_unused": True, "materialize_grads": True}
        return value, *torch.autograd.grad(value.sum(), inputs, **unused)

    return traced


def check(
    step: Step,
    example: Callable[[int], tuple[Tensor, ...]],
    generator: torch.Generator | None = None,
    mode: str = "symbolic",
) -> None:
    """Traces a step, and compares the replays with eager mode."""
    state = {name: t.detach().clone() for name, t in step.state_dict().items()}
    function = value_and_gradients(step)
    graph = make_fx(function, tracing_mode=mode)(state, *example(TRACED))
    for n in REPLAYED if mode == "symbolic" else REPLAYED[:1]:
        results = []
        for run in (function, graph):
            torch.manual_seed(n)
            if generator is not None:
                generator.manual_seed(n)
            results.append(run(state, *example(n)))
        (truth, *wanted), (value, *found) = results
        close(value, truth)
        for a, b in zip(found, wanted, strict=True):
            close_gradients(a, b)


def forms_of(spec: PenaltySpec) -> list[tuple[str, str | None]]:
    if spec.kind == "layer-wise":
        attaches = spec.name != "accumulated_dreg"
        return [("module", None)] + [("attached", None)] * attaches
    if not takes(spec, "engine"):
        graph = [("graph", None)] if spec.kind == "output" else []
        return [*graph, ("function", None), ("module", None)]
    return [("graph", None)] + [
        (f, e) for f in ("function", "module") for e in ("autograd", "auto")
    ]


def every_form() -> Iterator[Any]:
    for case in SPECS:
        for form, engine in forms_of(case.values[0]):
            yield pytest.param(case.values[0], form, engine, id=f"{case.id}-{form}-{engine}")


def step_of(
    spec: PenaltySpec, form: str, engine: str | None, options: dict[str, Any]
) -> tuple[Step, Callable[[int], tuple[Tensor, ...]], torch.Generator | None]:
    example: Example = spec.example(torch.float64, seeded())
    generator = seeded() if takes(spec, "generator") else None
    options = {**example.options, **options}
    options |= {"generator": generator} if generator is not None else {}
    options |= {"engine": engine} if engine else {}
    penalty = spec.module(*[example.model] * (form == "attached"), **options)

    def inputs(n: int) -> tuple[Tensor, ...]:
        x = resized(example.x, n) + torch.linspace(0, 1, n)[:, None]
        return x, *(resized(t, n) for t in example.targets)

    return Step(example.model, penalty, form), inputs, generator


@pytest.mark.parametrize("mode", ["symbolic", "real"])
@pytest.mark.parametrize("spec, form, engine", list(every_form()))
def test_every_form_of_every_penalty(
    spec: PenaltySpec, form: str, engine: str | None, mode: str
) -> None:
    check(*step_of(spec, form, engine, {}), mode)


@pytest.mark.slow
@pytest.mark.parametrize("spec, options", [case for case in CASES if case.values[1]])
def test_every_option(spec: PenaltySpec, options: dict[str, Any]) -> None:
    """Without a generator, the replay draws from that of torch."""
    form, engine = forms_of(spec)[0]
    step, inputs, _ = step_of(spec, form, engine, {**options, "reduction": "none"})
    step.penalty.generator = None
    check(step, inputs)


@pytest.mark.parametrize("spec", [s for s in SPECS if forms_of(s.values[0])[0][0] == "graph"])
def test_references(spec: PenaltySpec) -> None:
    """The definitions that are functions of x and output."""

    class Reference(nn.Module):
        def forward(self, *arguments: Any) -> Tensor:
            return spec.reference(*arguments)

    step, inputs, _ = step_of(spec, "graph", None, {})
    check(Step(step.model, Reference(), "graph"), inputs)


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "conv, BatchNorm": lambda: [nn.Conv2d(2, 5, 2), nn.BatchNorm2d(5), nn.ReLU()],
    "conv, BatchNorm in eval mode": lambda: [
        nn.Conv2d(2, 5, 2),
        nn.BatchNorm2d(5).eval(),
        nn.Tanh(),
    ],
    "conv, transposed": lambda: [
        nn.Conv2d(2, 5, 2),
        nn.GELU(),
        nn.ConvTranspose2d(5, 2, 2),
        nn.SiLU(),
    ],
    "linear, LayerNorm": lambda: [nn.Flatten(), nn.Linear(18, 5), nn.LayerNorm(5), nn.Tanh()],
    "no row of the table": lambda: [nn.Linear(3, 5), nn.Hardtanh(), nn.Linear(5, 2)],
}


@pytest.mark.parametrize("form", ["module", "attached"])
@pytest.mark.parametrize("modules", LAYERS.values(), ids=LAYERS)
def test_layers(modules: Callable[[], list[nn.Module]], form: str) -> None:
    model = nn.Sequential(*modules()).double()
    options = {"over": "units", "positions": "mean", "layers": "mean", "include_output": True}
    penalty = fastjac.DREG(*[model] * (form == "attached"), **options)

    def inputs(n: int) -> tuple[Tensor]:
        # A convolution may take almost all of sin(k) away. BatchNorm then divides by so small a
        # variance that rounding errors of gradients that are zero exceed 1e-13.
        return (torch.sin(torch.arange(n * 18.0) ** 2).view(n, 2, 3, 3),)

    check(Step(model, penalty, form), inputs)


@pytest.mark.parametrize("act", [nn.GELU, lambda: nn.LayerNorm(5)])
def test_several_cotangents(act: Callable[[], nn.Module]) -> None:
    """One at a time: torch's batching rules for these fix the size of the batch."""
    model = nn.Sequential(nn.Linear(4, 5), act(), nn.Linear(5, 3))
    check(
        Step(model, fastjac.FrobReg(), "graph"), lambda n: (torch.arange(4.0 * n).sin().view(n, 4),)
    )


def test_presets() -> None:
    critic, generator = nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 1)), seeded()
    penalty = fastjac.presets.wgan_gp(generator=generator)
    points = torch.sin(torch.arange(88.0)).view(22, 4)
    check(Step(critic, penalty, "module"), lambda n: (points[:n], points[11 : 11 + n]), generator)


# ---- what a traced call cannot look at


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("penalty", [fastjac.DataGrad(), fastjac.OneHot(), fastjac.IGPen()])
def test_the_replay_checks_the_classes(penalty: Any, mode: str) -> None:
    step = Step(nn.Linear(4, 3), penalty, "graph")
    x, y = torch.randn(7, 4), torch.arange(7) % 3
    state = dict(step.state_dict())
    graph = make_fx(value_and_gradients(step), tracing_mode=mode)(state, x, y)
    with pytest.raises((RuntimeError, IndexError), match="class indices outside of|out of bounds"):
        graph(state, x, y + 1)


def test_a_fake_tensor_has_no_classes_to_check() -> None:
    with torch._subclasses.FakeTensorMode():
        output, value = fastjac.DataGrad(engine="autograd")(
            nn.Linear(4, 3), torch.randn(7, 4), torch.zeros(7, dtype=torch.int64)
        )
    assert output.shape == (7, 3) and value.shape == ()


@pytest.mark.parametrize("form", ["graph", "module", "attached"])
def test_a_graph_cannot_count_calls(form: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    attached = form == "attached"
    penalty: Any = fastjac.DREG(model, every=2) if attached else fastjac.FrobReg(every=2)
    step = Step(model, penalty, form)
    with pytest.raises(RuntimeError, match="every > 1 and was called while make_fx records"):
        check(step, lambda n: (torch.ones(n, 4),))
    penalty.eval()  # each call computes the value
    if not attached:
        check(step, lambda n: (torch.ones(n, 4),))


# ---- ops


def derivatives(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """The outputs, their gradients and the gradients of these."""
    cotangents = [torch.cos(o.detach()) for o in outputs]
    first = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True)
    total = sum((g * torch.sin(g.detach())).sum() for g in first)
    return *outputs, *first, *torch.autograd.grad(total, inputs, materialize_grads=True)


def act(z: Tensor, g: Tensor, _: Tensor, impl: str) -> list[Tensor]:
    return [fastjac.act(z, g, 1, "gelu", impl=impl), fastjac.act(z, None, 0, "elu", impl=impl)]


def act_stats(z: Tensor, g: Tensor, w: Tensor, impl: str) -> list[Tensor]:
    per_channel = fastjac.act_stats(z, "tanh", weights=w, impl=impl)
    per_sample = fastjac.act_stats(g, "gelu", per="sample", dim=1, impl=impl)
    return [*per_channel, *per_sample, fastjac.act_stats(z, "silu", scale=0.5, impl=impl)[1]]


def row_sqnorm(z: Tensor, g: Tensor, w: Tensor, impl: str) -> list[Tensor]:
    return fastjac.row_sqnorm([z, g, w], impl=impl)


def softmax_residual(z: Tensor, g: Tensor, _: Tensor, impl: str) -> list[Tensor]:
    target = torch.zeros(z.shape[0], dtype=torch.int64)
    return [fastjac.softmax_residual(z, target, impl=impl) * g]


CALLS = {f.__name__: f for f in (act, act_stats, row_sqnorm, softmax_residual)}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_ops(op: str, impl: str) -> None:
    def traced(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = CALLS[op](*leaves, impl)
        used = leaves if op in ("act_stats", "row_sqnorm") else leaves[:2]
        return derivatives(outputs, used)

    def inputs(n: int) -> list[Tensor]:
        return [
            torch.sin(torch.arange(n * k + 1.0)[1:]).view(n, *s)
            for k, s in ((5, (5,)), (5, (5,)), (1, ()))
        ]

    graph = make_fx(traced, tracing_mode="symbolic")(*inputs(TRACED))
    for n in REPLAYED:
        for found, truth in zip(graph(*inputs(n)), traced(*inputs(n)), strict=True):
            close_gradients(found, truth)
