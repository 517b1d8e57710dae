"""Which engine runs a penalty on an input Jacobian: the chain engine or autograd."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastjac import arguments, distributed
from fastjac.input_jacobian.chain import Chain, Unsupported
from fastjac.input_jacobian.chain.tape import why_not
from fastjac.input_jacobian.compiled import engine

if TYPE_CHECKING:
    from fastjac.input_jacobian.penalty import InputPenalty

ENGINES = ("auto", "chain", "autograd", "compiled")

# By model, then training mode and penalty: None if the chain engine took it, or why it did not.
_tried: weakref.WeakKeyDictionary[nn.Module, dict[Any, str | None]] = weakref.WeakKeyDictionary()


def chain_wanted(penalty: InputPenalty, model: Any, x: Tensor, arguments: Any = ()) -> bool:
    """Whether to try. Raises for ``engine="chain"`` where it is known that it cannot be."""
    if penalty.engine == "autograd":
        return False
    reason = refusal(penalty, model, x)
    if reason is None and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        reason = "an argument of the penalty requires grad"
    if reason is not None and penalty.engine == "chain":
        compiled = hasattr(model, "_orig_mod")
        advice = "Pass it before compiling" if compiled else "Use engine='autograd'"
        raise RuntimeError(f"engine='chain' cannot run this call: {reason}. {advice}")
    return reason is None


def refusal(penalty: InputPenalty, model: Any, x: Tensor) -> str | None:
    if not penalty.chain_ready:
        return f"{type(penalty).__name__} is not made of VJPs of the output"
    if penalty.at is not None:
        return f"at={penalty.at!r}: the gradient is by a hidden tensor"
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested:
        return "x is no batch of floating-point samples"
    if x.dim() == 0 or len(x) == 0:
        return "x is no batch of floating-point samples"
    if x.layout != torch.strided:
        return f"x is a {x.layout} tensor"
    reason = why_not(model, x)
    if reason is not None:
        return reason
    if not isinstance(model, nn.Module):
        return None if penalty.engine == "chain" else "model is a function, not an nn.Module"
    return _tried.get(model, {}).get(_key(penalty, model))


def _key(penalty: InputPenalty, model: nn.Module) -> Any:
    return model.training, type(penalty)


def by_chain(
    penalty: InputPenalty, model: Callable[..., Any], x: Tensor, targets: Any, named: Any
) -> tuple[Tensor, Tensor] | None:
    """Output and values, or None where the model turns out to be no chain."""
    first = isinstance(model, nn.Module) and _key(penalty, model) not in _tried.get(model, {})
    if first:
        parts = list(model.modules())  # type: ignore[attr-defined]
        if any(hasattr(part, "_orig_mod") for part in parts):
            _remember(penalty, model, "a part of the model is compiled")
        if any(hasattr(part, "_orig_mod") or _uninitialized(part) for part in parts):
            return None
    # The first run may stop half-way: the next one starts from the same buffers and random numbers.
    state = _State(model, x) if first else None
    try:
        result = _run(penalty, model, x, targets, named)
    except Unsupported as error:
        if state is not None:
            state.restore()
        if penalty.engine == "chain":
            raise RuntimeError(
                f"engine='chain' cannot run this model: {error}. Use engine='autograd'"
            ) from error
        if state is None and not error.early:  # it was taken before, and does something else now
            raise RuntimeError(
                f"the chain engine took this model before and cannot take it now: {error}. Its "
                "buffers may have been updated; use engine='autograd'"
            ) from error
        _remember(penalty, model, str(error))
        warnings.warn(
            f"{type(penalty).__name__}: engine='autograd' runs instead of the chain engine, which "
            f"cannot take this model: {error}. Set engine='autograd' to do without this warning",
            stacklevel=6,
        )
        return None
    if first:
        _remember(penalty, model, None)
    return result


def _remember(penalty: InputPenalty, model: Any, reason: str | None) -> None:
    _tried.setdefault(model, {})[_key(penalty, model)] = reason


def _run(
    penalty: InputPenalty, model: Callable[..., Any], x: Tensor, targets: Any, named: Any
) -> tuple[Tensor, Tensor]:
    chain = Chain(model, x, getattr(penalty, "chunk_size", None) is None)
    output = chain.output
    arguments.batch("output", output, "x", len(x))
    if not output.is_floating_point():
        raise TypeError(f"output has dtype {output.dtype}: it must be floating point")
    if output.numel() == 0:
        raise ValueError(f"output has shape {tuple(output.shape)}: it holds no numbers per sample")
    stand_in: Any = x.detach()
    stand_in.chain = chain  # where `by_autograd.vjp` finds it
    return chain.values(penalty.per_sample(stand_in, output, *targets, **named))


def _uninitialized(module: nn.Module) -> bool:
    """Of a lazy module that has not run."""
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and is_lazy(t) for t in tensors)


class _State:
    """Buffers of the model and torch's random numbers."""

    def __init__(self, model: Any, x: Tensor) -> None:
        self.buffers = [
            (module._buffers, name, b, b.clone())
            for module in model.modules()
            for name, b in module._buffers.items()
            if b is not None
        ]
        self.cuda = x.device if x.is_cuda else None
        self.random = torch.get_rng_state()
        self.cuda_random = None if self.cuda is None else torch.cuda.get_rng_state(self.cuda)

    def restore(self) -> None:
        for buffers, name, buffer, before in self.buffers:
            buffers[name] = buffer
            if not torch.equal(buffer, before):
                buffer.data.copy_(before)  # its version stays: earlier graphs may hold it
        torch.set_rng_state(self.random)
        if self.cuda is not None and self.cuda_random is not None:
            torch.cuda.set_rng_state(self.cuda_random, self.cuda)


def explain(penalty: InputPenalty, model: Any, x: Tensor) -> str:
    """The engine of ``penalty(model, x)`` and its reasons, as text; runs the model once."""
    if distributed.is_sharded(model):
        return (
            f"engine: {penalty.engine}, inside the forward of fully_shard, which is not tried "
            "here: ask about the model before it is sharded"
        )
    model = distributed.inside(model)
    if penalty.engine == "compiled":
        return engine.explain(penalty, model, x)
    reason = "engine='autograd' was asked for" if penalty.engine == "autograd" else None
    reason = reason or refusal(penalty, model, x)
    links: list[str] = []
    if reason is None:
        state = _State(model, x) if isinstance(model, nn.Module) else None
        try:
            single = getattr(penalty, "chunk_size", None) is None
            links = Chain(model, x, single).run.describe()
        except Unsupported as error:
            reason = str(error)
        if state is not None:
            state.restore()
    if reason is not None:
        return f"engine: autograd\n   chain cannot run: {reason}"
    return "\n".join(["engine: chain", *(f"   {link}" for link in links)])
