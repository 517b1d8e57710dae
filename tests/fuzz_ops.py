"""Calls the raw ops with drawn arguments; test_fuzz_ops.py runs this program.

    python tests/fuzz_ops.py --cases 500 --seed 0
    python tests/fuzz_ops.py --seed 0 --first 123 --cases 1      # case 123 again

It runs in a process of its own because a fault may end the process: the call is written to
``--log`` before it is made. Each call must return tensors with valid memory and must not change
arguments that its schema does not mark as written to, or it must raise an error that a caller can
understand. The program prints one line per fault, and its exit code is then 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import re
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_cases import described, draw_call, fault_of, recorded_calls, tensors_in
from torch import Tensor

MOST_FAULTS = 20


def overloads(namespace: str, which: str) -> dict[str, Any]:
    """Every overload of every op of a namespace that matches `which`, by qualified name."""
    found = {}
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        prefix, _, rest = name.partition("::")
        op, _, overload = rest.partition(".")
        if prefix == namespace and re.search(which, op):
            found[name] = getattr(getattr(getattr(torch.ops, prefix), op), overload or "default")
    return found


def plain(t: Any) -> bool:
    """Whether the memory of a tensor can be read."""
    return (
        isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"
        and not t.is_quantized and not t.is_nested and t.numel() < 2**20
    )  # fmt: skip


def read_only(schema: Any, args: list[Any]) -> list[Tensor]:
    """The tensors that a call must not write to and that share no memory with those it may."""
    written, kept = set(), []
    for declared, value in zip(schema.arguments, args, strict=True):
        if declared.alias_info is not None and declared.alias_info.is_write:
            written |= {t.untyped_storage().data_ptr() for t in tensors_in(value) if plain(t)}
        else:
            kept += [t for t in tensors_in(value) if plain(t)]
    return [t for t in kept if t.untyped_storage().data_ptr() not in written]


def memory(t: Tensor) -> Tensor:
    """A view of the bytes of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def call(op: Any, args: list[Any], rng: Random) -> str | None:
    """Runs one case and returns the fault, or None. Exceptions of the op are not caught."""
    untouched = read_only(op._schema, args)
    before = [memory(t).clone() for t in untouched]
    mode = rng.choice((torch.enable_grad, torch.enable_grad, torch.no_grad, torch.inference_mode))
    with mode():
        out = op(*args)
        results = tensors_in(out)
        differentiable = [t for t in results if t.requires_grad and plain(t)]
        inputs = [t for t in tensors_in(args) if t.requires_grad]
        if differentiable and inputs:
            torch.autograd.grad([t.sum() for t in differentiable], inputs, allow_unused=True)
    for t, was in zip(untouched, before, strict=True):
        if not torch.equal(memory(t), was):
            return f"wrote to an argument {described(t)} that its schema marks as read only"
    devices = {t.device for t in tensors_in(args)}
    for t in results:
        if t.device not in devices:
            return f"returned a tensor on {t.device}"
        if len(devices) > 1:
            return f"took tensors on {', '.join(sorted(map(str, devices)))} for one computation"
        if plain(t) and t.untyped_storage().nbytes() < t.numel() * t.element_size():
            return f"returned {described(t)} with {t.untyped_storage().nbytes()} bytes of memory"
    return None


def within(rows: int, schema: Any, args: list[Any]) -> list[Any]:
    """For a library with only the first rows of the activation table: most ids are below `rows`."""
    return [
        value % rows if declared.name == "fn" and value < 100 else value
        for declared, value in zip(schema.arguments, args, strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--namespace", default="fastjac")
    parser.add_argument("--library", help="shared library that registers its kernels")
    parser.add_argument("--ops", default="", help="regular expression that their names match")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--rows", type=int, default=0, help="of the library's activation table")
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # quantized and nested tensors warn
    torch.set_num_threads(2)
    torch.manual_seed(0)
    # Allocations of huge sizes must fail at once. A sanitizer itself maps terabytes.
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, resource.RLIM_INFINITY))
    if options.library:
        import host

        host.load(Path(options.library))
    right_calls = recorded_calls() if options.namespace.startswith("fastjac") else {}
    ops = overloads(options.namespace, options.ops)
    outcomes: Counter[str] = Counter()
    faults = 0
    with options.log.open("w") as log:
        for case in range(options.first, options.first + options.cases):
            rng = Random(f"{options.seed}:{case}")
            name = rng.choice(list(ops))
            op = ops[name]
            stem = name.partition("::")[2].partition(".")[0].removesuffix("_triton")
            args = draw_call(rng, op._schema, right_calls.get(stem, ()))
            if options.rows:
                args = within(options.rows, op._schema, args)
            line = f"seed {options.seed} case {case}: {name}({', '.join(map(described, args))})"
            log.seek(0)
            log.truncate()
            log.write(line)
            log.flush()
            try:
                fault = call(op, args, rng)
                outcomes[f"{name} returned"] += 1
            except Exception as error:
                fault = fault_of(error)
                outcomes[f"{name} raised"] += 1
            if fault is not None:
                print(f"{line}\n    {fault}", flush=True)
                faults += 1
                if faults == MOST_FAULTS:
                    break
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    print(f"seed {options.seed}: {outcomes.total()} cases, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
