"""``act(z, g, k) = φ^(k)(z) · g``: an activation, its VJP and its double backward in one op.

The op is its own derivative. For a cotangent ``v`` of the result,

    ∂/∂g  →  φ^(k)(z) · v         = act(z, v, k)
    ∂/∂z  →  φ^(k+1)(z) · g · v   = act(z, g·v, k+1)

and ``act_backward`` computes both in one pass over ``z, g, v``. The forward of a layer is
``act(z, None, 0)``, its VJP is ``act(z, δ, 1)``, and the double backward of a gradient penalty is
``act_backward(z, δ, v, 1)``. It takes five memory passes; eager torch takes 11 (tanh) to 85
(GELU-tanh).

If φ' is a polynomial ψ of the output a = φ(z) (tanh, sigmoid), ``act(z, None, 0)`` saves a in place
of z, which its consumer usually saves too, and its derivative is ``act(a, v, 0)`` of ψ: no
exponential is computed again. The gradient of the second order then flows through a to z, as in
torch. In 16 bits z is saved, because 1 - a² has lost most of its digits once a is rounded.

Two ``autograd.Function``s that call each other implement autograd, forward mode and
``torch.func``. ``torch.compile`` calls them through ``allow_in_graph``, and the raw ops use the
same Functions. Without any one of these parts, derivatives were wrong or missing on torch 2.13.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import IDS, KERNEL_ROWS, MAX_ORDER, SLOPES, TABLE, Activation, get
from fastjac.ops.autograd import Add, Function, Multiply, recorded, transformed
from fastjac.ops.dispatch import Example, Op
from fastjac.ops.registration import check_like, raw, register, suffix_of
from fastjac.torch_private import below_autograd


def _examples() -> Iterator[Example]:
    """All orders of every activation, and both results of every double backward."""
    z = torch.linspace(-12, 12, 1537, dtype=torch.float64)  # includes the kinks at 0 and ±3
    z = torch.cat([z, torch.linspace(-1, 1, 511, dtype=torch.float64)])
    g, v = torch.cos(3 * z + 1), torch.sin(5 * z + 2)

    def call(inputs: dict[str, Tensor], impl: str, fn: str) -> dict[str, Tensor]:
        z, g = (inputs[name].detach().requires_grad_() for name in "zg")
        outputs = {"order 0, no g": act(z, fn=fn, impl=impl)}
        for order in range(MAX_ORDER + 1):
            wrt = {"z": z, "g": g} if order < MAX_ORDER else {"g": g}
            z_in = z if "z" in wrt else z.detach()
            outputs[f"order {order}"] = out = act(z_in, g, order, fn, impl=impl)
            # Torch has no edge to z if a derivative is constant; the kernels return zeros.
            grads = torch.autograd.grad(
                out, list(wrt.values()), inputs["v"], materialize_grads=True
            )
            outputs |= {f"order {order}, grad_{n}": x for n, x in zip(wrt, grads, strict=True)}
        return {name: out.detach() for name, out in outputs.items()}

    for fn in TABLE:
        yield Example(fn, {"z": z, "g": g, "v": v}, functools.partial(call, fn=fn))


_OP = Op("act", _examples)


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
        z: the pre-activation, of any shape and memory format; float32, float64, bfloat16 or
            float16. The 16-bit types are computed in float32 and rounded once.
        g: a factor of the shape, dtype and device of z (a cotangent or a tangent); None means 1.
        order: the order of the derivative of φ, 0 to 3.
        fn: the activation, a key of `fastjac.activations.TABLE`.
        impl: "auto" selects the fastest implementation that can run the call. "reference" (plain
            torch), "cpu", "triton" and "cuda" run or raise.
        **params: the parameters of the activation (``negative_slope``, ``beta``, …).

    Returns:
        A tensor of the shape, dtype and memory format of z.

    Gradients: reverse and forward mode, up to φ''': orders 0, 1, 2 and 3 are differentiable 3, 2, 1
    and 0 times with respect to z; all orders are linear in g. Differentiating once more raises
    RuntimeError in the backward. ``impl="reference"`` is differentiable as often as torch's own
    function is.

    Raises:
        TypeError: z or g is not a floating-point tensor, their dtypes differ, or a parameter is
            unknown.
        ValueError: fn or impl is unknown, order is not 0 to 3, or shapes or devices differ.
        RuntimeError: the impl cannot run the call, or a derivative of order 4 is needed.

    Example:

        >>> z = torch.randn(4, 3)
        >>> torch.allclose(fastjac.act(z, fn="gelu"), nn.functional.gelu(z), atol=1e-6)
        True
        >>> g = torch.randn(4, 3)
        >>> s = torch.sigmoid(z)
        >>> torch.allclose(fastjac.act(z, g, 1, "sigmoid"), g * s * (1 - s))  # φ'(z) ⊙ g
        True
    """
    row = get(fn)
    _check(z, g, order)
    values = row.param_values(params)
    chosen = _OP.select(impl, z.device, z.dtype)
    if chosen == "reference":
        return _reference(z, g, order, row, params)
    return _act_in_graph(z, g, order, IDS[fn], values, suffix_of(chosen))


