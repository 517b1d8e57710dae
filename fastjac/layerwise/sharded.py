"""Layer-wise penalties of layers whose weights are sharded over several processes.

FSDP2 gathers a weight when the forward of its module begins, frees it afterwards, and gathers it
again when the gradient of the output of the module arrives. It does not do so for the graph of a
penalty. Therefore the terms are computed while the module runs, and are `tied` to the output of the
activation: their backward waits for the gradient of that output, and the weights are gathered then.

Tensor parallel weights are DTensors. A term is ``Σ_c s_c r_c``. The row norms ``r`` of a weight
that is sharded over its inputs are sums over the processes. So are the ``s`` of an output that is
sharded over positions, and the sum over c of an output that is sharded over units. Each becomes a
DTensor with this placement, and torch reduces it in the forward and in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjac import torch_private
from fastjac.distributed import active, is_dtensor
from fastjac.layerwise.layers import LayerCall, Nonlinearity
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.ops.row_sqnorm import or_auto, row_sqnorm

# ---- FSDP2


def sharding() -> bool:
    """Whether any module of this process is under ``fully_shard``."""
    return torch_private.any_module_is_sharded() and active()


def freed(weight: Tensor) -> bool:
    if is_dtensor(weight):
        return False
    return weight.numel() > 0 and weight.untyped_storage().size() == 0


def check_gathered(call: LayerCall) -> None:
    """Raises if FSDP has freed the weight, since the kernels would read freed memory."""
    if freed(call.weight):
        raise RuntimeError(
            f"layer {call.name}: FSDP has freed its weight before the penalty could use it: apply "
            "fully_shard to a module that contains the layer and its activation (for an output "
            "layer, to the whole model alone), attach the penalty if a checkpoint recomputes the "
            "layer, or pass reshard_after_forward=False"
        )


def tied(a: Tensor, value: Tensor, call: LayerCall) -> tuple[Tensor, Tensor]:
    """Returns both in one node, whose backward waits for the gradients of both."""
    return _Tied.apply(a, value, call.weight, call.name)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, value, weight, name):
        ctx.weight, ctx.layer = weight.detach(), name
        ctx.set_materialize_grads(False)
        return a.detach(), value.detach()

    @staticmethod
    def backward(ctx, grad_a, grad_value):
        if freed(ctx.weight):
            raise RuntimeError(
                f"layer {ctx.layer}: its weight is not gathered in the backward of the penalty, "
                "because the loss has no gradient through the output of its module: pass "
                "reshard_after_forward=False to the fully_shard of that module"
            )
        return grad_a, grad_value, None, None


# ---- tensor parallel


def layout_of(call: LayerCall) -> Any:
    """The placement of a layer's output over the processes; to_local() keeps it in its node."""
    if call.norm is not None:
        raise refused(call, "a norm follows it: put the norm elsewhere")
    z: Any = call.z
    if is_dtensor(z):
        return z._spec
    spec = getattr(z.grad_fn, "dtensor_spec", None)
    if spec is None:
        raise RuntimeError(
            f"layer {call.name}: its weight is a DTensor, but its output is neither a DTensor nor "
            "the direct result of to_local(), so the penalty does not know how it is sharded: run "
            "the model with gradients on, and call the activation directly after to_local()"
        )
    return spec


def refused(call: LayerCall, why: str) -> RuntimeError:
    return RuntimeError(f"layer {call.name}: its weight is a DTensor (tensor parallel), and {why}")


def units_squared(call: LayerCall, phi: Nonlinearity) -> tuple[Any, Any]:
    """``s = Σ_p φ'(z)²``, ``[N, C]``, of the whole layer as a DTensor; the shape of the whole z."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    spec = layout_of(call)
    z: Any = call.z
    if is_dtensor(z):
        if any(p.is_partial() for p in spec.placements):
            z = z.redistribute(
                placements=[Replicate() if p.is_partial() else p for p in spec.placements]
            )
            spec = z._spec
        z = z.to_local()
    placements: list[Any] = []
    for p in spec.placements:
        dim = p.dim % len(spec.shape) if p.is_shard() else None
        if p.is_partial() or dim == 0:
            raise RuntimeError(
                f"layer {call.name}: its output is {p!r} over the processes, but a penalty needs "
                "all samples in every process of the tensor parallel group: set the output_layouts "
                "of its ParallelStyle to Replicate() or Shard(-1)"
            )
        units = dim == len(spec.shape) - 1
        placements.append(p if dim is None else Shard(1) if units else Partial())
    n, c = spec.shape[0], spec.shape[-1]
    slope = phi.derivative(z).to(accumulate_dtype(z.dtype))
    local = slope.square().flatten(1, -2).sum(1) if z.dim() > 2 else slope.square()
    size = torch.Size((n, c))
    return DTensor.from_local(
        local, spec.mesh, placements, run_check=False, shape=size, stride=(c, 1)
    ), spec.shape


def row_norms(call: LayerCall, impl: str = "auto") -> Any:
    """``‖W[i, :]‖²`` of the whole rows, ``[C]``, as a DTensor that is not partial."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    weight: Any = call.weight
    if not call.layer.linear:
        raise refused(call, "only Linear layers support that: do not parallelize this layer")
    (rows,) = row_sqnorm([weight.to_local()], impl=or_auto(impl))
    placements = [Partial() if p.is_shard(1) else p for p in weight.placements]
    norms = DTensor.from_local(
        rows,
        weight.device_mesh,
        placements,
        run_check=False,
        shape=torch.Size((weight.shape[0],)),
        stride=(1,),
    )
    return norms.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in norms.placements]
    )


def whole(t: Any) -> Tensor:
    """The values of a DTensor, the same in every process."""
    from torch.distributed.tensor import Replicate

    return t.redistribute(placements=[Replicate()] * t.device_mesh.ndim).to_local()
