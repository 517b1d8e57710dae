"""The output of a pass of an attached model: how long the penalty keeps it, and who else does.

The graph of a pass goes when the program lets go of the model's output, as without a penalty,
except that of the latest pass: ``model(x)`` and then ``penalty()`` is a step too.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from fastjac.torch_private import tree_leaves

KEY = "fastjac"


class Mark:
    """An object in the metadata of an autograd node, which is deleted with the node."""


class Output:
    """The tensors that a pass returned; `let_go` makes the references weak."""

    def __init__(self, output: Any) -> None:
        leaves = [output] if isinstance(output, Tensor) else tree_leaves(output)
        self.held: list[Tensor] | None = [t for t in leaves if isinstance(t, Tensor)]
        self.references: list[Any] = []
        self.marks: list[Any] = []

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of the output that there still are."""
        if self.held is not None:
            return self.held
        return [t for t in (ref() for ref in self.references) if t is not None]

    def let_go(self) -> None:
        if self.held is None:
            return
        for t in self.held:
            self.references.append(weakref.ref(t))
            if t.grad_fn is not None:
                # A loss keeps the node when the tensor itself is deleted.
                mark = t.grad_fn.metadata.setdefault(KEY, Mark())  # type: ignore[attr-defined]
                self.marks.append(weakref.ref(mark))
        self.held = None

    def dropped(self) -> bool:
        """Whether the program can no longer differentiate the output."""
        return self.held is None and bool(self.marks) and all(m() is None for m in self.marks)


def apart(output: Any, terms: list[Any]) -> Any:
    """The output, as a view if the node of one of the terms returned it.

    The penalty keeps these nodes, so the node of the output must be another one.
    """
    node = output.grad_fn if isinstance(output, Tensor) else None
    if node is not None:
        for term in terms:
            if term.result.grad_fn is node:
                return output.view_as(output)
    return output
