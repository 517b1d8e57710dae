"""What a penalty must be, from finite differences.

The Jacobian J ``[N, m, N, D]`` of the output is that of torch's first derivatives, one row at a
time, which must equal the differences of the output. A value is a formula of J, and its derivative
along a direction of x and all parameters at once comes from differences of such values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, einsum, nn

import fastjac
from fastjac.penalty import Penalty

STEP = 4e-6  # small, so that kinks are rarely between two places
TOLERANCE = 1e-6  # relative; the differences are usually right to 1e-9


class Run(NamedTuple):
    """What a value is computed from."""

    j: Tensor  # [N, m, N, D]
    output: Tensor  # [N, m]
    w: Tensor  # [3, N, m], cotangents
    t: Tensor  # [3, N, D], tangents
    y: Tensor  # [N], classes


class Kind(NamedTuple):
    """A penalty, its arguments, and its values R_n from the Jacobian."""

    make: Callable[..., Penalty]
    arguments: Callable[[Run], dict[str, Any]]
    values: Callable[[Run], Tensor]
    scalar: bool = False  # whether it is of the first output alone


def pulled(run: Run, w: Tensor) -> Tensor:
    return einsum("kam,ambd->kbd", w, run.j)


def squares(v: Tensor) -> Tensor:
    return v.square().sum((0, 2))


def rows(run: Run) -> Tensor:
    n, m = run.output.shape
    return torch.eye(m).unsqueeze(1).expand(m, n, m)


def projected(k: int) -> Kind:
    return Kind(
        fastjac.SpectReg,
        lambda run: {"projection": run.w[:k]},
        lambda run: squares(pulled(run, run.w[:k])) / k,
    )


def pushed(k: int) -> Kind:
    return Kind(
        fastjac.TangentProp,
        lambda run: {"tangents": run.t[:k]},
        lambda run: squares(einsum("ambd,kbd->kam", run.j, run.t[:k])) / k,
    )


def residual(run: Run) -> Tensor:
    one_hot = nn.functional.one_hot(run.y, run.output.shape[1])
    return (run.output.softmax(1) - one_hot)[None]


def softmax_rows(run: Run) -> Tensor:
    p = run.output.softmax(1)
    return torch.diag_embed(p).transpose(0, 1) - p.T[..., None] * p


def target(run: Run) -> Tensor:
    return run.w.flatten()[0] * torch.ones(run.j.shape[0], *run.j.shape[1::2])


KINDS: dict[str, Kind] = {
    "SpectReg(1)": projected(1),
    "SpectReg(3)": projected(3),
    "FrobReg": Kind(fastjac.FrobReg, lambda run: {}, lambda run: squares(pulled(run, rows(run)))),
    "DataGrad": Kind(
        fastjac.DataGrad,
        lambda run: {"target": run.y},
        lambda run: squares(pulled(run, residual(run))),
    ),
    "JacReg": Kind(
        fastjac.JacReg, lambda run: {}, lambda run: squares(pulled(run, softmax_rows(run)))
    ),
    "Sobolev": Kind(
        fastjac.Sobolev,
        lambda run: {"target_grad": target(run)},
        lambda run: squares(pulled(run, rows(run)) - target(run).transpose(0, 1)),
    ),
    "GradientPenalty": Kind(
        fastjac.GradientPenalty,
        lambda run: {},
        lambda run: (pulled(run, rows(run)[:1]).norm(dim=2)[0] - 1).square(),
        scalar=True,
    ),
    "TangentProp(1)": pushed(1),
    "TangentProp(3)": pushed(3),
}
ENGINES = ("auto", "chain", "autograd", "graph")


class First(nn.Module):
    """The first output of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, 0]


