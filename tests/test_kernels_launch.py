"""Where the Triton kernels are launched, and for how many different launches they are compiled."""

import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fuzz_cases import recorded_calls

from fastjac import codegen
from fastjac.activations import Activation
from fastjac.ops.dispatch import OPS
from fastjac.ops.registration import SCHEMAS

TRITON_OPS = [name for name in SCHEMAS if name.endswith("_triton")]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@needs_triton
def test_launches_are_on_the_device_of_their_tensors(monkeypatch):
    """On two GPUs, a launch outside of the guard is on the current one, or reads memory of both."""
    import fastjac.kernels

    current, kernels, launched = [], set(), set()

    class DeviceOf:
        def __init__(self, tensor):
            self.device = tensor.device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    class Kernel:
        def __init__(self, name):
            self.name = name
            kernels.add(name)

        def __getitem__(self, grid):
            launched.add(self.name)
            return lambda *args, **options: self.check(args)

        def check(self, args):
            assert [t.device for t in args if isinstance(t, torch.Tensor)][:1] == current

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    for _, name, _ in pkgutil.iter_modules(fastjac.kernels.__path__, "fastjac.kernels."):
        module = importlib.import_module(name)
        for attribute in list(vars(module)):
            if attribute.endswith("_kernel"):
                monkeypatch.setattr(module, attribute, Kernel(attribute))
    calls = recorded_calls(most=5)
    for name in TRITON_OPS:
        for args in calls[name.removesuffix("_triton")]:
            getattr(torch.ops.fastjac, name)(*args)
    assert launched == kernels and len(kernels) == 5


def test_ops_with_triton_kernels_say_so():
    """A raw op of Triton exists for exactly those ops that list the implementation."""
    named = {name for name, op in OPS.items() if "triton" in op.implementations}
    stems = {name.removesuffix("_triton").removesuffix("_backward") for name in TRITON_OPS}
    assert stems == {*named, "norm_push"}  # which no user calls
    assert named == {"act", "act_stats", "softmax_residual"}


def test_a_row_with_more_parameters_than_the_kernels_take_is_refused():
    row = Activation("many", "", ("a", "0", "0", "0"), params=dict.fromkeys("abcde", 1.0))
    with pytest.raises(ValueError, match="activation 'many' has 5 parameters.*take 4"):
        codegen.triton_module([row])


# Prints the number of compiled kernels of each kind of launch, over batches of many sizes and over
# values of the parameters.
VARIANTS = """
import collections, math, torch
from benchmarks.gpu.triton_launches import replace
from fastjac.activations import IDS, TABLE
from fastjac.kernels import act, act_stats, norm, softmax_residual
from fastjac.ops.act_stats import BIAS, CHANNEL, NONE, SAMPLE

BATCHES = (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 100, 127, 128, 1000, 1024, 4096, 65_536)
NUMBERS = (0.0, 1.0, 0.01, 1 / 3, -0.5, 16.0, 20.0)
FNS = {"relu": [()], "leaky_relu": [(v,) for v in NUMBERS], "sine": [(v,) for v in NUMBERS],
       "softplus": [(v, w) for v in (1.0, 0.3, 16.0) for w in (20.0, 1.0)]}
LAYOUTS = {"[N, 64]": ((64,), 1), "[N, 10]": ((10,), 1), "[N, 784]": ((784,), 1),
           "[N, 4097]": ((4097,), 1), "[N, 12, 64]": ((12, 64), 2), "[N, 16, 49]": ((16, 49), 1),
           "[N, 3, 300]": ((3, 300), 1), "[N, 64, 256]": ((64, 256), 1)}
keys = collections.defaultdict(set)
for module in (act, act_stats, norm, softmax_residual):
    replace(module, 90, lambda kernel, args, options: keys[label].add(kernel.key(args, options)))

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, values in FNS.items():
        for n in BATCHES:
            z = torch.empty(n, dtype=dtype)
            for params in values:
                for k in range(3):
                    label = f"act {name} {k} {dtype}"
                    act.act(z, z, k, IDS[name], params)
                label = f"act_backward {name} {dtype}"
                act.act_backward(z, z, z, 1, IDS[name], params)
    for layout, (shape, dim) in LAYOUTS.items():
        for n in BATCHES:
            if n * math.prod(shape) >= 2**29:  # more elements take other kernels, with int64
                continue
            z = torch.empty(n, *shape, dtype=dtype)
            # A scale of 1 and multiples of 16 too, as of a penalty with a schedule.
            for scale in (1.0, 16.0, 1 / n):
                u, v = (torch.empty(z.shape[d], dtype=wide) for d in (0, dim))
                rest = scale, IDS["leaky_relu"], (scale,)
                for per_sample in (False, True):
                    label = f"act_stats {layout} {per_sample} {dtype}"
                    act_stats.act_stats(z, v if per_sample else u, dim, per_sample, *rest)
                for statistic in (NONE, CHANNEL, SAMPLE, BIAS):
                    label = f"act_stats_backward {layout} {statistic} {dtype}"
                    act_stats.act_stats_backward(z, z, u, v, dim, statistic, *rest)
    for m in (2, 10, 1000, 1024, 50_000):
        for n in (b for b in BATCHES if b <= 1000):
            label = f"softmax {m} {dtype}"
            z = torch.empty(n, m, dtype=dtype)
            softmax_residual.softmax_residual(z, torch.empty(n, dtype=torch.int64))
            label = f"softmax_backward {m} {dtype}"
            softmax_residual.softmax_residual_backward(z, z)
            label = f"norm {m} {dtype}"
            stats, weight = torch.empty(n, dtype=wide), torch.empty(m, dtype=dtype)
            for k in (1, 2, 16):
                t = torch.empty(k, n, m, dtype=dtype)
                norm.norm_push(t, t, z, stats, stats, weight, m, True, True)

# Layers of other widths, too, share their kernels if the tile is as wide.
for c in (128, 256, 512, 784, 1024, 4096):
    label = "widths"
    act_stats.act_stats(torch.empty(64, c), None, 1, False, 1.0, IDS["relu"], ())
for label, found in keys.items():
    print(len(found), label)
"""


@needs_triton
def test_few_variants():
    """A batch of another size, or another value of a parameter, does not compile a kernel."""
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", VARIANTS],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    if "cannot import name" in out.stderr:
        pytest.skip(f"another Triton: {out.stderr.splitlines()[-1]}")
    assert out.returncode == 0, out.stderr[-4000:]
    found = {}
    for line in out.stdout.splitlines():
        count, _, label = line.partition(" ")
        found[label] = int(count)
    # Of act: one for sizes that are multiples of 16, one for others. Of act_stats: one for strips
    # that are split, one for smaller batches.
    assert {label: n for label, n in found.items() if n > 2} == {}
    assert {n for label, n in found.items() if label.startswith(("softmax", "norm", "widths"))} == {
        1
    }
    assert len(found) > 200
