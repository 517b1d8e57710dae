"""Penalties inside ``torch.compile`` give what they give in eager mode, as one graph.

The backend ``aot_eager`` traces as inductor does and runs torch's own kernels, so the results are
those of eager mode up to the order of sums, and random numbers are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_cases import MARKS, MODELS, WRONG_IN_TORCH, Counting, agrees, compiled, mlp
from layer_cases import Model
from penalty_cases import CASES, Call, gradients, takes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastjac
from fastjac.penalties import (
    DREG,
    AccumulatedDREG,
    Contractive,
    FiniteDifferenceDataGrad,
    FrobReg,
    PenaltySpec,
    SpectReg,
    TangentProp,
)

pytestmark = MARKS
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


# ---- every penalty

# One of each way in which a penalty asks for its products.
FAST = {"spectreg-0", "datagrad-0", "igpen-0", "jacreg-0", "sobolev-0", "tangentprop-0", "dreg-0"}


def forms_of(spec: PenaltySpec) -> list[str]:
    if spec.kind == "layer-wise" or spec.module is FiniteDifferenceDataGrad:
        return ["auto"]
    return ["auto", "autograd", "graph"] if takes(spec, "engine") else ["auto", "graph"]


def registry() -> list[Any]:
    return [
        pytest.param(
            *(*case.values, form),
            id=f"{case.id}-{form}",
            marks=[] if case.id in FAST and form != "autograd" else pytest.mark.slow,
        )
        for case in CASES
        if case.values[0].module is not AccumulatedDREG
        for form in forms_of(case.values[0])
    ]


@pytest.mark.parametrize(("spec", "options", "form"), registry())
def test_every_penalty(spec: PenaltySpec, options: dict[str, Any], form: str) -> None:
    """Random ones too; ``form`` is that of the call, or the engine of the model form."""
    call = Call(spec, options, engine="autograd" if form == "autograd" else None)
    penalty = call.module(reduction="none")
    penalty.generator = None
    weights = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)

    def value(x: Tensor, *targets: Tensor) -> Tensor:
        if form == "graph":
            return penalty(x, call.model(x), *targets)
        return penalty(call.model, x, *targets)[1]

    for x in (call.x, call.x.detach()):
        if form == "graph" and not x.requires_grad:
            continue
        inputs = [t for t in (x, *call.model.parameters()) if t.requires_grad]
        found = []
        for run in (value, compiled(value)):
            torch.manual_seed(3)
            values = run(x, *call.targets)
            found.append([values, *gradients(weights * values, inputs)])
        close(found[1], found[0])
        assert found[0][1].abs().sum() > 0


QUICK = ("fused", "a module twice", "dropout")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        pytest.param(
            *(name, backend),
            marks=[pytest.mark.slow] * (name not in QUICK or backend == "inductor"),
        )
        for name in MODELS
        for backend in ("aot_eager", "inductor")
        if (name, backend) not in WRONG_IN_TORCH
    ],
)
def test_models(name: str, backend: str) -> None:
    """Buffers are updated once. Inductor draws other random numbers than torch's kernels do."""
    torch.manual_seed(0)
    if (name, backend) == ("dropout", "inductor"):
        with torch._inductor.config.patch(fallback_random=True):
            agrees(MODELS[name](), torch.randn(6, 4), 2, backend)
    else:
        agrees(MODELS[name](), torch.randn(6, 4), 2, backend)


# ---- several cotangents, other batch sizes


