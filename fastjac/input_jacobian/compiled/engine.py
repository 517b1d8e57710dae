"""The compiled engine: ``torch.func.vjp`` of the model inside ``torch.compile``, as one graph.

Output, VJPs and values are traced together, so torch fuses and differentiates the whole of it; the
parameters are the module's own, and autograd outside goes on from there, once. The model runs on
copies of its buffers (`buffers`). Nothing falls back: what cannot run raises.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastjac import arguments, distributed, torch_private
from fastjac.input_jacobian.compiled import backend, buffers
from fastjac.input_jacobian.pullback import Pullback
from fastjac.ops.autograd import graph_nodes

# Torch's defaults overlook a hook that the model gets after it was compiled, and give up after 8
# graphs for all the modes, shapes and options. Inside DDP they would split the graph.
CONFIG = {"skip_nnmodule_hook_guards": False, "recompile_limit": 64, "optimize_ddp": False}

# By model, then class of the penalty. Each is compiled from a code object of its own: torch keeps
# its graphs by code object, and they go when the model does.
_functions: weakref.WeakKeyDictionary[Any, dict[type, Callable[..., Any]]] = (
    weakref.WeakKeyDictionary()
)


class CompiledPullback(Pullback):
    """Of a run inside ``torch.func.vjp``; ``pull`` is the function that this returned."""

    def __init__(self, x: Tensor, output: Tensor, pull: Callable[[Tensor], Tensor]) -> None:
        self.x, self.output, self.pull = x, output, pull

    def vjp(self, w: Tensor, chunk_size: int | None = None) -> Tensor:
        found = []
        for part in w.split(chunk_size or len(w)):
            one = len(part) == 1
            found.append(
                self.pull(part[0]).unsqueeze(0) if one else torch.func.vmap(self.pull)(part)
            )
        return found[0] if len(found) == 1 else torch.cat(found)

    def jvp(self, u: Tensor, chunk_size: int | None = None) -> Tensor:
        # Torch's JVP of a norm, differentiated again, is wrong without an error (seen on 2.13).
        raise RuntimeError(
            "engine='compiled' cannot run this call: the penalty takes a JVP of the model, which "
            "this engine does not have. Use engine='chain'"
        )

    def then(self, f: Callable[[Tensor], Tensor]) -> Pullback:
        value, back, *_ = torch.func.vjp(f, self.output)
        return CompiledPullback(self.x, value, lambda w: self.pull(back(w)[0]))


def run(
    per_sample: Callable[..., Tensor],
    model: Callable[..., Any],
    x: Tensor,
    targets: Any,
    named: Any,
) -> tuple[Tensor, Tensor]:
    """Output and values."""
    arguments.floating("x", x)
    reason = why_not(model, x)
    if reason is not None:
        raise RuntimeError(f"engine='compiled' cannot run this call: {reason}")
    places = buffers.places_of(model)
    # The graph may save its inputs for the backward: the buffers themselves must not be among them.
    copies = buffers.copies_of(places)
    own = x.view_as(x) if x.requires_grad else x  # a tensor that nobody else has
    call = (model, per_sample, own, targets, named, copies)
    errors = torch_private.dynamo_errors()
    try:
        with torch_private.dynamo_config().patch(CONFIG):
            traced, output, values, *left = _function_of(model, per_sample)(*call)
    except (errors.TorchDynamoException, errors.FailOnRecompileLimitHit) as error:
        if isinstance(error.__cause__, errors.ObservedException):
            _step(*call)  # raises what torch met while tracing, as it is
        raise RuntimeError(
            f"engine='compiled' cannot run this model: {_message(error)}. Use engine='autograd'"
        ) from error
    if not traced:
        raise RuntimeError(
            "engine='compiled' cannot run: torch.compile is switched off "
            "(torch.compiler.set_stance, TORCHDYNAMO_DISABLE). Use engine='autograd'"
        )
    if own is not x and _reaches(x, own, values):
        raise RuntimeError(
            "engine='compiled' cannot run this call: the model, the penalty's loss or an argument "
            "depends on x beside the model's argument. Use engine='autograd'"
        )
    buffers.write_back(places, *left)
    return output, values


def why_not(model: Any, x: Tensor) -> str | None:
    """What can be told before anything is compiled."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it already: use engine='autograd' inside a compiled function"
    if torch_private.saved_tensor_hooks() is not None:
        return "hooks on saved tensors (a checkpoint) are active: use engine='autograd'"
    if torch_private.has_any_global_hook():
        return "hooks on all modules are registered: use engine='autograd'"
    if type(x) not in (Tensor, nn.Parameter):
        return f"x is {type(x).__name__}: pass a plain tensor"
    if getattr(type(model), "__weakrefoffset__", 1) == 0:
        return f"model is {type(model).__name__}, which cannot be cached: wrap it in an nn.Module"
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if hasattr(part, "_orig_mod"):
            return "the model, or a part of it, is compiled: pass it before compiling"
        if isinstance(part, nn.parallel.DistributedDataParallel):
            return "a part of the model is a DistributedDataParallel: wrap the whole model in it"
        if distributed.is_sharded(part):
            return (
                "fully_shard was applied to parts of the model too, whose hooks torch.compile "
                "cannot trace: apply it to the model alone, or use engine='chain' or 'autograd'"
            )
        if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():
            return "a lazy module has not run: run the model once"
    return None


