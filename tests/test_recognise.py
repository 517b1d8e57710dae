"""Which modules of other libraries are recognised as activations, by what they compute."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastjac
from fastjac import recognise
from fastjac.activations import TABLE
from fastjac.layerwise.layers import nonlinearity_of
from fastjac.penalties import DREG, dreg


class Module(nn.Module):
    """A module without parameters that calls ``run``."""

    def __init__(self, run: Callable[..., Any], **attributes: Any) -> None:
        super().__init__()
        self.run = run
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, z: Tensor) -> Tensor:
        return self.run(self, z)


def new_gelu(m: Any, z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z.pow(3))))


ROWS: dict[str, tuple[Callable[..., Any], str]] = {
    "gelu_tanh": (new_gelu, "gelu_tanh"),
    "gelu by erf": (lambda m, z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))), "gelu"),
    "quick gelu": (lambda m, z: z * torch.sigmoid(1.702 * z), "quick_gelu"),
    "swish": (lambda m, z: z * z.sigmoid(), "silu"),
    "mish": (lambda m, z: z * F.softplus(z).tanh(), "mish"),
    "hard swish": (lambda m, z: z * F.relu6(z + 3) / 6, "hardswish"),
    "hard sigmoid": (lambda m, z: F.relu6(z + 3) / 6, "hardsigmoid"),
    "squared relu": (lambda m, z: F.relu(z) ** 2, "relu_squared"),
    "relu by clamp": (lambda m, z: z.clamp(min=0), "relu"),
    "partial": (lambda m, z: m.f(z), "gelu_tanh"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(case: str) -> None:
    run, fn = ROWS[case]
    module = Module(run, f=functools.partial(F.gelu, approximate="tanh"))
    found = recognise.recognise(module)
    assert found is not None and (found.fn, found.writes) == (fn, False)


@pytest.mark.parametrize("fn", [f for f in TABLE if f not in ("identity", "sine")])
def test_every_row_is_recognised_as_itself(fn: str) -> None:
    found = recognise.recognise(Module(lambda m, z: TABLE[fn].torch_function()(z)))
    assert found is not None and found.fn == (fn if fn != "celu" else "elu")  # they are the same


class Counter(nn.Module):
    """Has a state, which makes every fifth call another function."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return z.relu() if self.calls % 3 else z.tanh()


class Two(nn.Module):
    def forward(self, z: Tensor, other: Tensor) -> Tensor:
        return z.relu()


def with_child() -> nn.Module:
    module = Module(lambda m, z: z.relu())
    module.child = nn.Identity()
    return module


def with_parameter() -> nn.Module:
    module = Module(lambda m, z: z.relu())
    module.p = nn.Parameter(torch.ones(()))
    return module


