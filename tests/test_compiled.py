"""The compiled engine against autograd: gradients, buffers, what it refuses, what it leaves behind.

Most tests take the backend ``aot_eager``, which traces as inductor does and runs torch's own
kernels; those that are marked slow generate code.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import layer_cases
import pytest
import torch
import torch.nn.functional as F
from chain_cases import close, run, same, three_layers
from layer_cases import Model
from penalty_cases import CASES, Call, close_gradients, gradients
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastjac
from fastjac.activations import TABLE
from fastjac.bench.problems import lenet, small_resnet
from fastjac.penalties import DREG, DataGrad, FrobReg, IGPen, PenaltySpec, SpectReg, TangentProp
from fastjac.penalties import _compiled as engine
from fastjac.penalties._base import InputPenalty

# Torch hides this warning of its own while it traces a tensor that is no leaf, but not from pytest.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@pytest.fixture(autouse=True, scope="module")
def _empty_caches() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The compiler: inductor for the slow tests, unless one says otherwise."""
    slow = request.node.get_closest_marker("slow") is not None
    name = getattr(request, "param", "inductor" if slow else "aot_eager")
    monkeypatch.setattr(engine, "BACKEND", name)
    return str(name)


READY = [c for c in CASES if getattr(c.values[0].module, "chain_ready", False)]
# One of each way in which a penalty asks for its VJPs.
QUICK_CASES = {f"{name}-0" for name in ("spectreg", "datagrad", "igpen", "jacreg", "sobolev")}
PENALTY_CASES = [
    c if c.id in QUICK_CASES else pytest.param(*c.values, id=str(c.id), marks=pytest.mark.slow)
    for c in READY
]


def graphs() -> int:
    """What was compiled so far."""
    return int(counters["stats"]["unique_graphs"])


class Projected(nn.Module):
    """A SpectReg of k given projections: no engine draws anything."""

    def __init__(self, engine: str, k: int) -> None:
        super().__init__()
        self.penalty, self.k = SpectReg(engine=engine, reduction="none"), k

    def forward(self, model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.k, len(x), 3 if x.dim() < 4 else 10)
        w = torch.arange(float(torch.Size(shape).numel()), dtype=x.dtype).sin().view(shape)
        return self.penalty(model, x, projection=w)


def agrees(
    model: nn.Module, x: Tensor, requires_grad: tuple[bool, ...] = (True, False), k: int = 1
) -> None:
    """Output, value, gradients, buffers and random numbers are those of the autograd engine."""
    for wanted in requires_grad:
        expected, found = (
            run(model, x, Projected(name, k), requires_grad=wanted)
            for name in ("autograd", "compiled")
        )
        same(found, expected)


def refuses(model: Any, x: Tensor, reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        with pytest.raises(RuntimeError, match=f"engine='compiled' cannot run.*{reason}"):
            SpectReg(engine="compiled")(model, x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.GELU()),
        *(nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(12, 5), nn.LayerNorm(5)),
        *(nn.Tanh(), nn.Linear(5, 3)),
    )


def with_buffer(forward: Any, **buffers: Tensor) -> Model:
    model = three_layers(forward)
    for name, b in buffers.items():
        model.register_buffer(name, b)
    return model


# ---- the same results


