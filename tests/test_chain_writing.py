"""Ways of writing a model under the chain engine, its parameters and hooks, against autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from chain_cases import agrees, close, falls_back, run, same, spectreg, three_layers
from conftest import cpu_only
from layer_cases import Model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from fastjac.bench.networks import TransformerClassifier
from fastjac.input_jacobian import select
from fastjac.input_jacobian.chain import GraphRun
from fastjac.penalties import SpectReg

pytestmark = pytest.mark.usefixtures("double")


def plus_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    h += m.b(m.a(x).sin())
    h *= 2
    h -= 0.5
    h /= 3
    F.dropout(h, 0.3, True, True)
    h.add_(m.a(x)).relu_()
    return m.c(h)


def several_inputs(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.a(x))
    product = h * m.b(h) + torch.where(h > 0, h.sin(), m.b(h))
    return m.c(product) + m.c(m.a(x * x.sin()))


def pieces(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    parts = [h[:, :2] * 2, h[:, 2:].sin()]
    h = m.b(torch.cat(parts, 1)) + torch.stack([h, h * h]).sum(0)
    values, _ = h.topk(3, 1)
    return values + h.sort(1)[0][:, :3] + h.max(1, keepdim=True).values


def across_samples(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.a(x))
    h = h - h.mean(0) + h.t().softmax(0).t()
    return m.c(h @ (h.t() @ h).sin())


def constants(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    scale = float(h.detach().abs().max())
    mask = (h > 0).to(h.dtype) + h.argmax(1, keepdim=True)
    noise = torch.rand_like(h) + torch.zeros_like(h) + h.new_ones(())
    return m.c(h / scale * mask * noise + m.b(h).detach() + len(h) + h.shape[1] + h.size(0))


def other_types(m: Any, x: Tensor) -> Tensor:
    h = m.a(x).to(torch.float64).contiguous()
    spectrum = torch.view_as_real(torch.fft.rfft(h)).flatten(1)
    return m.c(m.b(spectrum[:, :5]) + torch.einsum("ni,ij->nj", h, m.b.weight) + (1 - h) ** 2)


def slices_of_weights(m: Any, x: Tensor) -> Tensor:
    h = F.linear(x, m.a.weight[:3], m.a.bias[:3]) @ m.b.weight[:3]
    return F.linear(F.gelu(h), m.b.weight.t()[:4], m.c.bias.repeat(2)[:4])


WRITTEN = [
    *(plus_in_place, several_inputs, pieces, across_samples, constants, slices_of_weights),
]


def test_complex_numbers() -> None:
    falls_back(three_layers(other_types), torch.randn(3, 4), "complex numbers")


@pytest.mark.parametrize("forward", WRITTEN, ids=lambda f: f.__name__)
def test_way_of_writing(forward: Any) -> None:
    agrees(three_layers(forward), torch.randn(3, 4))


OUTPUTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scalars": lambda m, x: m.c(m.a(x))[:, 0],
    "view of a hidden layer": lambda m, x: m.a(x)[:, :3],
    "transposed view": lambda m, x: m.a(x).t()[:3].t(),
    "tensor per sample": lambda m, x: m.c(m.a(x)).reshape(len(x), 3, 1, 1),
    "sum with x": lambda m, x: x + x,
}


@pytest.mark.parametrize("name", list(OUTPUTS))
@pytest.mark.parametrize("n", [1, 3])
def test_output(name: str, n: int) -> None:
    agrees(three_layers(OUTPUTS[name]), torch.randn(n, 4))


def test_output_that_is_the_input_leaves_the_projection_alone() -> None:
    for forward in (lambda m, x: x.view(3, 2, 2), lambda m, x: x + m.a.bias[:4]):
        x, w = torch.randn(3, 4, requires_grad=True), torch.randn(2, 3, 4)
        before = w.clone()
        output, value = SpectReg(engine="chain")(three_layers(forward), x, projection=w)
        close(value, w.square().sum((0, 2)).mean() / 2)
        (output.sum() + value).backward()
        close(x.grad, torch.ones(3, 4))
        assert torch.equal(w, before)


def test_input_of_one_number_per_sample() -> None:
    model = three_layers(lambda m, x: m.c(F.gelu(m.a(x.unsqueeze(1).expand(6, 4)))))
    agrees(model, torch.randn(6))


def dropped_in_place(m: Any, x: Tensor) -> Tensor:
    return m.c(F.dropout(m.a(x).view(-1, 5, 1).flatten(1), 0.3, True, True))


def added_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.b(m.a(x))[:, 1:]
    h += x
    h[:, :2] *= 3
    h[:, 3] = 0.5
    return h.sin()


@pytest.mark.parametrize("write", [dropped_in_place, added_in_place])
def test_writes_to_a_part_that_are_linear(write: Any) -> None:
    """Their node shows nothing of what it holds, but that its VJP depends on the cotangent alone.

    So there is no program, and without one the chain engine pays if x is large.
    """
    agrees(three_layers(write), torch.randn(3, 4))
    penalty = SpectReg()
    for rows, engine in ((3, "autograd"), (select.LARGE // 4, "chain")):
        text = penalty.explain(three_layers(write), torch.randn(rows, 4))
        assert text.startswith(f"engine: {engine}") and ("CopySlices" in text)


@cpu_only
@pytest.mark.filterwarnings("ignore:TF32")
def test_recurrent_layer_with_several_outputs() -> None:
    """In float32 an LSTM is one operation, whose outputs all take part."""

    def outputs(m: Any, x: Tensor) -> Tensor:
        y, (h, c) = m.m(x)
        return torch.cat([y[:, -1] * c[0], h[0].sin()], 1)

    model = Model(outputs, m=nn.LSTM(4, 3, batch_first=True)).float()
    x = torch.randn(2, 3, 4, dtype=torch.float32)
    assert "MkldnnRnnLayer" in "".join(GraphRun(x.requires_grad_(), model(x)).describe())
    with torch.backends.mkldnn.flags(enabled=False):  # as many operations
        expected = run(model, x, spectreg("autograd"))
    found = run(model, x, spectreg("chain"))
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-4, atol=1e-5)


def attention() -> nn.Module:
    return nn.TransformerEncoderLayer(
        4, 2, 6, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_attention(training: bool) -> None:
    x = torch.randn(2, 3, 4)
    model = nn.Sequential(attention(), nn.Flatten(), nn.Linear(12, 3)).train(training)
    with sdpa_kernel(SDPBackend.MATH):  # the one that torch differentiates twice on a CPU
        agrees(model, x)
        agrees(TransformerClassifier(8, 2, 16, 2), torch.randn(2, 3, 8))


def test_attention_with_weights() -> None:
    mha, x = nn.MultiheadAttention(4, 2, batch_first=True), torch.randn(2, 3, 4)
    agrees(Model(lambda m, x: m.m(x, x, x)[0], m=mha), x)


@cpu_only  # on a GPU a recurrent layer is one operation of cuDNN
def test_recurrent_layer() -> None:
    agrees(Model(lambda m, x: m.m(x)[0], m=nn.GRU(4, 3)), torch.randn(2, 3, 4))


@pytest.mark.parametrize("frozen", ["0", "0.weight", "0.bias", "2.bias", "4", ""])
@pytest.mark.parametrize("kind", ["mlp", "links", "batch norm", "convolution"])
def test_frozen_parameters(frozen: str, kind: str) -> None:
    middle = {"mlp": nn.Tanh(), "links": nn.LayerNorm(5), "batch norm": nn.BatchNorm1d(5)}
    model = nn.Sequential(
        nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 5), middle.get(kind, nn.GELU()), nn.Linear(5, 3)
    )
    x = torch.randn(6, 4)
    if kind == "convolution":
        model[0], model[2] = nn.Conv1d(2, 3, 2), nn.Conv1d(3, 5, 1)
        model.insert(4, nn.Flatten())
        model[5], x = nn.Linear(10, 3), torch.randn(6, 2, 3)
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    if not any(p.requires_grad for p in model.parameters()):
        same(*[run(model, x, spectreg(engine)) for engine in ("chain", "autograd")])
        return
    agrees(model, x)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_output_is_modified_before_the_backward(chunk_size: int | None) -> None:
    """With several products the engine goes back through the model again in the backward."""
    found = []
    for engine in ("chain", "autograd"):
        torch.manual_seed(1)
        model, x = three_layers(lambda m, x: m.c(F.gelu(m.a(x)))), torch.randn(3, 4)
        output, value = spectreg(engine, chunk_size=chunk_size)(model, x)
        output.mul_(2)
        total = output.square().sum() + value
        found.append(torch.autograd.grad(total, [model.a.weight, model.c.weight]))
    close(*found)


def test_requires_grad_switched_off_before_the_backward() -> None:
    found = []
    for engine in ("chain", "autograd"):
        torch.manual_seed(1)
        model, x = three_layers(lambda m, x: m.c(F.gelu(m.a(x)))), torch.randn(3, 4)
        parameters = [model.a.weight, model.c.weight]
        output, value = spectreg(engine)(model, x)
        model.eval().requires_grad_(False)
        output.mul_(2)
        (output.sum() + value).backward()
        found.append([p.grad for p in parameters])
    assert found == [[None, None]] * 2


def test_shared_parameters() -> None:
    net = nn.Sequential(
        *(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 4), nn.Tanh()),
        nn.Linear(4, 5),
    )
    net[6].weight, net[2].bias = net[0].weight, net[0].bias
    net.append(net[2])
    x = torch.randn(3, 4)
    agrees(net, x)
    agrees(Model(lambda m, x: m.net(x), net=net), x)
    agrees(Model(lambda m, x: F.linear(F.gelu(m.a(x)), m.a.weight.t()), a=nn.Linear(4, 5)), x)
    found = []
    for engine in ("chain", "autograd"):  # and with what the engine does not see
        output, value = spectreg(engine)(net, x)
        total = output.square().sum() + value + net[0].weight.sin().sum() * value
        found.append(torch.autograd.grad(total, list(net.parameters())))
    close(*found)


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm", "orthogonal"])
def test_parametrized_weights(kind: str) -> None:
    first = getattr(parametrizations, kind)(nn.Linear(4, 5))
    agrees(nn.Sequential(first, nn.GELU(), nn.Linear(5, 3)), torch.randn(3, 4))
    first = getattr(parametrizations, kind)(nn.Conv2d(1, 2, 2))
    agrees(nn.Sequential(first, nn.GELU(), nn.Flatten()), torch.randn(2, 1, 3, 3))


@pytest.mark.parametrize("of_x", [False, True], ids=["leaf", "depends on x"])
@pytest.mark.parametrize("inside", [False, True])
def test_weight_that_is_no_parameter(inside: bool, of_x: bool) -> None:
    """A hypernetwork, whose output replaces the weight of a layer."""
    found = []
    for engine in ("auto", "autograd"):
        torch.manual_seed(1)
        net, hyper = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)), nn.Linear(4, 20)
        x = torch.randn(3, 4, requires_grad=True)
        del net[0].weight
        net[0].weight = hyper(x.mean(0) if of_x else torch.ones(4)).view(5, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = Model(lambda m, x: m.net(x), net=net) if inside else net
            output, value = spectreg(engine)(model, x)
        total = output.square().sum() + value
        found.append(torch.autograd.grad(total, [x, hyper.weight, net[2].weight]))
    close(*found)


def test_hooks_of_modules() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    model[2].register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    x = torch.randn(3, 4)
    agrees(model, x)
    for register in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        calls: list[int] = []
        hooked = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
        getattr(hooked[1], register)(lambda *args, calls=calls: calls.append(1))
        output, value = spectreg("auto")(hooked, x)
        (output.sum() + value).backward()
        assert calls


def test_hooks_of_parameters() -> None:
    found = []
    for engine in ("chain", "autograd"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))
        model[0].weight.register_hook(lambda g: 2 * g)
        spectreg(engine)(model, torch.randn(3, 4))[1].backward()
        found.append(model[0].weight.grad)
    close(*found)
