"""The private names of torch that fastjac uses: each with the reason, and what happens without it.

No other file names one. Where this torch lacks a name, `missing` lists it, and what is defined here
in its place raises when it is used: the error repeats the reason. A test prints the list.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Name(NamedTuple):
    """A private name of torch."""

    path: str
    why: str
    without: str


NAMES: list[Name] = []


def _resolve(path: str) -> Any:
    """The object of a dotted path; imports the modules on the way."""
    parts = path.split(".")
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 1):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[: i + 1]))
            except ImportError:
                raise AttributeError(f"torch has no {path}") from None
        found = getattr(found, part)
    return found


def _private(path: str, *, why: str, without: str) -> Any:
    """The object that ``path`` names, or a function that raises where torch lacks it."""
    name = Name(path, why, without)
    NAMES.append(name)
    try:
        return _resolve(path)
    except AttributeError:

        def lacking(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"torch {torch.__version__} has no {path}, which fastjac needs {why}. "
                f"Without it, {without}"
            )

        return lacking


def _later(path: str, *, why: str, without: str) -> Callable[[], Any]:
    """As `_private`, for what is in a module that is slow to import: resolved at each call."""
    name = Name(path, why, without)
    NAMES.append(name)
    return lambda: _resolve(path)


def missing() -> list[Name]:
    """The names that this torch lacks."""
    found = []
    for name in NAMES:
        try:
            _resolve(name.path)
        except AttributeError:
            found.append(name)
    return found


# ---- torch.func and the two kinds of vmap

transforms_active = _private(
    "torch._C._are_functorch_transforms_active",
    why="to know whether a torch.func transform (grad, vjp, vmap) runs",
    without="an op cannot choose between its kernel and the formula that torch.func can transform",
)
is_legacy_batched = _private(
    "torch._C._functorch.is_legacy_batchedtensor",
    why="to recognise the tensors of autograd.grad(is_grads_batched=True)",
    without="a pass over several cotangents would lose its second-order term without an error",
)
unwrap_if_dead = _private(
    "torch._C._functorch.unwrap_if_dead",
    why="to unwrap tensors that a torch.func transform left behind when it ended",
    without="such a tensor cannot be an argument of an op",
)
enter_legacy_vmap = _private(
    "torch._C._vmapmode_increment_nesting",
    why="to find the level of a pass over several cotangents",
    without="several cotangents have to go one at a time (chunk_size=1)",
)
leave_legacy_vmap = _private(
    "torch._C._vmapmode_decrement_nesting",
    why="to find the level of a pass over several cotangents",
    without="several cotangents have to go one at a time (chunk_size=1)",
)
remove_batch_dim = _private(
    "torch._remove_batch_dim",
    why="to unwrap the tensors of a pass over several cotangents",
    without="several cotangents have to go one at a time (chunk_size=1)",
)
add_batch_dim = _private(
    "torch._add_batch_dim",
    why="to wrap the results of a pass over several cotangents",
    without="several cotangents have to go one at a time (chunk_size=1)",
)

# ---- autograd

below_autograd = _private(
    "torch._C._AutoDispatchBelowAutograd",
    why="to call a raw op in Function.forward without its own autograd formula (5 µs of Python)",
    without="the ops cannot be called",
)
_top_hooks = _private(
    "torch._C._autograd._top_saved_tensors_default_hooks",
    why="to see a checkpoint, or save_on_cpu, around a call",
    without="a checkpointed model could be recomputed in another way than it was run",
)
current_backward = _private(
    "torch._C._current_graph_task_id",
    why="to tell the recomputation by a checkpoint, which runs in a backward, from a new pass",
    without="recomputed passes would be counted as new ones",
)
backward_retains_graph = _private(
    "torch._C._autograd._get_current_graph_task_keep_graph",
    why="to free what a backward has used, unless retain_graph=True",
    without="the chain engine cannot run its backward",
)
_engine = _private(
    "torch.autograd.Variable._execution_engine",
    why="to be called when a backward has ended",
    without="checkpointed models that a layer-wise penalty is attached to cannot be recomputed",
)
tree_flatten = _private(
    "torch.utils._pytree.tree_flatten",
    why="to find the tensors in nested arguments and outputs",
    without="models with nested outputs cannot be penalised",
)
tree_unflatten = _private(
    "torch.utils._pytree.tree_unflatten",
    why="to put tensors back into nested arguments and outputs",
    without="models with nested outputs cannot be penalised",
)
tree_leaves = _private(
    "torch.utils._pytree.tree_leaves",
    why="to find the tensors in nested outputs",
    without="models with nested outputs cannot be penalised",
)


def saved_tensor_hooks() -> Any:
    """The innermost hooks on saved tensors (a checkpoint, ``save_on_cpu``), or None."""
    return None if torch.compiler.is_compiling() else _top_hooks(True)


def after_backward(function: Callable[[], None]) -> None:
    """Have ``function`` called when the backward that runs now has ended without an error."""
    _engine.queue_callback(function)


NAMES.append(
    Name(
        "torch.autograd.forward_ad._current_level",
        "to see whether forward-mode differentiation is active",
        "it is taken as active, and ops use the formula that forward mode can differentiate",
    )
)


def forward_mode_active() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


# ---- torch.compile

comptime = _private(
    "torch._dynamo.comptime.comptime",
    why="to look at the graph, and at versions of tensors, while torch.compile traces",
    without="a compiled model that overwrites a pre-activation would be penalised wrongly",
)


def traced_graphs(context: Any) -> list[Any]:
    """The graphs traced so far, with those of checkpoints and the like, for a `comptime` function.

    Without ``InstructionTranslator`` there is no other way to the modules that dynamo has made of
    the bodies of higher-order operators.
    """
    output = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
    bodies = [m.graph for m in output.nn_modules.values() if isinstance(m, torch.fx.GraphModule)]
    return [context.graph(), *bodies]


dynamo_config = _later(
    "torch._dynamo.config",
    why="to compile as one graph with hook guards, whatever the user's configuration is",
    without="engine='compiled' cannot run",
)
dynamo_errors = _later(
    "torch._dynamo.exc",
    why="to tell a model that cannot be traced from an error of the model",
    without="engine='compiled' cannot run",
)
lookup_backend = _later(
    "torch._dynamo.lookup_backend",
    why="to check the graph before the compiler that compiles it gets it",
    without="engine='compiled' cannot run",
)
inductor_config = _later(
    "torch._inductor.config",
    why="to leave out the pass of inductor that gave wrong values (seen on torch 2.13)",
    without="engine='compiled' cannot run",
)
TorchDispatchMode = _private(
    "torch.utils._python_dispatch.TorchDispatchMode",
    why="to count the operations of a training step",
    without="fastjac bench cannot run",
)
fresh_cache = _later(
    "torch._inductor.utils.fresh_cache",
    why="to time torch.compile without what earlier runs have left in its caches",
    without="fastjac bench cannot time contestants that compile",
)
HigherOrderOperator = _private(
    "torch._ops.HigherOrderOperator",
    why="to refuse graphs whose second derivative torch may get wrong",
    without="engine='compiled' cannot run",
)

assert_async = _private(
    "torch._assert_async",
    why="to check class indices in a compiled step without waiting for the device",
    without="penalties with class targets cannot run in a compiled step",
)

# ---- modules

has_any_global_hook = _private(
    "torch.nn.modules.module._has_any_global_hook",
    why="to see hooks that are registered for all modules",
    without="engine='compiled' cannot run",
)
NAMES.append(
    Name(
        "torch.nn.modules.module._global_forward_hooks",
        "to run a Sequential as one call only where no hook is registered for all modules",
        "the dictionaries are not found, and such hooks are not run there",
    )
)


def global_hooks() -> tuple[Any, ...]:
    """The dictionaries of hooks that are registered for all modules."""
    return tuple(
        value
        for name, value in vars(torch.nn.modules.module).items()
        if name.startswith("_global_") and "hooks" in name and hasattr(value, "__len__")
    )


# ---- distributed training

_ddp_sink = _later(
    "torch.nn.parallel.distributed._DDPSink",
    why="to make DDP with a static graph reduce the gradients of a penalty that is the whole loss",
    without="such a loss raises",
)
_training_state = _later(
    "torch.distributed.fsdp._fully_shard._fsdp_common.TrainingState",
    why="to keep the weights of nested fully_shard modules until the end of the backward",
    without="input penalties of models under nested fully_shard raise",
)


def waiting_ddp() -> Any:
    """The DDP that is running, if it reduces gradients only when its output gets one.

    It does so in the first step with ``static_graph=True``. Torch has no public way to ask; without
    these names the answer is None, and such a step raises in DDP itself.
    """
    ddp_class: Any = torch.nn.parallel.DistributedDataParallel
    ddp: Any = getattr(ddp_class, "_get_active_ddp_module", lambda: None)()
    static = ddp is not None and ddp.static_graph
    return ddp if static and not ddp._static_graph_delay_allreduce_enqueued else None


def through_ddp_sink(value: Tensor, ddp: Any) -> Tensor:
    """``value``, whose gradient makes a `waiting_ddp` (given as a weak reference) reduce too."""
    return _ddp_sink().apply(ddp, value)[0]


def set_fsdp_state(state: Any, name: str) -> None:
    """Puts the state of a fully_shard module to ``"PRE_BACKWARD"`` or ``"IDLE"``."""
    state._training_state = getattr(_training_state(), name)


def fsdp_state(module: Any) -> Any:
    """The state of a module under ``fully_shard``."""
    return module._get_fsdp_state()


NAMES.append(
    Name(
        "torch.distributed._composable_state._module_state_mapping",
        "to know whether any module of this process is under fully_shard",
        "no module is taken as sharded, and layer-wise penalties raise where FSDP freed a weight",
    )
)


def any_module_is_sharded() -> bool:
    """Whether any module of this process is under ``fully_shard``."""
    states = sys.modules.get("torch.distributed._composable_state")
    return states is not None and len(getattr(states, "_module_state_mapping", ())) > 0
