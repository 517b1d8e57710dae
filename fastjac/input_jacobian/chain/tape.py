"""Records the operations of one run of a model, from its input to its output.

The input of the model is a `Tracked` tensor, whose ``__torch_function__`` records each operation.
It sees every way of writing a ``forward``, including hooks, parametrizations and control flow, and
the record is used for this run only. `Unsupported` is raised, with the reason, for

* a ``torch.autograd.Function`` and everything else that runs with gradients off,
* an operation that writes to a tensor which shares its memory with another one,
* a layer whose weight depends on the input.

A tracked tensor has no autograd graph, so using one after the run raises.
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
    """The model uses a tracked tensor of an earlier run."""


class Tracked(Recorded):
    """A tensor of the recorded run; ``plain`` is an ordinary tensor with its numbers."""

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


_properties = ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_sparse")
_methods = (
    *("size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point"),
    *("is_complex", "__len__", "element_size", "get_device", "ndimension", "is_nested"),
)
ASKING: set[Any] = {
    *[getattr(Tensor, name).__get__ for name in _properties],
    *[getattr(Tensor, name) for name in _methods],
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
"""Functions of a tensor that do not depend on its numbers."""

RULES: dict[Any, Callable[..., Any]] = {}
"""By function: ``rule(tape, *args, **kwargs)`` records a call, or returns NotImplemented."""

DENIED = {
    *("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_"),
    *("backward", "grad", "__set__", "__delete__", "set_", "as_subclass", "__setitem__"),
}
"""Functions that act on the graph of a tensor, which a tracked one lacks, or on its memory."""

_grad_fn: Any = Tensor.grad_fn
GRAD_FN = _grad_fn.__get__  # module hooks of the old kind read it

REBINDING = {"__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div"}


class Tape:
    def __init__(self, x: Tensor) -> None:
        self.links: list[Link] = []
        self.values: list[Tracked] = []
        self.closed = False
        self.parameters: list[Tensor] = []
        self.numbers: dict[int, int] = {}  # id of a parameter: its place in the list
        self.versions: list[tuple[Tensor, int]] = [(x, x._version)]
        self.differentiable = [x.requires_grad]  # of each value: whether its gradient is needed
        self.x, self.device_type = x, x.device.type
        self.shared: set[int] = set()  # addresses of memory that values and constants share

    def value(self, plain: Tensor) -> Tracked:
        # The tensor requires grad. What torch computes from it without a call of
        # __torch_function__ (in a vmap, for example) has a graph then, and `_check_independent`
        # finds this tensor in it.
        t: Any = Tensor._make_subclass(Tracked, plain, True)
        t.tape, t.place, t.plain = self, len(self.values), plain
        self.values.append(t)
        return t

    def watch(self, *tensors: Tensor | None) -> None:
        """Note tensors that must not be modified in place before the backward."""
        for t in tensors:
            if t is not None:
                self.versions.append((t, t._version))
                if t.requires_grad:
                    self._check_independent(t)

    def _check_independent(self, weight: Tensor) -> None:
        """Raises if a tensor that requires grad depends on x."""

        def of_x(node: Any) -> bool:
            leaf = getattr(node, "variable", None)
            return type(leaf) is Tracked or leaf is self.x or node is self.x.grad_fn

        if weight is self.x or any(map(of_x, graph_nodes(weight))):
            raise Unsupported(
                "a tensor depends on x, but not through recorded operations on the argument of the "
                "model"
            )

    def _check_own(self, tensors: Any) -> None:
        for t in tensors:
            if type(t) is Tracked and t.tape is not self:
                raise KeptTensor(
                    "the model uses a tensor that it computed and kept in an earlier call of the "
                    'penalty; the chain engine builds no graph for it: use engine="autograd"'
                )

    def append(self, link: Link, inputs: list[Tracked], out: Tensor) -> Tracked:
        for p in link.parameters:
            if id(p) not in self.numbers:
                self.numbers[id(p)] = len(self.parameters)
                self.parameters.append(p)
        link.empty = out.numel() == 0
        link.inputs, link.output = tuple([t.place for t in inputs]), len(self.values)
        self.links.append(link)
        wanted = bool(link.parameters) or any([self.differentiable[i] for i in link.inputs])
        self.differentiable.append(wanted)
        return self.value(out)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record a call of a function of torch; returns what the function returns."""
        if func in ASKING:
            values = [t.plain if type(t) is Tracked else t for t in args]
            return func(*values, **kwargs)
        name = getattr(func, "__name__", str(func))
        self._check_call(func, name)
        self._check_own(args)
        if kwargs:
            self._check_own(kwargs.values())
        try:
            rule = RULES.get(func)
            out = NotImplemented if rule is None else rule(self, *args, **kwargs)
            return self.other(func, name, args, kwargs) if out is NotImplemented else out
        except (Unsupported, KeptTensor):
            raise
        except Exception as error:  # if the model is at fault, autograd raises it again
            raise Unsupported(f"{name} failed: {error}") from error

    def _check_call(self, func: Any, name: str) -> None:
        if self.closed:
            raise RuntimeError(
                f"{name} was called on a tensor that was computed and kept in a call of a penalty; "
                "the chain engine builds a graph for the output of the model only: use "
                'engine="autograd" in the penalty'
            )
        if not torch.is_grad_enabled():
            raise Unsupported(
                f"{name} runs with gradients off: torch.no_grad() in the model, or a "
                "torch.autograd.Function"
            )
        if torch_private.saved_tensor_hooks() is not None:
            raise Unsupported(f"{name} runs in a checkpoint or under other saved-tensor hooks")
        if torch.is_autocast_enabled(self.device_type):
            raise Unsupported(f"{name} runs under autocast")
        if name in DENIED or func == GRAD_FN:
            raise Unsupported(f"{name} is called on a hidden tensor, which has no autograd graph")

    def other(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Record a call for which there is no rule.

        An in-place operation is recorded as the one that it is the in-place form of.
        """
        out = NotImplemented
        if kwargs.get("inplace"):
            kwargs = {**kwargs, "inplace": False}
        elif name in REBINDING or (name.endswith("_") and not name.endswith("__")):
            func = getattr(Tensor, REBINDING.get(name, name[:-1]), None)
            if not callable(func):
                raise Unsupported(f"{name} writes to a tensor in place")
            rule = RULES.get(func)
            out = NotImplemented if rule is None else rule(self, *args, **kwargs)
        elif kwargs.get("out") is not None:
            raise Unsupported(f"{name} writes to a tensor in place")
        else:
            return self._by_autograd(func, name, args, kwargs)
        if out is NotImplemented:
            out = self._by_autograd(func, name, args, kwargs)
        if type(out) is not Tracked:
            raise Unsupported(f"{name} writes to a tensor in place")
        return self.rebind(args[0], out, name)

    def _by_autograd(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        self._check_own(leaves)
        tracked = {t.place: t for t in leaves if type(t) is Tracked}  # one of each value
        parameters = {
            id(t): t
            for t in leaves
            if isinstance(t, Tensor) and type(t) is not Tracked and t.requires_grad
        }
        places = {key: i for i, key in enumerate((*tracked, *parameters))}

        def run(*tensors: Tensor) -> Any:
            new = []
            for t in leaves:
                i = places.get(t.place if type(t) is Tracked else id(t))
                new.append(t if i is None else tensors[i])
            new_args, new_kwargs = tree_unflatten(new, spec)
            return func(*new_args, **new_kwargs)

        inputs = list(tracked.values())
        self.watch(*parameters.values())
        link = ByAutograd(run, [t.plain for t in inputs], parameters.values(), name)
        if link.output_place < 0:  # a shape, an index or a detached tensor is a constant
            self._note_shared(link.result, inputs)
            return link.result
        return link.with_output(self.append(link, inputs, link.out.detach()))

    def _note_shared(self, result: Any, inputs: list[Tracked]) -> None:
        """Note values whose memory a constant (``h.detach()``) shares."""
        for t in tree_flatten(result)[0]:
            if not isinstance(t, Tensor) or t.layout != torch.strided:
                continue
            memory = t.untyped_storage().data_ptr()
            for h in inputs:
                if h.plain.untyped_storage().data_ptr() == memory:
                    self.shared.add(memory)
                    self.versions.append((h.plain, h.plain._version))

    def rebind(self, target: Any, out: Tracked, name: str) -> Tracked:
        """Give the tensor object ``target`` the value ``out``, as an in-place operation does."""
        if type(target) is not Tracked:
            raise Unsupported(f"{name} writes to a tensor that was not computed from x")
        memory = target.plain.untyped_storage().data_ptr()
        if out.plain.dtype != target.plain.dtype or out.plain.shape != target.plain.shape:
            raise Unsupported(
                f"{name} changes the dtype or shape of its result to those of its target"
            )
        if memory in self.shared or any(
            v is not target and v.plain.untyped_storage().data_ptr() == memory for v in self.values
        ):
            raise Unsupported(f"{name} writes to a tensor that shares its memory with another one")
        target.plain, target.place = out.plain, out.place
        self.values[out.place] = target
        return target


def record(model: Callable[..., Any], x: Tensor) -> tuple[Tape, Tracked]:
    """Runs the model on x; returns the recorded operations and the output."""
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
        if isinstance(output, Tensor):
            raise Unsupported("the output of the model does not depend on x")
        raise Unsupported(f"the output of the model is {type(output).__name__}, not one tensor")
    return tape, output


def why_not(model: Any, x: Tensor) -> str | None:
    """Why the engine cannot run, as far as this is known before the model runs; else None."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
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
