"""Every op against its float64 reference, by one implementation, in the order of importance.

An item is one example in one dtype. The first are three activations in all dtypes, and the ops
without an activation; for Triton, which compiles each variant for about half a second, the other
activations in float32 and bfloat16 follow.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.gpu.work import Item, main
from fastjac.activations import TABLE
from fastjac.cli import check
from fastjac.ops.dispatch import OPS

#: One that is cheap and has a kink, one with erf, and one whose φ' is a polynomial of its output.
FIRST = ("relu", "gelu", "tanh")
DTYPES = ("float32", "bfloat16", "float64", "float16")


def items(device: str, impl: str, *only: str) -> Iterator[Item]:
    """The items of an implementation; ``only`` names the activations, as for the dry run."""
    torch.set_num_threads(1)  # one of many processes
    layers: list[tuple[tuple[str, ...], tuple[str, ...]]] = [(FIRST, DTYPES)]
    if impl == "triton":
        layers.append((tuple(fn for fn in TABLE if fn not in FIRST), DTYPES[:2]))
    if only:
        layers = [(only, DTYPES[:2])]
    for k, (activations, dtypes) in enumerate(layers):
        for dtype in dtypes:
            for op in (name for name, op in OPS.items() if impl in op.implementations):
                for example in OPS[op].examples():
                    fn = example.label.split()[0]
                    if fn in activations if fn in TABLE else k == 0:
                        filters = {"op": op, "impl": impl, "dtype": dtype, "device": device}
                        listed = {name: [value] for name, value in filters.items()}
                        yield (
                            f"{op}, {example.label}, {impl}, {dtype}",
                            functools.partial(check.run, example=[example.label], **listed),
                        )


if __name__ == "__main__":
    main(items)
