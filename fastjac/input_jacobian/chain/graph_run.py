"""The sweeps over the autograd graph of a run, operation by operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastjac.input_jacobian.chain.record import Record
from fastjac.ops.row_sqnorm import gradient_of_one, rows_of_one


class GraphRun:
    """The sweeps over a recorded graph. w, u and their products have a first dimension of K."""

    own_output = False  # the output is in the graph of torch

    def __init__(self, x: Tensor, output: Tensor) -> None:
        self.record = Record(x, output)
        self.output = output
        self.parameters = [output, *self.record.targets]
        self.deltas: list[Tensor | None] = []
        self.extras: list[Tensor | None] = [None] * len(self.record.targets)

    def begin(self) -> None:
        """Start a backward. Torch itself raises if a tensor that it saved was modified."""
        self.extras = [None] * len(self.record.targets)  # an earlier backward may have raised

    def pull(self, w: Tensor) -> Tensor:
        """``Jᵀ w``."""
        lead = tuple(w.shape[:1]) if w.shape[0] > 1 else ()
        v, self.deltas = self.record.pull(w if lead else w[0], lead)
        return v if lead else v.unsqueeze(0)

    def norms(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``v = Jᵀ w`` and ``Σ_k ‖v_k‖²`` of each sample."""
        v = self.pull(w).contiguous()
        norms = rows_of_one(v.flatten(0, 1))
        return v, norms if len(v) == 1 else norms.view(len(v), -1).sum(0)

    def jvp(self, u: Tensor) -> Tensor:
        """``J u``."""
        return self._push(u, None, True)

    def push(
        self, u: Tensor, keep: bool, wanted: bool, factor: Tensor | None = None
    ) -> Tensor | None:
        """``J u``, or None if it is not wanted; keeps the second-order terms.

        If ``factor``, one number per sample, is given, ``2 factor u`` (the gradient of the squared
        norms) takes the place of u.
        """
        if factor is not None:
            factor = factor.repeat(len(u)) if len(u) > 1 else factor
            u = gradient_of_one(u.flatten(0, 1), factor).view(u.shape)
        out = self._push(u, [*self.deltas] if keep else self.deltas, wanted)
        if not keep:
            self.deltas = []
        return out

    def push_given(self, given: list[Any], wanted: bool) -> Tensor | None:
        """`push` of ``[u, factor, *deltas]``, a list that is emptied, without earlier terms."""
        self.begin()
        u, factor, *self.deltas = given
        given.clear()
        return self.push(u, False, wanted, factor)

    def _push(self, u: Tensor, deltas: Any, wanted: bool) -> Any:
        lead = tuple(u.shape[:1]) if u.shape[0] > 1 else ()
        with torch.no_grad(), torch.autocast(self.output.device.type, enabled=False):
            out = self.record.push(u if lead else u[0], lead, deltas, self.extras, wanted)
        if wanted and out is None:
            out = self.output.new_zeros((*lead, *self.output.shape))
        return out if lead or out is None else out.unsqueeze(0)

    def take_deltas(self) -> list[Tensor | None]:
        """The cotangents of the last `pull`, which are not kept."""
        deltas, self.deltas = self.deltas, []
        return deltas

    def take_extras(self) -> list[Tensor | None]:
        """The second-order terms of the last push, which are not kept."""
        extras, self.extras = self.extras, []
        return extras

    def down(self, grad: Tensor | None, keep: bool) -> list[Tensor | None]:
        """The gradients of x and the parameters."""
        return [None, grad, *self.extras]

    def describe(self) -> list[str]:
        return self.record.describe()


def check_versions(tensors: list[Tensor], versions: list[int]) -> None:
    """Raises if a tensor that a run used was modified since its version was noted."""
    for t, version in zip(tensors, versions, strict=True):
        if t._version != version:
            raise RuntimeError(
                f"a tensor of shape {tuple(t.shape)} that the model used was modified in place "
                "before the backward: call backward() before optimizer.step(), or use the "
                "out-of-place operation"
            )


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
