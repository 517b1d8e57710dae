"""Small layers of an ``nn.Sequential`` that follow one another: one call in C++ in each direction.

In a small layer almost all of the time is spent between the kernels: in modules that call forwards,
in autograd nodes and in allocations. Nobody sees the tensors inside a Sequential, so a `Run` of
Linear modules and their activations is one autograd node. For L layers with batch N it returns

    a_L      v = v_0 + scale Σ_l Σ_c s_lc r_lc

with ``s`` and ``r`` as in `layer_act`, where ``v_0`` is the total of the layers before.

Whatever could show a difference to calling the modules one by one is looked at in each call
(`Run.parameters`): hooks, a replaced forward or weight, autocast, checkpoints, modes of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastjac import torch_private
from fastjac.activations import IDS, MAX_PARAMS, get
from fastjac.layerwise.layers import LayerCall, Nonlinearity, Table
from fastjac.nn import hooked
from fastjac.ops.act_stats import composed
from fastjac.ops.autograd import Function, recorded, transformed
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import raw, register
from fastjac.ops.row_sqnorm import composed_rows
from fastjac.torch_private import below_autograd

SMALL = 1 << 16
"""Elements of x, a weight or an output up to which a layer is small.

In a larger one the kernels take the time, and a backward layer by layer frees memory earlier.
"""


def modules_only(looks: bool) -> bool:
    """Whether a call of a module does what its class says, and torch computes it as usual.

    ``looks`` says whether a `calls.Calls` of the pass is active.
    """
    return torch.is_grad_enabled() and not (
        torch_private.has_any_global_hook()
        or transformed()
        or torch_private.saved_tensor_hooks() is not None
        or torch_private.any_mode(1 if looks else 0)
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
    )


class Run:
    """Pairs of a Linear and an activation module, given by the forwards that a watch put there."""

    def __init__(self, pairs: list[tuple[Any, Any]]) -> None:
        self.pairs = pairs
        self.stale = False  # whether an activation has become another one
        self.phis: list[Nonlinearity] = [activation.phi for _, activation in pairs]
        self.biased = [linear.module._parameters.get("bias") is not None for linear, _ in pairs]
        rows = []
        for phi, biased in zip(self.phis, self.biased, strict=True):
            assert phi.fn is not None
            params = get(phi.fn).param_values(phi.params)
            rows.append((IDS[phi.fn], biased, *params, *[0.0] * (MAX_PARAMS - len(params))))
        self.plan = torch.tensor(rows, dtype=torch.float64, device="cpu")

    def parameters(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]] | None:
        """The weights and biases, if one call can take the place of the modules now."""
        dtype, n = x.dtype, x.numel()
        if dtype not in (torch.float32, torch.float64) or x.dim() < 2 or not 0 < n <= SMALL:
            return None
        if not (type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.is_contiguous()):
            return None
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        width = x.shape[-1]
        n //= width
        for (linear, activation), phi, biased in zip(
            self.pairs, self.phis, self.biased, strict=True
        ):
            module = linear.module
            state, other = vars(module), vars(activation.module)
            if hooked(state, other) or type(module) is not nn.Linear:
                return None
            if state.get("forward") is not linear or other.get("forward") is not activation:
                return None
            if activation.current() is not phi:
                self.stale = True
                return None
            weight, bias = state["_parameters"].get("weight"), state["_parameters"].get("bias")
            for t in (weight, bias) if biased else (weight,):
                if type(t) is not nn.Parameter or not (t.requires_grad and t.is_cpu):
                    return None
                if t.dtype is not dtype or not t.is_contiguous():
                    return None
            if not biased and ("bias" not in state["_parameters"] or bias is not None):
                return None
            if weight.shape[1] != width or not 0 < weight.numel() <= SMALL:
                return None
            width = weight.shape[0]
            if n * width > SMALL or (biased and bias.shape != (width,)):
                return None
            weights.append(weight)
            if biased:
                biases.append(bias)
        return weights, biases

    def __call__(
        self, x: Tensor, before: Tensor | None, weights: list[Tensor], biases: list[Tensor]
    ) -> tuple[Tensor, Tensor, list[Table]]:
        """``a_L``, the total, and the table of each layer."""
        kept: list[Tensor] = []
        a, total = _apply(x, before, self, kept, len(weights), *weights, *biases)
        tables, first = [], 0
        for w in weights:
            tables.append(Table(kept[0], first, w.shape[0]))
            first += 2 * w.shape[0]
        return a, total, tables

    def calls(self, x: Tensor, weights: list[Tensor]) -> list[LayerCall]:
        """The record of each layer."""
        found = []
        for (linear, _), w in zip(self.pairs, weights, strict=True):
            call = LayerCall(linear.layer, w, -1, w._version, 0, used=True)
            call.released_shape = (*x.shape[:-1], w.shape[0])
            found.append(call)
        return found


def runs_of(modules: list[Any], observer: Any, kinds: tuple[type, type]) -> dict[int, Run]:
    """The runs among the modules of a Sequential, by their first place.

    ``kinds`` are the classes of the forwards that a watch puts into layers and activations.
    """
    found: dict[int, Run] = {}
    pairs: list[tuple[Any, Any]] = []
    place = 0
    while place < len(modules):
        pair = [vars(m).get("forward") for m in modules[place : place + 2] if m is not None]
        if len(pair) == 2 and _fuses(pair[0], pair[1], observer, kinds):
            pairs.append((pair[0], pair[1]))
            place += 2
            continue
        if pairs:
            found[place - 2 * len(pairs)] = Run(pairs)
        pairs = []
        place += 1
    if pairs:
        found[place - 2 * len(pairs)] = Run(pairs)
    return found


def _fuses(linear: Any, activation: Any, observer: Any, kinds: tuple[Any, Any]) -> bool:
    if type(linear) is not kinds[0] or type(activation) is not kinds[1]:
        return False
    if linear.observer is not observer or activation.observer is not observer:
        return False
    if linear.previous is not None or activation.previous is not None:
        return False
    if not linear.layer.plain or linear.layer.hooked or type(linear.module) is not nn.Linear:
        return False
    if type(activation.module).__call__ is not nn.Module.__call__:
        return False
    phi = activation.phi
    foreign = phi.writes is not None  # a module that may do more than compute φ
    return not foreign and phi.fn is not None and phi.impl in ("auto", "cpu") and _runs_here()


def _runs_here() -> bool:
    device, dtype = torch.device("cpu"), torch.float32
    return all(OPS[op].select("auto", device, dtype) == "cpu" for op in ("act_stats", "row_sqnorm"))


class _LayersAct(Function):
    boxed_grads_call = True

    @staticmethod
    def forward(ctx, x, before, run, kept, count, *parameters):
        weights, biases = parameters[:count], parameters[count:]
        with below_autograd():
            a, state, table, total = raw("layers_act")(x, weights, biases, before, run.plan, 1.0)
        kept.append(table)
        ctx.save_for_backward(x, state, table, *parameters)
        ctx.set_materialize_grads(False)
        ctx.constants = run, count
        return a, total

    @staticmethod
    def backward(ctx, *grads):
        g, v = grads[0] if isinstance(grads[0], list) else grads
        x, state, table, *parameters = ctx.saved_tensors
        run, count = ctx.constants
        needs_x, needs_before, *_ = ctx.needs_input_grad
        rest = v if needs_before else None, None, None, None
        if recorded(g, v):
            grad_x, *others = _recorded_backward(g, v, x, run, count, parameters)
            return grad_x if needs_x else None, *rest, *others
        if g is not None and not g.is_contiguous():
            g = g.contiguous()
        with below_autograd():
            if v is None:  # no penalty, so the numbers in the table do not matter
                v, table = x.new_zeros(()), torch.zeros_like(table)
            grad_x, *found = raw("layers_act_backward")(
                g, v, x, parameters[:count], state, table, needs_x, run.plan, 1.0
            )
        weights, biases, left = [], [], iter(found)
        for biased in run.biased:
            weights.append(next(left))
            if biased:
                biases.append(next(left))
        ctx.maybe_clear_saved_tensors()
        return grad_x if needs_x else None, *rest, *weights, *biases


# Calls the C++ base directly, since forward mode and torch.func are not supported.
_apply = super(torch.autograd.Function, _LayersAct).apply


def _recorded_backward(g, v, x, run, count, parameters):
    """The same gradients, in operations that torch can differentiate."""
    with torch.enable_grad():
        # Of these views nothing else in the graph of x depends, for example on a shared weight.
        inputs = [t.view_as(t) for t in (x, *parameters)]
        if not x.requires_grad:
            inputs[0].requires_grad_()
        a, *views = inputs
        biases, value = iter(views[count:]), 0
        for weight, phi, biased in zip(views[:count], run.phis, run.biased, strict=True):
            z = nn.functional.linear(a, weight, next(biases) if biased else None)
            a, s = composed(z, None, z.dim() - 1, False, 1.0, phi.fn, phi.params, "auto")
            value = value + (s * composed_rows(weight)).sum()
        pairs = [(t, c) for t, c in ((a, g), (value, v)) if c is not None]
        outputs, cotangents = zip(*pairs, strict=True)
        return torch.autograd.grad(
            outputs, inputs, cotangents, create_graph=True, allow_unused=True
        )


# ---- the raw ops, for CPU tensors; without fake kernels, since no mode sees them


# Returns a_L, the state [z_1, a_1, z_2, …, z_L, –], the table [s_1, r_1, s_2, …] and v. x is
# [..., d]. All tensors are contiguous. `plan` is float64 and has a row for each layer: the id of φ,
# whether there is a bias, and MAX_PARAMS parameters of φ.
register(
    "layers_act(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? total, Tensor plan,"
    " float scale) -> Tensor[]",
    derivative="use linear, act_stats and row_sqnorm",
)
# Returns ∂x (empty if not `needs_x`), ∂W_1, ∂b_1 (if the layer has a bias), ∂W_2, …
register(
    "layers_act_backward(Tensor? g, Tensor v, Tensor x, Tensor[] weights, Tensor state,"
    " Tensor table, bool needs_x, Tensor plan, float scale) -> Tensor[]",
    derivative="use linear, act_stats and row_sqnorm",
)
