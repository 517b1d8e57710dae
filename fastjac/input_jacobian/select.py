"""Chooses the engine of a penalty in the model form, and runs the model with it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastjac import distributed
from fastjac.input_jacobian import by_autograd
from fastjac.input_jacobian.chain import Chain, Unsupported
from fastjac.input_jacobian.chain.tape import why_not
from fastjac.input_jacobian.compiled import engine as compiled
from fastjac.input_jacobian.compiled.buffers import places_of

ENGINES = ("auto", "chain", "autograd", "compiled")


class Request(NamedTuple):
    """A call of a penalty: ``per_sample(pull, *targets, **named)`` of the pullback of a model."""

    asker: type  # the class of the penalty
    engine: str
    at: str | None
    per_sample: Callable[..., Tensor]
    targets: tuple[Any, ...] = ()
    named: dict[str, Any] = {}  # noqa: RUF012 (never modified)


# By model, then by training mode and class of penalty: why the chain engine cannot run the model,
# or None if it can.
_tried: weakref.WeakKeyDictionary[nn.Module, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def run(request: Request, model: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the model; returns its output and what ``per_sample`` returns for its pullback."""
    _, engine, at, per_sample, targets, named = request
    if engine == "compiled":
        if at is not None:
            raise RuntimeError(f"engine='compiled' cannot run this call: {_hidden(at)}")
        return compiled.run(per_sample, model, x, targets, named)
    if _chain_wanted(request, model, x):
        result = _by_chain(request, model, x)
        if result is not None:
            return result
    x, output = by_autograd.run_model(model, x, at)
    by_autograd.check_graph(x, output)
    distributed.check_graph(x, output)
    return output, per_sample(by_autograd.AutogradPullback(x, output), *targets, **named)


def _hidden(at: str) -> str:
    return f"at={at!r} needs a gradient with respect to a hidden tensor: use engine='autograd'"


def _chain_wanted(request: Request, model: Any, x: Tensor) -> bool:
    """Whether to try the chain engine. Raises if it was asked for and cannot run this call."""
    if request.engine == "autograd":
        return False
    reason = _refusal(request, model, x)
    if reason is None:
        for t in (*request.targets, *request.named.values()):
            if isinstance(t, Tensor) and t.requires_grad:
                reason = "an argument of the penalty requires grad"
    if reason is not None and request.engine == "chain":
        compiled_model = hasattr(model, "_orig_mod")
        advice = "Pass it before compiling" if compiled_model else "Use engine='autograd'"
        raise RuntimeError(f"engine='chain' cannot run this call: {reason}. {advice}")
    return reason is None


def _refusal(request: Request, model: Any, x: Tensor) -> str | None:
    """Why the chain engine cannot run this call, as far as this is known before it; else None."""
    if request.at is not None:
        return _hidden(request.at)
    is_batch = isinstance(x, Tensor) and x.is_floating_point() and not x.is_nested and x.dim() > 0
    if not is_batch or x.shape[0] == 0:
        return "x is not a batch of floating-point samples"
    if x.layout != torch.strided:
        return f"x is a {x.layout} tensor"
    reason = why_not(model, x)
    if reason is not None:
        return reason
    if not isinstance(model, nn.Module):
        return None if request.engine == "chain" else "model is a function, not an nn.Module"
    tried, key = _tried.setdefault(model, {}), (model.training, request.asker)
    if key not in tried:
        for part in model.modules():
            if hasattr(part, "_orig_mod"):
                tried[key] = "a part of the model is compiled"
            elif isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():
                return "a lazy module is not initialized"
    return tried.get(key)


def _by_chain(
    request: Request, model: Callable[..., Any], x: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Output and values, or None if the chain engine cannot run the model."""
    tried: dict[Any, str | None] = {}
    state, key = None, None
    if isinstance(model, nn.Module):
        tried, key = _tried[model], (model.training, request.asker)
        if key not in tried:  # if this run fails, the next one starts from the same state
            state = _State(model, x)
    try:
        result = _values(Chain(model, x), request)
    except Unsupported as error:
        if state is not None:
            state.restore()
        if request.engine == "chain":
            raise RuntimeError(
                f"engine='chain' cannot run this model: {error}. Use engine='autograd'"
            ) from error
        if state is None and not error.early:
            raise RuntimeError(
                f"the chain engine ran this model before and cannot run it now: {error}. The "
                "buffers of the model may have been updated already. Use engine='autograd'"
            ) from error
        tried[key] = str(error)
        warnings.warn(
            f"{request.asker.__name__}: engine='autograd' runs instead of the chain engine, which "
            f"cannot run this model: {error}. Set engine='autograd' to avoid this warning",
            stacklevel=8,
        )
        return None
    tried[key] = None
    return result


def _values(chain: Chain, request: Request) -> tuple[Tensor, Tensor]:
    by_autograd.check_output(chain.output, len(chain.x))
    return chain.values(request.per_sample(chain, *request.targets, **request.named))


class _State:
    """The buffers of the model and the state of torch's random generators."""

    def __init__(self, model: Any, x: Tensor) -> None:
        self.buffers = [(*place, place[-1].clone()) for place in places_of(model)]
        self.cuda = x.device if x.is_cuda else None
        self.random = torch.get_rng_state()
        self.cuda_random = None if self.cuda is None else torch.cuda.get_rng_state(self.cuda)

    def restore(self) -> None:
        for buffers, name, buffer, before in self.buffers:
            buffers[name] = buffer
            if not torch.equal(buffer, before):
                # Without counting it as a write, since earlier graphs may hold the buffer.
                buffer.data.copy_(before)
        torch.set_rng_state(self.random)
        if self.cuda is not None and self.cuda_random is not None:
            torch.cuda.set_rng_state(self.cuda_random, self.cuda)


def explain(request: Request, model: Any, x: Tensor) -> str:
    """A text that says which engine runs a call, and why; runs the model once."""
    if distributed.is_sharded(model):
        return (
            f"engine: {request.engine}, inside the forward of fully_shard, which is not run here: "
            "call explain_engine with the model before it is sharded"
        )
    model = distributed.inside(model)
    if request.engine == "compiled":
        return compiled.explain(model, x, None if request.at is None else _hidden(request.at))
    reason = "engine='autograd' is set" if request.engine == "autograd" else None
    reason = reason or _refusal(request, model, x)
    links: list[str] = []
    if reason is None:
        state = _State(model, x) if isinstance(model, nn.Module) else None
        try:
            links = Chain(model, x).run.describe()
        except Unsupported as error:
            reason = str(error)
        if state is not None:
            state.restore()
    if reason is not None:
        return f"engine: autograd\n   chain cannot run: {reason}"
    return "\n".join(["engine: chain", *(f"   {link}" for link in links)])
