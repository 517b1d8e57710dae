"""Chooses the engine of a penalty in the model form, and runs the model with it.

The model runs once, in the ordinary way, and torch builds the graph that it always builds. The
engine is chosen after the run, for this call alone: the chain engine, if it can read the graph, but
autograd for a small graph that is seen for the first time. A Sequential of Linear and activation
modules runs in C++ instead.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.hooks import RemovableHandle

from fastjac import distributed, torch_private
from fastjac.input_jacobian import by_autograd, guards, slips
from fastjac.input_jacobian.chain import (
    CHECKPOINT,
    Chain,
    GraphRun,
    Mlp,
    Signature,
    Unreadable,
    Unsupported,
    keeps_hidden,
    programs_of,
    run_of,
)
from fastjac.input_jacobian.pullback import Pullback
from fastjac.input_jacobian.traced_mlp import TracedMlp
from fastjac.input_jacobian.written_out import NormsWrittenOut
from fastjac.model_output import Part, State, tensors_of, with_tensors

ENGINES = ("auto", "chain", "autograd")


class Asks(Protocol):
    """What the choice asks of a penalty."""

    engine: str
    at: str | None
    output: Part
    uses_jvp: bool
    _outside: bool
    by_hand: bool

    def per_sample(self, pull: Pullback, *targets: Any, **named: Any) -> Tensor: ...


class Request(NamedTuple):
    """A call of a penalty: ``per_sample(pull, *targets, **named)`` of the pullback of a model."""

    penalty: Asks
    targets: tuple[Any, ...] = ()
    named: dict[str, Any] = {}  # noqa: RUF012 (never modified)


def run(request: Request, model: Callable[..., Any], x: Tensor) -> tuple[Any, Tensor]:
    """Runs the model; returns what it returned and what ``per_sample`` returns for its pullback."""
    penalty, targets, named = request
    whole, pull, reason, advice = _run(request, model, x)
    if isinstance(pull, Chain):
        pull.definition = lambda pull: _again(request, pull)
        picked = pull.run.output
        if penalty._outside:
            try:
                found = slips.values(penalty, pull, targets, named)
            except slips.ByHand:
                if penalty.engine == "chain":
                    raise
                penalty.by_hand = True  # this call runs the model again, and later ones once
                return run(request, model, x)
        else:
            found = penalty.per_sample(pull, *targets, **named)
        output, values = pull.values(found)
        if penalty.output is None:
            return output, values
        if output is not picked:  # the graph of this one has been freed
            tensors = [output if t is picked else t for t in tensors_of(whole) or ()]
            whole = with_tensors(whole, tensors)
        return whole, values
    if penalty.engine == "chain":
        raise RuntimeError(f"engine='chain' cannot run this call: {reason}{advice}")
    if penalty._outside:
        return whole, slips.values(penalty, pull, targets, named)
    return whole, penalty.per_sample(pull, *targets, **named)


def _norms(written_out: bool) -> AbstractContextManager[object]:
    return NormsWrittenOut() if written_out else nullcontext()


def _alone(whole: Any, output: Tensor) -> bool:
    """Whether no other tensor in what the model returned has a graph, which may be a hidden one."""
    tensors = tensors_of(whole)
    if tensors is None or not any(t is output for t in tensors):
        return False
    return all(t is output or t.grad_fn is None for t in tensors)


def _again(request: Request, pull: Pullback) -> Tensor:
    """``per_sample`` a second time; the random numbers that it draws do not count."""
    generator = getattr(request.penalty, "generator", None)
    state = None if generator is None else generator.get_state()
    devices = [pull.x.device] if pull.x.is_cuda else []
    with torch.random.fork_rng(devices):
        values = request.penalty.per_sample(pull, *request.targets, **request.named)
    if generator is not None:
        generator.set_state(state)
    return values


def _run(
    request: Request, model: Any, x: Any, steady: bool = False
) -> tuple[Any, Pullback, str | None, str]:
    """Runs the model; returns what it returned and the pullback.

    If that is not the chain engine's, also why, and what to do about it. If ``steady``, the engine
    is the one of later calls, with the same operations and shapes.
    """
    at, part = request.penalty.at, request.penalty.output
    advice = ". Use engine='autograd'"
    if torch.compiler.is_compiling():
        if request.penalty.engine == "auto" and not request.penalty.uses_jvp:
            traced = TracedMlp.of(model, x) if at is None and part is None else None
            if traced is not None:
                return traced.output, traced, "torch.compile traces the call", advice
        # Torch cannot differentiate its faster attention twice, nor the JVP of its norms.
        with sdpa_kernel(SDPBackend.MATH), _norms(request.penalty.uses_jvp):
            x, whole, output = by_autograd.run_model(model, x, at, part)
        by_autograd.check_graph(x, output)
        distributed.check_graph(x, output)
        pull = by_autograd.AutogradPullback(x, output)
        return whole, pull, "torch.compile traces the call", advice
    if isinstance(x, Tensor) and x.is_meta:
        raise ValueError(
            "x is on the meta device, where tensors have no numbers: create x and the model on a "
            "device that computes, such as 'cpu' or 'cuda'"
        )
    reason = _why_not(request, x)
    if (
        type(model) is nn.Sequential
        and reason is None
        and at is None
        and part is None
        and not torch.is_autocast_enabled(x.device.type)
    ):
        mlp = Mlp.of(model, x)
        if mlp is not None:
            return mlp.output, Chain(x, mlp), None, ""
    held = model if isinstance(model, nn.Module) else getattr(model, "__code__", type(model))
    found = _models.get(id(held))
    known = None if found is None or found[0]() is not held else found[1]
    if reason is not None or known:
        with sdpa_kernel(SDPBackend.MATH):
            return _observed(request, model, x, steady, reason)
    before = State(model, x) if known is None else None
    result = _observed(request, model, x, steady, None)
    if known is False and result[2] is None:
        return result
    return _again_by_matrix(request, model, x, steady, result, held, before)


_models: dict[int, tuple[Any, bool]] = {}
"""By the identity of a model, or of the code of a function: a weak reference to it, and whether its
attention must be differentiable twice.

