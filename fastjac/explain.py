"""`explain`: what a penalty or an op is, and what runs it."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor

from fastjac.layerwise.penalty import LayerPenalty
from fastjac.ops.dispatch import OPS, explain_op
from fastjac.penalties import PENALTIES
from fastjac.penalties.registry import call_forms
from fastjac.penalty import Penalty, options_of


def explain(what: str | type[Penalty] | Penalty = "act", *call: Any) -> str:
    """Says what a penalty is and how it runs on your model, or which implementation runs an op.

    Args:
        what: the name of a penalty (``"SpectReg"`` or ``"spectreg"``), its class, a penalty, or the
            name of a fused op (``"act"``).
        *call: of a penalty, a model and a batch: ``explain("DREG", model, x)``. A penalty that is
            attached to a model needs none. Of an op, a tensor of the device and dtype in question;
            the default is a float32 tensor on the CPU.

    Returns:
        Of a penalty, a text with its formula, options and source, and for a model and a batch: the
        engine that runs it and the operations of the model, or the layers that are penalised with
        their shares of the value, and the others with the reason. The model runs once; its buffers
        and the random numbers stay as they were. Of an op, a text with one line for each
        implementation, in order of preference, with an arrow at the one that ``impl="auto"`` takes.

    Raises:
        ValueError: there is no penalty or op of this name.
        TypeError: call is not what it must be.

    Example:

        >>> print(fastjac.explain("IGPen"))  # doctest: +ELLIPSIS
        IGPen: Input-gradient penalty: R_n = ‖∂ℓ_n/∂x_n‖², ℓ = loss_fn(output, *targets) [N].
           called    penalty(x, output, …), or penalty(model, x, …)
           options ...
    """
    if isinstance(what, str) and what in OPS:
        if len(call) > 1 or not all(isinstance(z, Tensor) for z in call):
            raise TypeError(f"after the name of an op, {what!r}, explain takes a tensor or nothing")
        return explain_op(what, *call)
    penalty = what if isinstance(what, Penalty) else None
    cls = type(what) if isinstance(what, Penalty) else _class_of(what)
    text = [_described(cls, penalty)]
    if call or getattr(penalty, "attached", False):
        if len(call) not in (0, 2):
            raise TypeError(
                "after a penalty, explain takes a model and a batch, without targets, or nothing"
            )
        text.append((cls() if penalty is None else penalty).explain(*call))
    return "\n".join(text)


def _class_of(what: Any) -> type[Penalty]:
    if isinstance(what, type) and issubclass(what, Penalty):
        return what
    classes = {spec.module.__name__: spec.module for spec in PENALTIES.values()}
    for spec in PENALTIES.values():
        if what in (spec.name, spec.functional):
            return spec.module
    if what in classes:
        return classes[what]
    known = [*classes, *OPS]
    near = difflib.get_close_matches(str(what), [*known, *PENALTIES], n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(
        f"explain: {what!r} is not a penalty or a fused op: {hint}choose from {', '.join(known)}, "
        "or pass the class of a penalty of your own"
    )


def _described(cls: type[Penalty], penalty: Penalty | None) -> str:
    doc = (cls.__doc__ or "").strip().split("\n")[0].replace("``", "")
    options = ", ".join(
        f"{option.name}={getattr(penalty, option.name, option.default)!r}"
        for option in options_of(cls)
    )
    calls = [f"penalty({form})" for form in call_forms(cls)]
    if issubclass(cls, LayerPenalty):
        calls.append(f"attached, penalty = {cls.__name__}(model) and then penalty()")
    lines = [
        f"{cls.__name__}: {doc}",
        f"   called    {', or '.join(calls)}",
        f"   options   {options}",
    ]
    spec = next((spec for spec in PENALTIES.values() if spec.module is cls), None)
    if spec is not None:
        lines += [
            f"   reference fastjac.reference.{spec.name}, in plain PyTorch",
            f"   source    {spec.source}",
            f"   more      help(fastjac.{cls.__name__}) explains the options",
        ]
    return "\n".join(lines)
