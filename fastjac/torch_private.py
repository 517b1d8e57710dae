"""The private names of torch that fastjac uses: why each is needed, and what happens without it.

No other file uses a private name of a module of torch. If this torch lacks one, `missing` lists
it, and using what is defined in its place raises an error that gives the reason. A test prints the
list.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Name(NamedTuple):
    """A private name of torch, why fastjac needs it, and what happens without it."""

    path: str
    why: str
    without: str


NAMES: list[Name] = []


def _private(path: str, why: str, without: str) -> Any:
    """The object that ``path`` names, or a function that raises if torch lacks it."""
    NAMES.append(Name(path, why, without))
    try:
        return pkgutil.resolve_name(path)
    except (AttributeError, ImportError):

        def lacking(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"torch {torch.__version__} has no {path}, which fastjac needs {why}. "
                f"Without it, {without}."
            )

        return lacking


def _later(path: str, why: str, without: str) -> Callable[[], Any]:
    """A function that returns the object. For modules that are slow to import."""
    NAMES.append(Name(path, why, without))
    return functools.cache(lambda: pkgutil.resolve_name(path))


def missing() -> list[Name]:
    """The names that this torch lacks."""
    found = []
    for name in NAMES:
        try:
            pkgutil.resolve_name(name.path)
        except (AttributeError, ImportError):
            found.append(name)
    return found


# ---- torch.func and the two kinds of vmap

transforms_active = _private(
    "torch._C._are_functorch_transforms_active",
    "to know whether a torch.func transform (grad, vjp, vmap) is running",
    "an op cannot choose between its kernel and the formula that torch.func can transform",
)
is_legacy_batched = _private(
    "torch._C._functorch.is_legacy_batchedtensor",
    "to recognise the tensors of autograd.grad(is_grads_batched=True)",
    "a pass over several cotangents would lose its second-order term without an error",
)
unwrap_if_dead = _private(
    "torch._C._functorch.unwrap_if_dead",
    "to unwrap tensors that a torch.func transform left behind when it ended",
    "such a tensor cannot be an argument of an op",
)
_COTANGENTS = (
    "to apply an op to several cotangents at once",
    "cotangents have to be processed one at a time (chunk_size=1)",
)
remove_batch_dim = _private("torch._remove_batch_dim", *_COTANGENTS)
add_batch_dim = _private("torch._add_batch_dim", *_COTANGENTS)

set_vmap_warnings = _private(
    "torch._C._functorch._set_vmap_fallback_warning_enabled",
    "to map an operation that vmap has no rule for without a warning, as autograd.grad does",
    "a model with such an operation warns in each step",
)

# ---- autograd

below_autograd = _private(
    "torch._C._AutoDispatchBelowAutograd",
    "to call a raw op in Function.forward without its own autograd formula (5 µs of Python)",
    "the ops cannot be called",
)
sequence_number = _private(
    "torch._C._autograd._get_sequence_nr",
    "to tell the operations of a run from those that were recorded before it",
    "the chain engine cannot run",
)
top_hooks = _private(
    "torch._C._autograd._top_saved_tensors_default_hooks",
    "to see whether a call is inside a checkpoint or save_on_cpu",
    "a checkpointed model could be recomputed in another way than it was run",
)
NAMES.append(
    Name(
        "torch.utils.checkpoint._CheckpointFrame",
        "to see the functions that a model calls when a checkpoint recomputes it",
        "the backward of a checkpointed model that calls activations as functions raises",
    )
)
current_backward = _private(
    "torch._C._current_graph_task_id",
    "to tell the recomputation of a checkpoint, which runs in a backward, from a new pass",
    "recomputed passes would be counted as new ones",
)
backward_retains_graph = _private(
    "torch._C._autograd._get_current_graph_task_keep_graph",
    "to free what a backward has used, unless retain_graph=True",
    "the chain engine cannot run its backward",
)
_engine = _private(
    "torch.autograd.Variable._execution_engine",
    "to call a function when a backward has ended",
    "checkpointed models that a layer-wise penalty is attached to cannot be recomputed",
)
tree_leaves = _private(
    "torch.utils._pytree.tree_leaves",
    "to find the tensors in nested arguments and outputs",
    "models with nested outputs cannot be penalised",
)
tree_map = _private(
    "torch.utils._pytree.tree_map",
    "to change the tensors in nested outputs",
    "models with nested outputs cannot be penalised",
)


def shape_of_node(node: Any, output: int = 0) -> list[int]:
    """The shape of an output of the operation that a node of the autograd graph belongs to."""
    return node._input_metadata[output].shape


def dtype_of_node(node: Any, output: int = 0) -> torch.dtype:
    """The dtype of such an output."""
    return node._input_metadata[output].dtype


def zeros_of_node(node: Any, output: int, lead: tuple[int, ...]) -> Tensor:
    """Zeros ``[*lead, *shape]`` like such an output."""
    like = node._input_metadata[output]
    return torch.zeros((*lead, *like.shape), dtype=like.dtype, device=like.device)


def saved_names(node: Any) -> list[str]:
    """The names of the tensors that nodes of this type save, for `saved_under_hooks`."""
    return [name for name in dir(node) if name.startswith("_raw_saved_")]


def saved_under_hooks(node: Any, names: list[str]) -> bool:
    """Whether a tensor of a node was saved under hooks (a checkpoint, ``save_on_cpu``)."""
    for name in names:
        saved = getattr(node, name)
        if isinstance(saved, tuple | list):
            if any([t.unpack_hook is not None for t in saved]):
                return True
        elif saved.unpack_hook is not None:
            return True
    return False


def saved_tensor_hooks() -> Any:
    """The innermost hooks on saved tensors (a checkpoint, ``save_on_cpu``), or None."""
    return None if torch.compiler.is_compiling() else top_hooks(True)


def checkpoint_frame() -> Any:
    """The object that recomputes the innermost checkpoint around this call, or None.

    Its attribute ``recompute_fn`` is what the backward calls.
    """
    hooks = saved_tensor_hooks()
    for cell in getattr(hooks and hooks[0], "__closure__", None) or ():
        if hasattr(cell.cell_contents, "recompute_fn"):
            return cell.cell_contents
    return None


def after_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the backward that is running has ended without an error."""
    _engine.queue_callback(function)


