"""The pullback of an existing autograd graph, by ``torch.autograd.grad``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import arguments
from fastjac.input_jacobian import guards
from fastjac.input_jacobian.guards import Operations
from fastjac.input_jacobian.pullback import Pullback
from fastjac.model_output import Part, call_model
from fastjac.per_sample import measure
from fastjac.torch_private import comptime, trace_again, traced_value

GRAPH_FORM = "use the model form, penalty(model, x, ...)"


class AutogradPullback(Pullback):
    """The pullback of ``x`` and ``output`` in one graph; differentiable as often as the graph."""

    def __init__(
        self,
        x: Tensor,
        output: Tensor,
        operations: Operations | None = None,
        why_not_chain: str = GRAPH_FORM,
    ) -> None:
        self.x, self.output, self.operations = x, output, operations
        self.why_not_chain = why_not_chain

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        return vjp(self.output, self.x, w, chunk_size, self.operations)

    def squared_norms(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        if w.shape[0] > 1:
            return super().squared_norms(w, chunk_size)
        # Without the dimension of size 1, whose views are nodes of the graph.
        return measure(
            checked(self.output, self.x, w.squeeze(0), 0, self.operations), "l2_squared", 1
        )

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        """A VJP of a VJP, since ``v(w) = Jᵀw`` is linear in ``w`` and ``J u = (∂v/∂w)ᵀ u``.

        The gradient of the result is a third derivative; `guards` has those that raise.
        """
        if torch.compiler.is_compiling():
            _refuse(self.output, self.x)
            return _jvp_in_graph(self.output, self.x, u, chunk_size, self.why_not_chain)
        operations = self.operations or Operations(self.output)
        return _jvp(self.output, self.x, u, chunk_size, operations, self.why_not_chain)

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


def vjp(
    output: Tensor,
    x: Tensor,
    w: Tensor,
    chunk_size: int | None = None,
    operations: Operations | None = None,
    guarded: bool = True,
) -> Tensor:
    """``Jᵀ w_k`` for cotangents ``w`` ``[K, *output.shape]``, as ``[K, *x.shape]``.

    Up to ``chunk_size`` cotangents share one batched pass; a single one needs no vmap. The result
    is differentiable, also with respect to ``w``.

    The cotangents are computed one at a time if a batched pass would be wrong in torch 2.13: if the
    graph contains an ``autograd.Function`` that is not one of fastjac (a compiled model is one),
    whose second-order term is dropped without an error, or one of `guards.WRONG_BATCHED`.
    """
    if w.shape[0] == 1:
        return checked(output, x, w.squeeze(0), 0, operations, guarded).unsqueeze(0)
    return checked(output, x, w, chunk_size or w.shape[0], operations, guarded)


def checked(
    output: Tensor,
    x: Tensor,
    w: Tensor,
    size: int,
    operations: Operations | None,
    guarded: bool = True,
) -> Tensor:
    """``Jᵀ w``, or for a size, that of K cotangents in passes of this size."""
    if torch.compiler.is_compiling():
        _refuse(output, x)
        return _vjp_in_graph(output, x, w, size, guarded)
    # Torch's batching rules of some operations fix sizes that are symbols (GELU, LayerNorm).
    if size > 1 and _symbolic(output, x, w):
        size = 1
    return _passes(output, x, w, size, operations or Operations(output), guarded)


def _jvp(
    output: Tensor,
    x: Tensor,
    u: Tensor,
    chunk_size: int | None,
    operations: Operations,
    why_not_chain: str,
) -> Tensor:
    if operations.missing:  # needed for the value too
        raise RuntimeError(guards.missing_second(operations))
    w = torch.zeros_like(output, requires_grad=True)
    v = _passes(output, x, w, 0, operations, guarded=False)
    size = 0 if u.shape[0] == 1 else chunk_size or u.shape[0]
    t = _passes(v, w, u if size else u.squeeze(0), size, operations, guarded=False)
    guards.check_backward(t, operations, why_not_chain)
    return t if size else t.unsqueeze(0)


def _symbolic(*tensors: Tensor) -> bool:
    return any(isinstance(n, torch.SymInt) for t in tensors for n in t.shape)


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    """The gradient of the sum of a loss with respect to x, without a graph."""
    if torch.compiler.is_compiling():
        return _gradient_in_graph(loss, x)
    (v,) = torch.autograd.grad(loss.sum(), x, retain_graph=True, allow_unused=True)
    return connected(v)


def connected(v: Tensor | None) -> Tensor:
    if v is None:
        raise RuntimeError(
            "output does not depend on x: pass the tensor that went into the model, and check "
            "that the model does not detach it"
        )
    return v


# ---- inside torch.compile
#
# Dynamo traces neither `autograd.grad` nor `requires_grad_` by itself. So that no setting of it has
# to be changed, they are calls of a function in its graph. The compiler behind dynamo runs these
# functions on tensors that have a graph of autograd.


@torch.compiler.allow_in_graph
def _vjp_in_graph(output: Tensor, x: Tensor, w: Tensor, size: int, guarded: bool) -> Tensor:
    return _passes(output, x, w, size, Operations(output), guarded)


@torch.compiler.allow_in_graph
def _jvp_in_graph(
    output: Tensor, x: Tensor, u: Tensor, chunk_size: int | None, why_not_chain: str
) -> Tensor:
    return _jvp(output, x, u, chunk_size, Operations(output), why_not_chain)


@torch.compiler.allow_in_graph
def _gradient_in_graph(loss: Tensor, x: Tensor) -> Tensor:
    (v,) = torch.autograd.grad(loss.sum(), x, retain_graph=True, allow_unused=True)
    return connected(v)


@torch.compiler.allow_in_graph
def _leaf_in_graph(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _leaf(x: Tensor) -> Tensor:
    """A copy of x that requires grad."""
    return _leaf_in_graph(x) if torch.compiler.is_compiling() else x.detach().requires_grad_()


def _refuse(output: Tensor, x: Tensor) -> None:
    """Raises where torch would compile a wrong gradient."""
    comptime(guards.refuse_functions)
    comptime(guards.refuse_outside)


def _passes(
    output: Tensor, x: Tensor, w: Tensor, size: int, operations: Operations, guarded: bool
) -> Tensor:
    if operations.foreign or operations.wrong_batched:
        size = min(size, 1)
    if operations.compiled:
        with guards.compiled_refused():
            v = _in_parts(output, x, w, size)
        guards.refuse_compiled(v)
    else:
        v = _in_parts(output, x, w, size)
    if guarded:
        guards.check_backward(v, operations)
    return v


def _in_parts(output: Tensor, x: Tensor, w: Tensor, size: int) -> Tensor:
    if size == 0:
        return _pass(output, x, w)
    if size == 1:
        return torch.stack([_pass(output, x, part) for part in w])
    return torch.cat([_pass(output, x, part, True) for part in w.split(size)])


def _pass(output: Tensor, x: Tensor, w: Tensor, batched: bool = False) -> Tensor:
    def pull(w: Tensor, batched: bool) -> Tensor | None:
        (v,) = torch.autograd.grad(
            output, x, w, create_graph=True, allow_unused=True, is_grads_batched=batched
        )
        return v

    # The older vmap of `is_grads_batched` does not take sizes that are symbols.
    try:
        if batched and _symbolic(output, x, w):
            v = torch.func.vmap(lambda w: pull(w, False))(w)
        else:
            v = pull(w, batched)
    except RuntimeError as error:
        one_by_one = ("is not implemented", "inplace operation")  # fails as well
        if not batched or any(text in str(error) for text in one_by_one):
            raise
        raise RuntimeError(
            f"the batched pass over {w.shape[0]} cotangents failed: if an operation of the model "
            f"does not support vmap, use chunk_size=1. The error of torch is: {error}"
        ) from error
    return connected(v)


def check_output(output: Tensor, n: int) -> None:
    """Raises if ``output`` is not a floating-point tensor with ``n`` samples that are not empty."""
    arguments.batch("output", output, "x", n)
    if not output.is_floating_point():
        raise TypeError(
            f"output has dtype {output.dtype}: it must be floating point (logits, not classes)"
        )
    if output.numel() == 0 and n > 0:
        raise ValueError(f"output has shape {tuple(output.shape)}: it must not be empty")


def check_graph(x: Tensor, output: Tensor) -> None:
    """Raises if x, a floating-point tensor, and ``output`` are not in one graph or batch."""
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
            "output are swapped. Pass (x, output), with the output of the model as it is"
        )


def run_model(
    model: Callable[..., Any], x: Tensor, at: str | None, part: Part = None
) -> tuple[Tensor, Any, Tensor]:
    """Runs the model; returns the tensor to differentiate with respect to, and the output.

    The output is given twice: what the model returned, and the tensor in it that ``part`` names.

    For ``at=None`` that tensor is the input (a detached copy, if it does not require grad).
    Otherwise it is the output of the submodule called ``at``. The model continues with a copy of
    it, which an in-place operation such as ``ReLU(inplace=True)`` may modify.
    """
    if at is None:
        arguments.floating("x", x)
        compiling = torch.compiler.is_compiling()
        if not x.requires_grad:
            x = _leaf_in_graph(x) if compiling else x.detach().requires_grad_()
        version = 0 if compiling else x._version
        whole, output = call_model(model, x, part)
        if not compiling and x._version != version:
            raise RuntimeError(
                "the model modified x in place (an activation with inplace=True, for instance), so "
                "the gradient with respect to x would be that of the modified one: pass x.clone() "
                "inside the model, or use the out-of-place operation"
            )
        return x, whole, output

    arguments.tensor("x", x)
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            f"at={at!r} names a submodule of a compiled model, which does not call its submodules: "
            "pass the module before compiling"
        )
    module = submodule(model, at)
    if torch.compiler.is_compiling():
        comptime(_install)
        (catch,) = [h for h in module._forward_hooks.values() if type(h) is Catch and h.at == at]
        catch.caught = []
        whole, output = call_model(model, x, part)
        caught, catch.caught = catch.caught, None
    else:
        catch = Catch(at)
        catch.caught = []
        handle = module.register_forward_hook(catch)
        try:
            whole, output = call_model(model, x, part)
        finally:
            handle.remove()
        caught = catch.caught
    if len(caught) != 1:
        raise RuntimeError(
            f"the submodule at={at!r} ran {len(caught)} times in one call of the model: name one "
            "that runs exactly once"
        )
    return caught[0], whole, output


class Catch:
    """A forward hook that keeps the output of a submodule while ``caught`` is a list."""

    def __init__(self, at: str) -> None:
        self.at = at
        self.caught: Any = None

    def __call__(self, module: nn.Module, args: Any, hidden: Any) -> Tensor | None:
        if self.caught is None:
            return None
        hidden = arguments.floating(f"the output of at={self.at!r}", hidden)
        hidden = hidden if hidden.requires_grad else _leaf(hidden)
        self.caught.append(hidden)
        return hidden.clone()


def _install(context: Any) -> None:
    """A `comptime` function: puts a `Catch` on ``module``, where it stays.

    Dynamo does not trace the registration of a hook.
    """
    module, at = (traced_value(context, name) for name in ("module", "at"))
    if not any(type(h) is Catch and h.at == at for h in module._forward_hooks.values()):
        module.register_forward_hook(Catch(at))
        trace_again()


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
