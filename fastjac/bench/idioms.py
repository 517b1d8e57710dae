"""The penalties in plain torch, as its users write them today: eager and under torch.compile.

Nothing here calls fastjac, except that it finds the layers of a user's model (`plain_dreg`).
:data:`IDIOMS` states each penalty on the input Jacobian once, as the cotangents ``w`` of the
network's output and the per-sample value of ``v = J^T w``. The contestants differ only in how they
compute ``v``.

The layer-wise penalty is ``R_n = Σ_l Σ_p Σ_c φ'(y_lnpc)² k_lc² ‖W_l[c]‖²`` over the hidden layers
and their positions p, where ``y`` is the input of the activation. With a BatchNorm between layer
and activation, ``k_c² = γ_c² / (σ_c² + ε)``, else 1. The eager form observes the model by forward
hooks, and the form to compile is the model's forward rewritten. They find the layers by different
means, and the gate compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastjac.bench.networks import ResidualBlock, TransformerClassifier
from fastjac.bench.plain_dreg import PlainDreg
from fastjac.bench.problems import StepProblem
from fastjac.model_output import part_of


@dataclass(frozen=True)
class InputJacobian:
    """A penalty that is the mean over samples of a function of ``v = J^T w``.

    Attributes:
        ours: The name of the public class that computes it.
        cotangents: ``(output [N, m], target, projection) -> w [K, N, m]``. It is differentiated
            through, because ``w`` of DataGrad and JacReg depends on the parameters.
        per_sample: ``v [K, N, D] -> R [N]``.
        takes: The attributes of the problem that the public class takes by name.
        jacobian_reg: What JacobianReg differentiates, a function of the output; None if that
            algorithm cannot express the penalty.
    """

    ours: str
    cotangents: Callable[[Tensor, Tensor, Tensor], Tensor]
    per_sample: Callable[[Tensor], Tensor]
    takes: tuple[str, ...] = ()
    jacobian_reg: Callable[[Tensor], Tensor] | None = None

    suite = "input-jacobian"
    op = "act"

    def eager(self, problem: StepProblem, model: nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
        """``() -> (output, penalty)`` by ``autograd.grad(create_graph=True)``."""

        run = runner(problem, model)

        def forward() -> tuple[Tensor, Tensor]:
            x, output = run()
            flat = output.reshape(len(output), -1)
            w = self.cotangents(flat, problem.target, problem.projection)
            v = torch.stack(
                [torch.autograd.grad(flat, x, row, create_graph=True)[0].flatten(1) for row in w]
            )
            return output, self.per_sample(v).mean()

        return forward

    def functional(
        self, problem: StepProblem, model: nn.Module
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """``(parameters, x, target, projection) -> (output, penalty)``, to compile."""

        def forward(
            parameters: dict[str, Tensor], x: Tensor, target: Tensor, projection: Tensor
        ) -> tuple[Tensor, Tensor]:
            def run(x: Tensor) -> tuple[Tensor, Tensor]:
                with attention_twice(problem):
                    whole = torch.func.functional_call(model, parameters, (x,))
                output = part_of(whole, problem.output)
                return output.reshape(len(output), -1), output

            pullback: Callable[[Tensor], tuple[Tensor]]
            flat, pullback, output = torch.func.vjp(run, x, has_aux=True)  # type: ignore[misc]
            w = self.cotangents(flat, target, projection)
            if len(w) == 1:
                v = pullback(w[0])[0].unsqueeze(0)
            else:
                v = torch.func.vmap(lambda row: pullback(row)[0])(w)
            return output, self.per_sample(v.flatten(2)).mean()

        return forward

    def by_jacobian_reg(self, problem: StepProblem, model: nn.Module) -> tuple[Tensor, Tensor]:
        """``(output, penalty)`` by facebookresearch's JacobianReg: one pass per projection.

        JacobianReg computes ``m/2 * mean ||J^T v||^2`` over projections on the unit sphere. Here
        the given ``w`` takes the place of ``sqrt(m) v``, and the result is doubled, so that it is
        the value of the other contestants. JacReg is JacobianReg of the probabilities.
        """
        assert self.jacobian_reg is not None
        x, output = runner(problem, model)()
        y = self.jacobian_reg(output.flatten(1))
        given = problem.projection if "projection" in self.takes else None
        passes = y.shape[1] if given is None else len(given)
        value = x.new_zeros(())
        for k in range(passes):
            if given is None:
                v = torch.zeros_like(y)
                v[:, k] = 1
            else:
                v = given[k]
            (jv,) = torch.autograd.grad(y.reshape(-1), x, v.reshape(-1), create_graph=True)
            value = value + 0.5 * jv.norm() ** 2 / len(y)
        return output, 2 * value / (1 if given is None else passes)


def attention_twice(problem: StepProblem) -> AbstractContextManager[object]:
    """What users of ``scaled_dot_product_attention`` need: only one of its kernels differentiates
    twice."""
    return sdpa_kernel(SDPBackend.MATH) if problem.own else nullcontext()


def runner(problem: StepProblem, model: nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
    """``() -> (x, output)``: a run of the model, and what its output is differentiated with."""
    if problem.at is not None:
        hidden: list[Tensor] = []
        module = model.get_submodule(problem.at)

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # The output of a frozen embedding is a constant.
            output = output if output.requires_grad else output.detach().requires_grad_()
            hidden.append(output)
            return output

        module.register_forward_hook(keep)

    def run() -> tuple[Tensor, Tensor]:
        x = problem.x.detach()
        x = x.requires_grad_() if problem.at is None else x
        with attention_twice(problem):
            whole = model(x)
        return x if problem.at is None else hidden.pop(), part_of(whole, problem.output)

    return run


def _cross_entropy_gradient(output: Tensor, target: Tensor, projection: Tensor) -> Tensor:
    labels = F.one_hot(target, output.shape[1]).to(output.dtype)
    return (output.softmax(dim=1) - labels).unsqueeze(0)


def _unit_vectors(output: Tensor, target: Tensor, projection: Tensor) -> Tensor:
    n, m = output.shape
    eye = torch.eye(m, dtype=output.dtype, device=output.device)
    return eye.unsqueeze(1).expand(m, n, m)


def _softmax_rows(output: Tensor, target: Tensor, projection: Tensor) -> Tensor:
    p = output.softmax(dim=1)
    return (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).transpose(0, 1)


def _squared_norm(v: Tensor) -> Tensor:
    return v.square().sum(dim=(0, 2))


LAYERS = (nn.Linear, nn.Conv2d)
Layer = nn.Linear | nn.Conv2d


def hidden_layers(model: nn.Module) -> Iterator[tuple[Layer, nn.BatchNorm2d | None, nn.Module]]:
    """(Linear or convolution, BatchNorm or None, GELU module) of the benchmark's networks."""
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            children = list(module)
            for layer, second, third in zip_longest(children, children[1:], children[2:]):
                if not isinstance(layer, LAYERS):
                    continue
                if isinstance(second, nn.GELU):
                    yield layer, None, second
                elif isinstance(second, nn.BatchNorm2d) and isinstance(third, nn.GELU):
                    yield layer, second, third
        elif isinstance(module, ResidualBlock):  # the input of act2 is a sum with the shortcut
            yield module.conv1, module.bn1, module.act1
        elif isinstance(module, nn.TransformerEncoderLayer):
            assert isinstance(module.activation, nn.GELU)
            yield module.linear1, None, module.activation


