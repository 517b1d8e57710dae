"""``act(z, g, k) = φ^(k)(z) · g``: an activation, its VJP and its double backward in one op.

The op is its own derivative. With a cotangent ``v`` of the result,

    ∂/∂g  →  φ^(k)(z) · v         = act(z, v, k)
    ∂/∂z  →  φ^(k+1)(z) · g · v   = act(z, g·v, k+1)

and ``act_backward`` writes both in one pass over ``z, g, v``. The forward of a layer is
``act(z, None, 0)``, its VJP ``act(z, δ, 1)``, the double backward of a gradient penalty
``act_backward(z, δ, v, 1)``: five memory passes; eager torch takes 11 (tanh) to 85 (GELU-tanh).

Wiring (each part is there because leaving it out went wrong silently or loudly on torch 2.13):
forward and backward are registered torch ops with fake kernels, vmap rules and a dispatcher-level
autograd formula; on top of them a pair of ``autograd.Function``s that call each other carries
``torch.func`` transforms, and enters ``torch.compile`` through ``allow_in_graph``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake, register_vmap

from fastjac.activations import IDS, MAX_ORDER, TABLE, Activation, get
from fastjac.dispatch import Example, Op
from fastjac.ops._autograd import Function, below_autograd

_LIBRARY = Library("fastjac", "FRAGMENT")

# `act` has C++ kernels for CPU and CUDA tensors, `act_triton` the Triton ones; same schema.
_SUFFIXES = ("", "_triton")
_RAW: dict[str, Any] = {}
for _suffix in _SUFFIXES:
    _LIBRARY.define(
        f"act{_suffix}(Tensor z, Tensor? g, int order, int fn, float p0, float p1) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _LIBRARY.define(
        f"act_backward{_suffix}(Tensor z, Tensor g, Tensor v, int order, int fn, float p0,"
        " float p1) -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )


def _examples() -> Iterator[Example]:
    """Every activation: all orders, and the two results of every double backward."""
    z = torch.linspace(-12, 12, 1537, dtype=torch.float64)
    z = torch.cat([z, torch.linspace(-1, 1, 511, dtype=torch.float64)])  # kinks at 0, ±3 included
    g, v = torch.cos(3 * z + 1), torch.sin(5 * z + 2)

    def call(inputs: dict[str, Tensor], impl: str, fn: str) -> dict[str, Tensor]:
        z, g = (inputs[name].detach().requires_grad_() for name in "zg")
        outputs = {"order 0, no g": act(z, fn=fn, impl=impl)}
        for order in range(MAX_ORDER + 1):
            wrt = {"z": z, "g": g} if order < MAX_ORDER else {"g": g}
            z_in = z if "z" in wrt else z.detach()
            outputs[f"order {order}"] = out = act(z_in, g, order, fn, impl=impl)
            # Torch has no edge to z where a derivative is constant; the kernels return zeros.
            grads = torch.autograd.grad(
                out, list(wrt.values()), inputs["v"], materialize_grads=True
            )
            outputs |= {f"order {order}, grad_{n}": x for n, x in zip(wrt, grads, strict=True)}
        return {name: out.detach() for name, out in outputs.items()}

    for fn in TABLE:
        yield Example(fn, {"z": z, "g": g, "v": v}, functools.partial(call, fn=fn))


_OP = Op("act", ("cuda", "triton", "cpu", "reference"), _examples)


def act(
    z: Tensor,  # [...]
    g: Tensor | None = None,  # [...], z's shape
    order: int = 0,
    fn: str = "gelu",
    *,
    impl: str = "auto",
    **params: float,
) -> Tensor:
    """φ^(order)(z) · g, elementwise.

    Args:
        z: pre-activation, any shape and memory format; float32, float64, bfloat16 or float16. The
            16-bit types are computed in float32 and rounded once.
        g: factor of z's shape, dtype and device (a cotangent, a tangent); None means 1.
        order: which derivative of φ, 0 to 3.
        fn: the activation, a key of `fastjac.activations.TABLE`.
        impl: "auto" takes the fastest implementation that can run z; "reference" (plain torch),
            "cpu", "triton" or "cuda" run or raise.
        **params: the activation's parameters (``negative_slope``, ``beta``, …).

    Returns:
        Tensor of z's shape, dtype and memory format.

    Gradients: reverse and forward mode, until φ''' is used up: orders 0, 1, 2 and 3 can be
    differentiated 3, 2, 1 and 0 times in z, and are linear in g. One more raises RuntimeError, in
    the backward of an output whose z requires grad. ``impl="reference"`` goes as far as torch does.

    Raises:
        TypeError: z or g is not a floating-point tensor, dtypes differ, or an unknown parameter.
        ValueError: unknown fn or impl, order outside 0 to 3, shapes or devices differ.
        RuntimeError: a named impl cannot run the call, or a derivative past φ''' is asked for.
    """
    row = get(fn)
    _check(z, g, order)
    p0, p1 = row.param_values(params)
    chosen = _OP.select(impl, z.device, z.dtype)
    if chosen == "reference":
        return _reference(z, g, order, row, params)
    return _act_in_graph(z, g, order, IDS[fn], p0, p1, "_triton" if chosen == "triton" else "")


def _check(z: Tensor, g: Tensor | None, order: int) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor, got {type(z).__name__}")
    if not z.is_floating_point():
        raise TypeError(
            f"z has dtype {z.dtype}; an activation needs floating point (for token ids, apply it to"
            " the embeddings)"
        )
    if not isinstance(order, int) or not 0 <= order <= MAX_ORDER:
        raise ValueError(f"order={order!r}; derivatives 0 to {MAX_ORDER} are implemented")
    if g is None:
        return
    if not isinstance(g, Tensor):
        raise TypeError(f"g must be a tensor of z's shape or None, got {type(g).__name__}")
    if g.shape != z.shape:
        raise ValueError(
            f"g has shape {tuple(g.shape)}, z has {tuple(z.shape)}; expand g to z's shape"
        )
    if g.dtype != z.dtype:
        raise TypeError(f"g has dtype {g.dtype}, z has {z.dtype}; convert one of them")
    if g.device != z.device:
        raise ValueError(f"g is on {g.device}, z on {z.device}; move one of them")


def _reference(
    z: Tensor, g: Tensor | None, order: int, row: Activation, params: dict[str, float]
) -> Tensor:
    """φ^(order)(z) · g by torch's own function, differentiated by torch: the readable truth."""
    derivative = row.torch_function(**params)
    for _ in range(order):
        derivative = _elementwise_derivative(derivative)
    out = derivative(z)
    return out if g is None else out * g


