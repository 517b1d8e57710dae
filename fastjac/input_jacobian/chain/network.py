"""A recorded run as a network that C++ sweeps through, one call each (`ops.net`).

`Network.of` finds the program of `ops.net` in the record of a run, however the model is written:
Linear layers, LayerNorm, activations of the table, sums, concatenations and factors. The forward
was that of torch, and the sweeps take the tensors that torch saved.
"""

from __future__ import annotations

import struct
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fastjac.activations import KERNEL_ROWS
from fastjac.input_jacobian.chain.activations import Kernel, suffix_for
from fastjac.input_jacobian.chain.program import ProgramRun, Programs
from fastjac.input_jacobian.chain.record import Record, Step
from fastjac.input_jacobian.chain.rules import signed
from fastjac.input_jacobian.chain.signature import Signature, number_bytes
from fastjac.input_jacobian.chain.sweeps import FLAT, TILED, Sweeps, rows_of_a_thread
from fastjac.ops import net
from fastjac.torch_private import shape_of_node

ROWS = {row.name: number for number, row in enumerate(KERNEL_ROWS)}

VIEWS = ("View", "UnsafeView", "Squeeze", "Unsqueeze", "Alias", "Clone")


SMALL = 1 << 15
"""Pre-activations up to which φ' and φ'' are kept, so that no sweep evaluates them again.

Of a larger network they would be more memory than the graph of torch has.
"""


class Other(Exception):
    """The run is not one of a network that C++ knows."""


class Network:
    """The program, and where its tensors are among those of a `Signature`; it holds no tensor.

    Attributes:
        plan: see `ops.net`.
        n: the number of samples.
        weights: the places of the saved weights, ``[in, out]``, or ``[C]`` of a LayerNorm.
        saved: the places of the argument ``saved`` of the sweeps; -1 for an empty one.
        wanted: the argument of `net_backward`, without and with the gradient of x.
        places: for each weight and bias, in the order of its results, the number of the leaf, or
            -1.
        flat, small, sizes: see `sweeps.FLAT`, `SMALL` and `sweeps.rows_of_a_thread`.
    """

    def __init__(self, matched: _Match) -> None:
        self.plan, self.n, self.weights = net.rows(matched.steps), matched.n, matched.weights
        self.places = [*matched.of_weights, *matched.of_biases]
        wanted = [leaf >= 0 for leaf in self.places]
        self.wanted = [_numbers([*wanted, of_x]) for of_x in (False, True)]
        linear = [step for step in matched.steps if step[0] == net.LINEAR]
        read = sorted({step[1] for step in linear} - {0})
        self.saved = [p for place in matched.arguments for p in (place, -1, -1)]
        # Torch saves the input of each layer whose weight requires grad.
        self.saved += [matched.of_input.get(value, -1) for value in read]
        self.saved += matched.of_norms
        sizes: Counter[int] = Counter()  # the elements of the values of each kind
        for step, width in zip(matched.steps, matched.widths, strict=True):
            sizes[step[0]] += self.n * width
        self.small = sizes[net.ACT] <= SMALL
        self.flat = sizes[net.ACT] + sizes[net.NORM] <= FLAT
        self.sizes = matched.size, sizes[net.LINEAR]

    @classmethod
    def of(cls, record: Record, signature: Signature) -> Network | None:
        x = signature.tensors[0]
        wide = x.dtype in (torch.float32, torch.float64)
        if not (wide and x.is_cpu and suffix_for("cpu", x.dtype) == "" and x.dim() > 0):
            return None
        try:
            return cls(_Match(record, signature))
        except Other:
            return None


