"""Chooses the engine of a penalty in the model form, and runs the model with it.

The model runs once, in the ordinary way, and torch builds the graph that it always builds. The
engine is chosen after the run, for this call alone: the chain engine, if it can read the graph and
it pays, else autograd. A Sequential of Linear and activation modules runs in C++ instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastjac import distributed, torch_private
from fastjac.input_jacobian import by_autograd
from fastjac.input_jacobian.chain import Chain, GraphRun, Mlp, Unsupported
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


def run(request: Request, model: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the model; returns its output and what ``per_sample`` returns for its pullback."""
    _, engine, at, per_sample, targets, named = request
    if engine == "compiled":
        if at is not None:
            raise RuntimeError(
                f"engine='compiled' cannot run this call: at={at!r} needs a gradient with respect "
                "to a hidden tensor: use engine='autograd'"
            )
        return compiled.run(per_sample, model, x, targets, named)
    reason = _why_not(request, x)
    chain: Chain | None = None
    if reason is None:
        mlp = Mlp.of(model, x) if at is None else None
        if mlp is not None:
            chain = Chain(x, mlp)
        else:
            hooks = RemovableHandle.next_id
            x, output = by_autograd.run_model(model, x, at)
            by_autograd.check_graph(x, output)
            chain, reason = _chain_of(request, x, output, hooks)
    else:
        x, output = by_autograd.run_model(model, x, at)
        by_autograd.check_graph(x, output)
    if chain is not None:
        return chain.values(per_sample(chain, *targets, **named))
    if engine == "chain":
        raise RuntimeError(
            f"engine='chain' cannot run this call: {reason}. Use engine='autograd'"
        )
    distributed.check_graph(x, output)
    return output, per_sample(by_autograd.AutogradPullback(x, output), *targets, **named)


def _why_not(request: Request, x: Any) -> str | None:
    """Why the chain engine cannot run this call, as far as this is known before it; else None."""
    if request.engine == "autograd":
        return "engine='autograd' is set"
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
    if torch_private.transforms_active():
        return "a torch.func transform is active"
    if torch_private.saved_tensor_hooks() is not None:
        return "hooks on saved tensors (a checkpoint) are active"
    if type(x) not in (Tensor, nn.Parameter):
        return f"x is {type(x).__name__}"
    if x.layout != torch.strided or x.is_nested:
        return "x is not a dense tensor"
    if x.numel() == 0:
        return "x is empty"
    for t in (*request.targets, *request.named.values()):
        if isinstance(t, Tensor) and t.requires_grad:
            return "an argument of the penalty requires grad"
    return None


def _chain_of(
    request: Request, x: Tensor, output: Tensor, hooks: int
) -> tuple[Chain | None, str | None]:
    """The chain engine for a graph, or why it does not run."""
    if hooks != RemovableHandle.next_id:  # torch numbers all hooks; those of a graph are not seen
        return None, "the model registers hooks when it runs"
    try:
        run = GraphRun(x, output)
    except Unsupported as error:
        return None, str(error)
    return Chain(x, run), None


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
        return compiled.explain(model, x, None)
    reason = _why_not(request, x)
    links: list[str] = []
    if reason is None:
        state = _State(model, x) if isinstance(model, nn.Module) else None
        mlp = Mlp.of(model, x) if request.at is None else None
        if mlp is not None:
            links = mlp.describe()
        else:
            hooks = RemovableHandle.next_id
            x, output = by_autograd.run_model(model, x, request.at)
            chain, reason = _chain_of(request, x, output, hooks)
            links = [] if chain is None else chain.run.describe()
        if state is not None:
            state.restore()
    if reason is not None:
        return f"engine: autograd\n   chain cannot run: {reason}"
    return "\n".join(["engine: chain", *(f"   {link}" for link in links)])
