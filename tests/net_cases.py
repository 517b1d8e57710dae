"""Programs for the sweeps of `fastjac.ops.net`, and what autograd computes for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import IDS, KERNEL_ROWS, get
from fastjac.ops.net import ACT, ADD, CAT, INPUT, LINEAR, NORM, SCALE, rows

Step = tuple[float, ...]


def linear(value: int, weight: int, bias: int = -1) -> Step:
    return LINEAR, value, 0, weight, bias


def act(value: int, fn: str, *params: float) -> Step:
    return ACT, value, 0, IDS[fn], 0, *params


def add(a: int, b: int) -> Step:
    return ADD, a, b


def cat(a: int, b: int) -> Step:
    return CAT, a, b


def scale(value: int, number: float) -> Step:
    return SCALE, value, 0, 0, 0, number


def norm(value: int, weight: int = -1, bias: int = -1) -> Step:
    return NORM, value, 0, weight, bias, 1e-3


D, C, M = 3, 5, 2  # widths of the input, the hidden layers and the output

# The steps after the input, the widths of weights and of biases.
# fmt: off
PROGRAMS: dict[str, tuple[list[Step], list[tuple[int, ...]], list[int]]] = {
    "chain": (
        [linear(0, 0, 0), act(1, "gelu"), linear(2, 1), linear(3, 2, 1), act(4, "tanh"),
         linear(5, 3, 2)],
        [(C, D), (C, C), (C, C), (M, C)], [C, C, M],
    ),
    "skip": (  # a residual block
        [linear(0, 0, 0), act(1, "silu"), linear(2, 1, 1), act(3, "sigmoid"), linear(4, 2, 2),
         add(1, 5), act(6, "gelu"), linear(7, 3)],
        [(C, D), (C, C), (C, C), (M, C)], [C, C, C],
    ),
    "cat": (  # DeepSDF: the coordinates are concatenated again in the middle
        [linear(0, 0, 0), act(1, "softplus", 3.0, 20.0), cat(2, 0), linear(3, 1, 1),
         act(4, "softplus", 3.0, 20.0), cat(0, 5), cat(6, 6), linear(7, 2, 2)],
        [(C, D), (C, C + D), (M, 2 * (C + D))], [C, C, M],
    ),
    "scale": (
        [linear(0, 0, 0), scale(1, -0.5), act(2, "tanh"), scale(3, 3.0), linear(4, 1), scale(5, 2)],
        [(C, D), (M, C)], [C],
    ),
    "relu": (
        [linear(0, 0, 0), act(1, "relu"), linear(2, 1, 1), act(3, "relu"), add(2, 4),
         linear(5, 2, 2)],
        [(C, D), (C, C), (M, C)], [C, C, M],
    ),
    "shared": (  # a weight and a bias are in two steps, and a step reads a value twice
        [linear(0, 0, 0), act(1, "gelu"), linear(2, 1, 1), act(3, "mish"), linear(4, 1, 1),
         add(5, 5), act(6, "tanh"), act(6, "sine", 2.0), add(7, 8), linear(9, 2)],
        [(C, D), (C, C), (M, C)], [C, C],
    ),
    "branches": (  # x goes to an activation, and the output is that of one
        [act(0, "tanh"), linear(1, 0, 0), linear(0, 0), add(2, 3), linear(4, 1, 1),
         act(4, "elu", 1), linear(6, 1), add(5, 7), scale(8, 0.5), add(9, 4), act(10, "silu"),
         linear(11, 2), act(12, "softsign")],
        [(C, D), (C, C), (M, C)], [C, C],
    ),
    "norms": (  # of a value that is read twice, of a linear step, and of the input
        [norm(0), linear(1, 0, 0), norm(2, 1, 1), act(3, "gelu"), linear(4, 2, 2), add(2, 5),
         norm(6, 3), linear(7, 4), act(8, "tanh"), norm(9, 3, 1), add(9, 10), linear(11, 5)],
        [(C, D), (C,), (C, C), (C,), (C, C), (M, C)], [C, C, C],
    ),
}
# fmt: on


def layer_norm(a: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """By its formula, since the second derivative of torch's own function is wrong in places."""
    hat = (a - a.mean(-1, keepdim=True)) * (a.var(-1, keepdim=True, correction=0) + eps).rsqrt()
    out = hat if weight is None else hat * weight
    return out if bias is None else out + bias


