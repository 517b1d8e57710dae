"""Replacements for the activation functions of torch: ``fastjac.gelu(z)`` for ``F.gelu(z)``.

There is one function for each row of the activation table. It has the parameters of torch's
function, in the same order, and the keyword ``impl``. It calls `fastjac.act` with order 0, so VJP
and double backward are fused, or torch's function where that is faster (`fastjac.fuse`). If
`fastjac.DREG` is attached to a model, it sees the calls of these functions, as those of ``F.gelu``.
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
                f" got z and {len(args)} positional arguments"
            )
        if "inplace" in params:
            raise TypeError(
                f"{row.name}() has no argument inplace, because the derivatives need z; remove it"
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
        f"``{row.torch}`` with the fused backward and double backward of `fastjac.act`.\n\nShapes,"
        " dtypes, gradient orders and errors are those of `fastjac.act` with order 0. Raises"
        " TypeError for ``inplace`` and for too many positional arguments."
    )
    return function


FUNCTIONS: dict[str, Callable[..., Tensor]] = {name: _drop_in(row) for name, row in TABLE.items()}


def gelu(z: Tensor, approximate: str = "none", *, impl: str = "auto") -> Tensor:
    """``torch.nn.functional.gelu`` with the fused backward and double backward of `fastjac.act`.

    Shapes, dtypes, gradient orders and errors are those of `fastjac.act` with order 0. Raises
    ValueError if ``approximate`` is neither "none" nor "tanh".
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}: it must be 'none' or 'tanh'")
    return activate(z, "gelu" if approximate == "none" else "gelu_tanh", impl, {})


FUNCTIONS["gelu"] = gelu
