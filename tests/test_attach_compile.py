"""An attached layer-wise penalty under torch.compile: gradients of the parameters, graph breaks."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter

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


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def eager(model, x, y):
    """The same without torch.compile; test_norm_layers.py compares it with the reference."""
    model = copy.deepcopy(model)
    penalty = DREG(model)
    return gradients(F.cross_entropy(model(x), y) + penalty(), model)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("what", ["step", "model", "model, then attached"])
def test_fullgraph(what, backend, no_stale_graphs):
    model, x, y = problem()
    expected = eager(model, x, y)
    options = {"backend": backend, "fullgraph": True}
    run = model if what == "step" else torch.compile(model, **options)
    penalty = DREG(run if what == "model, then attached" else model)

    def step(x, y):
        return F.cross_entropy(run(x), y) + penalty()

    run_step = torch.compile(step, **options) if what == "step" else step
    for _ in range(2):
        found = gradients(run_step(x, y), model)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert penalty.layers_found == ["0", "4", "6"]


def test_one_graph_and_no_recompilation_for_other_batch_sizes(no_stale_graphs):
    model, x, y = problem()
    penalty = DREG(model)
    counter = CompileCounter()
    step = torch.compile(
        lambda x, y: F.cross_entropy(model(x), y) + penalty(), backend=counter, dynamic=True
    )
    for n in (6, 5, 3):
        x, y = x[:n].clone(), y[:n].clone()  # a view would be another case for the compiler
        found, expected = gradients(step(x, y), model), eager(model, x, y)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_is_the_plain_one(strict, no_stale_graphs):
    """With the operations of the penalty in its graph it would train on wrong gradients."""
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
    """In eager mode such a layer is left out. A compiled graph does not show the write."""

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


def test_a_penalty_that_a_compiled_function_creates_is_refused(no_stale_graphs):
    model, x, _ = problem()
    step = torch.compile(lambda x: DREG()(model, x)[1], backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="DREG was created inside a function of torch.compile"):
        step(x)


def test_an_exported_call_of_the_penalty_is_refused(no_stale_graphs):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.penalty = problem()[0], DREG()

        def forward(self, x):
            return self.penalty(self.model, x)

    with pytest.raises(Exception, match="torch.export sees the plain model: export the model w"):
        torch.export.export(Step(), (problem()[1],), strict=True)
