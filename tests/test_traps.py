"""Calls for which torch computes a wrong derivative without an error, and what fastjac does."""

import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import nn
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp
from torch.utils.checkpoint import checkpoint

import fastjac
from fastjac.activations import TABLE
from fastjac.ops.dispatch import OPS, why_not

X = torch.tensor([0.3, -0.7, 1.9], dtype=torch.float64)
IMPLS = [i for i in OPS["act"].implementations if why_not(i, DEVICE, torch.float32) is None]


class Saving(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)


class Cube(Saving):
    """A user's own Function, which is differentiable twice: its backward calls a Function too."""

    @staticmethod
    def forward(z):
        return z**3

    @staticmethod
    def backward(ctx, v):
        return CubeBackward.apply(ctx.saved_tensors[0], v)


class CubeBackward(Saving):
    @staticmethod
    def forward(z, v):
        return 3 * z * z * v

    @staticmethod
    def backward(ctx, p):
        z, v = ctx.saved_tensors
        return 6 * z * v * p, 3 * z * z * p


class Cubed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize(
    "make", [fastjac.FrobReg, fastjac.JacReg, lambda **o: fastjac.SpectReg(-1, **o)]
)
def test_many_cotangents_through_a_foreign_function(make):
    torch.manual_seed(0)
    ours = Cubed(Cube.apply).double()
    plain = Cubed(lambda z: z**3).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(5, 4, dtype=torch.float64)

    def gradients(model, **options):
        _, value = make(**options)(model, x)
        return torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)

    truth = gradients(plain, engine="autograd")
    grads = [gradients(ours)]
    grads += [gradients(ours, engine="autograd"), gradients(plain, engine="chain")]
    for found in grads:
        torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-13)
    with pytest.raises(RuntimeError, match="engine='chain' cannot run.*torch.autograd.Function"):
        gradients(ours, engine="chain")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("make", [fastjac.FrobReg, fastjac.GradientPenalty, fastjac.DataGrad])
def test_foreign_function_in_a_compiled_step_raises(make, checkpointed, no_stale_graphs):
    """Without the error torch 2.13 drops the second-order term, and gradients are half as large."""

    def run(z):
        return checkpoint(Cube.apply, z, use_reentrant=False) if checkpointed else Cube.apply(z)

    model, x = Cubed(run), torch.randn(5, 4, requires_grad=True)
    penalty = make(engine="autograd")
    extra = (torch.zeros(5, dtype=torch.int64),) if make is fastjac.DataGrad else ()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        output = model(x)
        return penalty(x, output[:, :1] if make is fastjac.GradientPenalty else output, *extra)

    with pytest.raises(Exception, match="the model calls a torch.autograd.Function, whose second"):
        step(x)


def times_square(act):
    return lambda z: act(z) * z * z


NESTED = [
    (fastjac.tanh, torch.tanh),
    (fastjac.silu, F.silu),
    (lambda z: fastjac.act(z, z * z, fn="gelu"), times_square(F.gelu)),
]


@pytest.mark.parametrize(("ours", "torchs"), NESTED)
def test_forward_mode_nests(ours, torchs):
    def derivative(f):
        return lambda z: jvp(f, (z,), (torch.ones_like(z),))[1]

    for _ in range(3):
        ours, torchs = derivative(ours), derivative(torchs)
        torch.testing.assert_close(ours(X), torchs(X), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "second", [hessian, lambda f: jacfwd(jacrev(f)), lambda f: jacrev(grad(f))]
)
def test_second_derivative_of_a_gradient_penalty(second):
    def penalty(act):
        return lambda z: grad(lambda u: act(u).sum())(z).square().sum()

    got, truth = second(penalty(fastjac.silu))(X), second(penalty(F.silu))(X)
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["relu", "hardswish"])
@pytest.mark.parametrize("order", [1, 2])
def test_a_zero_slope_stays_zero_for_an_infinite_cotangent(name, order, impl):
    z = torch.tensor([-4.0, -3.0, 4.0])
    slope = fastjac.act(z, None, order, name, impl="reference")
    # The reference computes 0 * inf as it is written. Torch's own backward, below, does not.
    for bad in () if impl == "reference" else (float("inf"), float("nan")):
        out = fastjac.act(z, torch.full_like(z, bad), order, name, impl=impl)
        assert torch.equal(out == 0, slope == 0)
    x = z.clone().requires_grad_()
    fastjac.relu(x, impl=impl).sqrt().sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.0, 0.25]))


