"""What layer-wise penalties should show on a GPU, in one run and as one JSON file.

    python benchmarks/layerwise_gpu.py --json OUT      --device cpu is the dry run, at small sizes

* ``act_stats`` and its backward, 8192×8192, bf16 and fp32: GB/s, and per cent of the copy bandwidth
  measured in the same rounds (target 90).
* DREG on a 4096→16384→4096 GELU feed-forward, 8192 tokens, bf16: time over the plain step (1.03).
* Kernels launched by a step beyond the plain one's, for 2 and for 6 layers: the same number, less
  one for each layer whose bias gradient the fused backward sums.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import fastjac
from fastjac.activations import IDS
from fastjac.bench.measure import Samples, interleave
from fastjac.ops.act_stats import NONE
from fastjac.ops.dispatch import OPS, why_not
from fastjac.ops.registration import raw, suffix_of


def milliseconds(steps: dict[str, Any], device: torch.device) -> dict[str, float]:
    samples = Samples()
    interleave(steps, device, budget_s=2, min_rounds=5, max_rounds=30, sample_s=0.02,
               samples=samples)  # fmt: skip
    return {name: 1e3 * median(seconds) for name, seconds in samples.seconds.items()}


def bandwidth(device: torch.device, dtype: torch.dtype, size: int) -> list[dict[str, Any]]:
    """Every implementation against a copy of the same tensor."""
    z, g = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    q = torch.rand(size, device=device)
    target = torch.empty_like(z)
    accesses = {"copy": 2}
    steps: dict[str, Any] = {"copy": lambda: target.copy_(z)}
    for impl in OPS["act_stats"].implementations:
        if impl == "reference" or why_not(impl, device.type, dtype):
            continue
        forward = raw("act_stats" + suffix_of(impl))
        backward = raw("act_stats_backward" + suffix_of(impl))
        rest = (1.0, IDS["gelu"], ())
        steps[f"forward, {impl}"] = lambda f=forward, r=rest: f(z, None, 1, False, *r)
        steps[f"backward, {impl}"] = lambda b=backward, r=rest: b(z, g, None, q, 1, NONE, *r)
        accesses |= {f"forward, {impl}": 2, f"backward, {impl}": 3}
    with torch.no_grad():
        times = milliseconds(steps, device)
    nbytes = z.numel() * z.element_size()
    rates = {name: accesses[name] * nbytes / ms / 1e6 for name, ms in times.items()}
    return [
        {"dtype": str(dtype), "what": name, "ms": times[name], "GB/s": rate,
         "% of copy": 100 * rate / rates["copy"]}
        for name, rate in rates.items()
    ]  # fmt: skip


def feed_forward(device: torch.device, tokens: int, width: int) -> dict[str, float]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(tokens, width, device=device, dtype=dtype)
    steps = {}
    keep = []
    for name in ("plain", "DREG"):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        ).to(device, dtype)
        penalty = fastjac.DREG(model, weight=1e-6) if name == "DREG" else None
        keep.append(penalty)

        def step(model: Any = model, penalty: Any = penalty) -> None:
            model.zero_grad()
            loss = model(x).float().square().mean()
            (loss if penalty is None else loss + penalty()).backward()

        steps[name] = step
    times = milliseconds(steps, device)
    return {**times, "ratio": times["DREG"] / times["plain"]}


def launches(device: torch.device, depth: int, attached: bool) -> int:
    """Kernels of one step, the second one, when the penalty knows the layers."""
    layers = [m for _ in range(depth) for m in (nn.Linear(64, 64), nn.GELU())]
    model = fastjac.fuse(nn.Sequential(*layers)).to(device)
    penalty = fastjac.DREG(model) if attached else None
    x = torch.randn(32, 64, device=device)

    def step() -> None:
        model.zero_grad()
        loss = model(x).sum()
        (loss if penalty is None else loss + penalty()).backward()

    for _ in range(3):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    events = profile.events() or []
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels) if device.type == "cuda" else len(events)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    result = {
        "machine": torch.cuda.get_device_name() if gpu else "cpu (dry run)",
        "torch": torch.__version__,
        "fastjac": fastjac.__version__,
        "bandwidth": [
            row
            for dtype in (torch.bfloat16, torch.float32)
            for row in bandwidth(device, dtype, 8192 if gpu else 512)
        ],
        "feed-forward": feed_forward(device, *((8192, 4096) if gpu else (64, 64))),
        "launches": {
            f"{depth} layers": {
                name: launches(device, depth, attached)
                for name, attached in (("plain", False), ("DREG", True))
            }
            for depth in (2, 6)
        },
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["bandwidth"]:
        print(
            f"{row['dtype']:15} {row['what']:28} {row['GB/s']:8.0f} GB/s {row['% of copy']:5.0f}%"
        )
    print("feed-forward, time over the plain step:", round(result["feed-forward"]["ratio"], 3))
    print("launches:", result["launches"])


if __name__ == "__main__":
    main()
