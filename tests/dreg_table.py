"""The page that shows what DREG counts: ``python tests/dreg_table.py docs/LAYERS.md`` writes it."""

from __future__ import annotations

import sys
from pathlib import Path

from dreg_cases import ACTS, LAYERS, NORMS, function_of_norm, generic, taken

HEAD = """# What DREG counts

Which layers the layer-wise penalties count, in a model that computes layer, norm and activation one
after the other. This page is written by `python tests/dreg_table.py docs/LAYERS.md` from a table;
`tests/test_dreg_sweep.py` runs the combinations of its rows, attached, called and compiled, with
the norm in training and in eval mode and with each option, and compares output, value and all
gradients with the written-out formula in float64.

✓ means that the layer counts. A number is the reason with which the layer stands in
`layers_left_out`: no value contains a layer whose weight or slope is not known. If no layer is
left, the call raises. Under `torch.compile` some rows raise, with the message given, and the
reasons do not name the function that took the output.

A function of PyTorch counts as the module of the same name does. Between layer, norm and activation
the output may go through views that keep samples and units apart, copies, factors that are numbers,
and sums with a number or with a parameter that has one element for each unit.
"""


def page() -> str:
    notes: list[str] = []
    parts = [HEAD]
    for title, cases in (("layer", LAYERS), ("norm", NORMS), ("activation", ACTS)):
        parts.append(f"| {title} | eager | compiled |\n| --- | --- | --- |")
        for case in cases:
            cells = [
                _cell(reason, notes)
                for reason in (case.left_out, case.compiled or generic(case.left_out))
            ]
            if title == "norm" and case.left_out is None and case.name not in ("none", "2 z"):
                other = taken(function_of_norm(case.name))
                layer = case.name.startswith("LayerNorm")
                where = "after a convolution" if layer else "on [N, T, C]"
                reasons = (other, generic(other))
                cells = [
                    f"{c}, {where} {_cell(r, notes)}" for c, r in zip(cells, reasons, strict=True)
                ]
            parts.append(f"| {case.name} | {cells[0]} | {cells[1]} |")
        parts.append("")
    parts += [f"{i}. “{note}”" for i, note in enumerate(notes, 1)]
    return "\n".join(parts) + "\n"


def _cell(reason: str | None, notes: list[str]) -> str:
    if reason is None:
        return "✓"
    if reason not in notes:
        notes.append(reason)
    return f"[{notes.index(reason) + 1}]"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
