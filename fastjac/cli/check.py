"""``fastjac check``: every op × implementation × dtype × device against the float64 reference.

The inputs of each example of an op (`fastjac.ops.dispatch.Op.examples`) are rounded to the dtype
under test. The truth is ``impl="reference"`` in float64 on the rounded inputs, so only the error of
the op itself is measured.

The bound: an implementation computes in the compute dtype (float32 for the 16-bit types, else the
dtype itself) and rounds once to the storage dtype. The longest expression of the activation table
is a product of a dozen factors, and some of them are differences like ``1 - 6 s (1-s)``, which lose
two bits. 16 units in the last place of the compute dtype bound it in the relative L2 norm; in
float64 twice that, because the truth is rounded in the same way. So

    error ≤ 16 eps(compute) + ½ eps(storage, if 16-bit),   or the error of eager torch if larger.

The Triton interpreter truncates to bfloat16 where a GPU rounds to nearest, so its last term is one
eps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastjac.ops.dispatch import FLOAT_DTYPES, OPS, why_not
from fastjac.ops.native import triton_interpreted

Outputs = dict[str, Tensor]


def tolerance(impl: str, dtype: torch.dtype) -> float:
    """The bound on the relative L2 error of an implementation; the module explains it."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    bound = (32 if dtype == torch.float64 else 16) * torch.finfo(compute).eps
    if dtype != compute:
        truncates = impl == "triton" and triton_interpreted()
        bound += (1.0 if truncates else 0.5) * torch.finfo(dtype).eps
    return bound


def relative_error(output: Tensor, truth: Tensor) -> float:
    """‖output - truth‖ / ‖truth‖; absolute if the truth is zero; NaN becomes inf."""
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
    example: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Compare what can run here; what cannot is listed with its reason.

    Args:
        op, impl, dtype, device, example: Names to restrict the check to. The default is all. An
            example is named by its label, ``"gelu"`` or ``"gelu [N, C]"``.

    Returns:
        Records with the keys ``op, example, impl, dtype, device, error, worst_output, eager_error,
        tolerance, ok, why_not``. ``ok`` is None for a combination that cannot run here.

    Raises:
        ValueError: A name is not known.
    """
    dtypes = {str(d).removeprefix("torch."): d for d in FLOAT_DTYPES}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    impls = list(dict.fromkeys(i for o in OPS.values() for i in o.implementations))
    chosen_impls = _chosen("impl", impl, impls)
    labels = [e.label for name in _chosen("op", op, list(OPS)) for e in OPS[name].examples()]
    chosen_labels = _chosen("example", example, labels)
    return [
        {"op": op_name, "dtype": dtype_name, "device": device_name, **record}
        for op_name in _chosen("op", op, list(OPS))
        for device_name in _chosen("device", device, devices)
        for dtype_name in _chosen("dtype", dtype, list(dtypes))
        for record in _compare(
            op_name, chosen_impls, dtypes[dtype_name], device_name, chosen_labels
        )
    ]


def _chosen(what: str, given: Iterable[str] | None, known: list[str]) -> list[str]:
    names = list(given or known)
    for name in names:
        if name not in known:
            raise ValueError(f"{what}={name!r} is not known here; choose from {', '.join(known)}.")
    return names


def _compare(
    op: str, impls: list[str], dtype: torch.dtype, device: str, labels: list[str]
) -> Iterator[dict[str, Any]]:
    blank = dict.fromkeys(("error", "worst_output", "eager_error", "tolerance", "ok", "why_not"))
    able, has = [], OPS[op].implementations
    for impl in impls:
        named = f"{op} has {', '.join(has)}"
        reason = why_not(impl, device, dtype) if impl in has else named
        if reason is None:
            able.append(impl)
        else:
            yield {**blank, "example": "all", "impl": impl, "why_not": reason}
    for example in OPS[op].examples():
        if example.label not in labels:
            continue
        inputs = example.to(device, dtype)
        truth = example.call({k: v.double() for k, v in inputs.items()}, "reference")
        eager = _errors(example.call(inputs, "reference"), truth)
        for impl in able:
            errors = eager if impl == "reference" else _errors(example.call(inputs, impl), truth)
            bounds = {k: max(tolerance(impl, dtype), eager[k]) for k in errors}
            worst = max(errors, key=lambda k: errors[k] / bounds[k])
            yield blank | {
                **{"example": example.label, "impl": impl, "worst_output": worst},
                **{"error": errors[worst], "eager_error": eager[worst]},
                **{"tolerance": bounds[worst], "ok": all(errors[k] <= bounds[k] for k in errors)},
            }


def _errors(outputs: Outputs, truth: Outputs) -> dict[str, float]:
    return {name: relative_error(outputs[name], truth[name]) for name in truth}


def render(records: list[dict[str, Any]], console: Any = None) -> None:
    """Print one line for each (op, implementation, device, dtype), and every miss in full."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    headings = ("op", "impl", "device", "dtype", "checked", "worst error", "bound", "")
    table = Table(*headings, title="Against the float64 reference", title_justify="left")
    checked = [r for r in records if r["ok"] is not None]
    missed = [r for r in checked if not r["ok"]]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in checked:
        groups.setdefault((r["op"], r["impl"], r["device"], r["dtype"]), []).append(r)
    for key, group in groups.items():
        worst = max(group, key=lambda r: r["error"] / r["tolerance"])
        verdict = "[green]ok[/green]" if all(r["ok"] for r in group) else "[red]MISS[/red]"
        numbers = (f"{worst['error']:.1e}", f"{worst['tolerance']:.1e}")
        table.add_row(*key, str(len(group)), *numbers, verdict)
    console.print(table)
    for reason in dict.fromkeys(f"{r['impl']}: {r['why_not']}" for r in records if r["why_not"]):
        console.print(f"not run here: {reason}", highlight=False)
    for r in missed:
        console.print(
            f"[red]MISS[/red] {r['op']} {r['example']} {r['worst_output']}: impl {r['impl']},"
            f" {r['dtype']} on {r['device']}: error {r['error']:.2e} > {r['tolerance']:.2e}"
        )
    console.print(f"{len(checked) - len(missed)} passed, {len(missed)} failed", highlight=False)
