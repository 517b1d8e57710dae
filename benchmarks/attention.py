"""SpectReg of transformer encoders by the chain engine, beside the eager idiom.

    python -m benchmarks.attention [--threads N] [--rounds N] [--only WIDTHxTOKENSxBATCH ...]

The encoder has two layers of ``nn.TransformerEncoderLayer`` with heads of 32 and GELU. The eager
idiom must run under ``SDPBackend.MATH``, since the default kernel for attention has no second
derivative. Prints the median times of a step of loss and penalty, divided by those of a plain step,
and the peak memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastjac
from fastjac.bench.measure import Options, Samples, available_cores, busy, interleave, peak_bytes

SIZES = (
    *("128x64x8", "128x128x8", "128x256x8", "256x64x8", "256x256x4", "512x64x4", "512x256x2"),
    *("128x512x4", "128x1024x2", "128x2048x1", "128x4096x1"),
)


class Encoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, 0.0, "gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


def steps_of(width: int, tokens: int, batch: int) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    model, x = Encoder(width), torch.randn(batch, tokens, width)
    penalty = fastjac.SpectReg()

    def backward(output: Tensor, value: Tensor | float) -> None:
        for p in model.parameters():
            p.grad = None
        (output.logsumexp(1).mean() + value).backward()

    def eager() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            x_in = x.detach().requires_grad_()
            output = model(x_in)
            (v,) = torch.autograd.grad(output, x_in, torch.randn_like(output), create_graph=True)
            backward(output, v.square().flatten(1).sum(1).mean())

    return {
        "plain": lambda: backward(model(x), 0.0),
        "eager": eager,
        "fastjac": lambda: backward(*penalty(model, x)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", default=SIZES, metavar="WIDTHxTOKENSxBATCH")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    print(busy(chosen.threads) or f"{chosen.threads} threads, torch {torch.__version__}")
    options = Options(threads=chosen.threads, budget_s=2.0, min_rounds=chosen.rounds)
    print("width tokens batch | eager and fastjac / plain | eager / fastjac | peak MB of both")
    for size in chosen.only:
        width, tokens, batch = map(int, size.split("x"))
        steps = steps_of(width, tokens, batch)
        for step in steps.values():
            step(), step(), step()
        samples = Samples()
        interleave(steps, {}, options, samples)
        costs = {name: samples.ratio(name, "plain")[0] for name in ("eager", "fastjac")}
        peaks = [peak_bytes(steps[name], torch.device("cpu")) / 1e6 for name in costs]
        print(
            f"{width:5d} {tokens:6d} {batch:5d} | {costs['eager']:5.2f} {costs['fastjac']:5.2f} | "
            f"{costs['eager'] / costs['fastjac']:5.2f} | {peaks[0]:7.1f} {peaks[1]:7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
