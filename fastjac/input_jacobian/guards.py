"""What torch differentiates wrongly or not at all, by the node of its graph, and the guards.

The lists are those of torch 2.13. Each entry is shown by a test, `tests/test_torch_wrong.py`, which
fails once torch is right. A guard computes such a call in another way, or raises in the backward:
the value of a penalty is right in all cases, it is the gradient that is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from fastjac.ops.autograd import Function, graph_nodes, nodes_from
from fastjac.torch_private import traced_graphs

WRONG_THIRD = {
    "NativeLayerNormBackward0": "layer_norm",
    "NativeBatchNormBackward0": "batch_norm or instance_norm",
    "CudnnBatchNormBackward0": "batch_norm or instance_norm",
    "MiopenBatchNormBackward0": "batch_norm or instance_norm",
    # Inside torch.compile:
    "NativeBatchNormLegitBackward0": "batch_norm or instance_norm",
    "NativeBatchNormLegitBackward1": "batch_norm or instance_norm",
}
"""Norms in training mode whose third derivative takes mean and variance for constants."""

WRONG_AGAIN = {
    node.replace("Backward0", "BackwardBackward0"): name for node, name in WRONG_THIRD.items()
}
"""The first derivatives of these norms, as a part of a model; a penalty needs two more."""

WRONG_BATCHED = set() if TorchVersion(torch.__version__) >= "2.14" else {"NativeGroupNormBackward0"}
"""Whose second derivative is wrong for several cotangents at once; torch 2.14 has mended it."""

_ATTENTION = (
    "use the model form, penalty(model, x, ...), with engine='auto', or run the model under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), and the backward too if it computes a "
    "checkpoint again"
)

MISSING = {
    "HardsigmoidBackward0": "use the model form, penalty(model, x, ...), with engine='auto', or "
    "fastjac.fuse(model), also inside torch.compile",
    "ScaledDotProductFlashAttentionForCpuBackward0": _ATTENTION,
    "ScaledDotProductFlashAttentionBackward0": _ATTENTION,
    "ScaledDotProductEfficientAttentionBackward0": _ATTENTION,
    "ScaledDotProductCudnnAttentionBackward0": _ATTENTION,
}
"""Operations whose second derivative torch does not have, and what to do."""

JVP_OF_NORM = (
    "the gradient of a JVP through {} is needed, which torch computes wrongly (it takes mean and "
    "variance for constants). The chain engine computes it rightly: "
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


COMPILED = (
    "the model, or a part of it, is compiled, and torch cannot differentiate compiled code twice"
)
COMPILED_ADVICE = (
    "pass the model before compiling, and compile the step that calls the penalty, "
    "fastjac.compile(step)"
)


class Operations:
    """What the graph of a tensor contains that torch does not differentiate rightly."""

    def __init__(self, output: Tensor) -> None:
        self.foreign = False  # an autograd.Function that is not of fastjac
        self.compiled = False  # one of them is a graph of torch.compile
        self.wrong_third = self.wrong_again = ""  # names of norms
        self.wrong_batched = False
        self.missing = ""  # the node of an operation without a second derivative
        nodes: list[Any] = [output.grad_fn]
        seen = set(nodes)
        for node in nodes:  # which grows
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    nodes.append(following)
            kind = _kinds.get(type(node))
            if kind is None:
                kind = _kind(node)
                if kind != "foreign":  # each call may have a new class
                    _kinds[type(node)] = kind
            if not kind:
                continue
            if kind == "foreign":
                self.foreign = True
                self.compiled |= node._forward_cls.__name__ == "CompiledFunction"
            elif kind == "missing":
                self.missing = type(node).__name__
            elif kind == "batched":
                self.wrong_batched = True
            elif kind == "third":
                if getattr(node, "_saved_training", True):
                    self.wrong_third = WRONG_THIRD[type(node).__name__]
            elif kind == "again" and getattr(node, "_saved_train", True):
                self.wrong_again = WRONG_AGAIN[type(node).__name__]


ATTENTION = {node for node, advice in MISSING.items() if advice is _ATTENTION}
"""Attention without a matrix of scores. That with one, ``SDPBackend.MATH``, has all derivatives."""

_kinds: dict[type, str] = {}


def _kind(node: Any) -> str:
    """What `Operations` notes about the nodes of a type; "" if nothing."""
    name = type(node).__name__
    forward = getattr(node, "_forward_cls", None)
    if forward is not None:
        return "" if issubclass(forward, Function) else "foreign"
    for kind, names in (
        *(("third", WRONG_THIRD), ("again", WRONG_AGAIN), ("batched", WRONG_BATCHED)),
        ("missing", MISSING),
    ):
        if name in names:
            return kind
    return ""


def check_backward(v: Tensor, operations: Operations, of_jvp: str = "") -> None:
    """Make the backward of a VJP raise where torch would compute a wrong gradient, or none.

    ``of_jvp``, for a JVP, says how to reach the chain engine, or why it does not run.
    """
    if not v.requires_grad:
        return
    if operations.missing:
        _refuse_backward(v, missing_second(operations))
    if operations.wrong_again:
        _refuse_backward(v, GRADIENT_IN_MODEL.format(operations.wrong_again))
    if operations.wrong_third:
        norm = operations.wrong_third
        if of_jvp:
            _refuse_backward(v, f"{JVP_OF_NORM.format(norm)}{of_jvp}")
        else:
            _refuse_backward(v, THIRD.format(norm), third=True)


@contextlib.contextmanager
def compiled_refused() -> Iterator[None]:
    """Replaces an error of compiled code that overwrites what a second derivative needs."""
    try:
        yield
    except RuntimeError as error:
        if "donated buffers" in str(error):
            raise RuntimeError(f"{COMPILED}: {COMPILED_ADVICE}") from error
        raise


def refuse_compiled(v: Tensor) -> None:
    """Raises if a VJP went through compiled code, which can be differentiated once."""
    names = {type(node).__name__ for node in graph_nodes(v)}
    if "CompiledFunctionBackwardBackward" in names:
        raise RuntimeError(f"{COMPILED}: {COMPILED_ADVICE}")


def missing_second(operations: Operations) -> str:
    name, advice = operations.missing, MISSING[operations.missing]
    return MISSING_SECOND.format(name.removesuffix("Backward0"), advice)


def _refuse_backward(v: Tensor, message: str, third: bool = False) -> None:
    """Raise in the backward of v, or only in one with ``create_graph=True``."""

    def refuse(gradient: Tensor) -> None:
        if torch.is_grad_enabled() or not third:
            raise RuntimeError(message)

    v.register_hook(refuse)


def refuse_functions(context: Any) -> None:
    """A `comptime` function: raises if an ``autograd.Function`` of the user was traced.

    When dynamo traces one (torch 2.13), its second-order term is lost without an error. The ops of
    fastjac are single operations in the graph and are not affected.
    """
    for graph in traced_graphs(context):
        for node in graph.nodes:
            if getattr(node.target, "__name__", str(node.target)) == "autograd_function_apply":
                raise RuntimeError(
                    "the model calls a torch.autograd.Function, whose second derivative is lost in "
                    "torch.compile: compute the penalty outside of the compiled function"
                )


def refuse_outside(context: Any) -> None:
    """A `comptime` function: raises if output depends on x outside of what is traced, perhaps.

    A tensor that was computed before the compiled function, and requires grad, is a leaf in it. If
    it depends on x, that part of the gradient would be lost.
    """
    output, x = (context.get_local(name) for name in ("output", "x"))
    if x.as_proxy().node.op != "placeholder" and x.as_fake().grad_fn is None:
        return  # a leaf that was made inside, which nothing from outside depends on
    outside = {
        t.grad_fn: node.name
        for node in context.graph().find_nodes(op="placeholder")
        if isinstance(t := node.meta.get("example_value"), Tensor) and t.grad_fn is not None
    }
    for node in nodes_from(output.as_fake().grad_fn, x.as_fake().grad_fn):
        if node in outside:
            raise RuntimeError(
                "output depends on a tensor that was computed before the compiled function "
                f"({outside[node]}), which may depend on x: compute it inside, or detach it"
            )
