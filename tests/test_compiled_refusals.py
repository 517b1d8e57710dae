"""What the compiled engine refuses, and the errors that it passes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import Straight, close, three_layers
from compiled_cases import (
    MARKS,
    compare,
    graphs,
    mlp,
    refuses,
)
from layer_cases import Model
from test_traps import Cube
from torch import Tensor, nn

import fastjac
from fastjac.input_jacobian.penalty import InputPenalty
from fastjac.input_jacobian.pullback import Pullback
from fastjac.penalties import DREG, DataGrad, IGPen, SpectReg, TangentProp
from fastjac.presets import wgan_gp

pytestmark = MARKS


# ---- what it refuses


def branches(m: Any, x: Tensor) -> Tensor:
    return m.c(F.gelu(m.a(x))) if x.sum() > 0 else m.c(m.a(x))


def keeps(m: Any, x: Tensor) -> Tensor:
    m.kept = F.gelu(m.a(x))
    return m.c(m.kept)


def hooks_a_tensor(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h.register_hook(lambda g: 2 * g)
    return m.c(F.gelu(h))


def infers(m: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = m.b(m.a(x)).tanh()
    return m.c(m.a(x) * scale)


def writes_to_weights(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.a.weight.mul_(0.5)
    return m.c(F.gelu(m.a(x)))


REFUSED: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "control flow": (branches, "Data-dependent branching"),
    "Function": (lambda m, x: m.c(Straight.apply(m.a(x))), "autograd.?Function"),
    # Compiled torch loses its second-order term, with no error.
    "Function for torch.func": (lambda m, x: m.c(Cube.apply(m.a(x))), "autograd.?Function"),
    "data": (lambda m, x: m.c(F.gelu(m.a(x)) * m.b(m.a(x)).data), r"it uses \.data"),
    "kept": (keeps, "it keeps a tensor that it computes"),
    "tensor hook": (hooks_a_tensor, "hook"),
    "inference mode": (infers, "it enters inference mode"),
    "writes to weights": (writes_to_weights, "fake tensor"),
    "not compiled": (
        lambda m, x: m.c(torch.compiler.disable(F.gelu)(m.a(x))),
        "Attempted to call function marked as skipped",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_are_refused(name: str) -> None:
    forward, reason = REFUSED[name]
    model, x = three_layers(forward), torch.randn(6, 4)
    refuses(model, x, reason)
    assert not hasattr(model, "kept")


class OfALoss(InputPenalty):
    """A penalty of a user, which differentiates a loss of its own."""

    def per_sample(self, pull: Pullback) -> Tensor:
        loss = pull.then(lambda output: output.square().sum(1))
        return loss.squared_norms(torch.ones_like(loss.output).unsqueeze(0))


class OfX(InputPenalty):
    """A penalty of a user that uses x itself."""

    def per_sample(self, pull: Pullback) -> Tensor:
        v = pull.vjp(torch.ones_like(pull.output).unsqueeze(0))
        return (v[0] * pull.x.exp()).sum(1)


def test_a_generator_that_draws_outside_of_the_graph() -> None:
    critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    real, fake = torch.randn(3, 4), torch.randn(3, 4)
    values = [
        wgan_gp(generator=torch.Generator().manual_seed(1), engine=engine)(critic, real, fake)[1]
        for engine in ("compiled", "autograd")
    ]
    close(*values)


def test_calls_that_are_refused() -> None:
    model, x = mlp(), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"generator is given.*drop generator, pass projection="):
        SpectReg(engine="compiled", generator=torch.Generator())(model, x)
    with pytest.raises(ValueError, match="engine='compiled' is for the model form"):
        leaf = x.clone().requires_grad_()
        SpectReg(engine="compiled")(leaf, model(leaf))
    with pytest.raises(RuntimeError, match=r"compiled' cannot run.*computes a JVP of the model"):
        TangentProp(engine="compiled")(model, x, x)
    with pytest.raises(RuntimeError, match=r"compiled' cannot run.*at='0'"):
        SpectReg(engine="compiled", at="0")(model, x)
    close(*(OfALoss(engine=engine)(model, x)[1] for engine in ("compiled", "autograd")))
    leaf = x.clone().requires_grad_()
    values = [OfX(engine=engine)(model, leaf)[1] for engine in ("compiled", "autograd")]
    close(*(torch.autograd.grad(value, leaf) for value in values))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"torch.no_grad\(\) is active"):
        SpectReg(engine="compiled")(model, x)
    with pytest.raises(RuntimeError, match="torch.func transform"):
        torch.func.grad(lambda t: SpectReg(engine="compiled")(model, t)[1])(x)
    with torch.autograd.graph.save_on_cpu():
        refuses(model, x, "hooks on saved tensors")
    with torch.compiler.set_stance("force_eager"):
        refuses(model, x, "torch.compile is switched off")
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        refuses(model, x, "hooks on all modules")
    finally:
        handle.remove()
    refuses(nn.Sequential(nn.LazyLinear(3)), x, "a lazy module is not initialized")
    compiled = torch.compile(model, backend="eager")
    refuses(compiled, x, "is compiled: pass it before compiling")
    refuses(nn.Sequential(compiled), x, "is compiled: pass it before compiling")

    class Slots:
        __slots__ = ()

        def __call__(self, t: Tensor) -> Tensor:
            return model(t)

    refuses(Slots(), x, "does not support weak references: wrap it")


@pytest.mark.parametrize(
    "way",
    [
        "the same tensor",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("made of it", "kept", "target")),
    ],
)
def test_dependence_on_x_beside_the_argument(way: str) -> None:
    """Autograd counts it if x requires grad; ``torch.func`` does not see it."""
    net = mlp()
    for wanted in (True, False):
        x = torch.randn(6, 4).requires_grad_(wanted)
        y = x if way == "the same tensor" else 2 * x
        model: Any = lambda t, y=y: net(t) + net(y)  # noqa: E731
        if way == "kept":
            model = Model(lambda m, t: m.net(t) * m.y.sum(1, keepdim=True), net=net)
            model.y = y
        penalty: Any = lambda e, model=model, x=x: SpectReg(engine=e, n_proj=-1)(model, x)  # noqa: E731
        if way == "target":
            penalty = lambda e, x=x: IGPen(  # noqa: E731
                lambda out, t: (out.sum(1) - t.sum(1)).square(), engine=e
            )(net, x, x)
        if wanted:
            with pytest.raises(
                RuntimeError, match=r"compiled' cannot run.*depends on x in another way"
            ):
                penalty("compiled")
        else:
            found = [
                torch.autograd.grad(penalty(e)[1], net[0].weight) for e in ("compiled", "autograd")
            ]
            close(*found)


def fails(m: Any, x: Tensor) -> Tensor:
    raise KeyError("mine")


def compiled(penalty: Any, model: Any, *targets: Tensor, **options: Any) -> Callable[[], Any]:
    return lambda: penalty(engine="compiled", **options)(model, torch.randn(6, 4), *targets)


LABELS = torch.zeros(6, dtype=torch.int64)
NET = mlp().double()
NO_GRAD = "output does not depend on x"
PLAIN_ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "of the model": (compiled(SpectReg, three_layers(fails)), KeyError, "mine"),
    "labels": (compiled(DataGrad, NET, LABELS[:5]), ValueError, "target has batch size 5"),
    "tuple": (compiled(SpectReg, lambda t: (t, t)), TypeError, "output is tuple"),
    "detached": (compiled(SpectReg, lambda t: NET(t.detach())), RuntimeError, NO_GRAD),
    "detached loss": (
        compiled(IGPen, NET, loss_fn=lambda out: out.detach().sum(1)),
        RuntimeError,
        "must not detach output",
    ),
    # slow:
    "label dtype": (compiled(DataGrad, NET, LABELS.int()), TypeError, "target has dtype"),
    "label 3": (compiled(DataGrad, NET, LABELS + 3), RuntimeError, "class indices outside"),
    "label -100": (compiled(DataGrad, NET, LABELS - 100), RuntimeError, "class indices outside"),
    "batch": (compiled(SpectReg, lambda t: t[:3]), ValueError, "output has batch size 3"),
    "integers": (compiled(SpectReg, lambda t: t.long()), TypeError, "output has dtype"),
    "constant": (
        compiled(SpectReg, lambda t: NET(torch.ones(6, 4, dtype=torch.float64))),
        RuntimeError,
        NO_GRAD,
    ),
    "weight": (
        compiled(SpectReg, Model(lambda m, t: m.a.weight, a=nn.Linear(3, 6))),
        RuntimeError,
        NO_GRAD,
    ),
    "mean loss": (
        compiled(IGPen, NET, loss_fn=lambda out: out.sum()),
        ValueError,
        "one loss per sample",
    ),
}


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "aot_eager") for name in list(PLAIN_ERRORS)[:5]),
        *(pytest.param(n, "inductor", marks=pytest.mark.slow) for n in list(PLAIN_ERRORS)[5:]),
    ],
    indirect=["backend"],
)
def test_errors_that_are_not_the_engines_own_come_as_they_are(name: str, backend: str) -> None:
    """Also from compiled code, which would return zeros for labels out of range by default."""
    call, kind, message = PLAIN_ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_together_with_an_attached_layerwise_penalty() -> None:
    """The model that the penalty watches is refused; another model is not."""
    x, watched, other = torch.randn(6, 4), fastjac.fuse(mlp()), fastjac.fuse(mlp())
    compare(watched, x)
    layerwise = DREG(watched)
    refuses(watched, x, "it keeps a tensor")
    compare(other, x)
    layerwise.detach()
    compare(watched, x)


def test_auto_never_takes_it_and_explain_engine_knows_it() -> None:
    model, x = mlp(), torch.randn(6, 4)
    before = graphs()
    SpectReg()(model, x)
    SpectReg()(lambda t: model(t), x)
    text = SpectReg(engine="compiled").explain_engine(model, x)
    assert text.startswith("engine: compiled\n") and "torch.compile" in text
    refused = SpectReg(engine="compiled", at="0").explain_engine(model, x)
    assert refused.startswith("engine: none") and "at='0'" in refused
    assert graphs() == before
