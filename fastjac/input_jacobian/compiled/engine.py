"""The compiled engine: ``torch.func.vjp`` of the model inside ``torch.compile``, as one graph.

Output, VJPs and values are traced together, so torch fuses and differentiates the whole of it; the
parameters are the module's own, and autograd outside goes on from there, once. The model runs on
copies of its buffers (`buffers`). Nothing falls back: what cannot run raises.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, ObservedException, TorchDynamoException
from torch.nn.modules.lazy import LazyModuleMixin

from fastjac import arguments, distributed
from fastjac.input_jacobian.compiled import backend, buffers
from fastjac.ops.autograd import graph_nodes
from fastjac.per_sample import measure, total

if TYPE_CHECKING:
    from fastjac.input_jacobian.penalty import InputPenalty

# Torch's defaults overlook a hook that the model gets after it was compiled, and give up after 8
# graphs for all the modes, shapes and options. Inside DDP they would split the graph.
CONFIG = {"skip_nnmodule_hook_guards": False, "recompile_limit": 64, "optimize_ddp": False}

# By model, then class of the penalty. Each is compiled from a code object of its own: torch keeps
# its graphs by code object, and they go when the model does.
_functions: weakref.WeakKeyDictionary[Any, dict[type, Callable[..., Any]]] = (
    weakref.WeakKeyDictionary()
)


class Pullback:
    """The VJPs of a model, where `by_autograd.vjp` finds them."""

    def __init__(self, output: Tensor, pull: Callable[[Tensor], tuple[Tensor]]) -> None:
        self.output, self.pull = output, pull

    def vjp(self, w: Tensor, chunk_size: int | None) -> Iterator[Tensor]:
        """``v = Jᵀ w_k``, ``[k, *x.shape]``, in pieces."""
        for piece in w.split(chunk_size or len(w)):
            if len(piece) == 1:
                yield self.pull(piece[0])[0].unsqueeze(0)
            else:
                yield torch.func.vmap(lambda row: self.pull(row)[0])(piece)

    def squared_norms(self, w: Tensor, chunk_size: int | None, scale: float) -> Tensor:
        """``scale Σ_k ‖Jᵀ w_kn‖²``, ``[N]``."""
        pieces = self.vjp(w, chunk_size)
        return scale * total(measure(v, "l2_squared") for v in pieces)

    def cotangent_of(self, losses: Callable[[Tensor], Tensor]) -> Tensor:
        """``∂ℓ/∂g`` of losses ``[N]`` of the output ``g``."""
        loss, pull, *_ = torch.func.vjp(losses, self.output)
        return pull(torch.ones_like(loss))[0]


def run(
    penalty: InputPenalty, model: Callable[..., Any], x: Tensor, targets: Any, named: Any
) -> tuple[Tensor, Tensor]:
    """Output and values."""
    arguments.floating("x", x)
    drawn = penalty.draws_inside and named.get("projection") is None
    if drawn and getattr(penalty, "generator", None) is not None:
        raise ValueError(
            "generator is given and engine is 'compiled', whose random numbers are torch's own "
            "(torch.manual_seed): drop generator, pass projection=, or name another engine"
        )
    reason = why_not(penalty, model, x)
    if reason is not None:
        raise RuntimeError(f"engine='compiled' cannot run this call: {reason}")
    places = buffers.places_of(model)
    # The graph may save its inputs for the backward: the buffers themselves must not be among them.
    copies = buffers.copies_of(places)
    own = x.view_as(x) if x.requires_grad else x  # a tensor that nobody else has
    call = (model, penalty, own, targets, named, copies)
    try:
        with torch._dynamo.config.patch(CONFIG):
            traced, output, values, *left = _function_of(model, penalty)(*call)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        if isinstance(error.__cause__, ObservedException):
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


def why_not(penalty: InputPenalty, model: Any, x: Tensor) -> str | None:
    """What can be told before anything is compiled."""
    if not penalty.chain_ready:
        return f"{type(penalty).__name__} is not made of VJPs of the output: use engine='autograd'"
    if penalty.at is not None:
        return f"at={penalty.at!r}: the gradient is by a hidden tensor: use engine='autograd'"
    if torch.compiler.is_compiling():
        return "torch.compile traces it already: use engine='autograd' inside a compiled function"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "hooks on saved tensors (a checkpoint) are active: use engine='autograd'"
    if torch.nn.modules.module._has_any_global_hook():
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


def explain(penalty: InputPenalty, model: Any, x: Tensor) -> str:
    """What runs, as text; compiles nothing."""
    reason = why_not(penalty, model, x)
    if reason is not None:
        return f"engine: none, the call raises\n   compiled cannot run: {reason}"
    return (
        f"engine: compiled\n   torch.func.vjp inside torch.compile(backend={backend.NAME!r})\n"
        "   compiles at the first call, and anew for other modes, dtypes and shapes\n"
        "   raises if torch cannot trace the model, which is not tried here"
    )


def _function_of(model: Any, penalty: InputPenalty) -> Callable[..., Any]:
    owner = getattr(model, "__self__", model)  # of a method, which does not last
    functions = _functions.setdefault(owner, {})
    if type(penalty) not in functions:
        own = types.FunctionType(_step.__code__.replace(), _step.__globals__)
        # Not dynamic: torch fails on dropout and torch.randn of symbolic shapes (seen on 2.13).
        functions[type(penalty)] = torch.compile(
            own, fullgraph=True, dynamic=False, backend=backend.compiled
        )
    return functions[type(penalty)]


def _step(
    model: Callable[..., Any],
    penalty: InputPenalty,
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
    stand_in: Any = x.detach()
    stand_in.chain = Pullback(output, pull)  # where `by_autograd.vjp` finds it
    values = penalty.per_sample(stand_in, output, *targets, **named)
    changes = [buffers.change_of(b, now) for b, now in zip(before, after, strict=True)]
    left = [None if b is None else b.detach() for b in after]
    return torch.compiler.is_compiling(), output, values, left, changes


def _reaches(x: Tensor, own: Tensor, values: Tensor) -> bool:
    """Whether the graph of ``values`` leads to ``x`` by another way than ``own``, a view of it."""
    assert own.grad_fn is not None
    goal = own.grad_fn.next_functions[0][0]
    return any(node is goal for node in graph_nodes(values, own.grad_fn))


def _message(error: Exception) -> str:
    if isinstance(error, FailOnRecompileLimitHit):
        return f"there are {CONFIG['recompile_limit']} graphs of it for other shapes and modes"
    text = " ".join(str(getattr(error, "inner_exception", error)).split("\n")[:2]).rstrip(". ")
    if "TensorWrapper" in text:
        return "it keeps a tensor that it computes (in an attribute, a list) beyond the call"
    return text
