"""The backend of the compiled engine: torch's compiler, whose first result is checked.

On torch 2.13 the second derivative of some operations is wrong without an error (`refusal`), and
inductor computed the value 0 for SpectReg of a LeNet, because it moved the scatter in the VJP of
max_pool2d behind its use. Therefore the first run of each graph is compared with torch's own
kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastjac import torch_private

NAME: Any = "inductor"
# Without the pass that moved the scatter, and with the random numbers of torch's own kernels.
OPTIONS = {"reorder_for_peak_memory": False, "fallback_random": True}


class Refused(RuntimeError):
    """A graph cannot be compiled safely, or its compiled code is wrong."""


def compiled(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """The backend, for ``torch.compile(backend=...)``."""
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
    """Why torch may differentiate the graph wrongly, or None."""
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
    """Compares compiled code with its graph, and raises if they differ.

    Returns False if the results hold NaN or infinities, which show nothing. The tolerances allow
    other orders of summation; the errors to be found are of order 1.
    """
    devices = {a.device for a in args if isinstance(a, Tensor) and a.is_cuda}
    with torch.random.fork_rng(devices), torch_private.inductor_config().patch(OPTIONS):
        found = run_both_ways(function, args)
    with torch.random.fork_rng(devices):
        try:
            expected = run_both_ways(graph, args)
        except (RuntimeError, NotImplementedError):
            return True  # an operation that the compiler decomposes and the kernels do not have
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
                "engine='compiled' cannot run this model: the code that torch compiled for it is "
                f"wrong, by {error:.2g} of {size:.2g}. Use engine='autograd'"
            )
    return True


def run_both_ways(f: Callable[..., Any], args: Any) -> list[Tensor]:
    """The floating-point outputs, and the gradients of a weighted sum of them."""
    leaves = [
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
    ]
    outputs = [t for t in f(*leaves) if isinstance(t, Tensor) and t.is_floating_point()]
    wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    losses = [(t * weights_like(t)).sum() for t in outputs if t.requires_grad]
    grads: Sequence[Tensor] = ()
    if wanted and losses:
        # Torch compiles the backward here, and later calls use it: with retain_graph, so that they
        # can retain the graph too.
        grads = torch.autograd.grad(
            losses, wanted, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return [t.detach() for t in (*outputs, *grads)]


def weights_like(t: Tensor) -> Tensor:
    """Weights from 0.5 to 1.5: some wrong terms would vanish with equal ones."""
    weights = torch.linspace(0.5, 1.5, t.numel(), device=t.device)
    return weights.to(t.dtype).view(t.shape)
