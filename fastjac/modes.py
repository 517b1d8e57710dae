"""The modes of torch in which a penalty cannot be called."""

from __future__ import annotations

import torch

from fastjac import torch_private


def check_modes() -> None:
    """Raises if gradients are off, or hidden by a ``torch.func`` transform."""
    if torch_private.transforms_active():
        raise RuntimeError(
            "the penalty was called inside a torch.func transform, where the autograd graph is not "
            "available: call it outside of the transform, or compute it with torch.func.vjp "
            "(fastjac.reference has the formula)"
        )
    if torch.is_grad_enabled():  # also False in inference mode
        return
    inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    mode, use = "torch.no_grad()", "inside torch.enable_grad()"  # dynamo cannot tell
    if inference:
        mode, use = "inference mode", "use torch.no_grad() in its place"
    raise RuntimeError(
        f"the penalty needs the gradient of output with respect to x, but {mode} is active: call "
        f"model and penalty outside of it, or {use}"
    )


def check_not_recomputed(what: str = "has every > 1") -> None:
    """Raises in the recomputation of a checkpoint, which would count the call twice."""
    if not torch.compiler.is_compiling() and torch_private.current_backward() != -1:
        raise RuntimeError(
            f"the penalty {what} and was called inside a checkpointed function, whose "
            "recomputation would count the call twice: call the penalty outside of that function"
        )


def check_not_repeated() -> None:
    """Raises while ``make_fx`` or a CUDA graph records, whose graph does the same in each run."""
    if torch_private.capturing():
        raise RuntimeError(
            "the penalty has every > 1 and was called while a CUDA graph is captured, whose "
            "replays cannot count its calls: use every=1 and capture two graphs, a step with the "
            "penalty and one without it, and replay the first in every k-th step"
        )
    if torch_private.make_fx_traces():
        raise RuntimeError(
            "the penalty has every > 1 and was called while make_fx records a graph, which cannot "
            "count its calls: use every=1, and run the graph with the penalty in every k-th step"
        )
