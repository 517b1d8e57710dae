"""The penalties in plain torch, as its users write them today: eager and under torch.compile.

Nothing here calls fastjac. :data:`INPUT_JACOBIAN` states each input-Jacobian penalty once, as the
cotangents ``w`` of the network's output and the per-sample value of ``v = J^T w``; the contestants
differ only in how they obtain ``v``. The layer-wise penalty is in ``layer_idioms``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastjac.bench.layer_idioms import EagerDreg, WrittenOutDreg
from fastjac.bench.problems import StepProblem


@dataclass(frozen=True)
class InputJacobian:
    """A penalty that is the mean over samples of a function of ``v = J^T w``.

    Attributes:
        cotangents: ``(output [N, m], target, projection) -> w [K, N, m]``. It is differentiated
            through: DataGrad's and JacReg's ``w`` depend on the parameters.
        per_sample: ``v [K, N, D] -> R [N]``.
    """

    cotangents: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    per_sample: Callable[[Tensor], Tensor]


def _given(output: Tensor, target: Tensor, projection: Tensor | None) -> Tensor:
    if projection is None:
        raise ValueError("projection: SpectReg needs one here, so that contestants share it")
    return projection


def _cross_entropy_gradient(output: Tensor, target: Tensor, projection: Tensor | None) -> Tensor:
    labels = torch.nn.functional.one_hot(target, output.shape[1]).to(output.dtype)
    return (output.softmax(dim=1) - labels).unsqueeze(0)


def _unit_vectors(output: Tensor, target: Tensor, projection: Tensor | None) -> Tensor:
    m = output.shape[1]
    eye = torch.eye(m, dtype=output.dtype, device=output.device)
    return eye.unsqueeze(1).expand(m, output.shape[0], m)


def _softmax_rows(output: Tensor, target: Tensor, projection: Tensor | None) -> Tensor:
    p = output.softmax(dim=1)
    return (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).transpose(0, 1)


def _ones(output: Tensor, target: Tensor, projection: Tensor | None) -> Tensor:
    return torch.ones_like(output).unsqueeze(0)


def _squared_norm(v: Tensor) -> Tensor:
    return v.square().sum(dim=(0, 2))


def _mean_squared_norm(v: Tensor) -> Tensor:
    return v.square().sum(dim=2).mean(dim=0)


def _norm_minus_one_squared(v: Tensor) -> Tensor:
    return (_squared_norm(v).sqrt() - 1).square()


INPUT_JACOBIAN = {
    "spectreg": InputJacobian(_given, _mean_squared_norm),
    "datagrad": InputJacobian(_cross_entropy_gradient, _squared_norm),
    "frobreg": InputJacobian(_unit_vectors, _squared_norm),
    "jacreg": InputJacobian(_softmax_rows, _squared_norm),
    "gradient-penalty": InputJacobian(_ones, _norm_minus_one_squared),
}


def eager_objective(problem: StepProblem, model: nn.Module) -> Callable[[], Tensor]:
    """``() -> loss + penalty`` through ``autograd.grad(create_graph=True)``."""
    if problem.penalty == "dreg":
        layers = EagerDreg(model)

        def layerwise() -> Tensor:
            output, value = layers(problem.x)
            return problem.loss(output, problem.target) + problem.weight * value

        return layerwise
    penalty = INPUT_JACOBIAN[problem.penalty]

    def objective() -> Tensor:
        x = problem.x.detach().requires_grad_()
        output = model(x)
        w = penalty.cotangents(output, problem.target, problem.projection)
        v = torch.stack(
            [torch.autograd.grad(output, x, row, create_graph=True)[0].flatten(1) for row in w]
        )
        return problem.loss(output, problem.target) + problem.weight * penalty.per_sample(v).mean()

    return objective


def jacobian_reg_objective(problem: StepProblem, model: nn.Module) -> Tensor:
    """Task loss plus facebookresearch's JacobianReg: one ``create_graph`` pass per projection.

    Their value is ``m/2 * mean ||J^T v||^2`` over projections on the unit sphere; here the given
    ``w`` takes the place of ``sqrt(m) v``, and the factor two is undone, so that the numbers are
    those of the other contestants. JacReg is JacobianReg of the probabilities.
    """
    x = problem.x.detach().requires_grad_()
    output = model(x)
    y = output.softmax(dim=1) if problem.penalty == "jacreg" else output
    n, m = y.shape
    given = problem.projection
    passes = m if given is None else len(given)
    value = x.new_zeros(())
    for k in range(passes):
        if given is None:
            v = torch.zeros_like(y)
            v[:, k] = 1
        else:
            v = given[k]
        (jv,) = torch.autograd.grad(
            y.reshape(-1), x, v.reshape(-1), retain_graph=True, create_graph=True
        )
        value = value + 0.5 * jv.norm() ** 2 / (n if given is None else n * passes)
    return problem.loss(output, problem.target) + problem.weight * (2 * value)


def functional_objective(problem: StepProblem, model: nn.Module) -> Callable[..., Tensor]:
    """``(parameters, x, target, projection) -> loss + penalty`` over ``torch.func``, to compile.

    BatchNorm's running statistics are taken out of ``model``: torch.func refuses to update them
    inside a transform. The outputs in training mode do not depend on them.
    """
    loss, weight = problem.loss, problem.weight
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
    if problem.penalty == "dreg":
        layers = WrittenOutDreg(model)

        def layerwise(
            parameters: dict[str, Tensor], x: Tensor, target: Tensor, projection: Tensor | None
        ) -> Tensor:
            named = {f"model.{name}": p for name, p in parameters.items()}
            output, value = torch.func.functional_call(layers, named, (x,))
            return loss(output, target) + weight * value

        return layerwise
    penalty = INPUT_JACOBIAN[problem.penalty]

    def objective(
        parameters: dict[str, Tensor], x: Tensor, target: Tensor, projection: Tensor | None
    ) -> Tensor:
        pullback: Callable[[Tensor], tuple[Tensor]]
        output, pullback = torch.func.vjp(  # type: ignore[misc]  # no has_aux: two values
            lambda x: torch.func.functional_call(model, parameters, (x,)), x
        )
        w = penalty.cotangents(output, target, projection)
        if len(w) == 1:
            v = pullback(w[0])[0].unsqueeze(0)
        else:
            v = torch.func.vmap(lambda row: pullback(row)[0])(w)
        return loss(output, target) + weight * penalty.per_sample(v.flatten(2)).mean()

    return objective
