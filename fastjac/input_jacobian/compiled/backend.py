"""What compiles the graphs of the compiled engine: torch's compiler, not trusted blindly.

Seen on torch 2.13: the second derivative of some operations is wrong with no error (`refusal`), and
inductor gave SpectReg of a LeNet the value 0, for it moved the scatter of a max_pool2d's VJP behind
its use. So the first run of each graph is compared with torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac import torch_private

NAME: Any = "inductor"
# The pass that moved the scatter is left out; random numbers are those of torch's own kernels.
OPTIONS = {"reorder_for_peak_memory": False, "fallback_random": True}


class Refused(RuntimeError):
    """A graph that is not to be compiled, or whose compiled code is wrong."""


def compiled(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """For ``torch.compile(backend=...)``."""
    reason = refusal(graph)
    if reason is not None:
        raise Refused(reason)
    with torch_private.inductor_config().patch(OPTIONS):
        function = torch_private.lookup_backend()(NAME)(graph, inputs)
    unchecked = [graph]

    def call(*args: Any) -> Any:
        if unchecked and agree(unchecked[0], function, args):
            unchecked.pop()
        return function(*args)

    return call


def refusal(graph: torch.fx.GraphModule) -> str | None:
    """Why torch may differentiate a graph wrongly, if it may."""
    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            name = getattr(node.target, "__name__", "")
            if name == "_get_data_attr":
                return "it uses .data of a tensor, where .detach() would do"
            if name == "_enter_inference_mode":
                return "it enters inference mode, where torch.no_grad() would do"
            if isinstance(node.target, torch_private.HigherOrderOperator):
                return (
                    f"it calls {node.target} (an autograd.Function, a hook, a checkpoint, control "
                    "flow), whose second derivative torch may get wrong"
                )
    return None


def agree(graph: Callable[..., Any], function: Callable[..., Any], args: Any) -> bool:
    """Whether compiled code was found to do what its graph does; raises if it does not.

    The tolerances are for other orders of summation: what is looked for is of order 1.
    """
    devices = {a.device for a in args if isinstance(a, Tensor) and a.is_cuda}
    with torch.random.fork_rng(devices), torch_private.inductor_config().patch(OPTIONS):
        found = run_both_ways(function, args)
    with torch.random.fork_rng(devices):
        try:
            expected = run_both_ways(graph, args)
        except (RuntimeError, NotImplementedError):
            return True  # an operation that only the compiler, which takes it apart, can do
    if not all(t.isfinite().all() for t in expected):
        return False
    dtypes = {t.dtype for t in (*args, *expected) if isinstance(t, Tensor)}
    rough = dtypes & {torch.float16, torch.bfloat16} or torch.is_autocast_enabled()
    rough = rough or torch.is_autocast_enabled("cpu")
    tolerance = 0.25 if rough else 0.05 if torch.float32 in dtypes else 1e-6
    largest = max((float(t.norm()) for t in expected), default=0.0)
    for a, b in zip(found, expected, strict=True):
        error, size = float((a - b).norm()), float(b.norm())
        if not error <= tolerance * max(size, 1e-3 * largest):
            raise Refused(
                "engine='compiled' cannot run this model: what torch compiled for it is wrong, by "
                f"{error:.2g} of {size:.2g}. Use engine='autograd'"
            )
    return True


def run_both_ways(f: Callable[..., Any], args: Any) -> list[Tensor]:
    """Floating-point outputs, and the gradients of a function of them."""
    leaves = [
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
    ]
    outputs = [t for t in f(*leaves) if isinstance(t, Tensor) and t.is_floating_point()]
    wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    losses = [(t * weights_like(t)).sum() for t in outputs if t.requires_grad]
    grads: Sequence[Tensor] = ()
    if wanted and losses:
        # Torch compiles the backward here, and for good: retained, so that others can be.
        grads = torch.autograd.grad(
            losses, wanted, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return [t.detach() for t in (*outputs, *grads)]


def weights_like(t: Tensor) -> Tensor:
    """From 0.5 to 1.5: some wrong terms would vanish for equal ones."""
    weights = torch.linspace(0.5, 1.5, t.numel(), device=t.device)
    return weights.to(t.dtype).view(t.shape)
