"""Which modules of a model are layers, norms and activations, and the record of each call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastjac.activations import TABLE
from fastjac.layerwise.batch_norm import Normed
from fastjac.layerwise.products import Product
from fastjac.nn import Act, ConvAct1d, ConvAct2d, ConvAct3d, LinearAct, activation_of
from fastjac.ops.act import act
from fastjac.recognise import recognise

LINEAR = (nn.Linear,)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORM = (*BATCH_NORM, nn.LayerNorm, nn.GroupNorm)

# A layer together with its activation.
LAYER_ACTS = (LinearAct, ConvAct1d, ConvAct2d, ConvAct3d)

# Elementwise and deterministic: the modules of the table, and others that torch differentiates.
# RReLU draws its slopes; softmax and GLU mix elements.
ACTIVATIONS = (
    *dict.fromkeys(getattr(nn, row.module) for row in TABLE.values() if row.module is not None),
    *(nn.Hardshrink, nn.LogSigmoid, nn.PReLU, nn.Softshrink, nn.Tanhshrink, nn.Threshold),
)


@dataclass(eq=False)
class Layer:
    """A Linear or convolution module of a watched model, or a function that computes the same."""

    module: Any  # None for a function: the call has the bias and the options
    name: str  # of the module in the model
    plain: bool  # whether it is one call of torch's linear or convolution, and no more
    hooked: bool = False  # whether the watch has put a forward hook on it (tensor parallel)
    memo: Any = None  # what the statistic has decided for the last call, and from what
    kind: str = ""  # "linear", "convolution" or "transposed"; that of the module if it is empty

    def __post_init__(self) -> None:
        if not self.kind:
            transposed = isinstance(self.module, TRANSPOSED)
            other = "transposed" if transposed else "convolution"
            self.kind = "linear" if isinstance(self.module, LINEAR) else other
        self.linear = self.kind == "linear"
        self.transposed = self.kind == "transposed"
        self.dim = -1 if self.linear else 1  # the dimension of z with the units or channels

    def product_of(self, z: Tensor, products: list[Product]) -> Product | None:
        """The product that returned z; None if there is none, or z was written to since."""
        for product in products:
            if product.kind == self.kind and product.returned(z, self.name):
                return product
        return None


class Table(NamedTuple):
    """The numbers s and r of a layer's channels, one after the other in a flat tensor."""

    flat: Tensor
    first: int
    channels: int

    def products(self) -> Tensor:
        """``s_c r_c``, whose sum is the share of the layer."""
        middle, end = self.first + self.channels, self.first + 2 * self.channels
        return self.flat[self.first : middle] * self.flat[middle:end]


@dataclass(slots=True, eq=False)
class Nonlinearity:
    """``φ`` at one place of a model: a row of the activation table, or any activation module.

    ``fn``, ``impl`` and ``params`` are the arguments of `fastjac.act`. ``fn`` is None if the table
    does not have the activation; torch then differentiates ``function``, or ``module``. ``run``
    computes ``φ(z)`` as the model does; None stands for `fastjac.act`.
    """

    fn: str | None = None
    impl: str = "auto"
    params: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    run: Callable[[Tensor], Tensor] | None = None
    writes: bool | None = None  # whether it writes to z; None if the module says so
    function: Callable[[Tensor], Tensor] | None = None

    def value(self, z: Tensor) -> Tensor:
        """``φ(z)``."""
        return self._act(z, 0) if self.run is None else self.run(z)

    def derivative(self, z: Tensor) -> Tensor:
        """``φ'(z)``, which is differentiable with respect to z and the parameters of φ."""
        if self.fn is not None:
            return self._act(z, 1)
        if self.function is not None:
            return slope_of(self.function, z)
        assert self.module is not None
        return module_derivative(self.module, z)

    def overwrites(self) -> bool:
        """Whether the activation writes to z."""
        if self.writes is not None:
            return self.writes
        module = self.module
        if module is None or not ("inplace" in vars(module) or hasattr(type(module), "inplace")):
            return False  # without asking the module, whose error would take 2 µs
        return bool(module.inplace)

    def _act(self, z: Tensor, order: int) -> Tensor:
        assert self.fn is not None
        return act(z, None, order, self.fn, impl=self.impl, **self.params)