@pytest.mark.parametrize(("spec", "options"), PENALTY_CASES)
def test_every_penalty_equals_autograd(
    spec: PenaltySpec, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random penalties too: with this backend they draw what torch draws eagerly."""
    monkeypatch.setattr(engine, "BACKEND", "aot_eager")
    weights = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    found = []
    for name in ("compiled", "autograd"):
        call = Call(spec, options, engine=name)
        torch.manual_seed(3)
        value = call.values(**({"generator": None} if call.random() else {}))
        found.append([value, *gradients(weights * value, call.inputs)])
    close_gradients(found[0], found[1], rtol=1e-10)
    assert found[0][1].abs().sum() > 0


def bent_norm(m: Any, x: Tensor) -> Tensor:
    """Running statistics with no module, updated in eval mode too."""
    return m.c(F.batch_norm(m.a(x), m.mean, m.var, training=True))


def moving_average(m: Any, x: Tensor) -> Tensor:
    """What the output is made of is overwritten in the same run."""
    h = F.gelu(m.a(x))
    out = m.c(h * m.ema.clone())
    m.ema.mul_(0.9).add_(0.1 * h.mean(0).detach())
    return out


def parts_written(m: Any, x: Tensor) -> Tensor:
    m.table[1:3] += 1
    m.count.view(-1)[0] = 7
    return m.c(F.gelu(m.a(x)))


def replaced(m: Any, x: Tensor) -> Tensor:
    """By a buffer of another shape and dtype."""
    m.runs = torch.cat([m.runs, m.runs]) + 0.5
    return m.c(F.gelu(m.a(x)))


def shared_norm() -> nn.Sequential:
    norm = nn.BatchNorm1d(4)
    return nn.Sequential(nn.Linear(4, 4), norm, nn.GELU(), nn.Linear(4, 4), norm, nn.Linear(4, 3))


def shared_buffer() -> Model:
    """One tensor in two modules: written to in one, read in the other."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.scale.add_(1)
        return m.c(F.gelu(m.a(x)) * m.b.scale)

    model = with_buffer(forward, scale=torch.ones(5))
    model.b.register_buffer("scale", model.scale)
    return model


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def frozen() -> nn.Sequential:
    model = mlp()
    model[2].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


def hooked() -> nn.Sequential:
    model = mlp()
    model[1].register_forward_hook(lambda module, args, out: 2 * out)
    model[0].register_forward_pre_hook(lambda module, args: (3 * args[0],))
    model[0].weight.register_hook(lambda g: 2 * g)
    return model


def partly_without_grad() -> Model:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = m.b(m.a(x)).tanh()
        return m.c(F.gelu(m.a(x)) * scale * m.b(m.a(x)).detach())

    return three_layers(forward)


def spectral() -> nn.Sequential:
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    return nn.Sequential(first, nn.GELU(), nn.Linear(5, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolutions and norms": convnet,
    "eval mode": lambda: convnet().eval(),
    "fused": lambda: fastjac.fuse(layer_cases.mlp()),
    "in place": lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)),
    "spectral norm": spectral,
    "tied weights": tied,
    "frozen weights": frozen,
    "forward hooks": hooked,
    "no_grad and detach": partly_without_grad,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.GELU(), nn.Linear(5, 3)),
    "batch_norm as a function": lambda: with_buffer(
        bent_norm, mean=torch.zeros(5), var=torch.ones(5)
    ).eval(),
    "a module twice": shared_norm,
    "a buffer in two modules": shared_buffer,
    "moving average": lambda: with_buffer(moving_average, ema=torch.ones(5)),
    "parts of buffers": lambda: with_buffer(
        parts_written, table=torch.ones(5), count=torch.ones(2, 2, dtype=torch.int64)
    ),
    "replaced buffer": lambda: with_buffer(replaced, runs=torch.zeros(1, dtype=torch.int64)),
    "constant buffers": lambda: with_buffer(
        lambda m, x: m.c(F.gelu(m.a(x)).masked_fill(m.mask, 0.5) * m.one),
        mask=torch.tensor([False, True, False, False, True]),
        one=torch.ones(1).expand(5),
    ),
    "asks whether x requires grad": lambda: three_layers(
        lambda m, x: m.c(m.a(x).sin()) * (2 if x.requires_grad else 3)
    ),
}


QUICK = ["fused", "a module twice", "moving average"]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", QUICK)
def test_models_equal_autograd(name: str) -> None:
    torch.manual_seed(0)
    agrees(MODELS[name](), torch.randn(6, 4), (name == "fused",))


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"], indirect=True)
@pytest.mark.parametrize("name", list(MODELS))
def test_all_models_equal_autograd(name: str, backend: str) -> None:
    if name == "dropout" and backend == "inductor":
        pytest.skip("compiled code drops others: see the test of it below")
    torch.manual_seed(0)
    agrees(MODELS[name](), torch.randn(6, 4), k=2)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"], indirect=True)
