"""The table of the nodes of autograd graphs that have a rule; `by_autograd` takes the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastjac.activations import IDS
from fastjac.input_jacobian.chain.activations import Activation, OwnActivation
from fastjac.input_jacobian.chain.attention import Attention
from fastjac.input_jacobian.chain.norms import BatchNorm, GroupNorm, LayerNorm
from fastjac.input_jacobian.chain.rules import (
    RULES,
    Convolution,
    Div,
    Joined,
    Linear,
    LogSoftmax,
    Matmul,
    Mul,
    Pointwise,
    Softmax,
    Sum,
    add,
    align,
    behind,
    signed,
    whole,
)
from fastjac.ops.act import _Act
from fastjac.torch_private import dtype_of_node, shape_of_node

aten = torch.ops.aten


class Relabelled(Linear):
    """``as_strided`` that changes the strides of dimensions of size 1 alone.

    ``F.adaptive_avg_pool2d`` to one place ends with it if its input is in channels_last: the mean
    ``[N, C, 1, 1]`` gets strides of that memory format.
    """

    def takes(self, node, inside):
        source, i = node.next_functions[0]
        shape = [*map(signed, node._saved_size)]
        strides = [s for s, n in zip(node._saved_stride, shape, strict=True) if n > 1]
        dense = torch.empty(shape, device="meta").stride()
        mean = type(source).__name__ == "MeanBackward1" and shape_of_node(source, i) == shape
        return mean and strides == [s for s, n in zip(dense, shape, strict=True) if n > 1]


def linear(names: str, apply: Callable[[Any, Tensor], Any]) -> None:
    add(names, Linear(apply))


def leading(names: str, apply: Callable[[Any, Tensor, int], Any], several: bool = False) -> None:
    add(names, Linear(apply, several, leads=True))


# ---- linear in the only input


def dims_of(node: Any, u: Tensor) -> list[int]:
    """The dimensions of a reduction; none given means all."""
    dims = node._saved_dim
    return [signed(d) for d in dims] if dims else list(range(u.dim()))


def picked(node: Any, u: Tensor) -> Tensor:
    """Of an operation that selects numbers by index along a dimension (``sort``, ``max``)."""
    if not u.dim():
        return u
    index, dim = node._saved_indices, signed(node._saved_dim)
    if index.dim() < u.dim():
        return u.gather(dim, index.unsqueeze(dim)).squeeze(dim)
    return u.gather(dim, index)


def pooled(node: Any, u: Tensor) -> Tensor:
    """Of a pooling that selects numbers by flat index over the last dimensions."""
    index = node._saved_result1
    spatial = 3 if "3D" in type(node).__name__ else 2
    flat, places = u.flatten(-spatial), index.flatten(-spatial)
    return flat.gather(-1, places).view(index.shape)


def indexed(node: Any, u: Tensor) -> Tensor:
    return aten.index(u, list(node._saved_indices))


def pad_of(node: Any) -> list[int]:
    return [signed(p) for p in node._saved_pad]


def reflected(mode: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda n, u: F.pad(u, [signed(p) for p in n._saved_padding], mode=mode)


def average(pool: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda n, u: pool(
        *(u, n._saved_kernel_size, n._saved_stride, n._saved_padding, n._saved_ceil_mode),
        *(n._saved_count_include_pad, n._saved_divisor_override),
    )


# fmt: off
leading("View UnsafeView ReshapeAlias Squeeze Squeeze.1 Squeeze.2 Unsqueeze",
        lambda n, u, k: u.reshape(*u.shape[:k], *shape_of_node(n)))
leading("Alias Clone Add.1 Sub.1", lambda n, u, k: u)
add("AsStrided.1", Relabelled(lambda n, u, k: u, leads=True))
leading("Neg", lambda n, u, k: -u)
leading("Mul.1", lambda n, u, k: u * n._saved_other)
leading("Div.1", lambda n, u, k: u / n._saved_other)
leading("Rsub.1", lambda n, u, k: u * -n._saved_alpha)
leading("ToCopy", lambda n, u, k: u.to(dtype_of_node(n)))
RULES["CopyBackwards"] = Linear(lambda n, u, k: u.to(dtype_of_node(n)), leads=True)
linear("T", lambda n, u: u.t())
leading("Transpose Transpose.1", lambda n, u, k: u.transpose(
    behind(n._saved_dim0, k), behind(n._saved_dim1, k)))
leading("Permute", lambda n, u, k: u.permute(
    [*range(k), *[behind(d, k) for d in n._saved_dims]]))
linear("Expand", lambda n, u: u.expand(shape_of_node(n)))
linear("Repeat", lambda n, u: u.repeat(n._saved_repeats))
leading("Flip", lambda n, u, k: u.flip([behind(d, k) for d in n._saved_dims]))
leading("Roll", lambda n, u, k: u.roll([signed(s) for s in n._saved_shifts],
                                       [behind(d, k) for d in n._saved_dims]))
leading("Select", lambda n, u, k: u.select(behind(n._saved_dim, k), signed(n._saved_index)))
leading("Slice", lambda n, u, k: aten.slice(u, behind(n._saved_dim, k), *[
    None if i is None else signed(i) for i in (n._saved_start, n._saved_end, n._saved_step)]))
linear("Index", indexed)
linear("IndexSelect", lambda n, u: u.index_select(signed(n._saved_dim), n._saved_index))
linear("Gather", lambda n, u: u.gather(signed(n._saved_dim), n._saved_index))
linear("ConstantPadNd", lambda n, u: F.pad(u, pad_of(n)))
linear("ReflectionPad1D ReflectionPad2D ReflectionPad3D", reflected("reflect"))
linear("ReplicationPad1D ReplicationPad2D ReplicationPad3D", reflected("replicate"))
linear("Sum", lambda n, u: u.sum())
linear("Mean", lambda n, u: u.mean())
linear("Sum.1", lambda n, u: u.sum(dims_of(n, u), n._saved_keepdim))
linear("Mean.1", lambda n, u: u.mean(dims_of(n, u), n._saved_keepdim))
linear("Cumsum", lambda n, u: u.cumsum(signed(n._saved_dim)))
linear("Diagonal", lambda n, u: u.diagonal(*map(signed, (n._saved_offset, n._saved_dim1,
                                                         n._saved_dim2))))
linear("Tril", lambda n, u: u.tril(signed(n._saved_diagonal)))
linear("Triu", lambda n, u: u.triu(signed(n._saved_diagonal)))
linear("MaskedFill", lambda n, u: u.masked_fill(n._saved_mask, 0))
leading("Split UnsafeSplit", lambda n, u, k: u.split(
    n._saved_split_size, behind(n._saved_dim, k)), several=True)
leading("SplitWithSizes", lambda n, u, k: u.split(
    list(n._saved_split_sizes), behind(n._saved_dim, k)), several=True)
leading("Unbind", lambda n, u, k: u.unbind(behind(n._saved_dim, k)), several=True)
linear("Sort Topk Max Min Kthvalue Median.1 Cummax Cummin", picked)
linear("MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D", pooled)
linear("AvgPool2D", average(F.avg_pool2d))
linear("AvgPool3D", average(F.avg_pool3d))
linear("AdaptiveAvgPool2D", lambda n, u: aten.adaptive_avg_pool2d(u, shape_of_node(n)[-2:]))
linear("AdaptiveAvgPool3D", lambda n, u: aten.adaptive_avg_pool3d(u, shape_of_node(n)[-3:]))
linear("UpsampleNearest1D", lambda n, u: aten.upsample_nearest1d(
    u, n._saved_output_size, n._saved_scales))
linear("UpsampleNearest2D", lambda n, u: aten.upsample_nearest2d(
    u, n._saved_output_size, n._saved_scales_h, n._saved_scales_w))
linear("UpsampleBilinear2D", lambda n, u: aten.upsample_bilinear2d(
    u, n._saved_output_size, n._saved_align_corners, n._saved_scales_h, n._saved_scales_w))
linear("PixelShuffle", lambda n, u: F.pixel_shuffle(u, n._saved_upscale_factor))
linear("PixelUnshuffle", lambda n, u: F.pixel_unshuffle(u, n._saved_downscale_factor))
linear("Im2Col", lambda n, u: F.unfold(
    u, n._saved_kernel_size, n._saved_dilation, n._saved_padding, n._saved_stride))
linear("NativeDropout", lambda n, u: u * n._saved_result1 / (1 - n._saved_p))

# ---- linear in all inputs

add("Add", Sum(lambda n: (1, n._saved_alpha)))
add("Sub", Sum(lambda n: (1, -n._saved_alpha)))
add("Rsub", Sum(lambda n: (-n._saved_alpha, 1)))
# fmt: on


def stacked(node: Any, lead: tuple[int, ...], us: Any) -> Tensor:
    shape, dim = list(shape_of_node(node)), signed(node._saved_dim)
    shape.pop(dim)
    return torch.stack(filled(us, [shape] * len(us), lead), dim + len(lead) * (dim >= 0))


def joined(node: Any, lead: tuple[int, ...], us: Any) -> Tensor:
    dim = signed(node._saved_dim)
    pairs = zip(us, joined_shapes(node), strict=True)
    us, shapes = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
    return torch.cat(filled(us, shapes, lead), dim + len(lead) * (dim >= 0))


def joined_shapes(node: Any) -> list[Any]:
    """The shapes of the operands of ``torch.cat``; None for those that an earlier one includes.

    Torch saves them for operands that require grad. Constants next to each other count as one, and
    their size is what the others leave.
    """
    dim, left = signed(node._saved_dim), list(shape_of_node(node))
    shapes: list[Any] = [f and list(shape_of_node(f, i)) for f, i in node.next_functions]
    left[dim] -= sum(shape[dim] for shape in shapes if shape)
    if None in shapes:
        shapes[shapes.index(None)] = left
    return shapes


def can_join(node: Any, inside: tuple[bool, ...]) -> bool:
    """Whether the constants are next to each other, so that their place is known."""
    constants = [i for i, (f, _) in enumerate(node.next_functions) if f is None]
    return not constants or constants[-1] - constants[0] == len(constants) - 1


def filled(us: Any, shapes: Any, lead: tuple[int, ...]) -> list[Tensor]:
    """The tangents, with zeros of the given shapes for None."""
    like = next(u for u in us if u is not None)
    return [
        like.new_zeros((*lead, *shape)) if u is None else u
        for u, shape in zip(us, shapes, strict=True)
    ]


def chosen(node: Any, lead: tuple[int, ...], us: Any) -> Tensor:
    """``torch.where``; its operands are broadcast."""
    condition, shape = node._saved_condition, shape_of_node(node)
    a, b = (0 if u is None else align(u, lead, len(shape)) for u in us[-2:])
    return whole(torch.where(condition, a, b), lead, shape)


add("Stack", Joined(stacked))
add("Cat", Joined(joined, can_join))
add("Where", Joined(chosen))

# ---- products

add("Mm", Matmul("self", "mat2", (0, 1)))
add("Bmm", Matmul("self", "mat2", (0, 1)))
add("Addmm", Matmul("mat1", "mat2", (1, 2), added=True))
add("Baddbmm", Matmul("batch1", "batch2", (1, 2), added=True))
add("Convolution", Convolution())
add("Mul", Mul())
add("Div", Div())

# ---- elementwise, from the input s or the output s


def inside_range(n: Any, u: Tensor, s: Tensor) -> Tensor:
    """The derivative of a clamp, which has one limit or two."""
    limits: Any = getattr(n, "_saved_min", None), getattr(n, "_saved_max", None)
    low, high = limits
    if low is None:
        return torch.where(s <= high, u, 0)
    return torch.where(s >= low if high is None else (s >= low) & (s <= high), u, 0)


def power_slope(n: Any, u: Tensor, s: Tensor) -> Tensor:
    e = n._saved_exponent
    if e in (0, 1):  # not 0 * inf at s = 0
        return u * e
    return u * s * 2 if e == 2 else u * (e * s ** (e - 1))


def power_bend(n: Any, s: Tensor) -> Any:
    e = n._saved_exponent
    if e in (0, 1, 2):
        return e * (e - 1)
    return e * (e - 1) * s ** (e - 2)


# fmt: off
add("Relu", Pointwise("result", lambda n, u, s: aten.threshold_backward(u, s, 0)))
add("LeakyRelu", Pointwise("self", lambda n, u, s: aten.leaky_relu_backward(
    u, s, n._saved_negative_slope, False)))
add("LeakyRelu.1", Pointwise("result", lambda n, u, s: aten.leaky_relu_backward(
    u, s, n._saved_negative_slope, True)))
add("Hardtanh", Pointwise("self", lambda n, u, s: aten.hardtanh_backward(
    u, s, n._saved_min_val, n._saved_max_val)))
add("Hardsigmoid", Pointwise("self", lambda n, u, s: aten.hardsigmoid_backward(u, s)))
add("Clamp.1 ClampMin ClampMax", Pointwise("self", inside_range))
add("Abs", Pointwise("self", lambda n, u, s: u * s.sgn()))
add("Exp", Pointwise("result", lambda n, u, s: u * s, lambda n, s: 1))
add("Log", Pointwise("self", lambda n, u, s: u / s, lambda n, s: -1 / (s * s)))
add("Sqrt", Pointwise("result", lambda n, u, s: 0.5 * u / s, lambda n, s: -0.5 / (s * s)))
add("Rsqrt", Pointwise("result", lambda n, u, s: -0.5 * u * s**3, lambda n, s: -1.5 * s * s))
add("Reciprocal", Pointwise("result", lambda n, u, s: -u * s * s, lambda n, s: -2 * s))
add("Cos", Pointwise("self", lambda n, u, s: -u * s.sin(), lambda n, s: -s.cos()))
add("Pow", Pointwise("self", power_slope, power_bend))
# fmt: on


# ---- elementwise, by the kernels of the activation table

SELU = (1.0507009873554805, 1.6732632423543772, 1)


def elu(n: Any) -> Any:
    scales = n._saved_scale, n._saved_alpha, n._saved_input_scale
    if scales == SELU:
        return 1, IDS["selu"], ()
    return (1, IDS["elu"], (scales[1],)) if scales[0] == scales[2] == 1 else None


def of_input(fn: str, params: Any = ()) -> Callable[[Any], Any]:
    """A row of the table, with the names of the node's numbers or with numbers."""
    found, names = (1, IDS[fn], params), params
    if any(isinstance(name, str) for name in params):
        return lambda n: (1, IDS[fn], tuple([getattr(n, f"_saved_{name}") for name in names]))
    return lambda n: found