class Straight(torch.autograd.Function):
    """ReLU with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.relu()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


NONE: dict[str, Callable[[], nn.Module]] = {
    "gradient of its own": lambda: Module(lambda m, z: Straight.apply(z)),
    "images otherwise": lambda: Module(lambda m, z: z.relu() if z.dim() == 4 else z.tanh()),
    "noise with gradients": lambda: Module(
        lambda m, z: z.relu() + torch.is_grad_enabled() * torch.rand_like(z)
    ),
    "random": lambda: Module(lambda m, z: F.rrelu(z, training=True)),
    "random in training": lambda: Module(lambda m, z: F.dropout(z.relu(), training=m.training)),
    "only in eval": lambda: Module(lambda m, z: z.tanh() if m.training else z.relu()),
    "state": Counter,
    "clipped": lambda: Module(lambda m, z: F.gelu(z).clamp(-10, 10)),
    "mixes elements": lambda: Module(lambda m, z: z.relu().flip(-1)),
    "by position": lambda: Module(lambda m, z: torch.cat([z[:1].relu(), z[1:].tanh()])),
    "another slope": lambda: Module(lambda m, z: F.leaky_relu(z, 0.3)),
    "no row": lambda: Module(lambda m, z: z.erf()),
    "identity": lambda: Module(lambda m, z: z),
    "another shape": lambda: Module(lambda m, z: z.relu().sum(-1)),
    "raises": lambda: Module(lambda m, z: m.nothing(z)),
    "a list as attribute": lambda: Module(lambda m, z: z.relu(), log=[]),
    "child": with_child,
    "parameter": with_parameter,
    "two tensors": Two,
    "torch's": nn.ReLU,
}


@pytest.mark.parametrize("case", NONE)
def test_what_is_no_row(case: str) -> None:
    module = NONE[case]()
    before, state = torch.get_rng_state(), dict(vars(module))
    assert recognise.recognise(module) is None
    assert torch.equal(torch.get_rng_state(), before) and vars(module) == state


def test_a_module_that_changes_is_looked_at_again() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Module(lambda m, z: z.tanh() if m.smooth else z.relu()))
    model[1].smooth = True
    penalty, x = DREG(model), torch.randn(5, 3)
    for smooth in (True, True, False, False, True):
        model[1].smooth = smooth
        model(x)
        z = model[0](x)
        slope = 1 - z.tanh().square() if smooth else (z > 0).float()
        truth = (slope.square() @ model[0].weight.square().sum(1)).mean()
        torch.testing.assert_close(penalty(), truth)


def test_a_hidden_attribute_counts() -> None:
    module = Module(lambda m, z: z.tanh() if m._smooth else z.relu(), _smooth=True)
    for smooth, fn in ((True, "tanh"), (False, "relu")):
        module._smooth = smooth
        assert recognise.recognise(module).fn == fn  # type: ignore[union-attr]


def test_a_recognised_module_computes_the_value_itself() -> None:
    """It may do more: log its input, put a hook on its result."""
    logged = []

    def run(m: Any, z: Tensor) -> Tensor:
        a = F.silu(z)
        if z.dtype == torch.float32:
            logged.append(len(z))
            a.register_hook(lambda g: 3 * g)
        return a

    model = nn.Sequential(nn.Linear(3, 4), Module(run), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    penalty = DREG(model)
    for passes in (2, 3):
        output = model(x)
        assert len(logged) == passes
        found = torch.autograd.grad(output.sum(), list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(found, expected)
        z = model[0](x).detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.silu(z).sum(), z)
        truth = (slope.square() @ model[0].weight.square().sum(1)).mean()
        torch.testing.assert_close(penalty(), truth)


def test_a_module_that_writes_writes() -> None:
    module = Module(lambda m, z: z.mul_(z.sigmoid()))
    assert nonlinearity_of(module).overwrites()
    layer, x = nn.Linear(3, 4), torch.randn(5, 3)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = layer, module

        def forward(self, x: Tensor) -> Tensor:
            z = self.layer(x)
            self.act(z)
            return z

    output, value = dreg(Model(), x)
    torch.testing.assert_close(output, F.silu(layer(x)))
    (slope,) = torch.autograd.grad(F.silu(z := layer(x)).sum(), z)
    torch.testing.assert_close(value, (slope.square() @ layer.weight.square().sum(1)).mean())


class NewGELU(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return new_gelu(self, z)


def test_fuse_replaces_what_is_recognised() -> None:
    model = nn.Sequential(nn.Linear(3, 4), NewGELU(), Module(lambda m, z: z.erf()))
    x = torch.randn(5, 3)
    truth, before = model(x), list(model)
    fastjac.fuse(model)
    assert repr(model[1]) == "Act(gelu_tanh)" and model[2] is before[2]
    torch.testing.assert_close(model(x), truth)
    fastjac.unfuse(model)
    assert list(model) == before


def test_a_recognised_model_can_be_pickled_while_it_is_watched() -> None:
    model = nn.Sequential(nn.Linear(3, 4), NewGELU())
    penalty, x = DREG(model), torch.randn(5, 3)
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(twin(x), model(x))
    assert penalty() > 0


@pytest.mark.parametrize("name", ["gelu_new", "gelu", "quick_gelu", "relu2", "silu", "mish"])
def test_activations_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    rows = {"gelu_new": "gelu_tanh", "relu2": "relu_squared"}
    module = transformers.activations.ACT2FN[name]
    assert nonlinearity_of(module).fn == rows.get(name, name)


def pairs_of(name: str) -> tuple[nn.Module, int]:
    """A small model of transformers, and the number of its activations after a layer."""
    transformers = pytest.importorskip("transformers")
    try:  # its models import torchvision, where it is installed
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError as error:
        pytest.skip(f"torchvision is that of another torch: {error}")
    if name == "GPT2":
        config = transformers.GPT2Config(
            n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16, **TOKENS
        )
        return transformers.GPT2Model(config), 2
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)
    kind = {"Llama": "LlamaModel", "Bert": "BertModel", "CLIP": "CLIPTextModel"}[name]
    config = {"Bert": "BertConfig", "CLIP": "CLIPTextConfig", "Llama": "LlamaConfig"}[name]
    made = getattr(transformers, config)(**sizes, vocab_size=20, **TOKENS)
    return getattr(transformers, kind)(made), 3 if name == "Bert" else 2  # with its pooler


TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Bert", "CLIP"])
def test_models_of_transformers(name: str) -> None:
    torch.manual_seed(0)
    model, pairs = pairs_of(name)
    penalty, tokens = DREG(model.train()), torch.randint(3, 19, (2, 5))
    for _ in range(2):
        model(tokens)
        value = penalty()
        value.backward()
        assert len(penalty.layers_found) == pairs, (penalty.layers_found, penalty.layers_left_out)


def test_value_of_gpt2() -> None:
    torch.manual_seed(0)
    model, _ = pairs_of("GPT2")
    model.double().train()
    fcs = [block.mlp.c_fc for block in model.h]
    outputs: list[Tensor] = []
    handles = [fc.register_forward_hook(lambda m, x, z: outputs.append(z)) for fc in fcs]
    for dropout in model.modules():
        if isinstance(dropout, nn.Dropout):
            dropout.p = 0.0
    penalty = DREG(model)
    model(torch.randint(3, 19, (2, 5)))
    value = penalty()
    for handle in handles:
        handle.remove()
    phi = model.h[0].mlp.act
    truth = torch.zeros(())
    for fc, z in zip(fcs, outputs, strict=True):
        (slope,) = torch.autograd.grad(phi(y := z.detach().requires_grad_()).sum(), y)
        truth = truth + (slope.square() @ fc.weight.square().sum(0)).sum() / 2
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=0)
