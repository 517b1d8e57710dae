"""Measures the table of `fastjac.ops.act_sizes`: fused activations against torch's, by size.

    python benchmarks/act_sizes.py --threads 1 --dtype float32 --fn tanh gelu

A line has, for one activation and one size, the time of the fused activation divided by that of
torch's function, in CPU time (medians of interleaved runs). The four numbers are those of the
forward alone; of forward and backward; of forward, VJP and double backward; and of these with the
third order.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import fastjac
from fastjac.activations import TABLE
from fastjac.ops.act_sizes import FROM


def uses(f: Callable, size: int, dtype: torch.dtype) -> list[Callable]:
    grad = torch.autograd.grad
    z, w, u, r = (torch.randn(size).to(dtype).requires_grad_() for _ in range(4))

    def second(recorded: bool):
        (v,) = grad(f(z), z, w, create_graph=True)
        cotangent = u if recorded else u.detach()
        return grad(v, (z, w), cotangent, create_graph=recorded, allow_unused=True)

    def third():
        grads = [t for t in second(True) if t is not None and t.requires_grad]
        return grad(grads, (z, w, u), [r.detach()] * len(grads), allow_unused=True)

    return [
        lambda: f(z),
        lambda: grad(f(z), z, w.detach()),
        lambda: second(False),
        third,
    ]


def ratio(first: Callable, second: Callable, seconds: float = 0.15) -> float:
    took: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(took[0]) < 8 or (time.perf_counter() < end and len(took[0]) < 400):
        for k in (0, 1) if len(took[0]) % 2 else (1, 0):
            begin = time.process_time()
            (first, second)[k]()
            took[k].append(time.process_time() - begin)
    return statistics.median(took[0]) / statistics.median(took[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", nargs="*", default=["float32", "float64", "bfloat16"])
    parser.add_argument("--fn", nargs="*", default=list(FROM))
    parser.add_argument("--log2", nargs="*", type=int, default=[12, 14, 16, 18, 20])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for dtype in given.dtype:
        for fn in given.fn:
            for log2 in given.log2:
                torch.manual_seed(0)
                ours, theirs = (
                    uses(f, 2**log2, getattr(torch, dtype))
                    for f in (
                        lambda z, fn=fn: fastjac.act(z, fn=fn, impl="cpu"),
                        TABLE[fn].torch_function(),
                    )
                )
                ratios = [ratio(a, b) for a, b in zip(ours, theirs, strict=True)]
                found = "  ".join(f"{r:.2f}" for r in ratios)
                print(f"{given.threads} {dtype:8} {fn:11} 2^{log2}  {found}", flush=True)