def test_all_fused_activations(backend: str) -> None:
    torch.manual_seed(0)
    layers = [part for fn in TABLE for part in (fastjac.Act(fn), nn.Linear(5, 5))]
    agrees(nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 3)), torch.randn(6, 4))


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("make", "shape", "backend"),
    [
        (lenet, (2, 1, 28, 28), "aot_eager"),
        pytest.param(small_resnet, (2, 3, 32, 32), "aot_eager", marks=pytest.mark.slow),
        pytest.param(lenet, (2, 1, 28, 28), "inductor", marks=pytest.mark.slow),
        pytest.param(small_resnet, (2, 3, 32, 32), "inductor", marks=pytest.mark.slow),
    ],
    indirect=["backend"],
)
def test_networks_of_the_benchmark(make: Any, shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    agrees(make(), torch.randn(shape), (False,))


@pytest.mark.usefixtures("double")
def test_functions_and_methods_as_models() -> None:
    net, x, w = mlp(), torch.randn(6, 4), torch.randn(6, 3)
    truth = SpectReg(engine="autograd")(net, x, projection=w)[1]
    expected = torch.autograd.grad(truth, net[0].weight)
    model, before = lambda t: net(t), 0
    for _ in range(2):
        before = graphs()
        for f in (model, net.forward):
            value = SpectReg(engine="compiled")(f, x, projection=w)[1]
            close(torch.autograd.grad(value, net[0].weight), expected)
    assert graphs() == before  # the second time
    hidden = normed()
    refuses(lambda t: hidden(t), x, "in-place")  # whose buffers the engine cannot know


@pytest.mark.usefixtures("double")
def test_losses_with_weights_and_targets_of_their_own() -> None:
    x, net, head = torch.randn(6, 4), mlp(), nn.Linear(3, 1)
    found = []
    for name in ("compiled", "autograd"):
        leaf, y = x.clone().requires_grad_(), torch.linspace(0, 1, 6).requires_grad_()
        penalty = IGPen(lambda out, y: (head(out.sin())[:, 0] - y).square(), engine=name)
        value = penalty(net, leaf, y)[1]
        found.append(torch.autograd.grad(value, [net[0].weight, head.weight, y, leaf]))
    close(*found)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
def test_gradient_of_given_projections() -> None:
    x, net, found = torch.randn(6, 4), mlp(), []
    for name in ("compiled", "autograd"):
        w = torch.linspace(-1, 1, 36).view(2, 6, 3).requires_grad_()
        value = SpectReg(engine=name)(net, x, projection=w)[1]
        found.append(torch.autograd.grad(value, [w, net[0].weight]))
    close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"], indirect=True)
def test_under_autocast(backend: str) -> None:
    """What autograd does under it, to a few roundings; and without it again afterwards."""
    torch.manual_seed(0)
    model, x, w = mlp(), torch.randn(32, 4), torch.randn(32, 3)
    for on in (True, False):
        found = []
        for name in ("compiled", "autograd"):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
                given = w.bfloat16() if on else w
                output, value = SpectReg(engine=name)(model, x, projection=given)
            assert output.dtype == given.dtype
            inputs = list(model.parameters())[:-1]
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, inputs)]))
        error = float((found[0] - found[1]).norm() / found[1].norm())
        assert error < (2**-8 if on else 1e-6)


# ---- buffers


@pytest.mark.usefixtures("double")
def test_buffers_stay_the_same_tensors_and_are_updated_once() -> None:
    model, x = normed(), torch.randn(6, 4)
    model.register_buffer("constant", torch.arange(3.0))
    before = dict(model.named_buffers())
    mean = model[1].running_mean.clone()
    SpectReg(engine="compiled")(model, x)
    after = dict(model.named_buffers())
    assert all(after[name] is b for name, b in before.items())
    assert model[1].num_batches_tracked == 1
    assert not torch.equal(model[1].running_mean, mean)
    model.eval()
    state = copy.deepcopy(model.state_dict())
    SpectReg(engine="compiled")(model, x)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


