"""Why a layer is left out, and why a pass raises."""

from __future__ import annotations

from fastjac.layerwise.layers import LayerCall

UNKNOWN_WEIGHT = (
    "the weight that it computed with is not known: its forward does not return, unchanged, the "
    "result of one call of F.linear, or of F.conv1d and the like"
)
NOT_FOLLOWED = "no activation that fastjac sees follows it"
NOT_FOLLOWED_NORM = "no activation that fastjac sees follows its norm"
NOT_CALLED = "was not called as a module"
REPLACED = "was replaced in the model after the penalty was attached"
HIDDEN = (
    " (functions are not seen, because a part of the model is compiled by itself: "
    "compile the whole model, or no part of it)"
)


def without_gradient(call: LayerCall) -> RuntimeError:
    return RuntimeError(
        f"layer {call.name}: its pre-activation was computed with gradients off (in a reentrant "
        "checkpoint, or under torch.no_grad() in forward), so a part of the gradient of the "
        "penalty would be lost: use checkpoint(..., use_reentrant=False)"
    )


def without_samples(call: LayerCall) -> RuntimeError:
    return RuntimeError(
        f"layer {call.name}: its output has shape {tuple(call.z.shape)}: dimension 0 must be the "
        "samples in the whole model; give x a batch dimension"
    )
