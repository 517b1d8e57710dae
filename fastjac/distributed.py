"""Runs a computation inside the wrapper of a distributed model: DDP or FSDP2's ``fully_shard``.

Both wrappers act before and after the forward pass of the model, and expect one backward pass
through its output. The gradient with respect to ``x`` that a penalty computes looks like that pass
to them: after it FSDP2 frees the weights, and DDP with ``static_graph`` reduces the gradients, too
early. Therefore `run` puts the computation inside the wrapper: for one call it takes the place of
the wrapped module, and the wrapper sees a forward pass that returns the output and the value.

If a loss does not use the output or a parameter (a loss that is a penalty alone), neither wrapper
reduces the gradients, and neither raises an error (seen on torch 2.13). Therefore every value is
`attached` to the graph of the output when there is a process group.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastjac import torch_private
from fastjac.ops.autograd import graph_nodes
from fastjac.per_sample import attached_zero

_AVAILABLE = dist.is_available()
_world: Any = torch_private.process_groups() if _AVAILABLE else None  # of `is_initialized`


def active() -> bool:
    """Whether a process group is initialized."""
    return _AVAILABLE and _world.default_pg is not None


def loaded(module: str, name: str) -> tuple[type, ...]:
    """The class, in a tuple for ``isinstance``; empty if its module has not been imported."""
    found = getattr(sys.modules.get(module), name, None)
    return () if found is None else (found,)


def is_sharded(module: Any) -> bool:
    """Whether ``fully_shard`` was applied to this module itself."""
    return isinstance(module, loaded("torch.distributed.fsdp", "FSDPModule"))


def is_dtensor(t: Any) -> bool:
    return isinstance(t, loaded("torch.distributed.tensor", "DTensor"))


def inside(model: Any) -> Any:
    """The module inside DDP."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def unwrapped(model: Any) -> Any:
    """The module inside ``torch.compile`` and DDP, in any order."""
    while True:
        inner = inside(getattr(model, "_orig_mod", model))
        if inner is model:
            return model
        model = inner


# ---- the value


def attached(value: Tensor, *outputs: Any) -> Tensor:
    """``value``, made to depend on the outputs too, with a gradient of zero."""
    if not active():
        return value
    for t in torch_private.tree_leaves(outputs):
        if isinstance(t, Tensor) and t.requires_grad and t.is_floating_point():
            value = value + attached_zero(t, value.dtype).to(value.device)
    return value


def static_graph() -> Any:
    """A weak reference to the running DDP if it waits for the gradient of its output, else None.

    DDP does so in its first step with ``static_graph=True``.
    """
    if not active() or torch.compiler.is_compiling():
        return None
    ddp = torch_private.waiting_ddp()
    return None if ddp is None else weakref.ref(ddp)


def through_sink(value: Tensor, ddp: Any) -> Tensor:
    """``value``, connected to the DDP of `static_graph` so that its gradient is reduced too."""
    return value if ddp is None else torch_private.through_ddp_sink(value, ddp)


# ---- one call


def run(
    body: Callable[[Any, Any], tuple[Any, Tensor]],
    model: Any,
    x: Any,
    *,
    weights_afterwards: bool = True,
) -> tuple[Any, Tensor]:
    """``body(model, x)``, run where the wrapper of a distributed model runs its module.

    ``body`` runs the model once and returns what that returned, and a value computed from it.
    ``weights_afterwards`` says whether it needs the weights after the forward pass of the model.
    """
    owner = getattr(model, "__self__", model) if active() else None  # model may be a method
    if isinstance(owner, nn.Module):
        check_model(owner)
        if owner is not model and (is_sharded(owner) or isinstance(owner, DistributedDataParallel)):
            raise TypeError(
                f"model is a method of a {type(owner).__name__}: calling it skips what torch does "
                "before and after the forward pass; pass the module itself"
            )
        ddp = isinstance(model, DistributedDataParallel)
        if ddp or (is_sharded(model) and weights_afterwards):
            _check_wrapper(model, hooks=0 if ddp else 1)
            return (_inside_ddp if ddp else _inside_fully_shard)(body, model, x)
    return body(model, x)


def check_model(model: nn.Module) -> None:
    """Raises if torch distributes the model in a way that penalties do not support."""
    fsdp1 = loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    inner = unwrapped(model)
    whole = is_sharded(inner)
    for name, part in inner.named_modules():
        if isinstance(part, fsdp1):
            raise TypeError(
                f"{name or 'the model'} is a FullyShardedDataParallel (FSDP1), which is not "
                "supported: use torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if not whole and is_sharded(part):
            raise RuntimeError(
                f"fully_shard was applied to {name}, but not to the model that was passed to the "
                "penalty: call fully_shard(model) last, and pass that module to the penalty"
            )


def _check_wrapper(model: nn.Module, hooks: int) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"torch.compile cannot trace the penalty of a {type(model).__name__}: compile the "
            "layers, and call the penalty in a function that is not compiled"
        )
    if len(model._forward_hooks) > hooks or len(model._forward_pre_hooks) > hooks:
        raise RuntimeError(
            f"the {type(model).__name__} has forward hooks, which would receive (output, value) "
            "instead of the output: register them on a module inside it"
        )


