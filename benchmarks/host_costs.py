"""Parts of the host cost of a step, for the comments that quote them.

``python -m benchmarks.host_costs`` prints medians in microseconds, on one thread, with tensors of a
few elements, and of 1024x256 where it says so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastjac.activations import IDS
from fastjac.bench.everyday import Residual
from fastjac.bench.networks import FunctionalMlp
from fastjac.input_jacobian.chain import signature
from fastjac.input_jacobian.chain.graph_run import GraphRun
from fastjac.ops.registration import raw
from fastjac.torch_private import below_autograd


def median(call: Callable[[], object], rounds: int = 500) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e6)
    return statistics.median(times)


def reading(name: str, model: nn.Module, operations: int) -> None:
    """The graph of a run, read in C++ and in Python, and walked by the rules of the chain."""
    x = torch.randn(2, 4, requires_grad=True)
    output = model(x)
    in_cpp = median(lambda: signature.Signature(x, output, 0))
    found = signature.read, signature.references
    signature.read = signature.read_in_python
    signature.references = signature.references_in_python
    signature._alone.cache_clear()
    in_python = median(lambda: signature.Signature(x, output, 0))
    signature.read, signature.references = found
    signature._alone.cache_clear()
    print(f"{name}: read in C++ {in_cpp:.0f}, in Python {in_python:.0f}; ", end="")
    print(f"an operation {in_cpp / operations:.1f} and {in_python / operations:.1f}")
    w = torch.randn(1, *output.shape)

    def walk() -> None:
        graph = GraphRun(x, output)
        graph.push(graph.pull(w), False, False)

    print(
        f"{name}: recorded, pulled and pushed by rules {median(walk) / operations:.0f} an operation"
    )


def activations() -> None:
    z: Tensor = torch.randn(2, 4)
    backward, act = torch.ops.aten.gelu_backward.default._op, raw("act")
    with below_autograd():
        print(f"gelu_backward of torch {median(lambda: backward(z, z)):.1f}, ", end="")
        print(f"of fastjac {median(lambda: act(z, z, 1, IDS['gelu'], [])):.1f}")


def passes() -> None:
    """What the programs of sweeps avoid: a pass for the cosine, a sum of two memory orders."""
    z, g, act = torch.randn(1024, 256), torch.randn(1024, 256), raw("act")
    with below_autograd():
        print(f"1024x256: cosine and product {median(lambda: z.cos().mul_(g)):.0f}, ", end="")
        print(f"as one kernel {median(lambda: act(z, g, 1, IDS['sine'], [1.0])):.0f}")
    by_columns = torch.randn(256, 1024).t()
    print(f"1024x256: sum in one memory order {median(lambda: z.add_(g)):.0f}, ", end="")
    print(f"of two {median(lambda: z.add_(by_columns)):.0f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}")
    reading("own module, 7 operations", FunctionalMlp([4, 4, 4, 4, 10]), 7)
    reading("residual network, 17 operations", Residual(4, 4, layers=3), 17)
    activations()
    passes()