def penalty_term(slope: Tensor, layer: Layer, gain: Tensor | None) -> Tensor:
    """``Σ_{n,p,c} φ'² k_c² ‖W[c]‖²`` of one layer; ``gain`` is ``k²``."""
    channel = slope.dim() - 1 if isinstance(layer, nn.Linear) else 1
    s = slope.square().sum([d for d in range(slope.dim()) if d != channel])
    r = layer.weight.square().flatten(1).sum(1)
    return (s * (r if gain is None else r * gain)).sum()


class EagerDreg:
    """``x -> (output, mean_n R_n)``; forward hooks keep what each hidden layer computes.

    ``φ'`` is ``autograd.grad(a, y, 1, create_graph=True)``, which was faster than writing it out
    (784-4x512-10, batch 128, 2 cores: 10.3 against 11.9 ms).

    Args:
        model: Gets the hooks. The activation functions of a Transformer are replaced by modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation = nn.GELU()
        self.layers = list(hidden_layers(model))
        if not self.layers:
            raise ValueError("The model has no Linear or convolution followed by a GELU module.")
        self.before_norm: dict[nn.Module, Tensor] = {}
        self.activations: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for _, norm, activation in self.layers:
            if norm is not None:
                norm.register_forward_pre_hook(self._note_before_norm)
            activation.register_forward_hook(self._note_activation)

    def _note_before_norm(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self.before_norm[module] = inputs[0]

    def _note_activation(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        self.activations[module] = inputs[0], output

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(x)
        value = x.new_zeros(())
        for layer, norm, activation in self.layers:
            y, a = self.activations.pop(activation)
            (slope,) = torch.autograd.grad(a, y, torch.ones_like(a), create_graph=True)
            gain = None
            if norm is not None:
                variance = self.before_norm.pop(norm).var((0, 2, 3), unbiased=False)
                gain = norm.weight.square() / (variance + norm.eps)
            value = value + penalty_term(slope, layer, gain)
        return output, value / x.shape[0]


class WrittenOutDreg(nn.Module):
    """The model as a module that returns ``(output, mean_n R_n)``, for ``torch.compile``.

    ``φ'`` of GELU and BatchNorm are written out, so that the variance of the penalty and that of
    the norm are one reduction. torch.compile fuses this form best.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        terms: list[Tensor] = []
        output = _run(self.model, x, terms)
        return output, torch.stack(terms).sum() / x.shape[0]


