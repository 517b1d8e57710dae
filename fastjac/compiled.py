"""`compile`: ``torch.compile`` of a training step or an objective, whose first run is checked.

Inductor has computed wrong second derivatives without an error: on torch 2.13 it returned the value
0 for SpectReg of a LeNet, because it moved the scatter in the VJP of max_pool2d behind its use.
Therefore the first run of each graph is compared with the kernels of torch.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastjac import arguments, torch_private
from fastjac.torch_private import tree_leaves

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

OPTIONS = {
    # The pass of inductor that moved the scatter.
    "reorder_for_peak_memory": False,
    # The random numbers of torch's own kernels, or the first run could not be compared.
    "fallback_random": True,
}

CONFIG = {
    # Dynamo then traces `loss.backward()` in a step (torch 2.13; older versions do not have it).
    "trace_autograd_ops": True,
    # A checkpoint that recomputes a part of the model notes no layers a second time.
    "skip_fwd_side_effects_in_bwd_under_checkpoint": True,
    # nn.GRU, nn.LSTM and nn.RNN.
    "allow_rnn": True,
    # A step may be compiled for each call of `every`, for training and evaluation, and for dtypes.
    "recompile_limit": 64,
}


def compile(
    f: Callable[..., Any],
    *,
    mode: str = "default",
    backend: str | Callable[..., Any] = "inductor",
) -> Callable[..., Any]:
    """``torch.compile(f, fullgraph=True)`` with what penalties need, and a check of the first run.

    ``f`` is an objective, which returns a loss, or a whole training step, with
    ``loss.backward()`` in it, but not the optimizer, which torch does not trace. A whole step is
    one graph and the fastest form. Torch 2.10 traces objectives only::

        penalty = fastjac.SpectReg(weight=0.1)

        @fastjac.compile
        def step(x, y):
            output, value = penalty(model, x)
            loss = F.cross_entropy(output, y) + value
            loss.backward()
            return loss.detach()

        for x, y in loader:
            optimizer.zero_grad()  # which torch.compile does not trace
            step(x, y)
            optimizer.step()

    The first run of each graph is compared with the kernels of torch: outputs, gradients and what
    the step writes to. So the first call needs the memory of a copy of the parameters.

    The code is compiled for the batch size of the first call: dimension 0 of all tensors that ``f``
    is called with. A single call with another one, such as a last smaller batch, runs ``f`` as it
    is. The second of two in a row compiles code for all other sizes. (Code for all sizes takes up
    to 1.12 times as long as code for one: DREG of a transformer, 2 cores.)

    Args:
        f: a function of tensors, and of anything else that ``torch.compile`` takes.
        mode: ``"default"``, ``"reduce-overhead"`` (CUDA graphs), ``"max-autotune"`` or
            ``"max-autotune-no-cudagraphs"``, as in ``torch.compile``. Other modes than the default
            are for ``backend="inductor"``.
        backend: what compiles the graph, as in ``torch.compile``.

    Returns:
        A function with the arguments and results of ``f``.

    Raises:
        TypeError: f is not callable.
        ValueError: mode is unknown.
        RuntimeError: in a call, if the compiled code is wrong; the message names what differs. The
            errors of ``torch.compile`` for what it cannot trace are passed on.

    A weight that changes (``penalty.weight = ...``) does not cause a compilation. Random numbers
    are those of eager mode.

    Example:

        >>> model, x = nn.Linear(3, 2), torch.randn(4, 3)
        >>> penalty = fastjac.FrobReg()
        >>> objective = fastjac.compile(lambda x: penalty(model, x)[1])
        >>> torch.allclose(objective(x), penalty(model, x)[1])  # doctest: +SKIP
        True
    """
    if not callable(f):
        raise TypeError(f"f is {type(f).__name__}: it must be a function of tensors")
    arguments.choice("mode", mode, MODES)
    # Of two backends, since dynamo would use code for all sizes for the first one too.
    usual, other = (
        torch.compile(f, fullgraph=True, backend=functools.partial(_checked, backend, mode))
        for _ in range(2)
    )
    sizes = _Sizes()
    dynamo = torch_private.dynamo_config()
    config = {name: value for name, value in CONFIG.items() if hasattr(dynamo, name)}

    @functools.wraps(f)
    def call(*args: Any, **named: Any) -> Any:
        given = [t.shape[0] for t in tree_leaves((args, named)) if _has_size(t)]
        kind = sizes.kind(given)
        if kind == "single":
            return f(*args, **named)
        with dynamo.patch(config):
            results = (usual if kind == "usual" else other)(*args, **named)
        if sizes.usual is None:  # the first call that raised no error
            sizes.usual = given
        return results

    return call


def _has_size(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


class _Sizes:
    """The batch sizes of the calls: dimension 0 of each tensor."""

    def __init__(self) -> None:
        self.usual: list[int] | None = None  # those that the first code is for
        self.others = 0  # the number of calls with other sizes since a usual one
        self.compiled = False  # whether there is code for other sizes

    def kind(self, sizes: list[int]) -> str:
        """``"usual"``, ``"other"``, or ``"single"`` for a call that is not worth its code."""
        if self.usual is None or sizes == self.usual:
            self.others = 0
            return "usual"
        self.others += 1
        self.compiled |= self.others > 1
        return "other" if self.compiled else "single"


class WrongCode(RuntimeError):
    """The code that was compiled for a graph computes something else than torch does."""


def _checked(backend: Any, mode: str, graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """The backend for dynamo: ``backend``, with a comparison in the first run."""
    if backend == "inductor":
        options = {**torch_private.mode_options()(mode), **OPTIONS}
        function = torch_private.compile_fx()(graph, inputs, config_patches=options)
    else:
        lookup = torch_private.lookup_backend()
        function = (backend if callable(backend) else lookup(backend))(graph, inputs)
    unchecked = [graph]

    def call(*args: Any) -> Any:
        if unchecked and agree(unchecked[0], function, args):
            unchecked.pop()
        return function(*args)

    return call


class Found(NamedTuple):
    """A tensor that a run computed, and what it is."""

    name: str
    value: Tensor


def agree(graph: torch.fx.GraphModule, function: Callable[..., Any], args: Any) -> bool:
    """Compares compiled code with its graph, and raises if they differ.

    Returns False if the results hold NaN or infinities, which show nothing. The tolerances allow
    other orders of summation; the errors to be found are of order 1.
    """
    devices = {a.device for a in args if isinstance(a, Tensor) and a.is_cuda}
    with torch.random.fork_rng(devices):
        found = _run(graph, function, args)
    with torch.random.fork_rng(devices):
        try:
            expected = _run(graph, graph, args)
        except NotImplementedError:
            return True  # an operation that the compiler decomposes and the kernels do not have
    if not all(one.value.isfinite().all() for one in expected):
        return False
    dtypes = {a.dtype for a in args if isinstance(a, Tensor)} | {e.value.dtype for e in expected}
    rough = bool(dtypes & {torch.float16, torch.bfloat16}) or torch.is_autocast_enabled("cpu")
    rough = rough or torch.is_autocast_enabled() or "autocast" in graph.code
    tolerance = 0.25 if rough else 0.05 if torch.float32 in dtypes else 1e-6
    largest = max((float(one.value.norm()) for one in expected), default=0.0)
    for (_, a), (name, b) in zip(found, expected, strict=True):
        error, size = float((a - b).norm()), float(b.norm())
        if not error <= tolerance * max(size, 1e-3 * largest):
            raise WrongCode(
                f"the code that torch compiled is wrong: {name} differs by {error:.2g} from what "
                f"the kernels of torch compute, whose norm is {size:.2g}. Run the step without "
                "compile, and report the graph to PyTorch"
            )
    return True


def _run(
    graph: torch.fx.GraphModule, function: Callable[..., Any], args: Sequence[Any]
) -> list[Found]:
    """What a run on copies of the inputs returns and writes, and the gradients of its outputs."""
    placeholders = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]
    copies = [_copy(a) if isinstance(a, Tensor) else a for a in args]
    results = function(*copies)
    outputs = list(zip(_names(graph), results, strict=True))
    found = [Found(name, t) for name, t in outputs if isinstance(t, Tensor)]
    losses = [(t * _weights_like(t)).sum() for _, t in found if t.requires_grad]
    wanted = [
        (f"the gradient with respect to {name}", t)
        for name, t in zip(placeholders, copies, strict=True)
        if isinstance(t, Tensor) and t.requires_grad
    ]
    if losses and wanted:
        grads = torch.autograd.grad(
            losses, [t for _, t in wanted], allow_unused=True, materialize_grads=True
        )
        found += [Found(name, g) for (name, _), g in zip(wanted, grads, strict=True)]
    found = [Found(name, t.detach()) for name, t in found]
    found += [
        Found(f"what is written to {name}", t.detach() - a.detach())
        for name, t, a in zip(placeholders, copies, args, strict=True)
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
    return [one for one in found if one.value.is_floating_point()]


def _copy(t: Tensor) -> Tensor:
    """A copy with the same strides, which compiled code relies on."""
    copy = t.detach().clone()
    if copy.stride() != t.stride():
        storage = t.untyped_storage().clone()
        copy = t.new_empty(0).set_(storage, t.storage_offset(), t.shape, t.stride())
    return copy.requires_grad_(t.requires_grad)


def _names(graph: torch.fx.GraphModule) -> list[str]:
    """What each output of a graph is: a gradient that ``backward`` computed in it, or a number."""
    (end,) = graph.graph.find_nodes(op="output")
    outputs: Any = end.args[0]
    return [_gradient(node) or f"output {i} of the graph" for i, node in enumerate(outputs)]


def _gradient(node: Any) -> str | None:
    """What a node is, if it is a gradient that ``backward`` computed, or a copy of one."""
    while isinstance(node, torch.fx.Node) and node.op.startswith("call"):
        written = [n.args[1] for n in node.users if n.target == "copy_" and n.args[0] is node]
        source: Any = written[0] if written else node.args[0] if node.args else None
        if node.target is operator.getitem and source.target is torch.autograd.grad:
            return f"the gradient with respect to {source.args[1][node.args[1]]}"
        # Through the copies that become `.grad`.
        node = source if len(node.all_input_nodes) == 1 else None
    return None


def _weights_like(t: Tensor) -> Tensor:
    """Weights from 0.5 to 1.5: some wrong terms would vanish with equal ones."""
    weights = torch.linspace(0.5, 1.5, t.numel(), device=t.device)
    return weights.to(t.dtype).view(t.shape)
