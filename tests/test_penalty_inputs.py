"""Every penalty on all kinds of inputs: shapes, targets, projections, hidden layers, precisions."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from penalty_cases import (
    SPECS,
    Call,
    by_engine,
    close,
    close_gradients,
    engines_of,
    gradients,
    seeded,
    specs_with,
    takes,
)
from torch import Tensor, nn

from fastjac import reference
from fastjac.penalties import (
    PENALTIES,
    DataGrad,
    FrobReg,
    PenaltySpec,
    SpectReg,
    confidence_penalty,
    datagrad,
    finite_difference_datagrad,
    frobreg,
    gradient_penalty,
    sobolev,
    tangentprop,
)


class Reshaped(nn.Module):
    """``x`` ``[N, 2, 3]`` to an output of a given shape per sample."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, width = shape, math.prod(shape)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, width)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1)).reshape(len(x), *self.shape)


SCALAR = [PENALTIES["gradient_penalty"], PENALTIES["eikonal"]]
SOFTMAX = [PENALTIES["datagrad"], PENALTIES["jacreg"]]
SHAPED = [
    pytest.param(spec.values[0], shape, id=f"{spec.id}-{shape}")
    for spec in specs_with("at")
    for shape in ((), (1,), (4,), (2, 1, 2))
    if not (spec.values[0] in SCALAR and shape not in ((), (1,)))
    if not (spec.values[0] in SOFTMAX and shape in ((), (1,)))
]


@pytest.mark.parametrize(("spec", "shape"), SHAPED)
def test_shapes_of_input_and_output(spec: PenaltySpec, shape: tuple[int, ...]) -> None:
    model, gen, m = Reshaped(shape), seeded(), math.prod(shape)
    x = torch.randn(3, 2, 3, dtype=torch.float64, generator=gen, requires_grad=True)
    output = model(x)
    targets: dict[str, Tensor] = {
        "target": torch.randint(m, (3,), generator=gen),
        "tangents": torch.randn(2, 3, 2, 3, dtype=torch.float64, generator=gen),
        "target_grad": torch.randn(3, m, 2, 3, dtype=torch.float64, generator=gen),
    }
    used = [t for name, t in targets.items() if takes(spec, name)]
    options: dict[str, Any] = {"n_proj": 2} if takes(spec, "n_proj") else {}
    if spec.name == "igpen":
        options = {"loss_fn": lambda output: output.square().reshape(3, -1).sum(1)}

    def seed() -> dict[str, Any]:
        return {"generator": seeded(3)} if takes(spec, "generator") else {}

    inputs = [x, *model.parameters()]
    truth = spec.reference(x, output, *used, **options, **seed())
    expected = gradients(truth, inputs)
    function = partial(spec.functional, reduction="none", **options)
    close(function(x, output, *used, **seed()), truth)
    for engine in engines_of(spec):
        again, value = function(model, x, *used, engine=engine, **seed())
        close(again, output)
        close(value, truth)
        close_gradients(gradients(value, inputs), expected)


def test_one_tangent_and_one_target_grad_shaped_like_x() -> None:
    call = Call(PENALTIES["tangentprop"])
    (tangents,) = call.targets
    tangents.requires_grad_()
    both = [f(call.x, call.model(call.x), tangents) for f in (tangentprop, reference.tangentprop)]
    close_gradients(*[gradients(value.mean(), [tangents]) for value in both])
    value = tangentprop(call.model, call.x, tangents[0], reduction="none")[1]
    close(value, torch.func.jvp(call.model, (call.x,), (tangents[0],))[1].square().sum(1))
    model = Reshaped(())
    x = torch.randn(3, 2, 3, dtype=torch.float64, generator=seeded(), requires_grad=True)
    goal = torch.randn(3, 2, 3, dtype=torch.float64, generator=seeded(1))
    value = sobolev(x, model(x), goal, reduction="none")
    close(value, reference.sobolev(x, model(x), goal))


