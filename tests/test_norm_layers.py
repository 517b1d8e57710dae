"""A norm between layer and activation: the penalty against the layer's true Jacobian."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layer_cases import close
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jacrev

from fastjac.penalties import DREG, AccumulatedDREG

pytestmark = pytest.mark.usefixtures("double")
LAYERS = {
    "linear-batchnorm": (lambda: nn.Linear(4, 5), lambda: nn.BatchNorm1d(5), (6, 4)),
    "conv-batchnorm": (lambda: nn.Conv2d(2, 3, 2), lambda: nn.BatchNorm2d(3), (3, 2, 3, 3)),
    "conv-batchnorm-plain": (
        lambda: nn.Conv2d(2, 3, 2),
        lambda: nn.BatchNorm2d(3, affine=False),
        (3, 2, 3, 3),
    ),
    "linear-layernorm": (lambda: nn.Linear(4, 5), lambda: nn.LayerNorm(5), (6, 4)),
    "tokens-layernorm": (lambda: nn.Linear(4, 5), lambda: nn.LayerNorm(5), (3, 2, 4)),
    "linear-layernorm-plain": (
        lambda: nn.Linear(4, 5),
        lambda: nn.LayerNorm(5, elementwise_affine=False),
        (6, 4),
    ),
}


# LayerNorm does the same in both modes.
MODES = [(case, True) for case in LAYERS] + [(case, False) for case in LAYERS if "batch" in case]


def build(case: str, training: bool, phi: type[nn.Module]) -> tuple[nn.Sequential, Tensor]:
    make_layer, make_norm, shape = LAYERS[case]
    norm = make_norm()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 2)
    return nn.Sequential(make_layer(), norm, phi()).train(training), torch.randn(shape)


def with_fixed_statistics(norm: nn.Module, z: Tensor) -> Any:
    """The norm as the map ``z_n → k (z_n − μ) + β`` of one sample, its statistics those of z."""
    if isinstance(norm, nn.LayerNorm):
        means, variances = z.mean(-1, keepdim=True), z.var(-1, unbiased=False, keepdim=True)
        per_sample = list(zip(means, variances, strict=True))
        shape = [-1]
    else:
        dims = [d for d in range(z.dim()) if d != 1]
        mean, variance = norm.running_mean, norm.running_var
        if norm.training:
            mean, variance = z.mean(dims), z.var(dims, unbiased=False)
        shape = [-1] + [1] * (z.dim() - 2)
        per_sample = [(mean.view(shape), variance.view(shape))] * len(z)
    gain = 1 if norm.weight is None else norm.weight.view(shape)
    shift = 0 if norm.bias is None else norm.bias.view(shape)

    def run(n: int, z_n: Tensor) -> Tensor:
        mean, variance = per_sample[n]
        return (z_n - mean) * (variance + norm.eps) ** -0.5 * gain + shift

    return run


@pytest.mark.parametrize(("case", "training"), MODES)
def test_value_is_the_jacobian_with_the_statistics_held_constant(case: str, training: bool) -> None:
    for phi, function in ((nn.GELU, F.gelu), (nn.Tanh, torch.tanh), (nn.Hardtanh, F.hardtanh)):
        (layer, norm, act), x = build(case, training, phi)
        model = nn.Sequential(layer, norm, act)
        fixed = with_fixed_statistics(norm, layer(x).detach())

        def sample(n: int, x_n: Tensor, fixed=fixed, layer=layer, function=function) -> Tensor:
            return function(fixed(n, layer(x_n.unsqueeze(0))[0]))

        truth = [jacrev(partial(sample, n))(x_n).square().sum() for n, x_n in enumerate(x)]
        penalty = DREG(reduction="none")
        close(penalty(model, x)[1], torch.stack(truth))
        assert penalty.layers_found == ["0"]
        summed = DREG(reduction="sum")
        close(summed(model, x)[1], torch.stack(truth).sum())


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"use_weight": False}], ids=str)
@pytest.mark.parametrize(("case", "training"), MODES)
def test_gradient_goes_through_the_statistics(
    case: str, training: bool, options: dict[str, Any]
) -> None:
    """Finite differences of the value, in the input and every parameter."""
    model, x = build(case, training, nn.GELU)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    names = [name for name, _ in model.named_parameters()]
    called = DREG(**options)

    def value(x: Tensor, *parameters: Tensor) -> Tensor:
        given = dict(zip(names, parameters, strict=True))
        wrapped = Functional(model, {**given, **{k: b.clone() for k, b in buffers.items()}})
        return called(wrapped, x)[1]

    inputs = [
        x.requires_grad_(),
        *[p.detach().clone().requires_grad_() for p in model.parameters()],
    ]
    assert gradcheck(value, inputs)


class Functional(nn.Module):
    """A model run with other parameters and buffers."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.tensors = model, tensors

    def forward(self, x: Tensor) -> Tensor:
        return functional_call(self.model, self.tensors, (x,))


@pytest.mark.parametrize("case", ["linear-batchnorm", "conv-batchnorm", "tokens-layernorm"])
def test_second_derivative_goes_through_the_statistics(case: str) -> None:
    model, x = build(case, True, nn.GELU)
    called, x = DREG(), x.requires_grad_()
    assert gradgradcheck(lambda x, w: called(with_weight(model, w), x)[1], (x, model[0].weight))


def with_weight(model: nn.Sequential, w: Tensor) -> nn.Module:
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    return Functional(model, {"0.weight": w, **buffers})


def test_attached_equals_called() -> None:
    for case in LAYERS:
        model, x = build(case, True, nn.GELU)
        called = DREG()(model, x)[1]
        expected = torch.autograd.grad(called, list(model.parameters()))
        penalty = DREG(model)
        model(x)
        value = penalty()
        close(value, called)
        close(torch.autograd.grad(value, list(model.parameters())), expected)


def test_other_norms_are_left_out_with_a_reason() -> None:
    model = nn.Sequential(
        *(nn.Linear(4, 6), nn.RMSNorm(6), nn.GELU()),
        *(nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6), nn.GELU()),
        *(nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(), nn.GELU()),
        *(nn.Linear(6, 6), nn.GELU()),
    )
    penalty = DREG(model)
    model(torch.randn(5, 4))
    penalty()
    assert penalty.layers_found == ["11"]
    reasons = dict(penalty.layers_left_out)
    none = "no activation that fastjac sees follows"
    assert reasons["0"] == f"{none} it, but F.rms_norm"
    assert reasons["3"] == f"{none} its norm, but F.layer_norm"
    assert reasons["7"] == f"{none} its norm, but F.dropout"


@pytest.mark.parametrize("call", ["layer_norm", "native_layer_norm.default"])
def test_norms_of_an_exported_model_are_refused_in_forward_mode(call: str) -> None:
    """Torch's forward-mode derivative of them is right, its gradient is not."""
    op = functools.reduce(getattr, call.split("."), torch.ops.aten)

    class Exported(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            found = op(self.a(x), [4], None, None, 1e-5)
            return self.b(self.act(found if isinstance(found, Tensor) else found[0]))

    with pytest.raises(NotImplementedError, match="whose gradient is wrong: call F.layer_norm"):
        AccumulatedDREG()(Exported(), torch.randn(5, 3))
