"""Every penalty under torch.compile, on the gradients of the parameters, not only the value.

The model is fused, the truth is the reference on the plain model in float64.
"""

import copy

import pytest
import torch

import fastjac
from fastjac.penalties import PENALTIES

pytestmark = pytest.mark.slow

GRAPH = [n for n, s in PENALTIES.items() if s.kind in ("input-jacobian", "output")]
GRAPH.remove("finite_difference_datagrad")  # runs the model itself
GRAPH.remove("tangentprop")  # below


def problem(name):
    example = PENALTIES[name].example(torch.float64, torch.Generator().manual_seed(3))
    return example, dict(example.options)


def gradients(name, *, fused, wrap=lambda f: f):
    example, options = problem(name)
    model = copy.deepcopy(example.model)
    if fused:
        fastjac.fuse(model)
    x = example.x.detach().clone().requires_grad_()
    penalty = PENALTIES[name].functional

    def step(x, *targets):
        output = model(x)
        # One draw for all: the penalty's own generator state would differ between runs.
        return penalty(x, output, *targets, **options) + output.square().mean()

    torch.manual_seed(5)
    wrap(step)(x, *example.targets).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name", GRAPH)
def test_compiled_step_has_the_gradients_of_the_plain_one(name, no_stale_graphs):
    truth = gradients(name, fused=False)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        got = gradients(
            name,
            fused=True,
            wrap=lambda f: torch.compile(f, backend="aot_eager", fullgraph=True),
        )
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_tangentprop_in_a_compiled_region_is_refused_not_wrong(no_stale_graphs):
    """Its JVP needs a leaf made inside the region, which dynamo does not support: an error."""
    with (
        torch._dynamo.config.patch(trace_autograd_ops=True),
        pytest.raises(torch._dynamo.exc.Unsupported, match="requires_grad"),
    ):
        gradients(
            "tangentprop",
            fused=True,
            wrap=lambda f: torch.compile(f, backend="aot_eager", fullgraph=True),
        )