def _run(module: nn.Module, x: Tensor, terms: list[Tensor]) -> Tensor:
    """``module(x)``; appends the terms of its hidden layers."""
    if isinstance(module, ResidualBlock):
        z, k2 = _batch_norm(module.bn1, module.conv1(x))
        a = _gelu(module.act1, z, module.conv1, k2, terms)
        return module.act2(module.bn2(module.conv2(a)) + module.shortcut(x))
    if isinstance(module, TransformerClassifier):
        for block in module.encoder.layers:
            h = block.norm1(x)
            x = x + block.self_attn(h, h, h, need_weights=False)[0]
            z = block.linear1(block.norm2(x))
            x = x + block.linear2(_gelu(nn.GELU(), z, block.linear1, None, terms))
        return module.head(x.mean(dim=1))
    if not isinstance(module, nn.Sequential):
        return module(x)
    layer: Layer | None = None
    gain: Tensor | None = None
    for child in module:
        if isinstance(child, LAYERS):
            layer, gain, x = child, None, child(x)
        elif layer is not None and isinstance(child, nn.BatchNorm2d):
            x, gain = _batch_norm(child, x)
        elif layer is not None:
            x, layer = _gelu(child, x, layer, gain, terms), None
        else:
            x = _run(child, x, terms)
    return x


def _batch_norm(norm: nn.BatchNorm2d, z: Tensor) -> tuple[Tensor, Tensor]:
    """BatchNorm of a training step, and ``γ² / (σ² + ε)``."""
    variance, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    shift = norm.bias - mean * scale
    return z * scale[:, None, None] + shift[:, None, None], scale.square()


def _gelu(
    activation: nn.Module, z: Tensor, layer: Layer, gain: Tensor | None, terms: list[Tensor]
) -> Tensor:
    if not isinstance(activation, nn.GELU):
        raise TypeError(f"Only the derivative of GELU is written out, not that of {activation}.")
    cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    slope = cdf + z * torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    terms.append(penalty_term(slope, layer, gain))
    return F.gelu(z)


@dataclass(frozen=True)
class LayerWise:
    """The layer-wise penalty, which the public class of the name ``ours`` computes."""

    ours: str

    suite = "layer-wise"
    op = "act_stats"

    def eager(self, problem: StepProblem, model: nn.Module) -> Callable[[], tuple[Tensor, Tensor]]:
        """``() -> (output, mean_n R_n)`` by forward hooks."""
        if problem.own:
            return PlainDreg.eager(problem, model)
        layers = EagerDreg(model)
        return lambda: layers(problem.x)

    def functional(
        self, problem: StepProblem, model: nn.Module
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """``(parameters, x, target, projection) -> (output, mean_n R_n)``, to compile."""
        layers = WrittenOutDreg(model)

        def forward(
            parameters: dict[str, Tensor], x: Tensor, target: Tensor, projection: Tensor
        ) -> tuple[Tensor, Tensor]:
            named = {f"model.{name}": p for name, p in parameters.items()}
            return torch.func.functional_call(layers, named, (x,))

        return forward


Idiom = InputJacobian | LayerWise

#: Every penalty of the benchmark by its name.
IDIOMS: dict[str, Idiom] = {
    "spectreg": InputJacobian(
        "SpectReg",
        lambda output, target, projection: projection,
        lambda v: v.square().sum(dim=2).mean(dim=0),
        takes=("projection",),
        jacobian_reg=lambda output: output,
    ),
    "datagrad": InputJacobian(
        "DataGrad", _cross_entropy_gradient, _squared_norm, takes=("target",)
    ),
    "frobreg": InputJacobian(
        "FrobReg", _unit_vectors, _squared_norm, jacobian_reg=lambda output: output
    ),
    "jacreg": InputJacobian(
        "JacReg", _softmax_rows, _squared_norm, jacobian_reg=lambda output: output.softmax(dim=1)
    ),
    "gradient-penalty": InputJacobian(
        "GradientPenalty",
        lambda output, target, projection: torch.ones_like(output).unsqueeze(0),
        lambda v: (_squared_norm(v).sqrt() - 1).square(),
    ),
    "dreg": LayerWise("DREG"),
}
