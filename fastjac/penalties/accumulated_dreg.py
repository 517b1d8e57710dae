"""AccumulatedDREG: one tangent pushed forward through the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from typing_extensions import Unpack

from fastjac import arguments, distributed, reference
from fastjac.layerwise.layers import Call, Phi, top_hooks
from fastjac.layerwise.penalty import LayerOptions, LayerPenalty
from fastjac.layerwise.watch import Pass
from fastjac.ops import act
from fastjac.ops.dispatch import accumulate_dtype
from fastjac.penalties.registry import PenaltySpec, pushed_example
from fastjac.per_sample import measure


@dataclass
class Pushed:
    """The output of a layer's activation, with the tangent it carries."""

    call: Call
    post: Tensor
    version: int


class AccumulatedDREG(LayerPenalty):
    """``R_n = Σ_l ‖J_ln ⋯ J_1n u_n‖²``, ``u ~ N(0, I)``, ``J_l`` the Jacobian of hidden layer l.

    Unbiased for ``Σ_l ‖∂a_ln/∂x_n‖_F²``, the accumulated instead of the single layers' Jacobians
    of DREG; ``a_l`` is the output of the activation. One forward pass with forward-mode autograd;
    a layer's input and its tangent go through the weight together, as one batch.
    A reading of the word "layer-wise" in the abstract of arXiv 2606.23942 beside an author who
    accumulates forwards elsewhere, not a formula printed there.

    The layers counted are those DREG finds; the tangent goes through everything in between as
    well. ``layers_found`` and ``layers_left_out`` are as there.

    Arguments:
        model: an nn.Module of operations that have a forward-mode derivative (torch raises where
        one has none). x: ``[N, ...]`` floating point. tangent: the ``u``, shape, dtype and device
        of ``x``. There is no graph form.

    Options:
        include_output: count ``‖J_g u‖²`` of the output layer too. generator: on the device of
        ``x``; the draw is ``torch.randn(x.shape)``. weight, reduction, every: as for all penalties.

    Sums of squares of half precision are taken in float32. Differentiable in reverse mode as often
    as the network; not inside another forward-mode computation.

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
    ) -> tuple[Tensor, Any]:
        if distributed.tensor_parallel(model):
            raise RuntimeError(
                "the model computes with DTensors (tensor parallel), which have no forward-mode "
                "derivative: use DREG"
            )
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "AccumulatedDREG pushes a tangent forward while it watches the model, which "
                "torch.compile cannot trace: call it outside the compiled function"
            )
        u = self._draw(arguments.floating("x", x)) if tangent is None else self._given(tangent, x)
        # Those of a checkpoint around this call, which recomputes all of it.
        vars(self)["_hooks"] = top_hooks()
        with forward_ad.dual_level():
            try:
                dual, values = super().model_form(model, forward_ad.make_dual(x, u))
            except NotImplementedError as error:
                raise NotImplementedError(
                    "an operation of the model has no forward-mode derivative (as none has in a "
                    "graph of torch.compile: call it outside the compiled function). Torch said: "
                    f"{error}"
                ) from error
            finally:  # they hold the checkpoint's frame
                vars(self)["_hooks"] = None
            return forward_ad.unpack_dual(dual).primal, values

    computes = True
    needs_weights_afterwards = True  # FSDP's hooks cannot take tangents: run where they pass on

    def compute(self, module: Any, x: Tensor) -> Tensor | None:
        a, u = forward_ad.unpack_dual(x)
        if u is None or x.dim() < 2 or len(x) == 0:
            return None
        if top_hooks() != self._hooks:
            raise RuntimeError(
                "a part of the model runs in a checkpoint, which would recompute it without its "
                "tangent: checkpoint the call of AccumulatedDREG as a whole, or nothing in it"
            )
        # Torch would take the two products apart, and add two ∂W of different memory order:
        # 784-4×512-10, batch 128, 2 cores, 30 against 14 ms a step.
        both, weight = torch.cat([a, u]), module.weight
        if isinstance(module, torch.nn.Linear):
            z, t = torch.nn.functional.linear(both, weight).split(len(a))
        else:
            z, t = module._conv_forward(both, weight, None).split(len(a))
        if module.bias is not None:
            # Under autocast z has the lower precision.
            z = z + module.bias.to(z.dtype).view(-1, *[1] * (weight.dim() - 2))
        return forward_ad.make_dual(z, t)

    def on_layer(self, seen: Pass, call: Call, phi: Phi, a: Tensor | None) -> Tensor:
        if a is None:
            assert phi.fn is not None
            a = act(call.z, fn=phi.fn, impl=phi.impl, **phi.params)
        if not seen.dry:
            seen.terms.append(Pushed(call, a, a._version))
        return a

    def output_term(self, seen: Pass, call: Call) -> None:
        seen.terms.append(Pushed(call, call.z, call.version))

    def finish(self, seen: Pass, batch: int) -> Tensor:
        values = []
        for term in seen.terms:
            if term.post._version != term.version:
                raise RuntimeError(
                    f"layer {term.call.name}: its output or that of its activation was modified in "
                    "place after it was computed; use the out-of-place operation"
                )
            tangent = forward_ad.unpack_dual(term.post).tangent
            if tangent is None:
                raise RuntimeError(
                    f"layer {term.call.name} does not depend on x: see that the model does not "
                    "detach it"
                )
            values.append(measure(tangent, "l2_squared", lead=1))
        over = batch if self.reduction != "sum" and batch else 1
        self.remember([(t.call.name, v, 1 / over) for t, v in zip(seen.terms, values, strict=True)])
        return torch.stack(values).sum(0)

    def _draw(self, x: Tensor) -> Tensor:
        arguments.generator_device(self.generator, x.device)
        dtype = accumulate_dtype(x.dtype)
        return torch.randn(x.shape, dtype=dtype, device=x.device, generator=self.generator).to(
            x.dtype
        )

    def _given(self, tangent: Any, x: Tensor) -> Tensor:
        tangent = arguments.tensor("tangent", tangent)
        arguments.like("tangent", tangent, "x", x)
        if tangent.shape != x.shape:
            raise ValueError(
                f"tangent has shape {tuple(tangent.shape)} and x {tuple(x.shape)}: they must be "
                "the same"
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
