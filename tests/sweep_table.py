"""What the cells of the sweep raise, and the page that shows them.

``python tests/sweep_table.py docs/LIMITS.md`` writes the page; `test_sweep.py` checks the cells and
that the page is up to date.
"""

from __future__ import annotations

import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from sweep_cases import Case, cases
from sweep_truth import ENGINES, KINDS


class Raises(NamedTuple):
    """Cells that raise an error, or with an empty message are exact."""

    cases: tuple[str, ...]  # names or patterns
    cells: str  # a pattern of "engine penalty"
    message: str  # a part of the error message
    why: str

    def holds(self, name: str, engine: str, kind: str) -> bool:
        return fnmatchcase(f"{engine} {kind}", self.cells) and any(
            name == pattern or fnmatchcase(name, pattern) for pattern in self.cases
        )


def missing(message: str, *names: str) -> Raises:
    return Raises(names, "*", message, "torch has no second derivative")


def unread(message: str, text: str) -> Raises:
    """What the chain engine does not take; the default engine takes autograd."""
    names = tuple(line.strip() for line in text.strip().splitlines())
    return Raises(names, "chain *", message, '`"auto"` takes autograd')


def jvp_of_norm(*names: str) -> list[Raises]:
    why = 'plain PyTorch is wrong, `"auto"` takes the chain engine'
    message = "the gradient of a JVP through"
    return [Raises(names, f"{form} TangentProp*", message, why) for form in ("autograd", "graph")]


# A dropout above zero, or three dimensions, makes torch take another attention.
FLASH = (
    "MultiheadAttention", "TransformerEncoderLayer", "TransformerEncoderLayer, eval",
    "TransformerDecoderLayer", "TransformerDecoderLayer, eval",
    "TransformerEncoderLayer of gelu, norm_first, eval",  # in training it has dropout
    "F.scaled_dot_product_attention(a[[]:, None], a*", "grouped_attention*",
    "F.scaled_dot_product_attention(a[[]:, None], [*]*",
)  # fmt: skip

# The first row that holds counts.
RAISES: list[Raises] = [
    Raises(("*dropout_p*",), "*", "", ""),
    Raises(
        FLASH, "graph *", "the second derivative of ScaledDotProductFlashAttentionForCpu",
        "torch has none, the model form is exact",
    ),
    Raises(
        ("gradient_of_layer_norm", "gradient_of_batch_norm"),
        "*", "the model itself computes a gradient through", "plain PyTorch is wrong",
    ),
    *jvp_of_norm("BatchNorm*track_running_stats=False*"),
    Raises(("*BatchNorm*, eval", "InstanceNorm*, eval"), "*", "", ""),
    *jvp_of_norm(
        "*LayerNorm*", "F.layer_norm*", "two_branches", "Transformer*", "*BatchNorm*",
        "F.batch_norm*", "InstanceNorm*", "F.instance_norm*",
    ),
    *(
        Raises(("Hardsigmoid*",), f"{form} *", "the second derivative of Hardsigmoid",
               "torch has none, the chain engine is exact")
        for form in ("autograd", "graph")
    ),
    missing("_cdist_backward' is not implemented", "torch.cdist*"),
    missing("multi_margin_loss_backward is not implemented", "F.multi_margin_loss*"),
    missing("_embedding_bag_backward' is not implemented", "F.embedding_bag*"),
    unread("writes to a part of a tensor in place", "in_place_of_view"),
    unread("computes with complex numbers", """
        *torch.fft*
        *torch.stft*
        *torch.complex(*
        *torch.polar*
        *as_complex*
        (a + 0j)*
    """),
    unread("one of its inputs is computed from another one", """
        torch.logaddexp*
        a.clamp(min=a.flip(1))
        torch.maximum*
        torch.minimum*
        torch.fmax*
        torch.addcmul*
        torch.addcdiv*
        torch.lerp(a, a.flip(1), a.sin())
        a.scatter_reduce*
        torch.atan2*
        torch.hypot*
        torch.dist(*
        F.mse_loss*
        F.smooth_l1_loss*
        F.huber_loss*
        F.binary_cross_entropy_with_logits*
        torch.baddbmm(a, a @ a.mT, a, beta=0.5)
        torch.addbmm*
        F.grid_sample(a, a*
        own_gradient
        Bilinear twice
    """),
    unread("the model itself computes a gradient", "gradient_of_batch_norm_eval"),
    unread("has no rule. Use", """
        torch.copysign*
        torch.linalg.solve*
    """),
]  # fmt: skip

FAULTS: list[Raises] = [
    Raises(("a.logcumsumexp(1)",), "* TangentProp*", "", "the value is NaN, as in plain PyTorch"),
]
"""Cells that are wrong today. The test fails if one is mended and still in the list."""


def state_of(case: Case, engine: str, kind: str) -> Raises | None:
    """What a cell raises, or None if it is exact."""
    for row in RAISES:
        if row.holds(case.name, engine, kind):
            return row if row.message else None
    return None


def is_fault(case: Case, engine: str, kind: str) -> bool:
    return any(row.holds(case.name, engine, kind) for row in FAULTS)


# ---- the page

HEAD = """# Operations without an exact gradient

Every input-Jacobian penalty runs on the modules of `torch.nn` and on common functions, in training
and eval, by each engine and in the graph form, with one and several cotangents: {cells} cells, for
three sizes, of which some are equal. A cell is exact, its value and its gradient equal finite
differences in float64, or it raises an error and is in this table. The page is written by
`python tests/sweep_table.py docs/LIMITS.md`, and `tests/test_sweep.py` checks every cell (torch
2.13, on a CPU).

A number means that the call raises an error, whose message is given below the table. `on 6×5` is
the shape of a sample of what the module is given, and `a` the argument of a function.
"""


def page() -> str:
    everything, notes = cases(), []
    rows: dict[tuple[str, ...], list[str]] = {}
    for case in everything:
        texts = []
        for engine in ENGINES:
            states = {kind: state_of(case, engine, kind) for kind in KINDS}
            texts.append(cell(states, notes))
        if set(texts) != {"✓"}:
            rows.setdefault(tuple(texts), []).append(f"`{case.name}`")
    parts = [HEAD.format(cells=f"{len(everything) * len(ENGINES) * len(KINDS):,}")]
    parts.append(row("", *ENGINES))
    parts.append("|" + " --- |" * (len(ENGINES) + 1))
    parts += [row("<br>".join(names), *texts) for texts, names in rows.items()]
    parts.append("")
    parts += [f"{i}. “{message}” ({why})" for i, (message, why) in enumerate(notes, 1)]
    if FAULTS:
        parts.append("\nKnown faults:\n")
        parts += [f"- `{'`, `'.join(f.cases)}`, {f.cells}: {f.why}" for f in FAULTS]
    return "\n".join(parts) + "\n"


def cell(states: dict[str, Raises | None], notes: list[tuple[str, str]]) -> str:
    """What an engine does, with the penalties if they differ."""
    kinds: dict[str, list[str]] = {}
    for kind, state in states.items():
        text = "✓"
        if state is not None:
            note = state.message, state.why
            if note not in notes:
                notes.append(note)
            text = f"[{notes.index(note) + 1}]"
        kinds.setdefault(text, []).append(kind)
    if len(kinds) == 1:
        return next(iter(kinds))
    return "; ".join(f"{', '.join(of)}: {text}" for text, of in kinds.items() if text != "✓")


def row(*cells: str) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