NAMES.append(
    Name(
        "torch.autograd.forward_ad._current_level",
        "to see whether forward-mode differentiation is active",
        "it is assumed to be active, and ops use the formula that forward mode can differentiate",
    )
)


def forward_mode_active() -> bool:
    """Whether the call is inside ``forward_ad.dual_level`` or ``torch.func.jvp``."""
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


# ---- torch.compile

comptime = _private(
    "torch._dynamo.comptime.comptime",
    "to look at the graph, and at versions of tensors, while torch.compile traces",
    "a compiled model that overwrites a pre-activation would be penalised wrongly",
)


def compiled_call(module: Any) -> Any:
    """What a call of a module runs after ``module.compile()``; None before."""
    return module._compiled_call_impl


NAMES.append(
    Name(
        "torch.compiler._is_exporting_flag",
        "to see torch.export; inside torch.compile, torch 2.10 says so of every call",
        "fastjac cannot watch a model",
    )
)


def exporting() -> bool:
    """Whether ``torch.export`` runs the call."""
    return torch.compiler._is_exporting_flag


def traced_value(context: Any, name: str) -> Any:
    """The object that a local variable is, for a `comptime` function."""
    return context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker().value


_restart = _later(
    "torch._dynamo.exc.UnspecializeRestartAnalysis",
    "to trace a function again after forwards or hooks were put on its model",
    "at= and the called form of layer-wise penalties raise inside torch.compile",
)


def trace_again() -> None:
    """Has dynamo trace the function from its start, for a `comptime` function that has changed a
    module: dynamo may have read what was there before."""
    raise _restart()()


def traced_graphs(context: Any) -> list[Any]:
    """The graphs traced so far, those of checkpoints and the like included.

    For a `comptime` function. Only ``InstructionTranslator`` gives access to the modules that
    dynamo has made of the bodies of higher-order operators.
    """
    output = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
    bodies = [m.graph for m in output.nn_modules.values() if isinstance(m, torch.fx.GraphModule)]
    return [context.graph(), *bodies]


_COMPILE = "fastjac.compile raises"
dynamo_config = _later(
    "torch._dynamo.config",
    "to have torch.compile trace the backward of a step",
    _COMPILE,
)
lookup_backend = _later(
    "torch._dynamo.lookup_backend",
    "to compare the code that a backend compiles with its graph",
    _COMPILE,
)
mode_options = _later(
    "torch._inductor.list_mode_options",
    "to compile in a mode of torch.compile with options of fastjac",
    _COMPILE,
)
compile_fx = _later(
    "torch._inductor.compile_fx.compile_fx",
    "to leave out the pass of inductor that gave wrong values (seen on torch 2.13)",
    _COMPILE,
)
has_any_global_hook = _private(
    "torch.nn.modules.module._has_any_global_hook",
    "to see hooks that are registered for all modules",
    "layer-wise penalties of an nn.Sequential raise",
)
TorchDispatchMode = _private(
    "torch.utils._python_dispatch.TorchDispatchMode",
    "to count the operations of a training step",
    "fastjac bench cannot run",
)
fresh_cache = _later(
    "torch._inductor.utils.fresh_cache",
    "to time torch.compile without what earlier runs have left in its caches",
    "fastjac bench cannot time contestants that compile",
)
assert_async = _private(
    "torch._assert_async",
    "to check class indices in a compiled or traced step, where Python does not know them",
    "penalties with class targets cannot run in such a step",
)

_function_modes = _private(
    "torch._C._len_torch_function_stack",
    "to know whether a mode looks at the functions of torch that are called",
    "layer-wise penalties of an nn.Sequential raise",
)
_dispatch_modes = _private(
    "torch._C._len_torch_dispatch_stack",
    "to know whether a mode looks at the operations that torch runs",
    "layer-wise penalties of an nn.Sequential raise",
)


