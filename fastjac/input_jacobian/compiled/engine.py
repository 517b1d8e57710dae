"""The compiled engine: ``torch.func.vjp`` of the model inside ``torch.compile``, as one graph.

Output, VJPs and values are traced together, so torch fuses and differentiates all of it. The
parameters are those of the module, so autograd outside of the graph differentiates once more. The
model runs on copies of its buffers (`buffers`). A call that the engine cannot run raises.
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
from fastjac.input_jacobian.by_autograd import check_output
from fastjac.input_jacobian.compiled import backend, buffers
from fastjac.input_jacobian.pullback import Pullback
from fastjac.model_output import Part, tensors_of, with_tensors
from fastjac.ops.autograd import graph_nodes

# By default torch would not see hooks that are registered after the compilation, would stop after 8
# graphs (of all modes, shapes and options), and would split the graph inside DDP.
CONFIG = {"skip_nnmodule_hook_guards": False, "recompile_limit": 64, "optimize_ddp": False}

# By model, then by class of the penalty. Each function has a code object of its own: torch keeps
# graphs by code object, and so they are freed together with the model.
_functions: weakref.WeakKeyDictionary[Any, dict[type, Callable[..., Any]]] = (
    weakref.WeakKeyDictionary()
)


class CompiledPullback(Pullback):
    """The pullback of a run inside ``torch.func.vjp``, which returned ``pull``."""

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
        # The derivative of torch's JVP of a norm is wrong without an error (torch 2.13).
        raise RuntimeError(
            "engine='compiled' cannot run this call: the penalty computes a JVP of the model, "
            "which this engine does not support. Use engine='chain'"
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
    part: Part,
) -> tuple[Any, Tensor]:
    """Runs the model; returns what it returned and the values of the penalty."""
    arguments.floating("x", x)
    reason = why_not(model, x)
    if reason is not None:
        raise RuntimeError(f"engine='compiled' cannot run this call: {reason}")
    places = buffers.places_of(model)
    # Copies, since the graph may save its inputs for the backward.
    copies = buffers.copies_of(places)
    own = x.view_as(x) if x.requires_grad else x  # so that other uses of x can be told apart
    call = (model, per_sample, own, targets, named, part, copies)
    errors = torch_private.dynamo_errors()
    try:
        with torch_private.dynamo_config().patch(CONFIG):
            traced, whole, values, *left = _function_of(model, per_sample)(*call)
    except (errors.TorchDynamoException, errors.FailOnRecompileLimitHit) as error:
        if isinstance(error.__cause__, errors.ObservedException):
            _step(*call)  # raises the error that torch met while tracing
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
            "engine='compiled' cannot run this call: the model, a loss or an argument of the "
            "penalty depends on x in another way than through the argument of the model. Use "
            "engine='autograd'"
        )
    buffers.write_back(places, *left)
    return whole, values


def why_not(model: Any, x: Tensor) -> str | None:
    """Why the engine cannot run, as far as this is known before the compilation; else None."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the call: use engine='autograd' inside a compiled function"
    if torch_private.saved_tensor_hooks() is not None:
        return "hooks on saved tensors (a checkpoint) are active: use engine='autograd'"
    if torch_private.has_any_global_hook():
        return "hooks on all modules are registered: use engine='autograd'"
    if type(x) not in (Tensor, nn.Parameter):
        return f"x is {type(x).__name__}: pass a plain tensor"
    if getattr(type(model), "__weakrefoffset__", 1) == 0:
        return (
            f"model is {type(model).__name__}, which does not support weak references: wrap it in "
            "an nn.Module"
        )
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if hasattr(part, "_orig_mod"):
            return "the model or a part of it is compiled: pass it before compiling"
        if isinstance(part, nn.parallel.DistributedDataParallel):
            return "a part of the model is a DistributedDataParallel: wrap the whole model in it"
        if distributed.is_sharded(part):
            return (
                "fully_shard was applied to parts of the model, whose hooks torch.compile cannot "
                "trace: apply it to the whole model only, or use engine='chain' or 'autograd'"
            )
        if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():
            return "a lazy module is not initialized: run the model once"
    return None