class _Match:
    """The operations of a record, matched to the steps of `ops.net`.

    Attributes:
        steps, widths: of each value, its step and its width.
        of_input: by value, the place of its tensor if a layer saved it.
        arguments: the places of the arguments of the activations.
        of_norms: the places of the argument, μ and ι of each norm.
        of_weights, of_biases: the numbers of their leaves.
        size: the number of elements of the weights.
    """

    def __init__(self, record: Record, signature: Signature) -> None:
        self._signature = signature
        self._by_memory = {_memory(t): i for i, t in reversed([*enumerate(signature.tensors)])}
        self._leaves = {id(t): i for i, t in enumerate(signature.leaves)}
        x = signature.tensors[0]
        self.n, width = x.shape[0], x[0].numel()
        self.steps: list[Any] = [(net.INPUT, width, 0, 1)]  # torch has saved transposed weights
        self.widths = [width]
        self._values: dict[Any, int] = {record.source: 0}
        self.of_input: dict[int, int] = {}
        self.arguments: list[int] = []
        self.of_norms: list[int] = []
        self.weights: list[int] = []
        self.size = 0
        self._numbers: dict[tuple[int, int], int] = {}  # of the weights, by place and leaf
        self.of_weights: list[int] = []
        self.of_biases: list[int] = []
        for step in record.steps:
            self._values[step.node, 0] = self._step(step)
        # All other steps lead to the end, so they come before it.
        assert self._values[record.end] == len(self.steps) - 1
        if not any(step[0] == net.LINEAR for step in self.steps):
            raise Other("there is no Linear layer")

    def _step(self, step: Step) -> int:
        """The number of the value of an operation."""
        node, sources = step.node, step.sources
        name, _, overload = type(node).__name__.partition("Backward")
        # A norm has other outputs, which have no gradient; no other step has several.
        values = [None if s is None else self._values[s] for s in sources]
        inside: list[Any] = [v for v in values if v is not None]
        if isinstance(step.rule, Kernel):
            return self._activation(step, inside[0])
        if overload == "0" and name in ("Relu", "LeakyRelu", "Hardtanh", "Hardsigmoid"):
            return self._piecewise(node, name, inside[0])
        if name in ("Addmm", "Mm") and overload == "0":
            return self._linear(node, name == "Addmm", values)
        if name == "NativeLayerNorm" and overload == "0" and values[1:] == [None, None]:
            return self._norm(node, inside[0])
        shape = shape_of_node(node)
        if name == "Add" and overload == "0" and node._saved_alpha == 1 and len(inside) == 2:
            if any(list(shape_of_node(*s)) != list(shape) for s in sources if s is not None):
                raise Other("a sum with broadcasting")
            return self._add((net.ADD, *inside), self.widths[inside[0]])
        if name == "Cat" and len(inside) == len(values) and len(shape) == 2:
            if signed(node._saved_dim) not in (1, -1):
                raise Other("a concatenation of samples")
            value = inside[0]
            for other in inside[1:]:
                width = self.widths[value] + self.widths[other]
                value = self._add((net.CAT, value, other), width)
            return value
        if name == "Mul" and len(inside) == 1:
            factor = node._saved_other if values[0] is not None else node._saved_self
            constant = overload == "0" and factor.dim() == 0 and not factor.requires_grad
            if constant and factor.dtype == torch.float64:  # a number of Python
                (number,) = struct.unpack("d", number_bytes(factor))
                return self._add((net.SCALE, inside[0], 0, 0, 0, number), self.widths[inside[0]])
        if name in VIEWS and shape and shape[0] == self.n:
            return inside[0]  # the numbers of a sample stay in order
        raise Other(name)

    def _add(self, row: tuple[float, ...], width: int) -> int:
        self.steps.append(row)
        self.widths.append(width)
        return len(self.steps) - 1

    def _activation(self, step: Step, value: int) -> int:
        s, order, fn, params, suffix = step.rule.call(step.node)  # type: ignore[attr-defined]
        row = KERNEL_ROWS[fn].name
        if order == 0:
            row = row.replace("_slope", "_of_output")
        if suffix or order > 1:
            raise Other("an activation of another kind")
        return self._act(row, params, s, value)

    def _piecewise(self, node: Any, name: str, value: int) -> int:
        if name == "Relu":
            return self._act("relu", (), node._saved_result, value)
        row, params = {
            "LeakyRelu": ("leaky_relu", ("negative_slope",)),
            "Hardtanh": ("hardtanh", ("min_val", "max_val")),
            "Hardsigmoid": ("hardsigmoid", ()),
        }[name]
        numbers = tuple(getattr(node, f"_saved_{param}") for param in params)
        return self._act(row, numbers, node._saved_self, value)

    def _act(self, row: str, params: tuple[float, ...], s: Tensor, value: int) -> int:
        self.arguments.append(self._place(s, (self.n, self.widths[value])))
        return self._add((net.ACT, value, 0, ROWS[row], 0, *params), self.widths[value])

    def _place(self, t: Tensor, shape: tuple[int, ...]) -> int:
        if t.shape != shape or not t.is_contiguous():
            raise Other("a saved tensor is not a contiguous matrix")
        return self._by_memory[_memory(t)]

    def _linear(self, node: Any, biased: bool, values: list[Any]) -> int:
        a, weight = ("mat1", "mat2") if biased else ("self", "mat2")
        weight = getattr(node, f"_saved_{weight}")
        value, *others = values[1:] if biased else values
        if value is None or any(v is not None for v in (*others, *values[: int(biased)])):
            raise Other("a product of two values")
        if biased and not (node._saved_alpha == node._saved_beta == 1):
            raise Other("a scaled layer")
        inner, width = weight.shape
        if not weight.t().is_contiguous() or weight.numel() > TILED or inner != self.widths[value]:
            raise Other("a weight that is wide, or not contiguous")
        given = getattr(node, f"_saved_{a}")
        if given is not None and value > 0:
            self.of_input[value] = self._place(given, (self.n, inner))
        edges = node.next_functions
        number = self._weight(weight, self._leaf_behind(edges[2 if biased else 1][0], True))
        bias = self._bias(edges[0][0], width) if biased else -1
        return self._add((net.LINEAR, value, 0, number, bias), width)

    def _norm(self, node: Any, value: int) -> int:
        width = self.widths[value]
        if node._saved_normalized_shape != (width,):
            raise Other("a norm over more than the features, or less")
        self.of_norms.append(self._place(node._saved_input, (self.n, width)))
        for t in (node._saved_result1, node._saved_result2):
            self.of_norms.append(self._place(t, (self.n, 1)))
        number, (_, of_weight, of_bias) = -1, node.next_functions
        if node._saved_weight is not None:
            if not node._saved_weight.is_contiguous():
                raise Other("a weight that is not contiguous")
            number = self._weight(node._saved_weight, self._leaf_behind(of_weight[0], False))
        # ε is in ι, which torch has saved.
        return self._add((net.NORM, value, 0, number, self._bias(of_bias[0], width)), width)

    def _weight(self, weight: Tensor, leaf: int) -> int:
        """The number of a weight, which several steps may use."""
        place = self._by_memory[_memory(weight)]
        number = self._numbers.setdefault((place, leaf), len(self.weights))
        if number == len(self.weights):  # two parameters may share their memory
            self.weights.append(place)
            self.of_weights.append(leaf)
            self.size += weight.numel()
        return number

    def _bias(self, node: Any, width: int) -> int:
        """The number of a bias; -1 if there is none, or none that requires grad."""
        if node is None:
            return -1
        leaf = self._leaf_behind(node, False)
        if self._signature.leaves[leaf].shape != (width,):
            raise Other("a bias of another shape")
        if leaf not in self.of_biases:
            self.of_biases.append(leaf)
        return self.of_biases.index(leaf)

    def _leaf_behind(self, node: Any, transposed: bool) -> int:
        """The number of the leaf; -1 if there is none, since it does not require grad."""
        if node is None:
            return -1
        if transposed:
            if type(node).__name__ != "TBackward0":
                raise Other("a weight that is computed")
            node = node.next_functions[0][0]
        leaf = self._leaves.get(id(getattr(node, "variable", None)))
        if leaf is None:
            raise Other("a weight or bias that is computed")
        return leaf


