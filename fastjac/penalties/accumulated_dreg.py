"""AccumulatedDREG: the Jacobians of all layers with respect to the input of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, distributed, reference
from fastjac.layerwise.layers import LayerCall, Nonlinearity, written_to
from fastjac.layerwise.passes import Pass, Term
from fastjac.layerwise.penalty import LayerOptions, LayerPenalty
from fastjac.layerwise.tangents import NormTangents
from fastjac.ops.act import act
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.penalties.registry import PenaltySpec, pushed_example
from fastjac.per_sample import measure, normal
from fastjac.torch_private import saved_tensor_hooks, tree_map


def primal(t: Any) -> Any:
    return forward_ad.unpack_dual(t).primal if isinstance(t, Tensor) else t


@dataclass(slots=True)
class Pushed(Term):
    """The output of a layer's activation, which carries its tangent."""

    version: int = 0  # of the output, when it was computed


class AccumulatedDREG(LayerPenalty):
    """``R_n = Σ_l ‖J_ln ⋯ J_1n u_n‖²``, ``u ~ N(0, I)``, ``J_l`` the Jacobian of hidden layer l.

    An unbiased estimate of ``Σ_l ‖∂a_ln/∂x_n‖_F²``, where ``a_l`` is the output of the activation.
    These are accumulated Jacobians; DREG has the Jacobians of the single layers. It takes one
    forward pass with forward-mode autograd, in which the input of a layer and its tangent are
    multiplied by the weight as one batch. The abstract of arXiv 2606.23942 does not give this
    formula: it is another reading of the word "layer-wise".

    It counts the layers that DREG finds. The tangent also goes through all operations between
    them. Through LayerNorm, BatchNorm and InstanceNorm fastjac computes it, since the gradient of
    torch's forward-mode derivative is wrong there. ``layers_found`` and ``layers_left_out`` are as
    in DREG.

    Arguments:
        model: an nn.Module, all of whose operations have a forward-mode derivative (otherwise torch
        raises). x: ``[N, ...]`` floating point. tangent: the ``u``, of the shape, dtype and device
        of ``x``. There is no graph form.

    Options:
        include_output: adds ``‖J_g u‖²`` of the output layer.
        generator: a generator on the device of ``x``. It draws ``torch.randn(x.shape)``.
        weight, reduction, every, output: see ``help(fastjac.Penalty)``.

    Squares of half precision are summed in float32. The value is differentiable in reverse mode as
    often as the network, and not inside another forward-mode computation.

    Source: a reading of Martnishn 2026, arXiv 2606.23942.

    Example:

        >>> layer = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid())
        >>> x, u = torch.randn(4, 3), torch.randn(4, 3)
        >>> output, value = fastjac.AccumulatedDREG()(layer, x, tangent=u)
        >>> pushed = output * (1 - output) * (u @ layer[0].weight.T)  # J u
        >>> torch.allclose(value, pushed.square().sum(1).mean())
        True
    """

    def __init__(
        self, *, generator: torch.Generator | None = None, **options: Unpack[LayerOptions]
    ) -> None:
        super().__init__(**options)
        self.generator = arguments.generator(generator)

    def model_form(
        self, model: Any, x: Tensor, *, tangent: Tensor | None = None
    ) -> tuple[Any, Any]:
        if distributed.tensor_parallel(model):
            raise RuntimeError(
                "the model computes with DTensors (tensor parallel), which have no forward-mode "
                "derivative: use DREG"
            )
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "AccumulatedDREG uses forward-mode differentiation, which torch.compile does not "
                "trace: call it outside of the compiled function"
            )
        u = self._draw(arguments.floating("x", x)) if tangent is None else self._given(tangent, x)
        # The hooks of a checkpoint around this call, which recomputes the whole call.
        vars(self)["_hooks"] = saved_tensor_hooks()
        with forward_ad.dual_level():
            try:
                with NormTangents():
                    dual, values = super().model_form(model, forward_ad.make_dual(x, u))
            except NotImplementedError as error:
                raise NotImplementedError(
                    "an operation of the model has no forward-mode derivative. Under torch.compile "
                    "no operation has one: call it outside of the compiled function. The error of "
                    f"torch: {error}"
                ) from error
            finally:  # the hooks keep the frame of the checkpoint alive
                vars(self)["_hooks"] = None
            return tree_map(primal, dual), values

    # FSDP's hooks do not support tangents, so this runs in the place where they do not act.
    needs_weights_afterwards = True

    def compute(self, module: Any, x: Tensor) -> Tensor | None:
        a, u = forward_ad.unpack_dual(x)
        if u is None or x.dim() < 2 or x.shape[0] == 0:
            return None
        if saved_tensor_hooks() != self._hooks:
            raise RuntimeError(
                "a part of the model runs in a checkpoint, which would recompute it without its "
                "tangent: checkpoint the whole call of AccumulatedDREG, or no part of the model"
            )
        # Torch would compute the two products separately, and add two ∂W of different memory
        # layouts: 30 ms a step instead of 14 (784-4×512-10, batch 128, 2 cores).
        both, weight = torch.cat([a, u]), module.weight
        if isinstance(module, torch.nn.Linear):
            z, t = torch.nn.functional.linear(both, weight).split(a.shape[0])
        else:
            z, t = module._conv_forward(both, weight, None).split(a.shape[0])
        if module.bias is None:
            z = z.clone()
        else:  # under autocast z has the lower precision
            z = z + module.bias.to(z.dtype).view(-1, *[1] * (weight.dim() - 2))
        # make_dual copies a tangent that is a part of a larger storage, and in symbolic make_fx
        # torch 2.13 cannot do this.
        return forward_ad.make_dual(z, t.clone())

    def at_layer(
        self, seen: Pass, call: LayerCall, phi: Nonlinearity, a: Tensor | None
    ) -> tuple[Tensor, Pushed]:
        if a is None:
            assert phi.fn is not None
            a = act(call.z, fn=phi.fn, impl=phi.impl, **phi.params)
        return a, Pushed(call, a, version=a._version)

    def at_output(self, seen: Pass, call: LayerCall) -> Pushed:
        return Pushed(call, call.z, version=call.version)

    def finish(self, seen: Pass, batch: int) -> Tensor:
        values = []
        for term in seen.terms:
            if term.result._version != term.version:
                raise written_to(term.call.name)
            tangent = forward_ad.unpack_dual(term.result).tangent
            if tangent is None:
                raise RuntimeError(
                    f"layer {term.call.name} does not depend on x: check that the model does not "
                    "detach x"
                )
            values.append(measure(tangent, "l2_squared", lead=1))
        self.remember(batch, [(t, v, 1.0) for t, v in zip(seen.terms, values, strict=True)])
        return torch.stack(values).sum(0)

    def _draw(self, x: Tensor) -> Tensor:
        arguments.generator_device(self.generator, x.device)
        dtype = accumulate_dtype(x.dtype)
        return normal(x.shape, self.generator, dtype=dtype, device=x.device).to(x.dtype)

    def _given(self, tangent: Any, x: Tensor) -> Tensor:
        tangent = arguments.tensor("tangent", tangent)
        arguments.like("tangent", tangent, "x", x)
        if tangent.shape != x.shape:
            raise ValueError(
                f"tangent has shape {tuple(tangent.shape)}: it must have the shape of x, "
                f"{tuple(x.shape)}"
            )
        return tangent


SPEC = PenaltySpec.of(
    AccumulatedDREG,
    reference.accumulated_dreg,
    source="a reading of Martnishn 2026, arXiv 2606.23942",
    kind="layer-wise",
    example=pushed_example,
    cases=({"include_output": True},),
)
