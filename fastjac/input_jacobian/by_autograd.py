"""The pullback of an existing autograd graph, by ``torch.autograd.grad``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import arguments
from fastjac.input_jacobian.pullback import Pullback
from fastjac.ops.autograd import Function
from fastjac.penalty import call_model
from fastjac.per_sample import measure
from fastjac.torch_private import comptime, shape_of_node, traced_graphs


class AutogradPullback(Pullback):
    """The pullback of ``x`` and ``output`` in one graph; differentiable as often as the graph."""

    def __init__(self, x: Tensor, output: Tensor, operations: Operations | None = None) -> None:
        self.x, self.output, self.operations = x, output, operations

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        return vjp(self.output, self.x, w, chunk_size, self.operations)

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        if w.shape[0] > 1:
            return super().squared_norms(w, chunk_size)
        # Without the dimension of size 1, whose views are nodes of the graph (15 µs a step).
        return measure(
            _checked(self.output, self.x, w.squeeze(0), 0, self.operations), "l2_squared", 1
        )

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        """A VJP of a VJP, since ``v(w) = Jᵀw`` is linear in ``w`` and ``J u = (∂v/∂w)ᵀ u``.

        Raises for the norms of `WRONG_THIRD`: the gradient of the result is a third derivative.
        """
        if torch.compiler.is_compiling():
            comptime(REFUSE_JVP)
        elif norm := (self.operations or Operations(self.output)).wrong_third:
            raise RuntimeError(JVP_OF_NORM.format(norm))
        w = torch.zeros_like(self.output, requires_grad=True)
        (v,) = vjp(self.output, self.x, w.unsqueeze(0))
        return vjp(v, w, u, chunk_size)

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        return AutogradPullback(self.x, f(self.output))


class Composed(Pullback):
    """The pullback of ``f(model(x))``: autograd handles ``f``, and ``inner`` the model."""

    def __init__(self, inner: Pullback, f: Callable[[Tensor], Tensor]) -> None:
        self.x, self.output, self.inner = inner.x, f(inner.output), inner
        self.outer = AutogradPullback(inner.output, self.output)

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        return self.inner.vjp(self.outer.vjp(w, chunk_size), chunk_size)

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        return self.inner.squared_norms(self.outer.vjp(w, chunk_size), chunk_size)

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        return self.outer.jvp(self.inner.jvp(u, chunk_size), chunk_size)

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        return Composed(self, f)


# What torch 2.13 computes wrongly without an error, by the node of its graph. Each is shown by a
# test (`tests/test_torch_wrong.py`), which fails once torch is right.

WRONG_THIRD = {
    "NativeLayerNormBackward0": "layer_norm",
    "NativeBatchNormBackward0": "batch_norm or instance_norm",
    "CudnnBatchNormBackward0": "batch_norm or instance_norm",
    "MiopenBatchNormBackward0": "batch_norm or instance_norm",
}
"""Norms in training mode whose third derivative takes mean and variance for constants."""

WRONG_AGAIN = {
    node.replace("Backward0", "BackwardBackward0"): name for node, name in WRONG_THIRD.items()
}
"""The first derivatives of these norms, as a part of a model; a penalty needs two more."""

WRONG_BATCHED = {"NativeGroupNormBackward0"}
"""Whose second derivative is wrong for several cotangents at once."""

_ATTENTION = "run the model under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"

MISSING = {
    "HardsigmoidBackward0": "use the model form, penalty(model, x, ...), with engine='auto'",
    "ScaledDotProductFlashAttentionForCpuBackward0": _ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": _ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": _ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": _ATTENTION,
}
"""Operations whose second derivative torch does not have, and what to do."""

JVP_OF_NORM = (
    "the gradient of a JVP through {} is needed, which torch computes wrongly (it takes mean and "
    "variance for constants): use the model form, penalty(model, x, ...), with engine='auto' or "
    "'chain', outside of torch.compile"
)

BATCHED_NORM = (
    "chunk_size is more than 1, and torch differentiates {} wrongly for several cotangents at "
    "once: inside torch.compile use chunk_size=1"
)

GRADIENT_IN_MODEL = (
    "the model itself computes a gradient through {}, and torch computes the derivatives of that "
    "gradient wrongly (it takes mean and variance for constants): use another norm (GroupNorm, "
    "RMSNorm), or write the norm out"
)

THIRD = (
    "the gradient of a penalty was computed with create_graph=True, which needs the third "
    "derivative of {}, and torch computes it wrongly (it takes mean and variance for constants): "
    "use another norm (GroupNorm, RMSNorm), or write the norm out"
)


MISSING_SECOND = (
    "the second derivative of {} is needed, an operation of the model, and torch does not have it: "
    "{}"
)


class Operations:
    """What the graph of a tensor contains that torch does not differentiate rightly."""

    def __init__(self, output: Tensor) -> None:
        self.foreign = False  # an autograd.Function that is not of fastjac
        self.wrong_third = self.wrong_again = ""  # names of norms
        self.wrong_batched = False
        self.missing = ""  # the node of an operation without a second derivative
        self.count = 0
        self.gain = 0.0  # nanoseconds that the chain engine saves, see `GAINS`
        seen: set[Any] = set()
        left = [output.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            left += [following for following, _ in node.next_functions]
            kind = _kinds.get(type(node))
            if kind is None:
                kind = _kinds[type(node)] = _kind(node)
            if not kind:
                continue
            if type(node).__name__ in GAINS:
                self.gain += GAINS[type(node).__name__] * math.prod(shape_of_node(node))
            if kind == "foreign":
                self.foreign = True
            elif kind == "missing":
                self.missing = type(node).__name__
            elif kind == "batched":
                self.wrong_batched = True
            elif kind == "third":
                if getattr(node, "_saved_training", True):
                    self.wrong_third = WRONG_THIRD[type(node).__name__]
            elif kind == "again" and getattr(node, "_saved_train", True):
                self.wrong_again = WRONG_AGAIN[type(node).__name__]
        self.count = len(seen)


GAINS: dict[str, float] = {}
"""By node: nanoseconds an element that the chain engine saves, for a single cotangent."""

_kinds: dict[type, str] = {}


def _kind(node: Any) -> str:
    """What `Operations` notes about the nodes of a type; "" if nothing."""
    name = type(node).__name__
    forward = getattr(node, "_forward_cls", None)
    if forward is not None:
        return "" if issubclass(forward, Function) else "foreign"
    for kind, names in (
        *(("third", WRONG_THIRD), ("again", WRONG_AGAIN), ("batched", WRONG_BATCHED)),
        *(("missing", MISSING), ("gain", GAINS)),
    ):
        if name in names:
            return kind
    return ""


def vjp(
    output: Tensor,
    x: Tensor,
    w: Tensor,
    chunk_size: int | None = None,
    operations: Operations | None = None,
) -> Tensor:
    """``Jᵀ w_k`` for cotangents ``w`` ``[K, *output.shape]``, as ``[K, *x.shape]``.

    Up to ``chunk_size`` cotangents share one batched pass (``is_grads_batched``); a single one
    needs no vmap. The result is differentiable, also with respect to ``w``.

    The cotangents are computed one at a time if a batched pass would be wrong in torch 2.13: if the
    graph contains an ``autograd.Function`` that is not one of fastjac (a compiled model is one),
    whose second-order term is dropped without an error, or one of `WRONG_BATCHED`. Inside
    ``torch.compile``, where such a Function raises, and symbolic ``make_fx`` the default is one at
    a time too, since torch cannot trace a batched pass with dynamic shapes.
    """
    if w.shape[0] == 1:
        return _checked(output, x, w.squeeze(0), 0, operations).unsqueeze(0)
    symbolic = any(isinstance(n, torch.SymInt) for t in (output, x, w) for n in t.shape)
    together = 1 if symbolic or torch.compiler.is_compiling() else w.shape[0]
    return _checked(output, x, w, chunk_size or together, operations)


def _checked(
    output: Tensor, x: Tensor, w: Tensor, size: int, operations: Operations | None
) -> Tensor:
    """``Jᵀ w``, or for a size, that of K cotangents in passes of this size."""
    if torch.compiler.is_compiling():
        comptime(REFUSE_FUNCTIONS)
        if size > 1:
            comptime(REFUSE_BATCHED)
    else:
        operations = operations or Operations(output)
        if operations.wrong_again:
            raise RuntimeError(GRADIENT_IN_MODEL.format(operations.wrong_again))
        if operations.foreign or operations.wrong_batched:
            size = min(size, 1)
    if size == 0:
        v = _pass(output, x, w)
    elif size == 1:
        v = torch.stack([_pass(output, x, part) for part in w])
    else:
        v = torch.cat([_pass(output, x, part, True) for part in w.split(size)])
    if operations is not None and v.requires_grad:
        if operations.wrong_third:
            _refuse_backward(v, THIRD.format(operations.wrong_third), third=True)
        if operations.missing:
            name, advice = operations.missing, MISSING[operations.missing]
            _refuse_backward(v, MISSING_SECOND.format(name.removesuffix("Backward0"), advice))
    return v


def _refuse_backward(v: Tensor, message: str, third: bool = False) -> None:
    """Raise in the backward of v, or only in one with ``create_graph=True``."""

    def refuse(gradient: Tensor) -> None:
        if torch.is_grad_enabled() or not third:
            raise RuntimeError(message)

    v.register_hook(refuse)


def _pass(output: Tensor, x: Tensor, w: Tensor, batched: bool = False) -> Tensor:
    try:
        (v,) = torch.autograd.grad(
            output, x, w, create_graph=True, allow_unused=True, is_grads_batched=batched
        )
    except RuntimeError as error:
        if not batched or "is not implemented" in str(error):  # one at a time it is not, either
            raise
        raise RuntimeError(
            f"the batched pass over {w.shape[0]} cotangents failed: if an operation of the model "
            f"does not support vmap, use chunk_size=1. The error of torch is: {error}"
        ) from error
    if v is None:
        raise RuntimeError(
            "output does not depend on x: pass the tensor that went into the model, and check "
            "that the model does not detach it"
        )
    return v


def _traced_calls(names: tuple[str, ...], message: str) -> Callable[[Any], None]:
    """A `comptime` function that raises if the traced graph calls a function of one of the names.

    Made once, as a global: dynamo cannot give a comptime function a closure of traced values.
    """

    def check(context: Any) -> None:
        for graph in traced_graphs(context):
            for node in graph.nodes:
                called = getattr(node.target, "__name__", str(node.target))
                if called in names:
                    raise RuntimeError(message.format(called))

    return check


# When torch 2.13 traces `autograd.grad`, it drops the second-order term of an autograd.Function
# without an error. The ops of fastjac are single operations in the graph and are not affected.
REFUSE_FUNCTIONS = _traced_calls(
    ("autograd_function_apply",),
    "the model calls a torch.autograd.Function, whose second derivative is lost in torch.compile: "
    "compute the penalty outside of the compiled function",
)
REFUSE_BATCHED = _traced_calls(("group_norm",), BATCHED_NORM)
REFUSE_JVP = _traced_calls(("layer_norm", "batch_norm", "instance_norm"), JVP_OF_NORM)


def check_output(output: Tensor, n: int) -> None:
    """Raises if ``output`` is not a floating-point tensor with ``n`` samples that are not empty."""
    arguments.batch("output", output, "x", n)
    if not output.is_floating_point():
        raise TypeError(f"output has dtype {output.dtype}: it must be floating point")
    if output.numel() == 0 and n > 0:
        raise ValueError(f"output has shape {tuple(output.shape)}: it must not be empty")


def check_graph(x: Tensor, output: Tensor) -> None:
    """Raises if ``x`` and ``output`` are not in one graph or do not have the same batch size."""
    arguments.floating("x", x)
    check_output(output, x.shape[0])
    if not x.requires_grad:
        raise RuntimeError(
            "x does not require grad: call x.requires_grad_() before the model, or use the model "
            "form penalty(model, x)"
        )
    # Dynamo knows requires_grad of the tensors that it traces, but not grad_fn.
    if not output.requires_grad or not (torch.compiler.is_compiling() or output.grad_fn):
        raise RuntimeError(
            "output has no grad_fn: it was detached, computed under torch.no_grad(), or x and "
            "output are swapped"
        )


def run_model(model: Callable[..., Any], x: Tensor, at: str | None) -> tuple[Tensor, Tensor]:
    """Runs the model; returns the tensor to differentiate with respect to, and the output.

    For ``at=None`` that tensor is the input (a detached copy, if it does not require grad).
    Otherwise it is the output of the submodule called ``at``. The model continues with a copy of
    it, which an in-place operation such as ``ReLU(inplace=True)`` may modify.
    """
    arguments.tensor("x", x)
    if at is None:
        arguments.floating("x", x)
        if not x.requires_grad:
            x = x.detach().requires_grad_()
        return x, call_model(model, x)

    caught: list[Tensor] = []

    def catch(module: nn.Module, args: Any, hidden: Any) -> Tensor:
        hidden = arguments.floating(f"the output of at={at!r}", hidden)
        caught.append(hidden if hidden.requires_grad else hidden.detach().requires_grad_())
        return caught[-1].clone()

    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"at={at!r} names a submodule of a compiled model, which does not call its submodules: "
            "pass the module before compiling"
        )
    handle = submodule(model, at).register_forward_hook(catch)
    try:
        output = call_model(model, x)
    finally:
        handle.remove()
    if len(caught) != 1:
        raise RuntimeError(
            f"the submodule at={at!r} ran {len(caught)} times in one call of the model: it must "
            "run exactly once"
        )
    return caught[0], output


def submodule(model: Callable[..., Any], at: str) -> nn.Module:
    """The submodule of the model that is called ``at``."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"at={at!r} names a submodule, but model is {type(model).__name__}: it must be an "
            "nn.Module"
        )
    found = dict(model.named_modules(remove_duplicate=False)).get(at)
    if found is None or at == "":
        names = ", ".join(name for name, _ in model.named_modules() if name)
        raise ValueError(
            f"at={at!r} is not a submodule of the model: its submodules are {names or 'none'}"
        )
    return found
