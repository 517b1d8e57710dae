"""``fastjac check``: every op × implementation × dtype × device against the float64 reference.

An op brings its examples (`fastjac.ops.dispatch.Op.examples`): inputs in float64 and a call. The
inputs are rounded to the dtype under test, and the truth is ``impl="reference"`` in float64 on
those rounded inputs, so that only the op's own error is measured.

The bound. An implementation computes in the compute dtype (float32 for the 16-bit types, else the
dtype itself) and rounds once to the storage dtype. The longest expression of the activation table
is a product of a dozen factors, some of them differences like ``1 - 6 s (1-s)`` that lose two bits;
16 units in the last place of the compute dtype bounds it in the relative L2 norm (twice that in
float64, where the truth is no better than what it is compared with). So

    error ≤ 16 eps(compute) + ½ eps(storage, if 16-bit),   or eager torch's own error if larger.

The Triton interpreter truncates to bfloat16 where a GPU rounds to nearest: one eps there, not half.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastjac.ops.dispatch import FLOAT_DTYPES, OPS, why_not
from fastjac.ops.native import triton_interpreted

Outputs = dict[str, Tensor]


def tolerance(impl: str, dtype: torch.dtype) -> float:
    """Bound on the relative L2 error of an implementation; the argument is in the module's text."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    bound = (32 if dtype == torch.float64 else 16) * torch.finfo(compute).eps
    if dtype != compute:
        truncates = impl == "triton" and triton_interpreted()
        bound += (1.0 if truncates else 0.5) * torch.finfo(dtype).eps
    return bound


def relative_error(output: Tensor, truth: Tensor) -> float:
    """‖output - truth‖ / ‖truth‖; absolute where the truth is zero; inf if NaN where it is not."""
    output, truth = output.double().cpu(), truth.double().cpu()
    if truth.numel() == 0:
        return 0.0
    error = torch.linalg.vector_norm(output - truth)
    norm = torch.linalg.vector_norm(truth)
    value = (error / norm if norm > 0 else error).item()
    return value if value == value else float("inf")


def run(
    op: Iterable[str] | None = None,
    impl: Iterable[str] | None = None,
    dtype: Iterable[str] | None = None,
    device: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Compares what can run here; what can't is listed with its reason.

    Args:
        op, impl, dtype, device: names to restrict the check to; None means all.

    Returns:
        Records with the keys ``op, example, impl, dtype, device, error, worst_output, eager_error,
        tolerance, ok, why_not``. ``ok`` is None for a combination that can't run here.

    Raises:
        ValueError: a name that is none of the known ones.
    """
    dtypes = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    impls = list(dict.fromkeys(i for o in OPS.values() for i in o.implementations))
    chosen_ops = _chosen("op", op, list(OPS))
    chosen_impls = _chosen("impl", impl, impls)
    chosen_dtypes = _chosen("dtype", dtype, list(dtypes))
    chosen_devices = _chosen("device", device, devices)
    records: list[dict[str, Any]] = []
    for op_name in chosen_ops:
        for device_name in chosen_devices:
            for dtype_name in chosen_dtypes:
                names = [i for i in OPS[op_name].implementations if i in chosen_impls]
                records += _compare(op_name, names, dtypes[dtype_name], device_name)
    return records


def _chosen(what: str, given: Iterable[str] | None, known: list[str]) -> list[str]:
    names = known if not given else list(given)
    for name in names:
        if name not in known:
            raise ValueError(f"{what}={name!r} is not known here; choose from {', '.join(known)}")
    return names


def _compare(
    op: str, impls: list[str], dtype: torch.dtype, device: str
) -> Iterable[dict[str, Any]]:
    able = []
    for impl in impls:
        reason = why_not(impl, device, dtype)
        if reason is None:
            able.append(impl)
        else:
            yield _record(op, "all", impl, dtype, device, why_not=reason)
    for example in OPS[op].examples():
        inputs = example.to(device, dtype)
        wide = {k: v.double() for k, v in inputs.items()}
        truth = example.call(wide, "reference")
        eager = _errors(example.call(inputs, "reference"), truth)
        for impl in able:
            errors = eager if impl == "reference" else _errors(example.call(inputs, impl), truth)
            bounds = {k: max(tolerance(impl, dtype), eager[k]) for k in errors}
            worst = max(errors, key=lambda k: errors[k] / bounds[k])
            yield _record(
                op, example.label, impl, dtype, device,
                error=errors[worst], worst_output=worst, eager_error=eager[worst],
                tolerance=bounds[worst],
                ok=all(errors[k] <= bounds[k] for k in errors),
            )  # fmt: skip


def _errors(outputs: Outputs, truth: Outputs) -> dict[str, float]:
    return {name: relative_error(outputs[name], truth[name]) for name in truth}


def _record(
    op: str, example: str, impl: str, dtype: torch.dtype, device: str, **rest: Any
) -> dict[str, Any]:
    blank = {"error": None, "worst_output": None, "eager_error": None, "tolerance": None,
             "ok": None, "why_not": None}  # fmt: skip
    names = {"op": op, "example": example, "impl": impl,
             "dtype": str(dtype).removeprefix("torch."), "device": device}  # fmt: skip
    return {**names, **blank, **rest}


def render(records: list[dict[str, Any]], console: Any = None) -> None:
    """Prints one line an (op, implementation, dtype, device), and every miss in full."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    table = Table("op", "impl", "device", "dtype", "checked", "worst error", "bound", "",
                  title="Against the float64 reference", title_justify="left")  # fmt: skip
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in records:
        if r["ok"] is not None:
            groups.setdefault((r["op"], r["impl"], r["device"], r["dtype"]), []).append(r)
    for key, group in groups.items():
        worst = max(group, key=lambda r: r["error"] / r["tolerance"])
        verdict = "[green]ok[/green]" if all(r["ok"] for r in group) else "[red]MISS[/red]"
        table.add_row(*key, str(len(group)), f"{worst['error']:.1e}", f"{worst['tolerance']:.1e}",
                      verdict)  # fmt: skip
    console.print(table)
    for reason in dict.fromkeys(f"{r['impl']}: {r['why_not']}" for r in records if r["why_not"]):
        console.print(f"not run here: {reason}", highlight=False)
    for r in records:
        if r["ok"] is False:
            console.print(
                f"[red]MISS[/red] {r['op']} {r['example']} {r['worst_output']}: impl {r['impl']},"
                f" {r['dtype']} on {r['device']}: error {r['error']:.2e} > {r['tolerance']:.2e}"
            )
    checked = [r for r in records if r["ok"] is not None]
    missed = [r for r in checked if not r["ok"]]
    console.print(f"{len(checked) - len(missed)} passed, {len(missed)} failed", highlight=False)
