"""`Function`, the base of the ``autograd.Function`` of every op, and a walk over the graph.

`refuse_inference` explains an error of autograd that ops and penalties can meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastjac.torch_private import (
    add_batch_dim,
    forward_mode_active,
    is_legacy_batched,
    remove_batch_dim,
    transforms_active,
    unwrap_if_dead,
)


class Function(torch.autograd.Function):
    """A ``torch.autograd.Function`` that is cheap to call and correct under batched cotangents.

    Cost: torch inspects the signature of a Function with ``setup_context`` in every call, which
    takes 26 µs instead of 8. This is not needed here, because these Functions take positional
    arguments only. If no ``torch.func`` transform is active, `apply` calls the C++ base class
    directly, as torch does after the inspection. If there is nothing to differentiate, as in a
    backward without ``create_graph``, it calls ``forward`` (5 µs less).

    Correctness: ``autograd.grad(..., is_grads_batched=True, create_graph=True)`` and
    ``autograd.functional.jacobian(vectorize=True)`` run the backward under the older vmap of torch.
    It passes wrapped tensors to a Function and drops the graph that the Function records, so the
    second-order term is lost without an error (seen on torch 2.13). `apply` unwraps the tensors and
    maps over the batch with ``torch.func.vmap`` instead.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if transforms_active():
            return super().apply(*args)
        live = []
        records = forward_mode_active()
        for a in args:
            if isinstance(a, Tensor):
                if is_legacy_batched(a):
                    return cls._apply_batched(*args)
                a = unwrap_if_dead(a)  # of a torch.func transform that has ended
                records = records or a.requires_grad
            live.append(a)
        records = records and (torch.is_grad_enabled() or forward_mode_active())
        if not records and "setup_context" in cls.__dict__:  # otherwise forward takes a context
            return cls.forward(*live)
        try:
            return super(torch.autograd.Function, cls).apply(*live)  # type: ignore[misc]
        except RuntimeError as error:
            refuse_inference(error, cls._named(args))
            raise

    @classmethod
    def _named(cls, args: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
        """The arguments of `apply` with the names that ``forward`` gives them."""
        names = list(inspect.signature(cls.forward).parameters.values())
        for i, a in enumerate(args):
            last = names[min(i, len(names) - 1)]
            rest = last.kind is last.VAR_POSITIONAL
            yield f"{last.name}[{i - len(names) + 1}]" if rest else last.name, a

    @classmethod
    def _apply_batched(cls, *args: Any) -> Any:
        batched = [isinstance(a, Tensor) and is_legacy_batched(a) for a in args]
        level = _batch_level(next(a for a, b in zip(args, batched, strict=True) if b))
        values = [
            remove_batch_dim(a, level, 0, 0) if b else a for a, b in zip(args, batched, strict=True)
        ]
        mapped = [value for value, b in zip(values, batched, strict=True) if b]

        def call(*slices: Tensor) -> Any:
            left = iter(slices)
            return cls.apply(
                *(next(left) if b else v for v, b in zip(values, batched, strict=True))
            )

        out = torch.func.vmap(call)(*mapped)
        if isinstance(out, tuple):
            return tuple(add_batch_dim(o, 0, level) for o in out)
        return add_batch_dim(out, 0, level)


def _batch_level(t: Tensor) -> int:
    """The level of the batch dimension of a tensor in torch's older vmap.

    Torch counts the levels in each thread, and a backward on a GPU runs in a thread of its own,
    where the count is 0. So the tensor is asked: removing a level that it does not have gives a
    new dimension, here of size 0.
    """
    level = 1
    while remove_batch_dim(t, level, 0, 0).shape[0] == 0:
        level += 1
        if level > 64:  # more than torch has
            raise RuntimeError("a batched pass over no cotangents: pass at least one")
    return level


def recorded(*cotangents: Tensor | None) -> bool:
    """Whether the running backward is recorded (create_graph=True) or inside torch's older vmap."""
    return torch.is_grad_enabled() or any(
        c is not None and is_legacy_batched(c) for c in cotangents
    )


def transformed() -> bool:
    """Whether forward mode or a ``torch.func`` transform is active."""
    return transforms_active() or forward_mode_active()


def refuse_inference(
    error: RuntimeError, tensors: Iterable[tuple[str, Any]], model: Any = None
) -> None:
    """Says what to do, if autograd has refused a tensor made under ``torch.inference_mode()``.

    Called with an error that something else has raised, since to look for such tensors in each call
    would take time. Returns if the error is another one. ``tensors`` are the arguments with their
    names.
    """
    if "nference tensor" not in str(error):
        return
    state: list[tuple[str, Tensor]] = []
    if isinstance(model, nn.Module):
        state = [*model.named_parameters(), *model.named_buffers()]
    made = "made under torch.inference_mode(), and autograd cannot use"
    names = [name for name, t in state if t.is_inference()]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise RuntimeError(
            f"parameters or buffers of the model ({', '.join(names[:3])}{more}) were {made} them: "
            "outside of inference mode, copy the model (model = copy.deepcopy(model)), or create "
            "and load it there"
        ) from error
    name = next((n for n, t in tensors if isinstance(t, Tensor) and t.is_inference()), None)
    raise RuntimeError(
        f"{name or 'a tensor of the model'} was {made} it: outside of inference mode, pass a "
        "clone() of it"
    ) from error


def graph_nodes(t: Tensor, *without: Any) -> Iterator[Any]:
    """Iterate over the nodes of the autograd graph of ``t``, each of them once.

    The nodes ``without`` and those that are reached only through them are left out.
    """
    return nodes_from(t.grad_fn, *without)


def nodes_from(node: Any, *without: Any) -> Iterator[Any]:
    """Iterate over a node and all that its backward leads to, as `graph_nodes`."""
    seen, left = set(without), [node]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        left += [following for following, _ in node.next_functions]


class Multiply(Function):
    """a · b for ``jvp`` rules.

    Torch runs such a rule with forward mode switched off for plain operations, which then lose the
    tangent of an outer ``jvp`` without an error. Functions keep it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a * b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, v):
        a, b = ctx.saved_tensors
        return v * b, v * a

    @staticmethod
    def jvp(ctx, a_t, b_t):
        a, b = ctx.saved_tensors
        terms = []
        if a_t is not None:
            terms.append(Multiply.apply(a_t, b))
        if b_t is not None:
            terms.append(Multiply.apply(a, b_t))
        return terms[0] if len(terms) == 1 else Add.apply(*terms)


class Add(Function):
    """a + b for ``jvp`` rules; see `Multiply`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        return a + b

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, v):
        return v, v

    @staticmethod
    def jvp(ctx, a_t, b_t):
        if a_t is None or b_t is None:
            (only,) = (t for t in (a_t, b_t) if t is not None)
            return Multiply.apply(only, torch.ones_like(only))
        return Add.apply(a_t, b_t)
