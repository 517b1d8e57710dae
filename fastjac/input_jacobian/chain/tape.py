"""Records the operations of one run of a model, from its input to its output.

The input of the model is a tensor whose torch functions come here first (`Tracked`). So a model is
seen however its ``forward`` is written, with hooks, parametrizations and control flow, and the
record is of the very run it is used for: nothing can be stale. An operation that is not known to be
right in a chain raises `Unsupported`, with the reason. Not seen, and refused:

* a ``torch.autograd.Function`` and anything else with gradients switched off,
* operations that write to a tensor that something else shares memory with,
* weights that depend on the input.

A tracked tensor that somebody kept raises when it is used after the run: it has no graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastjac import torch_private
from fastjac.input_jacobian.chain.by_autograd import ByAutograd
from fastjac.input_jacobian.chain.links import Link, Unsupported
from fastjac.observers import OBSERVERS, Recorded
from fastjac.ops.autograd import graph_nodes
from fastjac.torch_private import tree_flatten, tree_unflatten


class KeptTensor(RuntimeError):
    """A value of another run, which has ended."""


class Tracked(Recorded):
    """A value of the chain while it is recorded; ``plain`` has its numbers."""

    tape: Tape
    place: int
    plain: Tensor

    def refuse(self, reason: str) -> None:
        raise Unsupported(reason)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for t in args:
            if type(t) is Tracked:
                return t.tape.call(func, args, kwargs)
        leaves = tree_flatten((args, kwargs))[0]
        found = next(t for t in leaves if type(t) is Tracked)
        return found.tape.call(func, args, kwargs)


def _asking() -> set[Any]:
    """Functions that ask about a tensor, not for its numbers."""
    properties = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse", "names")
    methods = (
        *("size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point"),
        *("is_complex", "__len__", "element_size", "get_device", "ndimension", "is_nested"),
    )
    found = {getattr(Tensor, name).__get__ for name in properties if hasattr(Tensor, name)}
    found |= {getattr(Tensor, name) for name in methods if hasattr(Tensor, name)}
    return found | {torch.is_floating_point, torch.is_complex, torch.numel}


ASKING = _asking()
RULES: dict[Any, Callable[..., Any]] = {}
"""Function of torch: ``rule(tape, *args, **kwargs)`` records it, or returns NotImplemented."""

DENIED = {
    *("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_"),
    *("backward", "grad", "__set__", "__delete__", "set_", "as_subclass", "__setitem__"),
}
"""What acts on a tensor's graph or memory: there is no such graph here."""

_grad_fn: Any = Tensor.grad_fn
GRAD_FN = _grad_fn.__get__  # asked for by legacy module hooks

REBINDING = {"__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div"}