def check_z(z: Tensor) -> None:
    if not isinstance(z, Tensor):
        raise TypeError(f"z is {type(z).__name__}: it must be a torch.Tensor")
    if not z.is_floating_point():
        raise TypeError(
            f"z has dtype {z.dtype}: it must have a floating-point dtype (for token ids, pass the"
            " embeddings)"
        )
    if z.layout != torch.strided or z.is_nested:
        kind = "nested" if z.is_nested else z.layout
        dense = "z.to_padded_tensor(0.0)" if z.is_nested else "z.to_dense()"
        raise TypeError(f"z is a {kind} tensor: it must be dense, pass {dense}")


def _check(z: Tensor, g: Tensor | None, order: int) -> None:
    check_z(z)
    if not isinstance(order, int) or not 0 <= order <= MAX_ORDER:
        raise ValueError(f"order is {order!r}: it must be an integer from 0 to {MAX_ORDER}")
    if g is None:
        return
    if not isinstance(g, Tensor):
        raise TypeError(f"g is {type(g).__name__}: it must be a torch.Tensor or None")
    if g.shape != z.shape:
        raise ValueError(
            f"g has shape {tuple(g.shape)} and z has {tuple(z.shape)}: pass g.expand_as(z)"
        )
    if g.dtype != z.dtype:
        raise TypeError(f"g has dtype {g.dtype} and z has {z.dtype}: pass g.to(z.dtype)")
    if g.device != z.device:
        raise ValueError(f"g is on {g.device} and z is on {z.device}: pass g.to(z.device)")


def _reference(
    z: Tensor, g: Tensor | None, order: int, row: Activation, params: dict[str, float]
) -> Tensor:
    """φ^(order)(z) · g: torch's function of the row, differentiated by torch."""
    derivative = row.torch_function(**params)
    for _ in range(order):
        derivative = _elementwise_derivative(derivative)
    out = derivative(z)
    return out if g is None else out * g


def _elementwise_derivative(f: Any) -> Any:
    return lambda z: torch.func.grad(lambda z: f(z).sum())(z)


# ---- derivatives


def _derivative(z, g, order, fn, *rest):
    """φ^(order)(z) · g, differentiable; zeros if φ^(order) is zero everywhere."""
    row = KERNEL_ROWS[fn]
    if row.is_zero(order):
        return z.new_zeros(()).expand(z.shape)  # a dense tensor of zeros would cost a memory pass
    if order > MAX_ORDER:
        raise RuntimeError(
            f"act: a derivative of order {order} of {row.name!r} is needed, and the kernels compute"
            f" orders 0 to {MAX_ORDER}: use impl='reference', which computes any order"
        )
    return _Act.apply(z, g, order, fn, *rest)


_WIDE = (torch.float32, torch.float64)