@pytest.mark.usefixtures("double")
def test_graphs_that_saved_a_buffer() -> None:
    """One that was not written to leaves them usable; one that was makes them raise, as ever."""
    for written in (False, True):

        def forward(m: Any, x: Tensor, written: bool = written) -> Tensor:
            out = m.c(F.gelu(m.a(x)) * m.scale.clone())
            if written:
                m.scale += 1
            return out

        model, x = with_buffer(forward, scale=torch.ones(5)), torch.randn(6, 4)
        output = F.gelu(model.a(x)) * model.scale
        SpectReg(engine="compiled")(model, x)[1].backward()
        if written:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()
        else:
            output.sum().backward()


@pytest.mark.usefixtures("double")
def test_buffers_that_share_memory() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.one.add_(1)
        return m.c(F.gelu(m.a(x)) * m.two)

    model = with_buffer(forward, one=torch.ones(5))
    model.register_buffer("two", model.one.view(5))
    refuses(model, torch.randn(6, 4), "its buffer 'one', which shares memory with another one")
    assert torch.equal(model.one, torch.ones(5))


# ---- differentiation


@pytest.mark.usefixtures("double")
def test_backward_as_often_and_in_any_order() -> None:
    model, x, w = mlp(), torch.randn(6, 4, requires_grad=True), torch.randn(6, 3)
    inputs = [x, *list(model.parameters())[:-1]]
    found = []
    for name in ("compiled", "autograd"):
        output, value = SpectReg(engine=name)(model, x, projection=w)
        first = torch.autograd.grad(value, inputs, retain_graph=True)
        loss = torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)
        close(torch.autograd.grad(value, inputs), first)
        found.append((*first, *loss))
    close(*found)


@pytest.mark.usefixtures("double")
def test_third_derivative_is_refused() -> None:
    model, x = mlp(), torch.randn(6, 4, requires_grad=True)
    output, value = SpectReg(engine="compiled")(model, x)
    for t in (value, output.sum()):
        (g,) = torch.autograd.grad(t, x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            g.square().sum().backward()


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"], indirect=True)
def test_written_to_between_forward_and_backward(backend: str) -> None:
    model, x = mlp(), torch.randn(6, 4)
    value = SpectReg(engine="compiled")(model, x)[1]
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ---- what is compiled, and when


@pytest.mark.usefixtures("double")
def test_compiles_once_for_calls_alike() -> None:
    model, x, w = normed(), torch.randn(6, 4), torch.randn(6, 3)

    def compiled(**options: Any) -> int:
        before = graphs()
        SpectReg(engine="compiled", **options)(model, x, projection=w)[1].backward()
        return graphs() - before

    assert compiled() == 1
    with torch.no_grad():
        model[0].weight.mul_(0.5)  # as an optimizer does
    assert [compiled(weight=weight, reduction="sum") for weight in (1.0, 2.0)] == [0, 0]
    model.eval()
    assert [compiled(), compiled()] == [1, 0]
    model.train()
    assert compiled() == 0


def compare(model: nn.Module, x: Tensor) -> None:
    """As `agrees`, with no copy of the model: it is this one that has been compiled."""
    w, found = torch.linspace(-1, 1, 3 * len(x)).view(len(x), 3), []
    for name in ("compiled", "autograd"):
        output, value = SpectReg(engine=name)(model, x, projection=w)
        inputs = [p for p in model.parameters() if p.requires_grad]
        found.append([value, *torch.autograd.grad(output.square().sum() + value, inputs)])
    close(*found)


@pytest.mark.usefixtures("double")
def test_sees_hooks_that_come_and_go() -> None:
    """Torch by itself overlooks them."""
    model, x = mlp(), torch.randn(6, 4)
    compare(model, x)
    first = model[1].register_forward_hook(lambda module, args, out: 2 * out)
    compare(model, x)
    second = model[1].register_forward_hook(lambda module, args, out: out.sin())
    compare(model, x)
    second.remove()
    compare(model, x)
    first.remove()
    compare(model, x)
    handle = model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    compare(model, x)
    handle.remove()
    handle = model[0].register_full_backward_hook(lambda module, into, out: None)
    refuses(model, x, "backwards hooks")
    handle.remove()
    compare(model, x)


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_sees_what_changes_about_a_model(backend: str) -> None:
    model, x = mlp(), torch.randn(6, 4)
    compare(model, x)
    model[1] = nn.Tanh()
    compare(model, x)
    model[0].weight.requires_grad_(False)
    compare(model, x)
    model[2].weight = nn.Parameter(torch.randn(3, 5))
    compare(model, x)
    model[1].forward = torch.sin
    compare(model, x)
    compare(model, torch.randn(4, 4))
    nn.utils.parametrizations.weight_norm(model[2])
    compare(model, x)
    model.float()
    assert SpectReg(engine="compiled")(model, x.float())[1].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_batches_of_other_sizes(backend: str) -> None:
    """With numbers drawn and dropout, which torch cannot compile for a symbolic size."""
    model, penalty = MODELS["dropout"](), SpectReg(n_proj=2, engine="compiled")
    for n in (6, 5, 4, 6):
        penalty(model, torch.randn(n, 4))[1].backward()


@pytest.mark.usefixtures("double")
def test_too_many_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine.CONFIG, "recompile_limit", 1)
    model = nn.Linear(4, 3)
    SpectReg(engine="compiled")(model, torch.randn(6, 4))
    refuses(model, torch.randn(5, 4), "there are 1 graphs of it")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("n", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["aot_eager"], indirect=True)