def of_output(fn: str) -> Callable[[Any], Any]:
    found = 0, IDS[fn], ()
    return lambda n: found


def gelu(n: Any) -> Any:
    return 1, IDS["gelu_tanh" if n._saved_approximate == "tanh" else "gelu"], ()


# fmt: off
KERNELS: dict[str, Callable[[Any], Any]] = {
    "Gelu": gelu,
    "Silu": of_input("silu"),
    "Mish": of_input("mish"),
    "Softplus": of_input("softplus", ("beta", "threshold")),
    "Elu": elu,
    "Celu": of_input("celu", ("alpha",)),
    "Hardswish": of_input("hardswish"),
    "Sin": of_input("sine", (1.0,)),
}
# fmt: on
for _name, _read in KERNELS.items():
    add(_name, Activation(_read))
add("Tanh", Activation(of_output("tanh_slope"), "result"))
add("Sigmoid", Activation(of_output("sigmoid_slope"), "result"))
RULES[_Act] = OwnActivation()

# ---- softmax, attention and norms

add("Softmax SafeSoftmax", Softmax())
add("ScaledDotProductFlashAttentionForCpu", Attention("attn_mask"))
add("ScaledDotProductFlashAttention", Attention())
add("ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention", Attention("attn_bias"))
add("LogSoftmax", LogSoftmax())
add("NativeLayerNorm", LayerNorm())
add("NativeBatchNorm CudnnBatchNorm", BatchNorm())
add("NativeGroupNorm", GroupNorm())