@pytest.mark.parametrize(
    ("spec", "engine"),
    by_engine(
        [pytest.param(PENALTIES[n], id=n) for n in PENALTIES if takes(PENALTIES[n], "target")]
    ),
)
def test_target_as_probabilities(spec: PenaltySpec, engine: str | None) -> None:
    call = Call(spec, engine=engine)
    (target,) = call.targets
    by_index = call.values()
    call.targets = (F.one_hot(target, 3).double(),)
    close(call.values(), by_index)
    call.targets = (torch.rand(3, 3, dtype=torch.float64, generator=seeded()).softmax(1),)
    close(call.values(), call.reference())


@pytest.mark.parametrize("spec", specs_with("projection"))
def test_given_projection(spec: PenaltySpec) -> None:
    call = Call(spec)
    w = torch.randn(2, 3, 3, dtype=torch.float64, generator=seeded(), requires_grad=True)
    for engine in ("autograd", "chain"):
        call.engine = engine
        for projection in (w.detach(), w[0].detach()):
            value = call.values(projection=projection)
            truth = call.reference(projection=projection)
            close(value, truth)
            close_gradients(gradients(value, call.inputs), gradients(truth, call.inputs))
    output = call.model(call.x)
    penalty = spec.module(**call.options, reduction="none")
    close(penalty(call.x, output, projection=w), call.reference(projection=w))


@pytest.mark.parametrize("spec", specs_with("projection"))
def test_given_projection_that_requires_grad(spec: PenaltySpec) -> None:
    call = Call(spec)
    w = torch.randn(2, 3, 3, dtype=torch.float64, generator=seeded(), requires_grad=True)
    inputs = [w, *call.inputs]
    values = []
    for engine in ("auto", "chain", "autograd"):
        call.engine = engine
        values.append(call.values(projection=w))
    truth = call.reference(projection=w)
    for value in values:
        close(value, truth)
        close_gradients(gradients(value, inputs), gradients(truth, inputs))
    close(call.values(projection=w[0]), call.reference(projection=w[0]))


@pytest.mark.parametrize(("spec", "engine"), by_engine(specs_with("at")))
def test_batch_norm_in_eval_mode(spec: PenaltySpec, engine: str | None) -> None:
    call = Call(spec, engine=engine)
    norm = nn.BatchNorm1d(5).double()
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t.copy_(torch.rand(5, generator=seeded(), dtype=torch.float64) + 0.5)
    call.model = nn.Sequential(call.model[0], norm, *call.model[1:]).eval()
    value, truth = call.values(), call.reference()
    close(value, truth)
    close_gradients(gradients(value, call.inputs), gradients(truth, call.inputs))


@pytest.mark.parametrize("spec", specs_with("at"))
def test_at_a_hidden_layer(spec: PenaltySpec) -> None:
    call = Call(spec)
    call.model = nn.ModuleDict({"below": nn.Linear(4, 4).double(), "above": call.model})
    call.model.forward = lambda x: call.model["above"](call.model["below"](x))
    hidden = call.model["below"](call.x)
    truth = spec.reference(
        hidden, call.model["above"](hidden), *call.targets, **call.options, **call.random()
    )
    output, value = call.model_form(at="below")
    close(output, call.model(call.x))
    close(value, truth)
    close_gradients(gradients(value, call.inputs), gradients(truth, call.inputs))
    assert not call.model["below"]._forward_hooks
    with pytest.raises(ValueError, match="at='below' is for the model form"):
        call.module(at="below")(hidden, hidden, *call.targets)
    value = call.values(at="below", engine="chain")
    close_gradients(gradients(value, call.inputs), gradients(truth, call.inputs))


def test_at_an_embedding_with_integer_inputs() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    tokens = torch.tensor([[1, 2], [3, 4], [5, 6]])
    value = FrobReg(at="0")(model, tokens)[1]
    close(value, model[2].weight.square().sum())
    model[0].requires_grad_(False)
    close(FrobReg(at="0")(model, tokens)[1], value)


