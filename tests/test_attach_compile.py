"""An attached layer-wise penalty under torch.compile: gradients of the parameters, graph breaks."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastjac
from fastjac import reference
from fastjac.penalties import DREG

pytestmark = pytest.mark.slow


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.GELU(), nn.Flatten()),
        *(nn.Linear(24, 6), nn.SiLU(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh()),
        nn.Linear(5, 3),
    ).double()
    return model, torch.randn(6, 2, 8, dtype=torch.float64), torch.randint(3, (6,))


def truth(model, x, y):
    """By hand: the stack of the reference, norms as scaled weights."""
    model = copy.deepcopy(model)
    conv, bn, _, flat, one, silu, two, ln, _, head = model
    z1 = conv(x)
    k1 = bn.weight * (z1.var((0, 2), unbiased=False) + bn.eps).rsqrt()
    y1 = bn(z1)
    z2 = one(flat(F.gelu(y1)))
    z3 = two(silu(z2))
    y3 = ln(z3)
    k3 = ln.weight * (z3.var(1, unbiased=False, keepdim=True) + ln.eps).rsqrt()
    slope = reference.derivative(torch.tanh, y3)
    third = (slope.square() * k3.square() * two.weight.square().sum(1)).sum(1).mean()
    stack = [(y1, k1.view(-1, 1, 1) * conv.weight, F.gelu), (z2, one.weight, F.silu)]
    loss = F.cross_entropy(head(y3.tanh()), y)
    return torch.autograd.grad(
        loss + reference.dreg(stack).mean() + third, list(model.parameters())
    )


def compare(model, expected):
    for p, t in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, t, rtol=1e-9, atol=1e-11)
        p.grad = None


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("what", ["model", "step"])
def test_fullgraph(what, backend, no_stale_graphs):
    model, x, y = problem()
    expected = truth(model, x, y)
    penalty = DREG(model)

    def step(x, y):
        return F.cross_entropy(model(x), y) + penalty()

    if what == "step":
        step = torch.compile(step, backend=backend, fullgraph=True)
        for _ in range(2):
            step(x, y).backward()
            compare(model, expected)
        return
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        output = compiled(x)
        (F.cross_entropy(output, y) + penalty()).backward()
        compare(model, expected)
    assert penalty.layers_found == ["0", "4", "6"]


def test_attached_to_a_compiled_model(no_stale_graphs):
    model, x, y = problem()
    expected = truth(model, x, y)
    compiled = torch.compile(model, backend="aot_eager")
    penalty = DREG(compiled)
    (F.cross_entropy(compiled(x), y) + penalty()).backward()
    compare(model, expected)


def test_one_graph_and_no_recompilation_for_other_batch_sizes(no_stale_graphs):
    model, x, y = problem()
    penalty = DREG(model)
    counter = CompileCounter()

    @torch.compile(backend=counter, dynamic=True)
    def step(x, y):
        return F.cross_entropy(model(x), y) + penalty()

    for n in (6, 5, 3):
        x, y = x[:n].clone(), y[:n].clone()  # a view would be another case for the compiler
        value = step(x, y)
        eager = copy.deepcopy(model)
        twin = DREG(eager)
        torch.testing.assert_close(value, F.cross_entropy(eager(x), y) + twin())
    assert counter.frame_count == 1


def test_called_form_in_a_compiled_region_says_what_to_do(no_stale_graphs):
    model, x, _ = problem()
    step = torch.compile(lambda x: fastjac.dreg(model, x)[1], backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="attach it before compiling"):
        step(x)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_the_plain_one(strict, no_stale_graphs):
    """With the penalty's own nodes in it, it would train on wrong gradients."""
    model, x, y = problem()
    plain = copy.deepcopy(model)
    F.cross_entropy(plain(x), y).backward()
    penalty = DREG(model)
    exported = torch.export.export(copy.deepcopy(model), (x,), strict=strict).module()
    mine = torch.export.export(model, (x,), strict=strict).module()
    for program in (exported, mine):
        F.cross_entropy(program(x), y).backward()
        for name, p in program.named_parameters():
            torch.testing.assert_close(p.grad, plain.get_parameter(name).grad)
            p.grad = None
        with pytest.raises(RuntimeError, match="the model has not run since"):
            penalty()
    assert "input" in inspect.signature(model.forward).parameters


@pytest.mark.parametrize("how", ["iadd", "add_", "slice", "view", "relu_"])
def test_write_between_layer_and_activation_is_refused(how, no_stale_graphs):
    """In eager mode such a layer is left out; a compiled graph would not show the write."""

    class Written(nn.Sequential):
        def forward(self, x):
            z = self[0](x)
            if how == "iadd":
                z += x
            elif how == "add_":
                z.add_(x)
            elif how == "slice":
                z[:, 0] = 0
            elif how == "view":
                z.view(-1)[0] = 0
            else:
                torch.relu_(z)
            return self[1](z)

    model = Written(nn.Linear(4, 4), nn.GELU())
    penalty = DREG(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="layer 0: its output was modified in place before the act"):
        compiled(torch.randn(3, 4))
    penalty.detach()