def explain(model: Any, x: Tensor, reason: str | None) -> str:
    """What runs, as text; compiles nothing. ``reason``: why the call is known to raise."""
    reason = reason or why_not(model, x)
    if reason is not None:
        return f"engine: none, the call raises\n   compiled cannot run: {reason}"
    return (
        f"engine: compiled\n   torch.func.vjp inside torch.compile(backend={backend.NAME!r})\n"
        "   compiles at the first call, and anew for other modes, dtypes and shapes\n"
        "   raises if torch cannot trace the model, which is not tried here"
    )


def _function_of(model: Any, per_sample: Any) -> Callable[..., Any]:
    owner = getattr(model, "__self__", model)  # of a method, which does not last
    functions = _functions.setdefault(owner, {})
    key = type(getattr(per_sample, "__self__", per_sample))
    if key not in functions:
        own = types.FunctionType(_step.__code__.replace(), _step.__globals__)
        # Not dynamic: torch fails on dropout and torch.randn of symbolic shapes (seen on 2.13).
        functions[key] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend.compiled)
    return functions[key]


def _step(
    model: Callable[..., Any],
    per_sample: Callable[..., Tensor],
    x: Tensor,
    targets: Any,
    named: Any,
    copies: list[Tensor],
) -> tuple[bool, Tensor, Tensor, list[Tensor | None], list[str]]:
    """What is compiled: whether it is, output, values, the buffers and what happened to them."""

    def run(x: Tensor) -> tuple[Tensor, Any]:
        # A view, since torch traces x itself as if it did not require grad.
        output, *held = buffers.run_on(copies, model, x.view_as(x))
        arguments.batch("output", output, "x", len(x))
        if not output.is_floating_point():
            raise TypeError(f"output has dtype {output.dtype}: it must be floating point")
        output = output.view_as(output)  # of this transform, even if it is a parameter
        if not output.requires_grad:
            raise RuntimeError("output does not depend on x: see that the model does not detach it")
        return output, held

    vjp: Any = torch.func.vjp  # its type forgets what has_aux adds
    output, pull, (before, after) = vjp(run, x, has_aux=True)
    pullback = CompiledPullback(x.detach(), output, lambda w: pull(w)[0])
    values = per_sample(pullback, *targets, **named)
    changes = [buffers.change_of(b, now) for b, now in zip(before, after, strict=True)]
    left = [None if b is None else b.detach() for b in after]
    return torch.compiler.is_compiling(), output, values, left, changes


def _reaches(x: Tensor, own: Tensor, values: Tensor) -> bool:
    """Whether the graph of ``values`` leads to ``x`` by another way than ``own``, a view of it."""
    assert own.grad_fn is not None
    goal = own.grad_fn.next_functions[0][0]
    return any(node is goal for node in graph_nodes(values, own.grad_fn))


def _message(error: Exception) -> str:
    if isinstance(error, torch_private.dynamo_errors().FailOnRecompileLimitHit):
        return f"there are {CONFIG['recompile_limit']} graphs of it for other shapes and modes"
    text = " ".join(str(getattr(error, "inner_exception", error)).split("\n")[:2]).rstrip(". ")
    if "TensorWrapper" in text:
        return "it keeps a tensor that it computes (in an attribute, a list) beyond the call"
    return text