def test_at_a_layer_whose_output_is_overwritten() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).double()
    x = torch.randn(6, 4, dtype=torch.float64, generator=seeded())
    slope = (model[0](x) > 0).double()
    rows = model[2].weight * slope.unsqueeze(1)
    close(FrobReg(at="0")(model, x)[1], rows.square().sum((1, 2)).mean())


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_zero_gradients_have_the_subgradient_zero(norm: str) -> None:
    linear = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64, generator=seeded(), requires_grad=True)
    output = linear(x) * 0
    values = [
        FrobReg(norm=norm)(x, output),
        SpectReg(norm=norm)(x, output),
        gradient_penalty(x, output[:, 0], center=1.0),
    ]
    for engine in ("autograd", "chain"):
        values += [
            FrobReg(norm=norm, engine=engine)(lambda t: linear(t) * 0, x)[1],
            SpectReg(norm=norm, engine=engine)(lambda t: linear(t) * 0, x)[1],
            gradient_penalty(lambda t: linear(t)[:, 0] * 0, x, center=1.0, engine=engine)[1],
        ]
    for value in values:
        (g,) = torch.autograd.grad(value, linear.weight)
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("spec", "engine"), by_engine(SPECS))
def test_half_precision_is_accumulated_in_float32(
    spec: PenaltySpec, engine: str | None, dtype: torch.dtype
) -> None:
    half, double = Call(spec, dtype=dtype, engine=engine), Call(spec)
    value = half.values()
    assert value.dtype == torch.float32
    # Three rounded layers forward and back: a few dozen units of the half format's eps on numbers
    # of order 1; a sum of squares in float16 would overflow beyond 65504 (next test).
    if "generator" not in half.random() and spec.name != "finite_difference_datagrad":
        tolerance = 32 * torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), double.values(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spec", SPECS)
def test_autocast(spec: PenaltySpec) -> None:
    """The network runs in bfloat16, and the sums of the penalty in float32."""
    call = Call(spec, dtype=torch.float32)
    exact = call.values()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output, value = call.model_form()
    assert output.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    # A difference of two bfloat16 losses over ε = 0.01 has no digits left to compare.
    if spec.name != "finite_difference_datagrad":
        tolerance = 32 * torch.finfo(torch.bfloat16).eps  # as above
        torch.testing.assert_close(value, exact, rtol=tolerance, atol=tolerance)
    assert all(g.isfinite().all() for g in gradients(value, call.inputs))
    if takes(spec, "engine"):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            by_chain = call.values(engine="chain")
        torch.testing.assert_close(by_chain, exact, rtol=tolerance, atol=tolerance)
        assert all(g.isfinite().all() for g in gradients(by_chain, call.inputs))


def test_float16_squares_do_not_overflow() -> None:
    x = torch.ones(2, 4, dtype=torch.float16, requires_grad=True)
    value = frobreg(x, x * 300)
    close(value, torch.tensor(4 * 300.0**2))


def test_confidence_penalty_of_masked_classes() -> None:
    logits = torch.tensor([[0.3, -float("inf"), 1.0]], dtype=torch.float64, requires_grad=True)
    value = confidence_penalty(logits, logits)
    close(value, confidence_penalty(logits, logits[:, [0, 2]]))
    (g,) = torch.autograd.grad(value, logits)
    assert g.isfinite().all()
    assert g[0, 1] == 0
    with torch.no_grad():
        close(confidence_penalty(torch.zeros(1, dtype=torch.int64), logits), value)


def test_finite_difference_sample_without_gradient_contributes_zero() -> None:
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    # At x = (500, 0) the probability of class 0 is exactly 1 in float64, so v = 0. The model says
    # something else when it is run again: the zero must not come from equal losses.
    x = torch.tensor([[500.0, 0.0], [0.1, 0.2]], dtype=torch.float64)
    noisy = iter([0.0, 1.0])
    values = finite_difference_datagrad(
        lambda t: model(t) + next(noisy) * torch.tensor([0.0, 600.0]),
        x,
        torch.tensor([0, 0]),
        reduction="none",
    )[1]
    assert values[0] == 0
    assert values[1] > 0
    (g,) = torch.autograd.grad(values.sum(), model.weight)
    assert g.isfinite().all()


def test_target_by_keyword() -> None:
    call = Call(PENALTIES["datagrad"])
    output, (target,) = call.model(call.x), call.targets
    close(datagrad(call.x, output, target=target), datagrad(call.x, output, target))
    close(DataGrad()(call.x, output, target=target), datagrad(call.x, output, target))