def _numbers(flags: list[bool]) -> Tensor:
    return torch.tensor(flags, dtype=torch.float64, device="cpu")


def _memory(t: Tensor) -> Any:
    return t.data_ptr(), t.shape, t.stride(), t.dtype


class NetworkRun(Sweeps, ProgramRun):
    """The sweeps of a run of a `Network`; see `ProgramRun`."""

    def __init__(self, x: Tensor, output: Tensor, signature: Signature, programs: Any) -> None:
        ProgramRun.__init__(self, x, output, signature, programs)
        network: Network = programs.network
        tensors = self.tensors
        self.shape, self.output_shape = x.shape, output.shape
        self.x = x = tensors[0]
        if x.dim() != 2 or not x.is_contiguous():
            self.x = x.detach().reshape(network.n, -1).contiguous()
        self.weights = [tensors[place] for place in network.weights]
        self.saved = [_NOTHING[x.dtype] if place < 0 else tensors[place] for place in network.saved]
        self.plan, self.flat, self.evaluates = network.plan, network.flat, network.small
        self.tile = rows_of_a_thread(network.n, *network.sizes)
        self.wanted, self.places = network.wanted[self.of_x], network.places
        self.pushes: list[tuple[Any, ...]] = []

    def begin(self) -> None:
        ProgramRun.begin(self)
        self.pushes = []

    def down(self, grad: Tensor | None, keep: bool) -> list[Tensor | None]:
        found = Sweeps.down(self, grad, keep)
        if not keep:
            self.free()
            self.tensors = []
        return found

    def describe(self) -> list[str]:
        return ["one C++ call per sweep:", *ProgramRun.describe(self)]


# Empty matrices, for what is missing in a list.
_NOTHING = {t: torch.empty(0, 0, dtype=t, device="cpu") for t in (torch.float32, torch.float64)}


def run_of(x: Tensor, output: Tensor, signature: Signature, programs: Programs) -> ProgramRun:
    """The sweeps of a run. Raises `Unsupported` if its graph cannot be recorded."""
    if programs.network is None and not programs.functions:  # it is new
        run = ProgramRun(x, output, signature, programs)
        programs.network = Network.of(run.as_graph().record, signature)
    if programs.network is not None and signature.private:
        return NetworkRun(x, output, signature, programs)
    return ProgramRun(x, output, signature, programs)