@dataclass(slots=True)
class LayerCall:
    """One call of a layer, perhaps together with the norm module that followed.

    ``z`` is the input of the activation: the output of the layer, or of the norm. A version is
    torch's count of the writes in place to a tensor; if it has changed, the tensor was written to.
    All versions are −1 under torch.compile.
    """

    layer: Layer
    weight: Tensor  # what the layer computed with, which may be another than the module's
    version: int  # of z when it was computed
    weight_version: int
    x_version: int
    groups: int = 1  # of a convolution
    # What `release` drops is set after the call was made: dynamo makes the arguments of a
    # constructor outputs of the graph of a compiled model, which get gradients.
    x: Any = field(default=None, init=False)
    z: Any = field(default=None, init=False)
    before_norm: Tensor | None = field(default=None, init=False)
    normed: Normed | None = field(default=None, init=False)  # of a BatchNorm in training mode
    norm: Norm | None = None
    used: bool = False  # whether an activation or a norm took z
    ref: Any = None  # a weak reference to z after `release`
    released_shape: Any = None
    bias: Tensor | None = None  # of a function; a module has its own
    conv: Any = None  # the options of a convolution that a function computed, as `conv_options`
    parent: LayerCall | None = None  # z is a view of the z of this call, or a multiple of it
    factor: float = 1.0  # z is this multiple of W x + b (of the norm, if there is one)
    moved: int | None = None  # the dimension of z with the units, if a view has moved it
    folded: bool = False  # whether dimension 0 is the samples and positions together
    function: bool = False  # whether a function took part, which only `calls.Calls` sees
    taken: str = ""  # the first function that took z and is no activation

    @property
    def dim(self) -> int:
        """The dimension of z with the units or channels, 1 or higher, or −1 for the last."""
        return self.layer.dim if self.moved is None else self.moved

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def shape(self) -> Any:
        """The shape of z."""
        return self.released_shape if self.z is None else self.z.shape

    @property
    def rows(self) -> Tensor:
        """The weight with one row per unit or output channel in dimension 0."""
        weight, groups = self.weight, self.groups
        if not self.layer.transposed:
            return weight
        # [C_in, C_out/g, taps…]: output channel (group, j) sees the inputs of its group.
        c_in, per_group, *taps = weight.shape
        by_group = weight.reshape(groups, c_in // groups, per_group, *taps).transpose(1, 2)
        return by_group.reshape(groups * per_group, c_in // groups, *taps)

    def release(self) -> None:
        """Drop the references to the tensors: under checkpoint the graph does not hold them."""
        self.released_shape = self.z.shape
        if self.version >= 0:  # not under torch.compile
            self.ref = weakref.ref(self.z)
        self.x = self.z = self.before_norm = self.normed = None

    def is_output(self, z: Tensor) -> bool:
        """Whether z is the output of this call. If it was released, the call holds it again."""
        if self.z is z:
            return True
        if self.ref is None or self.ref() is not z:
            return False
        self.z = z  # without x: a second activation of the same z is computed separately
        return True

    def check_unchanged(self) -> None:
        """Raises if z was written to in place since it was computed."""
        if self.version < 0 or torch.compiler.is_compiling():
            return
        z = self.z if self.ref is None else self.ref()
        if z is not None and z._version != self.version:
            raise written_to(self.name)

    def use(self) -> None:
        """Notes that an activation takes z, which the calls that z comes from need not hold."""
        self.used = True
        above = self.parent
        while above is not None:
            above.used = True
            if not torch.compiler.is_compiling() and above.z is not None:
                above.release()
            above = above.parent


def written_to(name: str) -> RuntimeError:
    return RuntimeError(
        f"layer {name}: its output, or that of its activation, was modified in place after it was "
        "computed: use the out-of-place operation"
    )


def is_activation(module: nn.Module) -> bool:
    """Whether the module is an activation whose derivative can be taken elementwise."""
    if callable(getattr(module, "fastjac_activation", None)):
        return True
    # The forward of a subclass of `Act` is differentiated as it is. Otherwise `Act.forward`, which
    # it may call, would be counted in its place.
    if isinstance(module, Act) or (
        isinstance(module, ACTIVATIONS) and inherits(module, ACTIVATIONS)
    ):
        return True
    return recognise(module) is not None


def inherits(module: nn.Module, kinds: tuple[Any, ...]) -> bool:
    """Whether the forward of the module's class is that of one of these classes."""
    own = type(module).forward
    return any(own is kind.forward for kind in kinds if isinstance(module, kind))


def nonlinearity_of(
    module: nn.Module, run: Callable[[Tensor], Tensor] | None = None
) -> Nonlinearity:
    """The ``φ`` of an activation module. A ``fastjac_activation`` comes before the table."""
    if hasattr(module, "fastjac_activation"):
        return Nonlinearity(module=module, run=run)
    row = activation_of(module)
    if row is not None:
        return Nonlinearity(row.fn, row.impl, row.params, module, run)
    found = recognise(module)
    if found is not None:
        return Nonlinearity(found.fn, module=module, run=run, writes=found.writes)
    return Nonlinearity(module=module, run=run)


def module_derivative(module: nn.Module, z: Tensor) -> Tensor:
    """``φ'(z)`` of an activation that the table does not have."""
    phi: Callable[[Tensor], Tensor] = getattr(module, "fastjac_activation", None) or (
        lambda t: type(module).forward(module, t)
    )
    if isinstance(module, nn.Hardsigmoid):  # torch cannot differentiate its own twice
        phi = lambda t: F.relu6(t + 3) / 6  # noqa: E731
    return slope_of(phi, z, f"fastjac_activation of {type(module).__name__}")


def slope_of(phi: Callable[[Tensor], Tensor], z: Tensor, name: str = "") -> Tensor:
    """``φ'(z)`` of an elementwise function, by torch."""
    # The copy is for in-place activations, which may not write to the input of vjp.
    value, pull = torch.func.vjp(lambda t: phi(t.clone()), z)[:2]
    if value.shape != z.shape:
        raise ValueError(
            f"{name} maps shape {tuple(z.shape)} to {tuple(value.shape)}: it must be elementwise"
        )
    (slope,) = pull(torch.ones_like(value))
    return slope


def is_plain(module: Any) -> bool:
    """Whether the class's forward is exactly one call of torch's linear or convolution."""
    if type(module) in (nn.Linear, LinearAct):
        return True
    return (
        type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, *LAYER_ACTS)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def conv_options(module: Any) -> tuple[Any, ...] | None:
    """The options of ``torch.convolution`` after the bias; None for a Linear."""
    if isinstance(module, LINEAR):
        return None
    options = (module.stride, module.padding, module.dilation, False, module.output_padding)
    return (*options, module.groups)


class Norm(NamedTuple):
    """A norm after a layer, ``γ (z − μ)/σ + β``: how a module or a function computed it."""

    kind: str  # "batch", "layer" or "group"
    weight: Tensor | None  # γ
    bias: Tensor | None  # β
    eps: float
    running_var: Tensor | None = None  # σ² of a batch norm, if it is not that of the batch
    groups: int = 1

    def fits(self, call: LayerCall) -> bool:
        """Whether its channels are the units or channels of the call."""
        dims = len(call.shape)
        return call.dim % dims == (dims - 1 if self.kind == "layer" else 1)


def norm_of(module: Any) -> Norm:
    """A norm module as it computes now."""
    if isinstance(module, nn.LayerNorm):
        return Norm("layer", module.weight, module.bias, module.eps)
    if isinstance(module, nn.GroupNorm):
        return Norm("group", module.weight, module.bias, module.eps, groups=module.num_groups)
    var = None if module.training else module.running_var
    return Norm("batch", module.weight, module.bias, module.eps, var)