The kernels that torch chooses for attention are not; the chain engine has the derivatives that they
lack. If a call turns out to be one for autograd, the model runs a second time, with the attention
that has a matrix of scores, and later calls run with it at once. In the first call, where this is
usually found, the second run starts from the buffers and random numbers of the first one.
"""


def _again_by_matrix(
    request: Request, model: Any, x: Any, steady: bool, result: Any, held: Any, before: Any
) -> tuple[Any, Any, str | None, str]:
    """The result of a run, or of a second one if only autograd can differentiate it."""
    reason, number = result[2], id(held)
    attention = reason is not None and result[1].operations.missing in guards.ATTENTION
    # A checkpoint computes the model again in the backward, where the context has ended.
    again = attention and reason != CHECKPOINT
    _models[number] = weakref.ref(held, lambda _: _models.pop(number, None)), again
    if not again:
        return result
    if before is not None:
        before.restore()
    return _run(request, model, x, steady)


def _observed(
    request: Request, model: Any, x: Any, steady: bool, reason: str | None
) -> tuple[Any, Any, str | None, str]:
    """`_run` of a model in torch; ``reason`` is why the chain engine cannot run it, if known."""
    at, part = request.penalty.at, request.penalty.output
    advice = ". Use engine='autograd'"
    hooks = RemovableHandle.next_id + (at is not None)  # `run_model` registers one itself
    start = torch_private.sequence_number()
    x, whole, output = by_autograd.run_model(model, x, at, part)
    by_autograd.check_graph(x, output)
    # Torch counts all hooks. One on a hidden tensor changes the gradient, and is not seen.
    hooked = hooks != RemovableHandle.next_id
    operations = None
    if reason is None and hooked:
        reason = "the model registers hooks when it runs"
        if steady or request.penalty.engine == "chain":
            try:
                GraphRun(x, output)
            except Unsupported as error:  # a compiled model, which says more
                reason, advice = str(error), error.advice
    elif reason is None:
        try:
            programs, signature, untraced = _programs(x, output, start)
            if programs is not None:
                alone = whole is output or _alone(whole, output)
                if signature.private and (not alone or keeps_hidden(model)):
                    signature.private = False
                return whole, Chain(x, run_of(x, output, signature, programs)), None, ""
            if output.grad_fn is not None:
                operations = guards.Operations(output)
            now = x.numel() >= LARGE or _asks_for_chain(request, operations)
            if steady or now:
                graph = GraphRun(x, output)
                if untraced is None or now:
                    return whole, Chain(x, graph), None, ""
            reason = untraced or FIRST
        except Unsupported as error:
            reason, advice = str(error), error.advice
    distributed.check_graph(x, output)
    why = f"it does not run this call, because {reason}"
    if reason == FIRST:
        why = "set uses_jvp = True in the class of the penalty, or engine='chain'"
    operations = operations or guards.Operations(output)
    pull = by_autograd.AutogradPullback(x, output, operations, why)
    return whole, pull, reason, advice


LARGE = 1 << 15
"""Elements of x from which on the chain engine pays without a program.

