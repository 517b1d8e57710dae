"""``softmax_residual``: ``p − y`` with ``p = softmax(z)``.

This is the gradient of the cross-entropy with respect to z. Its VJP is that of the softmax,
``p (v − ⟨p, v⟩)``, computed in one pass over z and v. Only z is saved for the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastjac.ops.autograd import Function, recorded, transformed
from fastjac.ops.dispatch import Example, Op, accumulate_dtype
from fastjac.ops.registration import raw, register, suffix_of
from fastjac.torch_private import below_autograd


def _examples() -> Iterator[Example]:
    """Few classes, many classes, and logits that differ much."""
    for name, n, m, scale in (("10 classes", 7, 10, 1.0), ("3000 classes", 3, 3000, 20.0)):
        target = torch.arange(n) * 13 % m

        def call(
            inputs: dict[str, Tensor], impl: str, target: Tensor = target
        ) -> dict[str, Tensor]:
            z = inputs["z"].detach().requires_grad_()
            r = softmax_residual(z, target.to(z.device), impl=impl)
            (grad,) = torch.autograd.grad(r, z, inputs["v"])
            return {"p − y": r.detach(), "gradient": grad}

        z = scale * torch.sin(torch.arange(n * m, dtype=torch.float64)).view(n, m)
        yield Example(name, {"z": z, "v": z.cos()}, call)


_OP = Op("softmax_residual", _examples)


def softmax_residual(logits: Tensor, target: Tensor, *, impl: str = "auto") -> Tensor:
    """``softmax(z) − y`` per sample, where y is the unit vector of the class.

    This is ``∂ CE(z, target) / ∂z``.

    Args:
        logits: z, ``[N, m]``, float32, float64, bfloat16 or float16.
        target: the classes, int64 ``[N]``, each in ``[0, m)``.
        impl: as in `fastjac.act`.

    Returns:
        A tensor ``[N, m]`` of the dtype of z. Half precision is computed in float32.

    Gradients: with respect to z, reverse and forward mode, ``torch.func``, any number of times.

    Raises:
        TypeError: logits is not a floating-point tensor, or target is not int64.
        ValueError: a shape does not fit, or devices differ.
        RuntimeError: the impl cannot run the call, or a class is out of range on a CPU. On a GPU
            the row of such a class is NaN, because a check would have to wait for the device.

    Example:

        >>> logits, y = torch.randn(4, 5), torch.tensor([0, 3, 4, 1])
        >>> truth = logits.softmax(1) - nn.functional.one_hot(y, 5)
        >>> torch.allclose(fastjac.softmax_residual(logits, y), truth, atol=1e-6)
        True
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits is {what}: it must be a floating-point tensor")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        what = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target is {what}: it must be an int64 tensor of class indices")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: it must be [N, m], m >= 1")
    if target.shape != logits.shape[:1]:
        raise ValueError(f"target has shape {tuple(target.shape)}: it must be [{logits.shape[0]}]")
    if target.device != logits.device:
        raise ValueError(
            f"target is on {target.device} and logits is on {logits.device}: pass "
            "target.to(logits.device)"
        )
    chosen = _OP.select(impl, logits.device, logits.dtype)
    # In a compiled region, the compiler fuses the formula with the operations around it.
    if chosen == "reference" or (impl == "auto" and torch.compiler.is_compiling()):
        return composed(logits, target)
    return _in_graph(logits, target, suffix_of(chosen))


def composed(logits: Tensor, target: Tensor) -> Tensor:
    """The definition of ``softmax_residual`` in operations of torch."""
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    y = torch.zeros_like(wide).scatter(1, target.unsqueeze(1), 1.0)
    return (wide.softmax(1) - y).to(logits.dtype)


class _SoftmaxResidual(Function):
    @staticmethod
    def forward(logits, target, suffix):
        with below_autograd():
            return raw("softmax_residual" + suffix)(logits, target)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, _, ctx.suffix = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    def backward(ctx, v):
        (logits,) = ctx.saved_tensors
        if recorded(v):
            wide = accumulate_dtype(logits.dtype)
            p, v = logits.to(wide).softmax(1), v.to(wide)
            return (p * (v - (p * v).sum(1, keepdim=True))).to(logits.dtype), None, None
        with below_autograd():
            return raw("softmax_residual_backward" + ctx.suffix)(logits, v), None, None


@torch.compiler.allow_in_graph
def _in_graph(logits, target, suffix):
    if transformed():
        return composed(logits, target)
    return _SoftmaxResidual.apply(logits, target, suffix)


# ---- the raw ops


def _fake(logits, other):
    return logits.new_empty(logits.shape)


register(
    "softmax_residual(Tensor logits, Tensor target) -> Tensor",
    derivative=_SoftmaxResidual.apply,
    fake=_fake,
    triton="softmax_residual",
)
register(
    "softmax_residual_backward(Tensor logits, Tensor v) -> Tensor",
    derivative="call fastjac.softmax_residual",
    fake=_fake,
    triton="softmax_residual",
)