def explain(model: Any, x: Tensor, reason: str | None) -> str:
    """A description of the engine; nothing is compiled. ``reason``: why the call would raise."""
    reason = reason or why_not(model, x)
    if reason is not None:
        return f"engine: none, the call raises\n   compiled cannot run: {reason}"
    return (
        f"engine: compiled\n   torch.func.vjp inside torch.compile(backend={backend.NAME!r})\n"
        "   compiles at the first call, and again for other modes, dtypes and shapes\n"
        "   raises if torch cannot trace the model, which this description does not try"
    )


def _function_of(model: Any, per_sample: Any) -> Callable[..., Any]:
    owner = getattr(model, "__self__", model)  # bound methods are temporary objects
    functions = _functions.setdefault(owner, {})
    key = type(getattr(per_sample, "__self__", per_sample))
    if key not in functions:
        own = types.FunctionType(_step.__code__.replace(), _step.__globals__)
        # Not dynamic: torch 2.13 fails on dropout and torch.randn of symbolic shapes.
        functions[key] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend.compiled)
    return functions[key]


def _step(
    model: Callable[..., Any],
    per_sample: Callable[..., Tensor],
    x: Tensor,
    targets: Any,
    named: Any,
    part: Part,
    copies: list[Tensor],
) -> tuple[bool, Any, Tensor, list[Tensor | None], list[str]]:
    """The compiled function.

    Returns whether it runs compiled, what the model returned, the values, and the buffers and
    their changes.
    """

    seen: list[Any] = []  # what the model returned, with tensors of the transform

    def run(x: Tensor) -> tuple[Tensor, Any]:
        # A view, since torch traces x itself as a tensor that does not require grad.
        whole, output, *held = buffers.run_on(copies, model, x.view_as(x), part)
        check_output(output, len(x))
        output = output.view_as(output)  # a tensor of this transform, even for a parameter
        if not output.requires_grad:
            raise RuntimeError(
                "output does not depend on x: check that the model does not detach it"
            )
        seen.append(None if part is None else whole)
        tensors = tensors_of(seen[0])
        if tensors is None:
            raise TypeError(
                f"engine='compiled' cannot run this model: it returns {type(whole).__name__}, with "
                "an object in which torch does not find the tensors: return a dict or a tuple, or "
                "use engine='chain'"
            )
        return output, (tensors, *held)

    vjp: Any = torch.func.vjp  # its annotation does not cover has_aux
    output, pull, (tensors, before, after) = vjp(run, x, has_aux=True)
    pullback = CompiledPullback(x, output, lambda w: pull(w)[0])
    values = per_sample(pullback, *targets, **named)
    changes = [buffers.change_of(b, now) for b, now in zip(before, after, strict=True)]
    left = [None if b is None else b.detach() for b in after]
    whole = output if part is None else with_tensors(seen[0], tensors)
    return torch.compiler.is_compiling(), whole, values, left, changes


def _reaches(x: Tensor, own: Tensor, values: Tensor) -> bool:
    """Whether the graph of ``values`` leads to ``x`` in another way than through its view."""
    assert own.grad_fn is not None
    goal = own.grad_fn.next_functions[0][0]
    return any(node is goal for node in graph_nodes(values, own.grad_fn))


def _message(error: Exception) -> str:
    if isinstance(error, torch_private.dynamo_errors().FailOnRecompileLimitHit):
        return f"it has {CONFIG['recompile_limit']} graphs already, for other shapes and modes"
    text = " ".join(str(getattr(error, "inner_exception", error)).split("\n")[:2]).rstrip(". ")
    if "TensorWrapper" in text:
        return "it keeps a tensor that it computes (in an attribute or a list) after the call"
    return text