class Tape:
    def __init__(self, x: Tensor) -> None:
        self.links: list[Link] = []
        self.values: list[Tracked] = []
        self.closed = False
        self.parameters: list[Tensor] = []
        self.numbers: dict[int, int] = {}  # id of a parameter: its place in the list
        self.versions: list[tuple[Tensor, int]] = []
        self.differentiable = [x.requires_grad]  # by value: whether anything wants its gradient
        self.x = x
        self.shared: set[int] = set()  # memory of values that constants share
        self.versions.append((x, x._version))

    def value(self, plain: Tensor) -> Tracked:
        # It requires grad, so that what torch computes of it unseen (in a vmap, say) has a graph
        # that leads back here, and `_independent` finds it.
        t: Any = Tensor._make_subclass(Tracked, plain, True)
        t.tape, t.place, t.plain = self, len(self.values), plain
        self.values.append(t)
        return t

    def watch(self, *tensors: Tensor | None) -> None:
        """Tensors that must not be written to before the backward."""
        for t in tensors:
            if t is not None:
                self.versions.append((t, t._version))
                if t.requires_grad:
                    self._independent(t)

    def _independent(self, weight: Tensor) -> None:
        """Raise if a tensor that requires grad depends on x."""

        def of_x(node: Any) -> bool:
            leaf = getattr(node, "variable", None)
            return type(leaf) is Tracked or leaf is self.x or node is self.x.grad_fn

        if weight is self.x or any(map(of_x, graph_nodes(weight))):
            raise Unsupported(
                "a tensor depends on x beside the model's argument, or by operations that could "
                "not be recorded"
            )

    def _check_own(self, tensors: Any) -> None:
        for t in tensors:
            if type(t) is Tracked and t.tape is not self:
                raise KeptTensor(
                    "a tensor that the model computed in an earlier run under a penalty, and that "
                    'it kept, has no graph: use engine="autograd" in the penalty'
                )

    def append(self, link: Link, inputs: list[Tracked], out: Tensor) -> Tracked:
        for p in link.parameters:
            if id(p) not in self.numbers:
                self.numbers[id(p)] = len(self.parameters)
                self.parameters.append(p)
        link.empty = out.numel() == 0
        link.inputs, link.output = tuple(t.place for t in inputs), len(self.values)
        self.links.append(link)
        wanted = bool(link.parameters) or any(self.differentiable[i] for i in link.inputs)
        self.differentiable.append(wanted)
        return self.value(out)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in ASKING:
            values = [t.plain if type(t) is Tracked else t for t in args]
            return func(*values, **kwargs)
        name = getattr(func, "__name__", str(func))
        if self.closed:
            raise RuntimeError(
                f"{name} of a tensor that the model computed in its run under a penalty, and that "
                "somebody kept: the chain engine gives a graph to the output alone. Use "
                'engine="autograd" in the penalty'
            )
        if not torch.is_grad_enabled():
            raise Unsupported(
                f"{name} runs with gradients off: torch.no_grad() in the model, or a "
                "torch.autograd.Function"
            )
        if torch_private.saved_tensor_hooks() is not None:
            raise Unsupported(f"{name} runs in a checkpoint, or under other saved-tensor hooks")
        if torch.is_autocast_enabled(self.x.device.type):
            raise Unsupported(f"{name} runs under autocast")
        if name in DENIED or func == GRAD_FN:
            raise Unsupported(f"{name} of a hidden tensor")
        self._check_own(args)
        self._check_own(kwargs.values())
        try:
            rule = RULES.get(func)
            if rule is not None:
                out = rule(self, *args, **kwargs)
                if out is not NotImplemented:
                    return out
            return self.other(func, name, args, kwargs)
        except (Unsupported, KeptTensor):
            raise
        except Exception as error:  # autograd will raise it too, or knows better
            raise Unsupported(f"{name} failed: {error}") from error

    def other(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Any operation of torch, by autograd."""
        in_place = bool(kwargs.get("inplace"))
        if in_place:
            kwargs = {**kwargs, "inplace": False}
        elif name in REBINDING or (name.endswith("_") and not name.endswith("__")):
            plain_name = REBINDING.get(name, name[:-1])
            func, in_place = getattr(Tensor, plain_name, None), True
            if not callable(func):
                raise Unsupported(f"{name} writes to a tensor in place")
            rule = RULES.get(func)
            if rule is not None:
                out = rule(self, *args, **kwargs)
                if out is not NotImplemented:
                    return self.rebind(args[0], out, name)
        elif kwargs.get("out") is not None:
            raise Unsupported(f"{name} writes to a tensor in place")

        leaves, spec = tree_flatten((args, kwargs))
        self._check_own(leaves)
        tracked: dict[int, Tracked] = {t.place: t for t in leaves if type(t) is Tracked}
        parameters = {
            id(t): t
            for t in leaves
            if isinstance(t, Tensor) and type(t) is not Tracked and t.requires_grad
        }
        places = {id(t): i for i, t in enumerate((*tracked.values(), *parameters.values()))}

        def run(*tensors: Tensor) -> Any:
            # A value that was rebound may stand there as two objects.
            new = [
                tensors[list(tracked).index(t.place)]
                if type(t) is Tracked
                else tensors[places[id(t)]]
                if id(t) in places
                else t
                for t in leaves
            ]
            new_args, new_kwargs = tree_unflatten(new, spec)
            return func(*new_args, **new_kwargs)

        inputs = list(tracked.values())
        self.watch(*parameters.values())
        link = ByAutograd(run, [t.plain for t in inputs], parameters.values(), name)
        if link.output_place < 0:  # a shape, an index, a detached tensor: a constant
            if in_place:
                raise Unsupported(f"{name} writes to a tensor in place")
            self._note_shared(link.result, inputs)
            return link.result
        out = self.append(link, inputs, link.out.detach())
        out = self.rebind(args[0], out, name) if in_place else out
        return link.with_output(out)

    def _note_shared(self, result: Any, inputs: list[Tracked]) -> None:
        """``h.detach()`` shows what is written to h later."""
        for t in tree_flatten(result)[0]:
            if not isinstance(t, Tensor) or t.layout != torch.strided:
                continue
            memory = t.untyped_storage().data_ptr()
            for h in inputs:
                if h.plain.untyped_storage().data_ptr() == memory:
                    self.shared.add(memory)
                    self.versions.append((h.plain, h.plain._version))

    def rebind(self, target: Any, out: Tracked, name: str) -> Tracked:
        """The tensor object ``target`` now has the numbers of ``out``."""
        if type(target) is not Tracked:
            raise Unsupported(f"{name} writes to a tensor that is no value of the chain")
        memory = target.plain.untyped_storage().data_ptr()
        if out.plain.dtype != target.plain.dtype or out.plain.shape != target.plain.shape:
            raise Unsupported(f"{name} casts to the dtype or shape of the tensor it writes to")
        if memory in self.shared or any(
            v is not target and v.plain.untyped_storage().data_ptr() == memory for v in self.values
        ):
            raise Unsupported(f"{name} writes to a tensor that another shares its memory with")
        target.plain, target.place = out.plain, out.place
        self.values[out.place] = target
        return target


def record(model: Callable[..., Any], x: Tensor) -> tuple[Tape, Tracked]:
    """Run the model on x; its operations, and its output."""
    tape = Tape(x)

    def observe(z: Any, fn: str, impl: str, params: dict[str, Any], a: Any) -> Any:
        if type(z) is not Tracked or z.tape is not tape:
            return a
        return RULES["activation"](tape, z, fn, impl, params)

    OBSERVERS.append(observe)
    try:
        output = model(tape.value(x.detach()))
    except Unsupported as error:
        error.early = not tape.links
        raise
    finally:
        OBSERVERS.remove(observe)
        tape.closed = True
    if type(output) is not Tracked or output.tape is not tape:
        kind = type(output).__name__
        raise Unsupported(
            "the output of the model does not depend on x"
            if isinstance(output, Tensor)
            else f"the output of the model is {kind}, not one tensor"
        )
    return tape, output


def why_not(model: Any, x: Tensor) -> str | None:
    """What can be told before the model runs."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the call: its own fusion takes the engine's place"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    if torch_private.transforms_active():
        return "a torch.func transform is active"
    if torch_private.saved_tensor_hooks() is not None:
        return "hooks on saved tensors (a checkpoint) are active"
    if type(x) not in (Tensor, nn.Parameter):
        return f"x is {type(x).__name__}"
    if hasattr(model, "_orig_mod"):
        return "the model is compiled"
    return None