It then goes through the graph in Python, which costs some microseconds for each operation and
sweep, and saves as many passes over memory.
"""

FIRST = "the first call with these operations and shapes is run by autograd"


def _programs(x: Tensor, output: Tensor, start: int) -> tuple[Any, Any, str | None]:
    """The programs of a run and its signature, if it is not the first one; or why there are none.

    ``(None, None, None)`` for the first one.
    """
    try:
        signature = Signature(x, output, start)
        programs = programs_of(signature)
    except Unreadable as error:
        return None, None, str(error)
    if programs is None:
        return None, None, None
    if programs.failure is not None:
        return None, None, f"its sweeps cannot be traced: {programs.failure}"
    return programs, signature, None


def _asks_for_chain(request: Request, operations: guards.Operations | None) -> bool:
    """Whether a call that has no programs needs the chain engine.

    It is named, or the gradient of a JVP is asked for, which torch computes wrongly for some norms,
    or torch lacks a second derivative. Otherwise autograd is as fast or faster if x is small.
    """
    penalty = request.penalty
    if penalty.engine == "chain" or penalty.uses_jvp:
        return True
    return operations is not None and bool(operations.missing)


def _why_not(request: Request, x: Any) -> str | None:
    """Why the chain engine does not run this call, as far as this is known before it; else None."""
    if request.penalty.engine == "autograd":
        return "engine='autograd' is set"
    if request.penalty.by_hand:
        return "per_sample differentiates pull.output itself"
    if torch_private.transforms_active():
        return "a torch.func transform is active"
    if torch_private.make_fx_traces():
        return "make_fx traces the call"
    if torch_private.top_hooks(True) is not None:
        return "hooks on saved tensors (a checkpoint) are active"
    if type(x) not in (Tensor, nn.Parameter):
        return f"x is {type(x).__name__}"
    if x.layout != torch.strided or x.is_nested:
        return "x is not a dense tensor"
    if x.numel() == 0:
        return "x is empty"
    if x._backward_hooks:
        return "x has hooks"
    return None


def explain(request: Request, model: Any, x: Tensor) -> str:
    """A text that says which engine runs a call, and why; runs the model once."""
    engine = request.penalty.engine
    if distributed.is_sharded(model):
        return (
            f"engine: {engine}, inside the forward of fully_shard, which is not run here: "
            "call explain with the model before it is sharded"
        )
    model = distributed.inside(model)
    state = State(model, x) if isinstance(model, nn.Module) else None
    _, pull, reason, _ = _run(request, model, x, steady=True)
    if state is not None:
        state.restore()
    if engine == "chain" and not isinstance(pull, Chain):
        return f"engine: none, engine='chain' raises\n   {reason}"
    if isinstance(pull, Chain):
        return "\n".join(["engine: chain", *(f"   {step}" for step in pull.run.describe())])
    return f"engine: autograd\n   not chain: {reason}"