def _elementwise_derivative(f: Any) -> Any:
    return lambda z: torch.func.grad(lambda z: f(z).sum())(z)


# ---- the formulas, for both levels of autograd below; `call` and `call_backward` are that level's


def _past_last_order(fn: int, order: int) -> RuntimeError:
    name = list(TABLE)[fn]
    return RuntimeError(
        f"act: derivative of order {order} of {name!r} was asked for, the kernels go to"
        f" {MAX_ORDER}; impl='reference' differentiates any number of times"
    )


def _zeros(z: Tensor) -> Tensor:
    return z.new_zeros(()).expand(z.shape)  # a dense tensor of zeros would cost a memory pass


def _vjp(call, call_backward, z, g, v, order, fn, needs_z, needs_g):
    """(∂z, ∂g) of act(z, g, order) for the cotangent v; None where not needed."""
    grad_z = grad_g = None
    row = list(TABLE.values())[fn]
    if needs_z and row.is_zero(order + 1):  # piecewise linear: nothing to compute
        grad_z, needs_z = _zeros(z), False
    if needs_z and order + 1 > MAX_ORDER:
        raise _past_last_order(fn, order + 1)
    if needs_z and needs_g:
        grad_z, grad_g = call_backward(z, g, v, order)
    elif needs_z:
        grad_z = call(z, v if g is None else g * v, order + 1)
    elif needs_g:
        grad_g = call(z, v, order)
    return grad_z, grad_g


def _vjp_of_backward(call, z, g, v, p, q, order, fn, needs):
    """(∂z, ∂g, ∂v) of act_backward(z, g, v, order) for the cotangents p, q of its two results."""
    needs_z, needs_g, needs_v = needs
    grad_z = grad_g = grad_v = None
    if needs_z:
        grad_z = call(z, v * q, order + 1)
        if not list(TABLE.values())[fn].is_zero(order + 2):
            if order + 2 > MAX_ORDER:
                raise _past_last_order(fn, order + 2)
            grad_z = grad_z + call(z, g * v * p, order + 2)
    if needs_g:
        grad_g = call(z, v * p, order + 1)
    if needs_v:
        grad_v = call(z, g * p, order + 1) + call(z, q, order)
    return grad_z, grad_g, grad_v


# ---- autograd.Function level: eager, torch.func and torch.compile