def net(act: Callable[[], nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), act(), nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("act", "engine", "compilations"),
    [
        (nn.GELU, "auto", 1),
        (nn.SiLU, "autograd", 1),
        # Torch's batching rule for the derivative of GELU fixes the size of the batch (2.13).
        pytest.param(nn.GELU, "autograd", 3, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("make", [FrobReg, SpectReg])
def test_cotangents_and_batch_sizes(
    make: Any, act: Callable[[], nn.Module], engine: str, compilations: int
) -> None:
    model, backend = net(act), Counting()
    penalty = make(3, engine=engine) if make is SpectReg else make(engine=engine)
    step = compiled(lambda x: penalty(model, x)[1], backend, dynamic=True)
    inputs = [model[0].weight, model[0].bias, model[2].weight]
    for n in (6, 5, 3):
        x, found = torch.randn(n, 4), []
        for run in (step, lambda x: penalty(model, x)[1]):
            torch.manual_seed(n)
            value = run(x)
            found.append([value, *torch.autograd.grad(value, inputs)])
        close(found[0], found[1])
    assert backend.compilations == compilations


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.t()[0].mean(), lambda out: 0.0])
def test_losses_of_any_kind(loss: Callable[[Tensor], Any]) -> None:
    """Whose gradients with respect to the output are expanded, transposed, or none."""
    model, x, w = mlp(), torch.randn(6, 4), torch.randn(6, 3)
    truth = SpectReg(engine="autograd")

    def step(penalty: Any) -> Tensor:
        output, value = penalty(model, x, projection=w)
        return value + loss(output)

    found = [step(truth), compiled(step)(SpectReg())]
    close(*(gradients(value, list(model.parameters())) for value in found))


# ---- operations that need care


def attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unsqueeze(1).chunk(3, -1)
    return m.head(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


def with_attention() -> Model:
    return Model(attention, qkv=nn.Linear(4, 12), head=nn.Linear(4, 3))


def with_norm(norm: nn.Module) -> nn.Sequential:
    """On ``[N, 4, 5]``, with the channels in dimension 1, or for a LayerNorm on ``[N, 4]``."""
    if isinstance(norm, nn.LayerNorm | nn.BatchNorm1d):
        return nn.Sequential(nn.Linear(4, 6), norm, nn.GELU(), nn.Linear(6, 3))
    first = nn.Conv1d(4, 6, 1)
    return nn.Sequential(first, norm, nn.GELU(), nn.Flatten(), nn.Linear(30, 3))


def norms() -> dict[str, nn.Module]:
    """In training mode; the running statistics of three of them are updated."""
    found: dict[str, nn.Module] = {
        "layer": nn.LayerNorm(6),
        "batch": nn.BatchNorm1d(6, momentum=0.3),
        "batch, plain": nn.BatchNorm1d(6, affine=False, track_running_stats=False),
        "instance": nn.InstanceNorm1d(6, affine=True),
        "instance, running": nn.InstanceNorm1d(6, momentum=0.2, track_running_stats=True),
        "group": nn.GroupNorm(2, 6),
    }
    for norm in found.values():
        for p in norm.parameters():
            p.data.uniform_(0.5, 1.5)
    return found


SLOW_NORMS = ("batch, plain", "instance", "group")


def check(model: nn.Module, call: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> None:
    """Output, value, gradients and buffers are those of eager mode, in two calls."""
    plain, found = copy.deepcopy(model), []
    step = compiled(lambda: call(model))
    for run, m in ((step, model), (lambda: call(plain), plain)):
        for _ in range(2):
            output, value = run()
            grads = gradients(output.square().sum() + value, list(m.parameters()))
        found.append([output, value, *grads, *(b.double() for b in m.buffers())])
    close(found[0], found[1])


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW_NORMS)) for n in norms()],
)
def test_jvp_through_norms(name: str) -> None:
    """Its gradient by autograd is wrong through torch's own norms: the reference is the chain.

    The running statistics are those that torch computes.
    """
    model = with_norm(norms()[name])
    x = torch.randn((6, 4) if isinstance(model[0], nn.Linear) else (6, 4, 5))
    tangents = torch.randn(2, *x.shape)
    check(model, lambda m: TangentProp()(m, x, tangents))
    model.eval()
    check(model, lambda m: TangentProp()(m, x, tangents))


@pytest.mark.parametrize("name", ["group", "batch"])
def test_cotangents_through_norms(name: str) -> None:
    """Torch differentiates a batched backward of GroupNorm wrongly, so they are taken in turn."""
    model = with_norm(norms()[name])
    x = torch.randn((6, 4) if name == "batch" else (6, 4, 5))
    check(model, lambda m: SpectReg()(m, x, projection=torch.ones(3, 6, 3).cumsum(0).sin()))


@pytest.mark.parametrize("penalty", [SpectReg(engine="autograd"), TangentProp()])
def test_attention(penalty: Any) -> None:
    x, model = torch.randn(6, 5, 4), with_attention()
    given = (torch.randn_like(x),) if isinstance(penalty, TangentProp) else ()
    if not given:
        penalty = partial(penalty, projection=torch.randn(6, 3))
    check(model, lambda m: penalty(m, x, *given))


def test_attention_in_the_graph_form() -> None:
    x, model, w = torch.randn(6, 5, 4, requires_grad=True), with_attention(), torch.randn(6, 3)

    def call(m: nn.Module) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            output = m(x)
        return output, SpectReg()(x, output, projection=w)

    check(model, call)


