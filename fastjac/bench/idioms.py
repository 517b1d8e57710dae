"""The penalties in plain torch, as its users write them today: eager and under torch.compile.

Nothing here calls fastjac. :data:`IDIOMS` states each penalty on the input Jacobian once, as the
cotangents ``w`` of the network's output and the per-sample value of ``v = J^T w``. The contestants
differ only in how they compute ``v``. The layer-wise penalty is in ``layer_idioms``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.bench.layer_idioms import LayerWise
from fastjac.bench.problems import StepProblem


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

        def forward() -> tuple[Tensor, Tensor]:
            x = problem.x.detach().requires_grad_()
            output = model(x)
            w = self.cotangents(output, problem.target, problem.projection)
            v = torch.stack(
                [torch.autograd.grad(output, x, row, create_graph=True)[0].flatten(1) for row in w]
            )
            return output, self.per_sample(v).mean()

        return forward

    def functional(self, model: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
        """``(parameters, x, target, projection) -> (output, penalty)``, to compile."""

        def forward(
            parameters: dict[str, Tensor], x: Tensor, target: Tensor, projection: Tensor
        ) -> tuple[Tensor, Tensor]:
            pullback: Callable[[Tensor], tuple[Tensor]]
            output, pullback = torch.func.vjp(  # type: ignore[misc]  # no has_aux: two values
                lambda x: torch.func.functional_call(model, parameters, (x,)), x
            )
            w = self.cotangents(output, target, projection)
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
        x = problem.x.detach().requires_grad_()
        output = model(x)
        y = self.jacobian_reg(output)
        given = "projection" in self.takes
        rows = problem.projection if given else _unit_vectors(y, problem.target, y)
        value = x.new_zeros(())
        for v in rows:
            (jv,) = torch.autograd.grad(y, x, v, create_graph=True)
            value = value + 0.5 * jv.norm() ** 2 / len(y)
        return output, 2 * value / (len(rows) if given else 1)


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
