"""The sweeps of a run as programs, traced once for each `signature` and kept.

The first run with a signature is noted, the second one traces the sweeps that it makes (`trace`),
and from the third one on they are calls of the traced functions. A training with shapes that never
repeat is not slowed down by tracing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from fastjac import torch_private
from fastjac.input_jacobian.chain.graph_run import GraphRun, check_versions, plus
from fastjac.input_jacobian.chain.signature import Signature, Unreadable
from fastjac.input_jacobian.chain.trace import Untraceable, trace

Function = Callable[..., list[Any]]

KEPT = 256
"""Signatures whose programs are kept. A model has one for each shape of its input and each mode."""

SEEN = 4096
"""Signatures that are remembered to have been seen once."""


class Programs:
    """The traced sweeps of the runs with one signature, by name and options."""

    def __init__(self) -> None:
        self.functions: dict[Any, Function] = {}
        self.failure: str | None = None  # why a sweep could not be traced
        self.network: Any = None  # a `Network`, if the run is that of one
        self.targets: list[int] | None = None  # the tensors with second-order terms

    def has(self, name: str) -> bool:
        return any([key[0] == name for key in self.functions])


_programs: dict[Any, Programs] = {}
_seen: dict[int, None] = {}


def programs_of(signature: Signature) -> Programs | None:
    """The programs of a signature; None if it is seen for the first time."""
    key = signature.key
    try:
        found = _programs.get(key)
    except TypeError as error:
        raise Unreadable("an operation holds an option that cannot be compared") from error
    if found is not None:
        return found
    number = hash(key)
    if number not in _seen:
        _seen[number] = None
        if len(_seen) > SEEN:
            del _seen[next(iter(_seen))]  # the oldest one
        return None
    found = _programs[key] = Programs()
    if len(_programs) > KEPT:
        del _programs[next(iter(_programs))]
    return found


def forget() -> None:
    """Forget all programs."""
    _programs.clear()
    _seen.clear()


class ProgramRun:
    """The sweeps of a run by programs. w, u and their products have a first dimension of K.

    If the hidden tensors of the run are private, the gradients of the parameters are computed by a
    program too, and the graph of torch is freed; else torch goes down its graph, as for a
    `GraphRun`.
    """

    def __init__(self, x: Tensor, output: Tensor, signature: Signature, programs: Programs) -> None:
        self.given, self.programs = x, programs
        self.of_x = x.requires_grad
        self.output: Any = output  # None after the last backward, as are the next two
        self.signature: Any = signature
        self.graph: GraphRun | None = None
        self.tensors, self.leaves = signature.tensors, signature.leaves
        self.versions = [t._version for t in self.tensors]
        self.own_output = signature.private
        self.deltas: list[Tensor | None] = []
        self.extras: list[Tensor | None] | None = None
        self.waiting: list[Any] | None = None  # what is given to a push that `down` takes along
        if not self.own_output and not programs.has("push"):
            self.as_graph()  # now, since the user may modify the output in place

    @property
    def starts(self) -> list[GradientEdge]:
        """The edges of x, if its gradient is wanted, and of the leaves."""
        edges = [GradientEdge(node, 0) for node in self.signature.leaf_nodes]
        return [GradientEdge(*self.signature.source), *edges] if self.of_x else edges

    def free(self) -> None:
        """Free the graph of torch, so that each tensor is freed after its last use."""
        self.output = self.signature = self.graph = None

    @property
    def parameters(self) -> list[Tensor]:
        """What the gradients of `down` are for, but x."""
        if self.own_output:
            return self.leaves
        if self.programs.targets is None:
            places = {_value(t): i for i, t in enumerate(self.tensors) if t.requires_grad}
            targets = self.as_graph().record.targets
            self.programs.targets = [places[_value(t)] for t in targets]
        return [self.output, *[self.tensors[i] for i in self.programs.targets]]

    def as_graph(self) -> GraphRun:
        if self.graph is None:
            self.graph = GraphRun(self.given, self.output)
        return self.graph

    def begin(self) -> None:
        """Start a backward. Raises if a tensor of the run was modified since."""
        check_versions(self.tensors, self.versions)
        self.extras = self.waiting = None  # an earlier backward may have raised

    # ---- sweeps

    def _sweep(
        self,
        name: str,
        options: tuple[Any, ...],
        given: list[Tensor | None],
        sweep: Callable[[list[Any]], list[Any]],
        last: bool = False,
    ) -> list[Any]:
        """Runs a program on the tensors of the run and those given, which it frees.

        Args:
            name, options: which program.
            given: the other tensors.
            sweep: what the program repeats, see `trace`.
            last: whether the tensors of the run are freed.
        """
        device = self.given.device.type
        autocast = torch.is_autocast_enabled(device)
        key = (name, autocast, *options, *map(_description, given))
        function = self.programs.functions.get(key)
        with torch.no_grad():
            if function is None:
                try:
                    # The function runs at once, though the sweep has the results. The two round
                    # differently, and two backwards through one run must agree (gradcheck).
                    function = trace(name, self.tensors, given, sweep)
                except Untraceable as error:
                    self.programs.failure, outputs = error.args
                    return outputs
                self.programs.functions[key] = function
            tensors = self.tensors if last else list(self.tensors)
            if last:
                self.free()
            with torch_private.below_autograd():
                if not autocast:
                    return function(tensors, given)
                with torch.autocast(device, enabled=False):
                    return function(tensors, given)

    def pull(self, w: Tensor) -> Tensor:
        """``Jᵀ w``."""

        def sweep(given: list[Any]) -> list[Any]:
            graph = self.as_graph()
            return [graph.pull(*given), *graph.take_deltas()]

        v, *self.deltas = self._sweep("pull", (), [w], sweep)
        return v

    def norms(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``v = Jᵀ w`` and ``Σ_k ‖v_k‖²`` of each sample."""

        def sweep(given: list[Any]) -> list[Any]:
            graph = self.as_graph()
            return [*graph.norms(*given), *graph.take_deltas()]

        v, norms, *self.deltas = self._sweep("norms", (), [w], sweep)
        return v, norms

    def jvp(self, u: Tensor) -> Tensor:
        """``J u``."""

        (out,) = self._sweep("jvp", (), [u], lambda given: [self.as_graph().jvp(*given)])
        return out

    def push(
        self, u: Tensor, keep: bool, wanted: bool, factor: Tensor | None = None
    ) -> Tensor | None:
        """``J u``, or None if it is not wanted; keeps the second-order terms. See `GraphRun`."""
        given = [u, factor, *self.deltas]
        if not keep:
            self.deltas.clear()  # and so frees each one after its last use
        if self.waiting is not None:
            self._push(self.waiting, False)
            self.waiting = None
        if self.own_output and not (keep or wanted or self.extras):
            self.waiting = given
            return None
        return self._push(given, wanted)

    def _push(self, given: list[Any], wanted: bool) -> Tensor | None:
        def sweep(given: list[Any]) -> list[Any]:
            graph = self.as_graph()
            return [graph.push_given(given, wanted), *graph.take_extras()]

        out, *extras = self._sweep("push", (wanted,), given, sweep)
        if self.extras is not None:
            extras = [plus(a, b) for a, b in zip(self.extras, extras, strict=True)]
        self.extras = extras
        return out

    def down(self, grad: Tensor | None, keep: bool) -> list[Tensor | None]:
        """The gradients of x and the parameters."""
        (extras, self.extras), (waiting, self.waiting) = (self.extras, None), (self.waiting, None)
        if not self.own_output:
            return [None, grad, *(extras or [None] * (len(self.parameters) - 1))]
        if waiting is not None:
            given, name = [grad, *waiting], "push_down"
        elif grad is not None or extras is not None:
            given, name = [grad, *(extras or [])], "down"
        else:
            return [None] * (1 + len(self.leaves))
        del grad, extras, waiting

        def sweep(given: list[Any]) -> list[Any]:
            graph = self.as_graph()
            grad = given.pop(0)
            if name == "push_down":
                graph.push_given(given, False)
                given += graph.take_extras()
            targets: Any = [GradientEdge(*graph.record.end), *graph.record.targets[: len(given)]]
            terms = [p for p in zip(targets, [grad, *given], strict=True) if p[1] is not None]
            found = torch.autograd.grad(
                [target for target, _ in terms],
                self.starts,
                [cotangent for _, cotangent in terms],
                retain_graph=True,
                allow_unused=True,
            )
            return [*found] if self.of_x else [None, *found]

        return self._sweep(name, (self.of_x,), given, sweep, last=not keep)

    def describe(self) -> list[str]:
        return self.as_graph().describe()


def _value(t: Tensor) -> Any:
    """What tells the value of a run from others: two leaves may share their memory."""
    return id(t) if t.grad_fn is None else (t.grad_fn, t.output_nr)


def _description(t: Tensor | None) -> Any:
    return None if t is None else (t.shape, t.stride(), t.dtype)