# ---- several models, several penalties


@pytest.mark.parametrize("make", [DREG, SpectReg, lambda: SpectReg(at="0")])
def test_a_penalty_of_two_models_compiles_once_for_each(make: Callable[[], Any]) -> None:
    """It puts forwards and hooks on both, and leaves no trace that another step looks at."""
    penalty, x, found = make(), torch.randn(6, 4), []
    for model in (mlp(), mlp()):
        backend = Counting()

        def step(x: Tensor, model: nn.Module = model) -> Tensor:
            return penalty(model, x)[1]

        found.append((compiled(step, backend), backend, model))
    for _ in range(3):
        for step, _, model in found:
            torch.manual_seed(0)
            value = step(x)
            torch.manual_seed(0)
            close(value, make()(model, x)[1])
    assert [backend.compilations for _, backend, _ in found] == [1, 1]


class Twice(nn.Module):
    """A model that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))

    def forward(self, x: Tensor, again: bool = True) -> Tensor:
        return 2 * self(x, False) if again else self.part(x)


AT = FrobReg(at="part")


@pytest.mark.parametrize(
    "penalties",
    [(DREG(), Contractive()), (FrobReg(), AT), (AT, DREG()), (FrobReg(at="part.0"), AT)],
)
def test_penalties_of_one_model_in_one_step(penalties: tuple[Any, ...]) -> None:
    """The second one puts its forwards or hooks on a model that dynamo has read already."""
    model, x, backend = Twice(), torch.randn(6, 4), Counting()

    def step(x: Tensor) -> Tensor:
        values = [penalty(model, x)[1] for penalty in penalties]
        return values[0] + 2 * values[1] + 3 * penalties[0](model, x[:2])[1]

    expected = step(x)
    run = compiled(step, backend)
    for _ in range(2):
        close(run(x), expected)
    close(step(x), expected)
    assert backend.compilations == 1


# ---- what raises


class Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * x.cos()


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sine.apply(x)


def raises(f: Callable[..., Any], *given: Any, match: str) -> None:
    """``f`` is on a line of its own: torch quotes the lines of the user in its errors."""
    with pytest.raises(Exception, match=match):
        compiled(f)(*given)


def value_of(penalty: Any, model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: penalty(model, x)[1]


@pytest.mark.parametrize("penalty", [SpectReg(), SpectReg(3), FrobReg()])
def test_a_function_of_the_user_raises(penalty: Any) -> None:
    """Torch would lose its second-order term, and the gradient would be wrong."""
    f = value_of(penalty, net(Foreign))
    raises(f, torch.randn(6, 4), match="the model calls a torch.autograd.Function")


def test_a_generator_raises() -> None:
    for n_proj in (1, 3):
        f = value_of(SpectReg(n_proj, generator=torch.Generator()), mlp())
        raises(f, torch.randn(6, 4), match="torch.compile cannot trace a torch.Generator")


def test_the_chain_engine_raises() -> None:
    f = value_of(SpectReg(engine="chain"), mlp())
    raises(f, torch.randn(6, 4), match="Use engine='autograd'")


def test_a_graph_from_outside_raises() -> None:
    """To torch.compile, h is a leaf: what of the output came through it would be lost."""
    model, x = mlp(), torch.randn(6, 4, requires_grad=True)
    h, penalty = 2 * x, SpectReg()

    def step(x: Tensor, h: Tensor) -> Tensor:
        return penalty(x, model(x) + h[:, :3])

    raises(step, x, h, match="depends on a tensor that was computed before the compiled function")
    compiled(step)(x, h.detach()).backward()
    # x itself may come from somewhere.
    value = compiled(lambda x: penalty(x, model(x), projection=torch.ones(6, 3)))(h)
    truth = penalty(h, model(h), projection=torch.ones(6, 3))
    close(gradients(value, [x]), gradients(truth, [x]))


def test_hardsigmoid_raises_unless_it_is_fused() -> None:
    """Torch does not have its second derivative."""
    x, penalty, model = torch.randn(6, 4), SpectReg(engine="autograd"), net(nn.Hardsigmoid)
    f = value_of(penalty, model)
    raises(f, x, match="Hardsigmoid.*or fastjac.fuse.model., also inside torch.comp")
    check(fastjac.fuse(model), lambda m: penalty(m, x, projection=torch.ones(6, 3)))