@dataclass
class Case:
    """Random operands of a program."""

    steps: list[Step]
    weights: list[Tensor]
    biases: list[Tensor]
    x: Tensor
    w: Tensor  # [K, N, M]
    u: Tensor  # [K, N, D]
    grad: Tensor
    factor: Tensor  # [K N]
    plan: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.plan = rows([(INPUT, self.x.shape[1]), *self.steps])

    @classmethod
    def of(cls, name: str, n: int = 13, k: int = 1) -> Case:
        steps, weights, biases = PROGRAMS[name]

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        return cls(
            steps,
            [random(*shape) / 2 for shape in weights],
            [random(width) for width in biases],
            *(random(n, D), random(k, n, M), random(k, n, D), random(n, M), random(k * n)),
        )

    def to(self, dtype: torch.dtype) -> Case:
        weights, biases = ([t.to(dtype) for t in ts] for ts in (self.weights, self.biases))
        others = (t.to(dtype) for t in (self.x, self.w, self.u, self.grad, self.factor))
        return Case(self.steps, weights, biases, *others)

    def values(self, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
        """All values of the program, by torch."""
        values = [x]
        for kind, first, *rest in self.steps:
            a = values[int(first)]
            if kind == LINEAR:
                bias = biases[int(rest[2])] if rest[2] >= 0 else None
                values.append(torch.nn.functional.linear(a, weights[int(rest[1])], bias))
            elif kind == ACT:
                row = KERNEL_ROWS[int(rest[1])]
                named = dict(zip(row.params, rest[3:], strict=True))
                values.append(get(row.name).torch_function(**named)(a))
            elif kind == NORM:
                weight = weights[int(rest[1])] if rest[1] >= 0 else None
                bias = biases[int(rest[2])] if rest[2] >= 0 else None
                values.append(layer_norm(a, weight, bias, rest[3]))
            elif kind == SCALE:
                values.append(a * rest[3])
            else:
                b = values[int(rest[0])]
                values.append(a + b if kind == ADD else torch.cat([a, b], dim=1))
        return values

    def truth(self, u: str) -> dict[str, Any]:
        """The output, v, J u and the gradients, of ``u``: "none", "given" or "factor"."""
        leaves = [t.clone().requires_grad_() for t in (*self.weights, *self.biases, self.x)]
        w, b = leaves[: len(self.weights)], leaves[len(self.weights) : -1]
        x = leaves[-1]
        f: Callable[[Tensor], Tensor] = lambda x: self.values(x, w, b)[-1]  # noqa: E731
        output = f(x)
        vs = [torch.autograd.grad(output, x, w_k, create_graph=True)[0] for w_k in self.w]
        v = torch.stack(vs)
        total = (self.grad * output).sum()
        if u == "given":
            total = total + (self.u * v).sum()
        elif u == "factor":
            total = total + (self.factor.view(len(v), -1) * v.square().sum(2)).sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        tangents = [torch.func.jvp(f, (x.detach(),), (u_k,))[1] for u_k in self.u]
        return {"output": output, "v": v, "ju": torch.stack(tangents), "grads": grads}

    def given(self) -> list[Tensor]:
        """``saved`` of what torch saves in a forward: outputs of tanh, sigmoid and relu, else z.

        The plan is changed accordingly.
        """
        values = self.values(self.x, self.weights, self.biases)
        nothing = self.x.new_empty(0, 0)
        saved: list[Tensor] = []
        norms: list[Tensor] = []
        read = set()
        for i, (kind, first, *rest) in enumerate(self.steps, 1):
            if kind == LINEAR and first:
                read.add(int(first))
            if kind == NORM:
                a = values[int(first)]
                variance = a.var(1, keepdim=True, correction=0)
                norms += [a, a.mean(1, keepdim=True), (variance + rest[3]).rsqrt()]
            if kind != ACT:
                continue
            name = KERNEL_ROWS[int(rest[1])].name
            s = values[int(first)]
            if name in ("tanh", "sigmoid", "relu"):
                s = values[i]
                self.plan[i, 3] = IDS["relu" if name == "relu" else f"{name}_of_output"]
            saved += [s, nothing, nothing]
        return [*saved, *[values[i] for i in sorted(read)], *norms]
