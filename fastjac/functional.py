"""Drop-ins for torch's activation functions: ``fastjac.gelu(z)`` where ``F.gelu(z)`` stood.

Each row of the activation table gives one function, with torch's parameter names and order and
the keyword ``impl``. It is `fastjac.act` of order 0, so that the VJP and the double backward that
``autograd.grad(create_graph=True)`` asks for are the fused ones. In a model that `fastjac.DREG` is
attached to, these functions also show the layer to the penalty, which ``F.gelu`` cannot.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastjac.activations import TABLE, Activation
from fastjac.observers import activate


def _drop_in(row: Activation) -> Callable[..., Tensor]:
    names = list(row.params)

    def function(z: Tensor, *args: float, impl: str = "auto", **params: Any) -> Tensor:
        if len(args) > len(names):
            raise TypeError(
                f"{row.name}() takes z and {len(names)} parameters ({', '.join(names) or 'none'}),"
                f" got {len(args)} more positional arguments"
            )
        if "inplace" in params:
            raise TypeError(
                f"{row.name}() has no inplace: z is kept for the derivatives; leave it out"
            )
        params.update(zip(names, args, strict=False))
        return activate(z, row.name, impl, params)

    kind = inspect.Parameter
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kind("z", kind.POSITIONAL_OR_KEYWORD, annotation=Tensor),
            *(
                kind(name, kind.POSITIONAL_OR_KEYWORD, default=value, annotation=float)
                for name, value in row.params.items()
            ),
            kind("impl", kind.KEYWORD_ONLY, default="auto", annotation=str),
        ],
        return_annotation=Tensor,
    )
    function.__name__ = function.__qualname__ = row.name
    function.__doc__ = (
        f"φ(z) of {row.name}, elementwise: ``{row.torch}`` with the fused backward and double"
        " backward of `fastjac.act`.\n\nShapes, dtypes, gradient orders and errors as there, of"
        " order 0; TypeError also for ``inplace`` and for too many positional arguments."
    )
    return function


FUNCTIONS: dict[str, Callable[..., Tensor]] = {name: _drop_in(row) for name, row in TABLE.items()}


def gelu(z: Tensor, approximate: str = "none", *, impl: str = "auto") -> Tensor:
    """φ(z) = z Φ(z), or its tanh form: ``torch.nn.functional.gelu`` with fused derivatives.

    Shapes, dtypes, gradient orders and errors as `fastjac.act` of order 0; ValueError also for an
    ``approximate`` other than "none" or "tanh".
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate={approximate!r}; choose 'none' or 'tanh'")
    return activate(z, "gelu" if approximate == "none" else "gelu_tanh", impl, {})


FUNCTIONS["gelu"] = gelu