class Truth:
    """The values of all penalties on a model, and their derivatives along one direction."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.model, self.x = model, x
        n, d = x.shape
        output, j = self.jacobian()
        m = output.shape[1]
        self.fixed = {
            "w": torch.randn(3, n, m),
            "t": torch.randn(3, n, d),
            "y": torch.arange(n) % m,
        }
        self.of_output = torch.randn_like(output)
        torch.testing.assert_close(j, self.differences().view(j.shape), rtol=1e-6, atol=1e-6)
        self.run = Run(j, output, **self.fixed)
        self.values = {name: kind.values(self.run).mean() for name, kind in KINDS.items()}
        self.tensors = [x, *model.parameters()]
        self.direction = [torch.randn_like(t) for t in self.tensors]
        # (8 (f(h) − f(−h)) − (f(2h) − f(−2h))) / 12h has an error of h⁴.
        near, far = ([self.moved(k * s * STEP) for s in (1, -1)] for k in (1, 2))
        self.slopes = {
            name: (8 * (near[0][name] - near[1][name]) - (far[0][name] - far[1][name])) / 12 / STEP
            for name in KINDS
        }

    def output(self) -> Tensor:
        torch.default_generator.manual_seed(1)  # for dropout; torch.manual_seed takes 0.2 ms
        return self.model(self.x)

    def jacobian(self) -> tuple[Tensor, Tensor]:
        """The output and its Jacobian, row by row."""
        output = self.output()
        found = [
            torch.autograd.grad(y, self.x, retain_graph=True)[0] for y in output.flatten().unbind()
        ]
        return output.detach().clone(), torch.stack(found).view(*output.shape, *self.x.shape)

    def differences(self) -> Tensor:
        """The Jacobian by central differences, ``[N m, N D]``."""
        found = []
        for element in self.x.detach().view(-1).unbind():
            before = element.clone()
            element.copy_(before + STEP)
            above = self.output().detach().clone()  # it may be x itself
            element.copy_(before - STEP)
            found.append((above - self.output().detach()).flatten() / (2 * STEP))
            element.copy_(before)
        return torch.stack(found, 1)

    def moved(self, step: float) -> dict[str, Tensor]:
        """``mean R + ⟨of_output, output⟩`` at another place."""
        self.move(step)
        output, j = self.jacobian()
        self.move(-step)
        run = Run(j, output, **self.fixed)
        of_output = (self.of_output * output).sum()
        of_first = (self.of_output * output)[:, 0].sum()
        return {
            name: kind.values(run).mean() + (of_first if kind.scalar else of_output)
            for name, kind in KINDS.items()
        }

    def move(self, step: float) -> None:
        with torch.no_grad():
            for t, d in zip(self.tensors, self.direction, strict=True):
                t.add_(d, alpha=step)

    # ---- fastjac

    def wrong(self, name: str, engine: str) -> str | None:
        """What is wrong with a penalty and an engine; raises what it raises."""
        kind = KINDS[name]
        model = First(self.model) if kind.scalar else self.model
        arguments = kind.arguments(self.run)
        torch.default_generator.manual_seed(1)
        if engine == "graph":
            output = model(self.x)
            value = kind.make()(self.x, output, **arguments)
        else:
            output, value = kind.make(engine=engine)(model, self.x, **arguments)
        of_output = self.of_output[:, 0] if kind.scalar else self.of_output
        slope = self.slope(value + (of_output * output).sum())
        for what, found, truth in (
            ("value", value, self.values[name]),
            ("gradient", slope, self.slopes[name]),
        ):
            error = abs(found.item() - truth.item()) / max(abs(truth.item()), 0.1)
            if not error < TOLERANCE:
                return f"{what} {found.item():.8g}, truth {truth.item():.8g}"
        return None

    def slope(self, value: Tensor) -> Tensor:
        """The derivative along the direction."""
        grads = torch.autograd.grad(value, self.tensors, allow_unused=True)
        pairs = zip(grads, self.direction, strict=True)
        return torch.stack([(g * d).sum() for g, d in pairs if g is not None]).sum()

    def slope_by_torch(self) -> Tensor:
        """That of ``SpectReg(1)`` in plain PyTorch."""
        output = self.output()
        w = self.fixed["w"][0]
        (v,) = torch.autograd.grad(output, self.x, w, create_graph=True)
        return self.slope(v.square().sum(1).mean() + (self.of_output * output).sum())
