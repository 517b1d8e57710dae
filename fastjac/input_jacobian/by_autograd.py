"""What the penalties ask of autograd: batched VJPs, norms of them, and the input of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.comptime import comptime

from fastjac import arguments
from fastjac.ops.autograd import Function, graph_nodes
from fastjac.penalty import call_model


def vjp(output: Tensor, x: Tensor, w: Tensor, chunk_size: int | None = None) -> Iterator[Tensor]:
    """``Jᵀ w_k`` for cotangents ``w`` ``[K, *output.shape]``, in pieces ``[k, *x.shape]``.

    A piece is one batched pass (``is_grads_batched``) over ``chunk_size`` cotangents, a piece of
    one cotangent a plain pass without vmap. All of it stays in the graph, ``w`` included.

    A graph that holds somebody's ``autograd.Function`` (a compiled model is one) is gone through
    one cotangent at a time: under a batched pass torch would drop the second-order term of such a
    Function with no error (seen on torch 2.13); alone it is exact, or raises. In a compiled step
    the default is one at a time too (torch cannot trace a batched pass with dynamic shapes), and
    such a Function raises.
    """
    chain = getattr(x, "chain", None)
    if chain is not None:
        yield from _chain_vjp(chain, output, w, chunk_size)
        return
    if torch.compiler.is_compiling():
        refuse_functions()
        size = chunk_size or 1
    else:
        size = chunk_size or len(w)
        if size > 1 and holds_foreign_function(output):
            size = 1
    for piece in w.split(size):
        batched = len(piece) > 1
        try:
            (v,) = torch.autograd.grad(
                output,
                x,
                piece if batched else piece[0],
                create_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        except RuntimeError as error:
            if not batched:
                raise
            raise RuntimeError(
                f"the batched pass over {len(piece)} cotangents failed; if an operation of the "
                f"model cannot be batched, chunk_size=1 goes one by one. Torch said: {error}"
            ) from error
        if v is None:
            raise RuntimeError(
                "output does not depend on x: pass the very tensor that went into the model, and "
                "see that the model does not detach it"
            )
        yield v if batched else v.unsqueeze(0)


def chain_of(x: Tensor, output: Tensor) -> Any:
    """The recorded run that x and the output of the model stand for, if any."""
    chain = getattr(x, "chain", None)
    return chain if chain is not None and output is chain.output else None


def _chain_vjp(chain: Any, output: Tensor, w: Tensor, chunk_size: int | None) -> Iterator[Tensor]:
    if output is chain.output:
        yield from chain.vjp(w, chunk_size)
        return
    for piece in vjp(output, chain.output, w, chunk_size):  # of a loss
        yield from chain.vjp(piece, None)


def holds_foreign_function(output: Tensor) -> bool:
    """Whether the graph of ``output`` has a node of a Python ``autograd.Function`` not ours."""
    for node in graph_nodes(output):
        forward = getattr(node, "_forward_cls", None)
        if forward is not None and not issubclass(forward, Function):
            return True
    return False


def refuse_functions() -> None:
    """While compiling: torch 2.13 drops the second-order term of somebody's ``autograd.Function``.

    With no error, where ``autograd.grad`` is traced. Ours are in the graph as single operations.
    """

    @comptime
    def check(context: Any) -> None:
        output = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
        # Those of checkpoints and their like are modules.
        bodies = [
            m.graph for m in output.nn_modules.values() if isinstance(m, torch.fx.GraphModule)
        ]
        targets = [node.target for graph in (context.graph(), *bodies) for node in graph.nodes]
        if any(getattr(t, "__name__", "") == "autograd_function_apply" for t in targets):
            raise RuntimeError(
                "the model calls a torch.autograd.Function, whose second derivative torch loses "
                "in a compiled step: compute the penalty outside torch.compile"
            )


def check_graph(x: Tensor, output: Tensor) -> None:
    """``output`` must be a function of ``x`` in one graph, sample by sample."""
    arguments.floating("x", x)
    arguments.batch("output", output, "x", x.shape[0])
    if not x.requires_grad:
        raise RuntimeError(
            "x does not require grad: call x.requires_grad_() before the model, or use the model "
            "form penalty(model, x)"
        )
    if not output.is_floating_point():
        raise TypeError(f"output has dtype {output.dtype}: it must be floating point")
    # Dynamo knows requires_grad of a tensor it traces, not grad_fn.
    if not output.requires_grad or not (torch.compiler.is_compiling() or output.grad_fn):
        raise RuntimeError(
            "output has no grad_fn: it was detached, computed under torch.no_grad(), or x and "
            "output are swapped"
        )
    if output.numel() == 0 and output.shape[0] > 0:
        raise ValueError(f"output has shape {tuple(output.shape)}: it holds no numbers per sample")


def run_model(model: Callable[..., Any], x: Tensor, at: str | None) -> tuple[Tensor, Tensor]:
    """``(hidden, output)`` of the model, ``hidden`` the tensor to differentiate by.

    ``at=None``: the input, made to require grad if it does not. Otherwise the output of the
    submodule of that name. The model goes on from a copy of it, so that an in-place operation that
    follows (ReLU(inplace=True)) cannot change which tensor is meant.
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
            f"at={at!r} names a submodule, and model is torch.compile'd, whose submodules do not "
            "run: pass the module before compiling"
        )
    handle = submodule(model, at).register_forward_hook(catch)
    try:
        output = call_model(model, x)
    finally:
        handle.remove()
    if len(caught) != 1:
        raise RuntimeError(
            f"at={at!r} ran {len(caught)} times in one call of the model: it must run exactly once"
        )
    return caught[0], output


def submodule(model: Callable[..., Any], at: str) -> nn.Module:
    """The submodule called ``at``."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"at={at!r} names a submodule, and model is {type(model).__name__}: it must be an "
            "nn.Module"
        )
    found = dict(model.named_modules(remove_duplicate=False)).get(at)
    if found is None or at == "":
        names = ", ".join(name for name, _ in model.named_modules() if name)
        raise ValueError(f"at={at!r} is not a submodule of the model: it has {names or 'none'}")
    return found