def test_small_batches(n: int, backend: str) -> None:
    model, x, found = nn.Sequential(nn.Linear(4, 3), nn.Tanh()), torch.randn(n, 4), []
    for name in ("compiled", "autograd"):
        value = FrobReg(engine=name)(model, x)[1]
        found.append([value, *gradients(value, list(model.parameters()))])
    close(*found)


@pytest.mark.usefixtures("double")
def test_model_and_penalty_are_let_go_and_can_be_copied() -> None:
    model, x, penalty = normed(), torch.randn(6, 4), SpectReg(engine="compiled")
    penalty(model, x)[1].backward()
    assert vars(model).keys() == vars(normed()).keys()
    before = graphs()
    for other in (copy.deepcopy(penalty), pickle.loads(pickle.dumps(penalty))):
        other(model, x)
    assert graphs() == before
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    copied(x)
    kept, weight = weakref.ref(model), weakref.ref(model[0].weight)
    del model
    gc.collect()
    assert kept() is None and weight() is None


def draws_alike(model: nn.Module, x: Tensor) -> None:
    penalty = SpectReg(n_proj=2, engine="compiled")
    values = []
    for _ in range(2):
        torch.manual_seed(1)
        values += [penalty(model, x)[1].item(), penalty(model, x)[1].item()]
    assert values[0] != values[1] and values[:2] == values[2:]


def test_random_numbers_are_reproducible() -> None:
    draws_alike(mlp(), torch.randn(6, 4))


@pytest.mark.slow
def test_random_numbers_are_reproducible_in_compiled_code() -> None:
    draws_alike(mlp(), torch.randn(6, 4))


@pytest.mark.slow
@pytest.mark.usefixtures("double")
def test_dropout_is_one_and_the_same_in_all_derivatives() -> None:
    """A directional derivative of the compiled value, by a difference of it at the same seed."""
    model, x, w = MODELS["dropout"](), torch.randn(6, 4), torch.randn(6, 3)
    weight, step = model[0].weight, torch.randn(5, 4)

    def value() -> Tensor:
        torch.manual_seed(2)
        return SpectReg(engine="compiled")(model, x, projection=w)[1]

    (g,) = torch.autograd.grad(value(), weight)
    values = []
    for h in (1e-5, -1e-5):
        with torch.no_grad():
            weight.add_(step, alpha=h)
        values.append(value().item())
        with torch.no_grad():
            weight.sub_(step, alpha=h)
    assert (g * step).sum().item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