class _Inside:
    """Takes the place of a wrapper's module for one call.

    Only ``x`` goes through the wrapper. In mixed precision the wrapper would cast other arguments
    as it casts the inputs of the model.
    """

    def __init__(self, body: Callable[[Any, Any], Any], module: Any) -> None:
        self.body, self.module = body, module

    def __call__(self, x: Any) -> tuple[Any, Tensor]:
        return self.body(self.module, x)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)  # DDP reads the buffers


def _inside_ddp(body: Callable[[Any, Any], Any], model: Any, x: Any) -> tuple[Any, Tensor]:
    module = model.module
    model._modules["module"] = _Inside(body, module)
    try:
        return model(x)
    finally:
        model._modules["module"] = module


# ---- FSDP2


class _Bare(nn.Module):
    """A module without its hooks: the same parameters, buffers and submodules."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers = model._parameters, model._buffers
        self._modules = model._modules
        vars(self)["model"] = model  # as an attribute that is not a submodule

    def forward(self, x: Tensor) -> Tensor:
        model: Any = vars(self)["model"]
        return model.forward(x)


def _inside_fully_shard(body: Callable[[Any, Any], Any], model: Any, x: Any) -> tuple[Any, Tensor]:
    # Kept in the model. A weak dictionary would keep the model alive, since its value refers to it.
    bare = vars(model).get("_fastjac_bare") or _Bare(model)
    vars(model)["_fastjac_bare"] = bare
    before = vars(model).get("forward")
    bare.training = model.training

    def restore() -> None:
        vars(model).pop("forward", None)
        if before is not None:
            vars(model)["forward"] = before

    def forward(x: Any) -> tuple[Any, Tensor]:
        restore()
        with gathered(model):
            whole, value = body(bare, x)
        # FSDP warns about outputs that are views: an in-place operation would remove its hooks.
        return torch_private.tree_map(_own, whole), _own(value)

    vars(model)["forward"] = forward
    try:
        return model(x)
    finally:
        restore()


def _own(t: Any) -> Any:
    return t.clone() if isinstance(t, Tensor) and t._is_view() else t


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Keeps all weights of a model under ``fully_shard`` gathered until its backward has ended.

    This gathers the submodules that were sharded on their own and disables their hooks. When the
    backward has ended, FSDP reduces the remaining gradients and shards the weights again.
    """
    parts: list[Any] = [m for m in model.modules() if is_sharded(m) and m is not model]
    states = [torch_private.fsdp_state(part) for part in parts]
    try:
        for part, state in zip(parts, states, strict=True):
            part.unshard()
            # In this state the recomputation of a checkpoint does not gather or free weights.
            torch_private.set_fsdp_state(state, "PRE_BACKWARD")
        yield
    finally:
        for state in states:
            torch_private.set_fsdp_state(state, "IDLE")


# ---- what is not supported


def check_graph(x: Tensor, output: Tensor, *, twice: bool = True) -> None:
    """Raises if the gradient of ``output`` with respect to ``x`` would be wrong.

    ``twice`` says whether that gradient will be differentiated again. The backward of
    ``DTensor.from_local`` redistributes outside of the graph (torch 2.13), so that its second
    derivative is lost without an error.
    """
    if twice and (is_dtensor(x) or is_dtensor(output)):
        raise RuntimeError(TENSOR_PARALLEL)
    if not active() or torch.compiler.is_compiling():
        return
    for node in graph_nodes(output, x.grad_fn):
        name = type(node).__name__  # name() may be an attribute of a Function's ctx
        if name == "RegisterPostBackwardFunctionBackward":
            raise RuntimeError(
                "output was computed by a model under fully_shard, which frees its weights when x "
                "receives its gradient: use the model form, penalty(model, x), with that model"
            )
        if name == "_DDPSinkBackward" and node.ddp_weakref().static_graph:
            raise RuntimeError(
                "output was computed by a DistributedDataParallel with static_graph=True, which "
                "would reduce the gradients when x receives its own: use the model form, "
                "penalty(model, x), with that model"
            )
        if twice and name in ("_FromTorchTensorBackward", "_ToTorchTensorBackward"):
            raise RuntimeError(TENSOR_PARALLEL)


def tensor_parallel(model: Any) -> bool:
    """Whether a weight is a DTensor, also when fully_shard has gathered the weights."""
    if not active() or not isinstance(model, nn.Module):
        return False
    return any(is_dtensor(p) for p in model.parameters())


TENSOR_PARALLEL = (
    "the model computes with DTensors (tensor parallel), and torch cannot differentiate their "
    "redistribution twice: penalties on the input gradient need DistributedDataParallel or "
    "fully_shard instead; layer-wise penalties (DREG) support tensor parallel models"
)