class _Act(Function):
    """act(z, g, k). Its derivatives are calls of itself and of `_ActBackward`.

    Each parameter is an argument, because a generated vmap rule fails with an empty tuple.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(z, g, order, fn, *rest):
        *params, suffix = rest
        with below_autograd():
            return raw("act" + suffix)(z, g, order, fn, params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, g, order, fn, *rest = inputs
        if order == 0 and g is None and fn in SLOPES and z.dtype in _WIDE:
            z, fn, ctx.of_output = output, SLOPES[fn], True
        else:
            ctx.of_output = False
        ctx.constants = order, fn, *rest
        ctx.save_for_backward(z, g)
        ctx.save_for_forward(z, g)

    @staticmethod
    def backward(ctx, v):
        z, g = ctx.saved_tensors
        order, *rest = ctx.constants
        if ctx.of_output:
            return _Act.apply(z, v, 0, *rest), *[None] * (2 + len(rest))
        needs_z, needs_g = ctx.needs_input_grad[:2]
        grad_z = grad_g = None
        if (
            needs_z
            and needs_g
            and order < MAX_ORDER
            and not KERNEL_ROWS[rest[0]].is_zero(order + 1)
        ):
            grad_z, grad_g = _ActBackward.apply(z, g, v, order, *rest)
        else:
            if needs_z:
                grad_z = _derivative(z, v if g is None else g * v, order + 1, *rest)
            if needs_g:
                grad_g = _derivative(z, v, order, *rest)
        return grad_z, grad_g, *[None] * (1 + len(rest))

    @staticmethod
    def jvp(ctx, z_t, g_t, *_):
        z, g = ctx.saved_tensors
        order, *rest = ctx.constants
        if ctx.of_output:
            return _Act.apply(z, z_t, 0, *rest)
        terms = []
        if z_t is not None:
            factor = z_t if g is None else Multiply.apply(g, z_t)
            terms.append(_derivative(z, factor, order + 1, *rest))
        if g_t is not None:
            terms.append(_derivative(z, g_t, order, *rest))
        return functools.reduce(Add.apply, terms)


def _one_pass(z: Tensor, p: Tensor, q: Tensor, order: int, suffix: str) -> bool:
    """Whether `act_double_backward`, which is not differentiable, can compute a third order.

    It has a CPU kernel only. On a GPU, and if the result is differentiated, `act` computes it.
    """
    plain = z.device.type == "cpu" and not suffix and order + 2 <= MAX_ORDER
    return plain and not recorded(p, q) and not transformed()


class _ActBackward(Function):
    """(φ^(k+1)(z) · g · v, φ^(k)(z) · v) in one pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z, g, v, order, fn, *rest):
        *params, suffix = rest
        with below_autograd():
            return raw("act_backward" + suffix)(z, g, v, order, fn, params)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, g, v, *ctx.constants = inputs
        ctx.save_for_backward(z, g, v)
        ctx.save_for_forward(z, g, v)

    @staticmethod
    def backward(ctx, p, q):
        z, g, v = ctx.saved_tensors
        order, *rest = ctx.constants
        needs_z, needs_g, needs_v = ctx.needs_input_grad[:3]
        grad_z = grad_g = grad_v = None
        *others, suffix = rest
        if needs_z and _one_pass(z, p, q, order, suffix):
            with below_autograd():
                args = z, g, v, p, q, order, others[0], others[1:]
                return *raw("act_double_backward")(*args), *[None] * (1 + len(rest))
        if needs_z:
            grad_z = _derivative(z, v * q, order + 1, *rest)
            grad_z = grad_z + _derivative(z, g * v * p, order + 2, *rest)
        if needs_g:
            grad_g = _derivative(z, v * p, order + 1, *rest)
        if needs_v:
            grad_v = _derivative(z, g * p, order + 1, *rest) + _derivative(z, q, order, *rest)
        return grad_z, grad_g, grad_v, *[None] * (1 + len(rest))

    @staticmethod
    def jvp(ctx, z_t, g_t, v_t, *_):
        z, g, v = ctx.saved_tensors
        order, *rest = ctx.constants
        multiply, first, second = Multiply.apply, [], []
        if z_t is not None:
            first.append(_derivative(z, multiply(multiply(g, v), z_t), order + 2, *rest))
            second.append(_derivative(z, multiply(v, z_t), order + 1, *rest))
        if g_t is not None:
            first.append(_derivative(z, multiply(v, g_t), order + 1, *rest))
        if v_t is not None:
            first.append(_derivative(z, multiply(g, v_t), order + 1, *rest))
            second.append(_derivative(z, v_t, order, *rest))
        zeros = [torch.zeros_like(z)]
        return functools.reduce(Add.apply, first), functools.reduce(Add.apply, second or zeros)


@torch.compiler.allow_in_graph
def _act_in_graph(z, g, order, fn, params, suffix):
    return _Act.apply(z, g, order, fn, *params, suffix)


# ---- the raw ops


def _fake(z, g, *rest):
    check_like(g, z, "g")
    return torch.empty_like(z)


def _fake_backward(z, g, v, *rest):
    check_like(g, z, "g")
    check_like(v, z, "v")
    return torch.empty_like(z), torch.empty_like(z)


def _fake_double_backward(z, g, v, p, q, *rest):
    for operand, name in ((g, "g"), (v, "v"), (p, "p"), (q, "q")):
        check_like(operand, z, name)
    return tuple(torch.empty_like(z) for _ in range(3))


def _batched(op, info, in_dims, *args):
    """Move the batch dimension to the front: the ops are elementwise and take any shape."""

    def moved(x, dim):
        if not isinstance(x, Tensor):
            return x
        if dim is None:
            return x.unsqueeze(0).expand(info.batch_size, *x.shape)
        return x.movedim(dim, 0)

    out = op(*map(moved, args, in_dims))
    return out, (0, 0) if isinstance(out, tuple) else 0


register(
    "act(Tensor z, Tensor? g, int order, int fn, float[] params) -> Tensor",
    derivative=lambda z, g, order, fn, params, suffix: _Act.apply(z, g, order, fn, *params, suffix),
    fake=_fake,
    vmap=_batched,
    triton="act",
    any_order=True,
)
register(
    "act_backward(Tensor z, Tensor g, Tensor v, int order, int fn, float[] params)"
    " -> (Tensor, Tensor)",
    derivative=lambda z, g, v, order, fn, params, suffix: _ActBackward.apply(
        z, g, v, order, fn, *params, suffix
    ),
    fake=_fake_backward,
    vmap=_batched,
    triton="act",
    any_order=True,
)
register(
    "act_double_backward(Tensor z, Tensor g, Tensor v, Tensor p, Tensor q, int order, int fn,"
    " float[] params) -> (Tensor, Tensor, Tensor)",
    derivative="differentiate torch.ops.fastjac.act_backward instead",
    fake=_fake_double_backward,
    any_order=True,
)