class _Act(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z, g, order, fn, p0, p1, suffix):
        with below_autograd():
            return _RAW["act" + suffix](z, g, order, fn, p0, p1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, g, *ctx.constants = inputs
        ctx.save_for_backward(z, g)
        ctx.save_for_forward(z, g)

    @staticmethod
    def backward(ctx, v):
        z, g = ctx.saved_tensors
        order, *rest = ctx.constants
        grads = _vjp(
            lambda z, g, k: _Act.apply(z, g, k, *rest),
            lambda z, g, v, k: _ActBackward.apply(z, g, v, k, *rest),
            *(z, g, v, order, rest[0]),
            needs_z=ctx.needs_input_grad[0],
            needs_g=ctx.needs_input_grad[1],
        )
        return (*grads, None, None, None, None, None)

    @staticmethod
    def jvp(ctx, z_t, g_t, *_):
        z, g = ctx.saved_tensors
        order, *rest = ctx.constants
        out = None
        if z_t is not None:
            grads = _vjp(
                lambda z, g, k: _Act.apply(z, g, k, *rest),
                None,
                *(z, g, z_t, order, rest[0]),
                needs_z=True,
                needs_g=False,
            )
            out = grads[0]
        if g_t is not None:
            from_g = _Act.apply(z, g_t, order, *rest)
            out = from_g if out is None else out + from_g
        return out


class _ActBackward(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z, g, v, order, fn, p0, p1, suffix):
        with below_autograd():
            return _RAW["act_backward" + suffix](z, g, v, order, fn, p0, p1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, g, v, *ctx.constants = inputs
        ctx.save_for_backward(z, g, v)

    @staticmethod
    def backward(ctx, p, q):
        z, g, v = ctx.saved_tensors
        order, *rest = ctx.constants
        grads = _vjp_of_backward(
            lambda z, g, k: _Act.apply(z, g, k, *rest),
            *(z, g, v, p, q, order, rest[0]),
            needs=ctx.needs_input_grad[:3],
        )
        return (*grads, None, None, None, None, None)


@torch.compiler.allow_in_graph
def _act_in_graph(z, g, order, fn, p0, p1, suffix):
    return _Act.apply(z, g, order, fn, p0, p1, suffix)


# ---- dispatcher level: the raw ops, for whoever calls torch.ops.fastjac.* and for opcheck


def _register(suffix: str) -> None:
    act_name, backward_name = f"fastjac::act{suffix}", f"fastjac::act_backward{suffix}"
    raw = _RAW["act" + suffix] = getattr(torch.ops.fastjac, "act" + suffix).default
    raw_backward = getattr(torch.ops.fastjac, "act_backward" + suffix).default
    _RAW["act_backward" + suffix] = raw_backward

    @register_fake(act_name, lib=_LIBRARY)
    def _(z, g, order, fn, p0, p1):
        return torch.empty_like(z)

    @register_fake(backward_name, lib=_LIBRARY)
    def _(z, g, v, order, fn, p0, p1):
        return torch.empty_like(z), torch.empty_like(z)

    def setup(ctx, inputs, output):
        z, g, *ctx.constants = inputs
        ctx.save_for_backward(z, g)

    def backward(ctx, v):
        z, g = ctx.saved_tensors
        order, *rest = ctx.constants
        grads = _vjp(
            lambda z, g, k: raw(z, g, k, *rest),
            lambda z, g, v, k: raw_backward(z, g, v, k, *rest),
            *(z, g, v, order, rest[0]),
            needs_z=ctx.needs_input_grad[0],
            needs_g=ctx.needs_input_grad[1],
        )
        return (*grads, None, None, None, None)

    register_autograd(act_name, backward, setup_context=setup, lib=_LIBRARY)

    def setup_backward(ctx, inputs, output):
        z, g, v, *ctx.constants = inputs
        ctx.save_for_backward(z, g, v)

    def backward_of_backward(ctx, p, q):
        z, g, v = ctx.saved_tensors
        order, *rest = ctx.constants
        grads = _vjp_of_backward(
            lambda z, g, k: raw(z, g, k, *rest),
            *(z, g, v, p, q, order, rest[0]),
            needs=ctx.needs_input_grad[:3],
        )
        return (*grads, None, None, None, None)

    register_autograd(
        backward_name, backward_of_backward, setup_context=setup_backward, lib=_LIBRARY
    )

    def batched(op, tensors: int):
        def rule(info, in_dims, *args):
            moved = [
                None if x is None
                else x.unsqueeze(0).expand(info.batch_size, *x.shape) if dim is None
                else x.movedim(dim, 0)
                for x, dim in zip(args[:tensors], in_dims[:tensors], strict=True)
            ]  # fmt: skip
            out = op(*moved, *args[tensors:])
            return out, (0, 0) if isinstance(out, tuple) else 0

        return rule

    register_vmap(act_name, batched(raw, 2), lib=_LIBRARY)
    register_vmap(backward_name, batched(raw_backward, 3), lib=_LIBRARY)


for _suffix in _SUFFIXES:
    _register(_suffix)


def _triton_kernel(name: str) -> Any:
    def launch(*args):
        from fastjac.kernels import act as kernels  # needs Triton, which may not be installed

        return getattr(kernels, name)(*args)

    return launch


for _name in ("act", "act_backward"):
    _LIBRARY.impl(f"{_name}_triton", _triton_kernel(_name), "CompositeExplicitAutograd")
