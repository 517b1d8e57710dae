"""From how many elements on a fused activation is at least as fast as torch's, on a CPU.

A call of `fastjac.act` takes about 12 µs more than one of torch's function, and its node in the
graph 15 µs more, because both are written in Python. The kernels win this back on tensors that are
large enough: in the forward if torch's formula is slow, in the backward if torch computes it from
many operations.

`FROM` has, for float32, float64 and the 16-bit types, the smallest power of two from which fastjac
takes at most 1.05 times as long as torch in each of three uses: forward and backward; forward, VJP
and double backward; and these with the third order. None means that there is no such size. ReLU and
its relatives have none: torch computes them with the same memory passes and less overhead.
``benchmarks/act_sizes.py`` measures the table. The numbers are from an AMD EPYC (AVX-512), one
thread, torch 2.13.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastjac.ops import in_graph

NEVER: tuple[None, None, None] = (None, None, None)

FROM: dict[str, tuple[int | None, int | None, int | None]] = {
    "relu": NEVER,
    "leaky_relu": NEVER,
    "elu": (2**16, 2**14, 2**16),
    "selu": (2**16, 2**14, 2**16),
    "celu": (2**16, 2**16, 2**16),
    "gelu": (2**16, 2**14, None),
    "gelu_tanh": (2**14, 2**14, 2**14),
    "silu": (2**20, 2**18, 2**20),
    "quick_gelu": (2**18, 2**18, 2**16),
    "mish": (2**14, 2**12, 2**14),
    "tanh": (2**16, 2**16, 2**18),
    "sigmoid": (2**20, 2**20, None),
    "softplus": (2**16, 2**16, 2**16),
    "softsign": (2**14, 2**14, 2**14),
    "hardswish": NEVER,
    "hardsigmoid": (2**18, 2**16, 2**18),
    "hardtanh": NEVER,
    "relu6": NEVER,
    "relu_squared": (2**16, 2**16, 2**16),
    "sine": (2**14, None, 2**16),
}


def never(fn: str) -> bool:
    """Whether torch's function is the faster one at any size."""
    return FROM.get(fn) is NEVER


_COLUMN = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 2}


def pays(z: Tensor, fn: str) -> bool:
    """Whether the fused activation is at least as fast as torch's for a pre-activation ``z``.

    Sizes are known for eager mode on a CPU. Elsewhere the answer is that of `never`. Under autocast
    too, because torch computes some activations in float32 there, and the dtype of a result may not
    depend on the size of a tensor. For a graph of ``torch.compile`` see `in_graph.ACTIVATIONS`.
    """
    if torch.compiler.is_compiling() and z.device.type in in_graph.ACTIVATIONS:
        return fn in in_graph.ACTIVATIONS[z.device.type]
    sizes = FROM.get(fn)
    if sizes is None or sizes is NEVER:
        return sizes is None
    if z.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return True
    column, size = _COLUMN.get(z.dtype), z.numel()
    if column is None or type(size) is not int:  # a symbolic size has no value
        return True
    smallest = sizes[column]
    return smallest is not None and size >= smallest