# ---- what it refuses


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Cube(torch.autograd.Function):
    """Written for ``torch.func``; compiled torch loses its second-order term, with no error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return 3 * g * z * z


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


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_are_refused(name: str) -> None:
    forward, reason = REFUSED[name]
    model, x = three_layers(forward), torch.randn(6, 4)
    refuses(model, x, reason)
    assert not hasattr(model, "kept")


class OfALoss(InputPenalty):
    """A penalty of a user, which differentiates a loss of its own."""

    chain_ready = True

    def per_sample(self, x: Tensor, output: Tensor) -> Tensor:
        loss = output.square().sum(1)
        (v,) = fastjac.penalties._autograd.vjp(loss, x, torch.ones_like(loss).unsqueeze(0))
        return v.square().flatten(1).sum(1)


@pytest.mark.usefixtures("double")
def test_calls_that_are_refused() -> None:
    model, x = mlp(), torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"generator is given.*drop generator, pass projection="):
        SpectReg(engine="compiled", generator=torch.Generator())(model, x)
    with pytest.raises(ValueError, match="engine='compiled' is for the model form"):
        leaf = x.clone().requires_grad_()
        SpectReg(engine="compiled")(leaf, model(leaf))
    with pytest.raises(
        RuntimeError, match=r"compiled' cannot run.*TangentProp is not made of VJPs"
    ):
        TangentProp(engine="compiled")(model, x, x)
    with pytest.raises(RuntimeError, match=r"compiled' cannot run.*at='0'"):
        SpectReg(engine="compiled", at="0")(model, x)
    with pytest.raises(RuntimeError, match=r"compiled' cannot run.*use|Use engine='autograd'"):
        OfALoss(engine="compiled")(model, x)
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
    refuses(nn.Sequential(nn.LazyLinear(3)), x, "a lazy module has not run")
    compiled = torch.compile(model, backend="eager")
    refuses(compiled, x, "is compiled: pass it before compiling")
    refuses(nn.Sequential(compiled), x, "is compiled: pass it before compiling")

    class Slots:
        __slots__ = ()

        def __call__(self, t: Tensor) -> Tensor:
            return model(t)

    refuses(Slots(), x, "cannot be cached: wrap it")


@pytest.mark.usefixtures("double")
def test_inside_a_compiled_function(no_stale_graphs: None) -> None:
    model, x, penalty = mlp(), torch.randn(6, 4), SpectReg(engine="compiled")
    step = torch.compile(lambda x: penalty(model, x)[1], backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="torch.compile traces it already"):
        step(x)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("way", "backend"),
    [
        ("the same tensor", "aot_eager"),
        *(
            pytest.param(way, "aot_eager", marks=pytest.mark.slow)
            for way in ("made of it", "kept by the model", "target")
        ),
    ],
    indirect=["backend"],
)
def test_dependence_on_x_beside_the_argument(way: str, backend: str) -> None:
    """Autograd counts it where x requires grad; ``torch.func`` does not see it."""
    net = mlp()
    for wanted in (True, False):
        x = torch.randn(6, 4).requires_grad_(wanted)
        y = x if way == "the same tensor" else 2 * x
        model: Any = lambda t, y=y: net(t) + net(y)  # noqa: E731
        if way == "kept by the model":
            model = Model(lambda m, t: m.net(t) * m.y.sum(1, keepdim=True), net=net)
            model.y = y
        penalty: Any = lambda e, model=model, x=x: SpectReg(engine=e, n_proj=-1)(model, x)  # noqa: E731
        if way == "target":
            penalty = lambda e, x=x: IGPen(  # noqa: E731
                lambda out, t: (out.sum(1) - t.sum(1)).square(), engine=e
            )(net, x, x)
        if wanted:
            with pytest.raises(RuntimeError, match=r"compiled' cannot run.*depends on x beside"):
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
    "tuple": (compiled(SpectReg, lambda t: (t, t)), TypeError, "output of the model is tuple"),
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


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (i > 4)) for i, n in enumerate(PLAIN_ERRORS)],
)
def test_errors_that_are_not_the_engines_own_come_as_they_are(name: str) -> None:
    """Also from compiled code, which by itself would make zeros of labels out of range."""
    call, kind, message = PLAIN_ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.usefixtures("double")
def test_together_with_an_attached_layerwise_penalty() -> None:
    """Refused on the model that it watches, then and later; on another one nothing changes."""
    x, watched, other = torch.randn(6, 4), fastjac.fuse(mlp()), fastjac.fuse(mlp())
    compare(watched, x)
    layerwise = DREG(watched)
    refuses(watched, x, "it keeps a tensor")
    compare(other, x)
    layerwise.detach()
    compare(watched, x)


@pytest.mark.usefixtures("double")
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
