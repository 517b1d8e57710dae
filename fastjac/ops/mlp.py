"""``mlp_*``: the sweeps of `net` through an MLP, as ops of a graph of ``torch.compile``.

They differ from those of `net` in what a compiler must know: the plan is a list of numbers, the
state of each sweep is one flat tensor, whose size follows from the plan, and the number of rows of
a tile is found in C++, so that the batch may have any size. With x ``[N, d]`` and K cotangents or
tangents for each sample, ``[K N, ...]``:

    mlp_forward    x        → the output, ``saved``
    mlp_pull       w        → v = Jᵀ w, ‖v‖² of each row, ``deltas``
    mlp_push       u        → J u, ``pushed``
    mlp_backward   grad, u  → the gradients of ⟨grad, output⟩ and of ⟨u, Jᵀ w⟩ together

`Output` and `Pull` are their derivatives. The backward of `Pull` leaves u and what `mlp_push` found
to the backward of `Output`, which computes all gradients in one sweep, as an MLP is used once for
the loss and once for the penalty. It finds it by its node in the graph, and runs later, since
`Pull` takes the output's ``link``. Both are differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import KERNEL_ROWS, MAX_PARAMS
from fastjac.ops.net import ACT, LINEAR
from fastjac.ops.registration import raw, register
from fastjac.torch_private import below_autograd, current_backward

COLUMNS = 5 + MAX_PARAMS

ONCE = (
    "the gradient of a penalty was computed with create_graph=True inside torch.compile, and its "
    'sweeps in C++ are differentiable once: use engine="autograd"'
)


class Output(torch.autograd.Function):
    """``(output, link, saved)`` of x, the weights and the biases."""

    @staticmethod
    def forward(ctx, plan, count, x, *parameters):
        weights, biases = list(parameters[:count]), list(parameters[count:])
        with below_autograd():
            output, saved = raw("mlp_forward")(x, weights, biases, plan)
        ctx.save_for_backward(x, saved, *weights)
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.biases = plan, len(biases)
        ctx.pushes = []  # what backwards of `Pull` have left, with the number of the backward
        return output, x.new_zeros(()), saved

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        x, saved, *weights = ctx.saved_tensors
        _, _, of_x, *of_parameters = ctx.needs_input_grad
        wanted = [float(needed) for needed in (*of_parameters, of_x)]
        now = current_backward()
        pushes = [push for task, *push in ctx.pushes if task == now] or [[None] * 4]
        ctx.pushes = []
        grad = None if grad is None else grad.contiguous()
        total: list[Any] = [None] * len(wanted)
        for u, factor, deltas, pushed in pushes:
            if grad is None and u is None:
                continue
            with below_autograd():
                found = raw("mlp_backward")(
                    *(grad, u, factor, x, weights, saved, deltas, pushed, wanted, ctx.plan)
                )
            total = [g if t is None else t + g for t, g in zip(total, found, strict=True)]
            grad = None
        total = [g if needed else None for g, needed in zip(total, wanted, strict=True)]
        return None, None, total[-1], *total[:-1]


class Pull(torch.autograd.Function):
    """``(v, norms)`` of w; ``node`` is that of the `Output` or None."""

    @staticmethod
    def forward(ctx, node, plan, k, link, w, saved, *weights):
        with below_autograd():
            v, norms, deltas = raw("mlp_pull")(w, list(weights), saved, k, plan)
        ctx.save_for_backward(v, saved, deltas, *weights)
        ctx.set_materialize_grads(False)
        ctx.node, ctx.plan, ctx.k = node, plan, k
        return v, norms

    @staticmethod
    def backward(ctx, u, factor):
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        v, saved, deltas, *weights = ctx.saved_tensors
        of_w = ctx.needs_input_grad[4]
        nothing = [None] * (6 + len(weights))
        if u is None and factor is None:
            return tuple(nothing)
        if u is None:  # of Σ factor ‖v‖²
            u = v
        elif factor is not None:
            u, factor = u + 2 * factor.unsqueeze(1) * v, None
        pushed = None
        u = u.contiguous()
        factor = None if factor is None else factor.contiguous()
        if of_w:
            with below_autograd():
                nothing[4], pushed = raw("mlp_push")(
                    u, factor, list(weights), saved, deltas, ctx.k, ctx.plan
                )
        if ctx.node is not None:
            ctx.node.pushes.append((current_backward(), u, factor, deltas, pushed))
        return tuple(nothing)


@torch.compiler.allow_in_graph
def output_in_graph(plan, count, x, *parameters):
    return Output.apply(plan, count, x, *parameters)


@torch.compiler.allow_in_graph
def pull_in_graph(plan, k, link, w, saved, *weights):
    return Pull.apply(link.grad_fn, plan, k, link, w, saved, *weights)


# ---- the sizes of the state


def _steps(plan: Sequence[float]) -> list[Sequence[float]]:
    return [plan[i : i + COLUMNS] for i in range(0, len(plan), COLUMNS)]


def _padded(n: Any) -> Any:
    return (n + 15) // 16 * 16


class _Sizes:
    """How many numbers each list of `net` has, for n samples and K cotangents."""

    def __init__(self, plan: Sequence[float], weights: Sequence[Tensor]) -> None:
        steps = _steps(plan)
        self.widths = [int(steps[0][1])]
        for kind, value, _, number, *_ in steps[1:]:
            self.widths.append(
                weights[int(number)].shape[0] if kind == LINEAR else self.widths[int(value)]
            )
        self.acts = [i for i, step in enumerate(steps) if step[0] == ACT]
        self.curved = [i for i in self.acts if not KERNEL_ROWS[int(steps[i][3])].is_zero(2)]
        linears = [i for i, step in enumerate(steps) if step[0] == LINEAR]
        self.kept = sorted({int(steps[i][1]) for i in linears} - {0})
        # A linear step that an activation follows is not kept.
        self.open = [i for i in linears if i + 1 not in self.acts]

    def total(self, steps: Sequence[int], rows: Any) -> Any:
        return sum(_padded(rows * self.widths[i]) for i in steps)

    def saved(self, n: Any) -> Any:
        return self.total([*self.acts, *self.curved, *self.kept], n)

    def deltas(self, n: Any, k: int) -> Any:
        return self.total([*self.acts, *self.open], k * n)

    def pushed(self, n: Any, k: int) -> Any:
        return self.total(self.curved, n) + self.total(self.kept, k * n)


# ---- the raw ops


def _fake_forward(x, weights, biases, plan):
    sizes = _Sizes(plan, weights)
    n = x.shape[0]
    return x.new_empty(n, sizes.widths[-1]), x.new_empty(sizes.saved(n))


def _fake_pull(w, weights, saved, k, plan):
    sizes, rows = _Sizes(plan, weights), w.shape[0]
    v = w.new_empty(rows, sizes.widths[0])
    return v, w.new_empty(rows), w.new_empty(sizes.deltas(rows // k, k))


def _fake_push(u, factor, weights, saved, deltas, k, plan):
    sizes, rows = _Sizes(plan, weights), u.shape[0]
    return u.new_empty(rows, sizes.widths[-1]), u.new_empty(sizes.pushed(rows // k, k))


def _fake_backward(grad, u, factor, x, weights, saved, deltas, pushed, wanted, plan):
    shapes = [tuple(w.shape) for w in weights]
    biases: dict[int, int] = {}
    for kind, _, _, weight, bias, *_ in _steps(plan):
        if kind == LINEAR and bias >= 0:
            biases[int(bias)] = shapes[int(weight)][0]
    shapes += [(biases[i],) for i in sorted(biases)]
    found = [x.new_empty(shape if w else 0) for shape, w in zip(shapes, wanted[:-1], strict=True)]
    return [*found, torch.empty_like(x) if wanted[-1] else x.new_empty(0, x.shape[1])]


_INSTEAD = "use a penalty with engine='auto' inside torch.compile"
register(
    "mlp_forward(Tensor x, Tensor[] weights, Tensor[] biases, float[] plan) -> (Tensor, Tensor)",
    derivative=_INSTEAD,
    fake=_fake_forward,
)
register(
    "mlp_pull(Tensor w, Tensor[] weights, Tensor saved, int k, float[] plan)"
    " -> (Tensor, Tensor, Tensor)",
    derivative=_INSTEAD,
    fake=_fake_pull,
)
register(
    "mlp_push(Tensor u, Tensor? factor, Tensor[] weights, Tensor saved, Tensor deltas, int k,"
    " float[] plan) -> (Tensor, Tensor)",
    derivative=_INSTEAD,
    fake=_fake_push,
)
register(
    "mlp_backward(Tensor? grad, Tensor? u, Tensor? factor, Tensor x, Tensor[] weights,"
    " Tensor saved, Tensor? deltas, Tensor? pushed, float[] wanted, float[] plan) -> Tensor[]",
    derivative=_INSTEAD,
    fake=_fake_backward,
)