class InAThread(torch.autograd.Function):
    """tanh; its backward runs in a thread of its own, as every backward on a GPU does."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.tanh()

    @staticmethod
    def backward(ctx, v):
        found = []
        (z,) = ctx.saved_tensors
        thread = threading.Thread(target=lambda: found.append(fastjac.act(z, v, 1, "tanh")))
        thread.start()
        thread.join()
        return found[0]


def test_batched_cotangents_in_the_thread_of_a_gpu():
    """Torch counts the levels of its older vmap in each thread, and there none is entered."""
    x, w = X.clone().requires_grad_(), torch.randn(4, 3, dtype=torch.float64)
    (found,) = torch.autograd.grad(InAThread.apply(x), x, w, is_grads_batched=True)
    torch.testing.assert_close(found, w * (1 - X.tanh().square()))


def test_raw_op_keeps_forward_mode_and_refuses_torch_func():
    raw = torch.ops.fastjac.act.default
    fn = list(TABLE).index("gelu")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, torch.ones_like(X))
        got = forward_ad.unpack_dual(raw(dual, None, 0, fn, ())).tangent
    torch.testing.assert_close(got, jvp(F.gelu, (X,), (torch.ones_like(X),))[1])
    with pytest.raises(RuntimeError, match="cannot be transformed by torch.func"):
        grad(lambda z: raw(z, None, 0, fn, ()).sum())(X)


def test_fuse_keeps_full_backward_hooks_both_ways():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    calls = []
    model[1].register_full_backward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        model(torch.randn(2, 3)).sum().backward()
        model = fastjac.unfuse(model) if isinstance(model[1], fastjac.Act) else fastjac.fuse(model)
    assert len(calls) == 3


def test_layerwise_penalties_of_one_model_in_several_threads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 2))
    x = torch.randn(6, 4)
    truth = fastjac.dreg(model, x)[1].item()
    values = []

    def work():
        penalty = fastjac.DREG()
        values.extend(penalty(model, x)[1].item() for _ in range(40))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(values) == 160 and values == pytest.approx([truth] * 160, rel=1e-6)


def test_a_tensor_as_activation_parameter_is_refused():
    omega = nn.Parameter(torch.tensor(30.0))
    for call in (
        lambda: fastjac.sine(X, omega),
        lambda: fastjac.sine(X, omega, impl="reference"),
        lambda: fastjac.Act("sine", omega=omega),
    ):
        with pytest.raises(
            TypeError, match="omega is Parameter: a parameter of an activation must be"
        ):
            call()


def test_a_subclass_of_act_is_penalised_with_its_own_derivative():
    class Tripled(fastjac.Act):
        def forward(self, z):
            return 3 * super().forward(z)

    linear, x = nn.Linear(3, 4), torch.randn(5, 3)
    once = fastjac.dreg(nn.Sequential(linear, fastjac.Act("gelu"), nn.Linear(4, 1)), x)[1]
    model = nn.Sequential(linear, Tripled("gelu"), nn.Linear(4, 1))
    torch.testing.assert_close(fastjac.dreg(model, x)[1], 9 * once)
    penalty = fastjac.DREG(model)
    _ = model(x)
    torch.testing.assert_close(penalty(), 9 * once)


def test_held_functions_take_inplace_and_drop_ins_refuse_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.act, self.other = F.relu, F.tanh

        def forward(self, z):
            return self.other(self.act(z, inplace=True)) + self.act(z, True)

    z = torch.randn(4)
    model = Net()
    truth = model(z.clone())
    fastjac.fuse(model)
    assert repr(model.other) == "fastjac.tanh"
    torch.testing.assert_close(model(z.clone()), truth)
    with pytest.raises(TypeError, match="relu\\(\\) has no argument inplace"):
        fastjac.relu(z, inplace=True)
