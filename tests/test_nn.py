"""The activation functions, `Act`, `fuse` and `unfuse`."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, cpu_only
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastjac
from fastjac.activations import TABLE
from fastjac.ops.act_sizes import FROM, never
from fastjac.ops.dispatch import OPS

# An implementation that is named, which fuses at any size.
IMPL = OPS["act"].select("auto", torch.device(DEVICE), torch.float32)


@pytest.mark.parametrize("name", TABLE)
def test_drop_in_equals_torch(name):
    row = TABLE[name]
    z = torch.randn(5, 7, requires_grad=True)
    got, truth = getattr(fastjac, name)(z), row.torch_function()(z)
    torch.testing.assert_close(got, truth)
    cotangent = torch.randn_like(z)
    torch.testing.assert_close(
        torch.autograd.grad(got, z, cotangent)[0], torch.autograd.grad(truth, z, cotangent)[0]
    )


def test_drop_ins_take_torchs_arguments():
    z = torch.randn(9)
    pairs = [
        (fastjac.leaky_relu(z, 0.3), F.leaky_relu(z, 0.3)),
        (fastjac.elu(z, alpha=0.5), F.elu(z, alpha=0.5)),
        (fastjac.softplus(z, 2.0, 5.0), F.softplus(z, 2.0, 5.0)),
        (fastjac.gelu(z, approximate="tanh"), F.gelu(z, approximate="tanh")),
        (fastjac.sine(z, omega=30.0), torch.sin(30 * z)),
    ]
    for got, truth in pairs:
        torch.testing.assert_close(got, truth)
    assert list(inspect.signature(fastjac.softplus).parameters) == [
        "z", "beta", "threshold", "impl",
    ]  # fmt: skip
    with pytest.raises(TypeError, match="relu.*takes z and 0 parameters"):
        fastjac.relu(z, 1.0)
    with pytest.raises(ValueError, match="approximate is 'erf'"):
        fastjac.gelu(z, "erf")


def every_activation() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(4, 6)]
    for row in TABLE.values():
        if row.module is not None:
            kwargs = {**row.torch_kwargs, **{k: v * 1.5 for k, v in row.params.items()}}
            layers += [getattr(nn, row.module)(**kwargs), nn.Linear(6, 6)]
    return nn.Sequential(*layers)


class TwiceDifferentiable(nn.Module):
    def forward(self, z):
        return F.relu6(z + 3) / 6


def parameter_gradients(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    (v,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    model.zero_grad()
    ((v**2).sum() + out.square().sum()).backward()
    return [p.grad.clone() for p in model.parameters()]


def test_fuse_replaces_every_activation_and_changes_no_number():
    model = every_activation().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    truth = copy.deepcopy(model)
    for i, module in enumerate(truth):
        if type(module) is nn.Hardsigmoid:  # torch cannot differentiate its own twice
            truth[i] = TwiceDifferentiable()
    state, before = copy.deepcopy(model.state_dict()), parameter_gradients(truth, x)
    originals = list(model)
    assert fastjac.fuse(model, impl=IMPL) is model
    replaceable = sum(row.module is not None for row in TABLE.values())
    assert sum(isinstance(m, fastjac.Act) for m in model) == replaceable
    assert model.state_dict().keys() == state.keys()
    for a, b in zip(parameter_gradients(model, x), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    once = list(model)
    fastjac.fuse(model)
    assert list(model) == once  # a second time changes nothing
    assert fastjac.unfuse(model) is model
    assert all(a is b for a, b in zip(model, originals, strict=True))


def test_fuse_keeps_sharing_hooks_mode_and_subclasses():
    class MyGELU(nn.GELU):
        def forward(self, z):
            return super().forward(z) * 2

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.GELU()
            self.second = self.first
            self.own = MyGELU()
            self.inner = nn.ModuleDict({"a": nn.Tanh(), "b": self.first})

        def forward(self, z):
            return self.inner["b"](self.inner["a"](self.own(self.second(self.first(z)))))

    model = Net().eval()
    calls = []
    handle = model.first.register_forward_hook(lambda *_: calls.append(1))
    z = torch.randn(6)
    truth = model(z)
    fastjac.fuse(model)
    assert model.first is model.second is model.inner["b"] and isinstance(model.first, fastjac.Act)
    assert type(model.own) is MyGELU and not model.first.training
    torch.testing.assert_close(model(z), truth)
    assert len(calls) == 6
    handle.remove()
    model(z)
    assert len(calls) == 6
    fastjac.unfuse(model)
    assert type(model.first) is nn.GELU and model.first is model.inner["b"]


def test_fuse_of_a_transformer_layer_and_of_an_activation():
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation="gelu", batch_first=True)
    x = torch.randn(2, 3, 8)
    truth = layer(x)
    fastjac.fuse(layer, impl=IMPL)
    assert repr(layer.activation) == "fastjac.gelu"
    torch.testing.assert_close(layer(x), truth)
    pickle.loads(pickle.dumps(layer))
    fastjac.unfuse(layer)
    assert layer.activation is F.gelu
    assert isinstance(fastjac.fuse(nn.SiLU()), fastjac.Act)
    assert type(fastjac.unfuse(fastjac.fuse(nn.SiLU()))) is nn.SiLU


def test_fused_models_copy_and_pickle():
    model = fastjac.fuse(nn.Sequential(nn.Linear(2, 3), nn.ELU(0.3)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x = torch.randn(4, 2)
        torch.testing.assert_close(other(x), model(x))
        assert repr(other[1]) == "Act(elu, alpha=0.3)"
        assert type(fastjac.unfuse(other)[1]) is nn.ELU


def test_what_the_table_has_no_row_for_stays():
    model = nn.Sequential(nn.Hardshrink(), nn.GLU(), nn.Softmax(-1), nn.PReLU())
    before = list(model)
    with pytest.warns(UserWarning, match="fuse: Sequential has no activation module that fastjac"):
        fastjac.fuse(model, impl=IMPL)
    assert list(model) == before


def test_fuse_warns_only_if_there_was_nothing_to_replace():
    class Functional(nn.Linear):
        def forward(self, x):
            return F.gelu(super().forward(x))

    with pytest.warns(UserWarning, match="F.gelu in a forward are replaced by hand"):
        fastjac.fuse(Functional(3, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (nn.ReLU(), nn.GELU(), nn.TransformerEncoderLayer(8, 2, 16)):
            fastjac.fuse(fastjac.fuse(model))


SLOWER = [nn.ReLU(), nn.LeakyReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Hardswish()]


def test_fuse_leaves_what_torch_computes_faster():
    model = nn.Sequential(*SLOWER, nn.Tanh(), nn.Hardsigmoid())
    before = list(model)
    fastjac.fuse(model)
    assert list(model)[:-2] == before[:-2]
    assert all(isinstance(m, fastjac.Act) for m in model[-2:])
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="relu")
    assert fastjac.fuse(layer).activation is F.relu
    fastjac.fuse(model, impl=IMPL)  # a named implementation replaces all
    assert all(isinstance(m, fastjac.Act) for m in model)
    fastjac.unfuse(model)
    assert list(model) == before


def test_the_sizes_name_every_activation():
    assert {"identity", *FROM} == set(TABLE)
    never_paying = {type(m).__name__ for m in SLOWER}
    assert {TABLE[fn].module for fn in FROM if never(fn)} == never_paying


def is_fused(a):
    return type(a.grad_fn).__name__ == "_ActBackward"


@cpu_only
@pytest.mark.parametrize("fn", FROM)
def test_torch_computes_what_is_too_small_to_pay(fn):
    """On the CPU, with impl="auto", in modules and functions; `act` itself is always fused."""
    module, function = fastjac.Act(fn), getattr(fastjac, fn)
    for dtype, smallest in zip((torch.float32, torch.float64), FROM[fn], strict=False):
        small = torch.randn(9, dtype=dtype, requires_grad=True)
        large = torch.randn(smallest or 2**21, dtype=dtype, requires_grad=True)
        for call in (module, function):
            assert not is_fused(call(small))
            assert is_fused(call(large)) == (smallest is not None)
            if smallest is not None:
                assert not is_fused(call(large[1:]))
        assert is_fused(fastjac.act(small, fn=fn)) and is_fused(function(small, impl=IMPL))


def test_the_dtype_of_a_result_does_not_depend_on_the_size():
    """Autocast lets torch compute softplus in float32, and the kernels in bfloat16."""
    with torch.autocast(DEVICE, torch.bfloat16):
        for size in (3, FROM["softplus"][2]):
            z = torch.randn(size, dtype=torch.bfloat16, requires_grad=True)
            assert fastjac.softplus(z).dtype == torch.bfloat16


def test_a_symbolic_size_is_not_looked_at():
    """The traced graph is right at another size, on both sides of the table's."""
    graph = make_fx(lambda z: fastjac.tanh(z).square(), tracing_mode="symbolic")(torch.randn(5))
    z = torch.randn(FROM["tanh"][0] + 1)
    torch.testing.assert_close(graph(z), torch.tanh(z).square())


def test_errors():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got builtin"):
        fastjac.fuse(F.gelu)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        fastjac.unfuse(3)
    with pytest.raises(ValueError, match="impl='gpu' is not an implementation.*from auto, cuda"):
        fastjac.fuse(nn.GELU(), impl="gpu")
    with pytest.raises(ValueError, match="fn='swish' is not an activation"):
        fastjac.Act("swish")
    with pytest.raises(TypeError, match="'gelu' has no parameter 'beta'"):
        fastjac.Act("gelu", beta=2.0)


def test_inference_mode_and_no_grad():
    z = torch.randn(5)
    model = fastjac.fuse(nn.Sequential(nn.GELU()))
    with torch.inference_mode():
        torch.testing.assert_close(model(z), F.gelu(z))
    with torch.no_grad():
        assert not model(z.requires_grad_()).requires_grad