def any_mode(ours: int = 0) -> bool:
    """Whether a mode sees the functions or operations of torch (make_fx, counters, a device).

    ``ours`` is the number of modes for functions that do not count.
    """
    return _function_modes() > ours or _dispatch_modes() > 0


unseen = _private(
    "torch._C.DisableTorchFunction",
    "to look at tensors without calling the modes that see functions (3 µs each)",
    "layer-wise penalties cannot run",
)

# ---- make_fx

NAMES.append(
    Name(
        "torch.fx.experimental.proxy_tensor.get_proxy_mode",
        "to know whether make_fx traces the call",
        "checks of numbers run, which make_fx cannot trace",
    )
)
NAMES.append(
    Name(
        "torch._subclasses.FakeTensor",
        "to know whether a tensor has no numbers",
        "checks of numbers run, and raise for such a tensor",
    )
)


_modes = _private(
    "torch._C._len_torch_dispatch_stack",
    "to know in one call that nothing records the operations",
    "the chain engine cannot run",
)
_before_dispatch = _private(
    "torch._C._dispatch_tls_is_dispatch_key_included",
    "to know in one call that nothing records the operations before autograd",
    "the chain engine cannot run",
)
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def modes_active() -> bool:
    """Whether a ``TorchDispatchMode`` is active."""
    return _modes() > 0 or _before_dispatch(_PRE_DISPATCH)


def make_fx_traces() -> bool:
    """Whether ``make_fx`` (or non-strict ``torch.export``, which uses it) records the call."""
    if torch.compiler.is_dynamo_compiling():  # dynamo runs no code that could ask
        return False
    if not modes_active():
        return False
    tracer = sys.modules.get("torch.fx.experimental.proxy_tensor")
    mode: Any = getattr(tracer, "get_proxy_mode", lambda: None)
    return mode() is not None


def numbers_hidden(t: Tensor) -> bool:
    """Whether Python cannot look at the numbers of a tensor, because the call is traced."""
    if torch.compiler.is_compiling() or make_fx_traces():
        return True
    fake: Any = getattr(sys.modules.get("torch._subclasses"), "FakeTensor", ())
    return isinstance(t, fake)


# ---- CUDA graphs


def capturing() -> bool:
    """Whether the call is captured in a CUDA graph, whose replays repeat it with the same numbers.

    The names are public. They are here so that one place says it, which tests without a GPU can
    replace. Code of ``torch.compile`` cannot ask; its guards compare the numbers in each call.
    """
    return not torch.compiler.is_compiling() and capturing_now()


def capturing_now() -> bool:
    """`capturing`, in code that torch.compile does not trace."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


# ---- distributed training

process_groups = _later(
    "torch.distributed.distributed_c10d._world",
    "to see in one call whether a process group is initialized",
    "fastjac cannot be imported",
)
_ddp_sink = _later(
    "torch.nn.parallel.distributed._DDPSink",
    "to make DDP with a static graph reduce the gradients of a penalty that is the whole loss",
    "such a loss raises",
)
_training_state = _later(
    "torch.distributed.fsdp._fully_shard._fsdp_common.TrainingState",
    "to keep the weights of nested fully_shard modules until the end of the backward",
    "input penalties of models under nested fully_shard raise",
)


def waiting_ddp() -> Any:
    """The DDP module that is running, if it reduces gradients only when its output gets one.

    This is the case in the first step with ``static_graph=True``. Torch has no public way to ask.
    Without these names the answer is None, and DDP itself raises in such a step.
    """
    ddp_class: Any = torch.nn.parallel.DistributedDataParallel
    ddp: Any = getattr(ddp_class, "_get_active_ddp_module", lambda: None)()
    static = ddp is not None and ddp.static_graph
    return ddp if static and not ddp._static_graph_delay_allreduce_enqueued else None


def through_ddp_sink(value: Tensor, ddp: Any) -> Tensor:
    """``value``; its gradient makes a `waiting_ddp` (given as a weak reference) reduce too."""
    return _ddp_sink().apply(ddp, value)[0]


def set_fsdp_state(state: Any, name: str) -> None:
    """Set the state of a fully_shard module to ``"PRE_BACKWARD"`` or ``"IDLE"``."""
    state._training_state = getattr(_training_state(), name)


def fsdp_state(module: Any) -> Any:
    """The state of a module under ``fully_shard``."""
    return module._get_fsdp_state()


NAMES.append(
    Name(
        "torch.distributed._composable_state._module_state_mapping",
        "to know whether any module of this process is under fully_shard",
        "no module is taken as sharded, and layer-wise penalties raise if FSDP freed a weight",
    )
)


def any_module_is_sharded() -> bool:
    """Whether any module of this process is under ``fully_shard``."""
    states = sys.modules.get("torch.distributed._composable_state")
    return states is not None and len(getattr(states, "_module_state_mapping", ())) > 0
